import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedraclora import plugins
from fedraclora.data import Dataset, Examples
from fedraclora.models import cnn, initial_model, mlp, softmax_regression

MODELS = [
    name for name in plugins.names("fedraclora.models") if name != "transformer"
]  # takes tokens: test_transformer.py
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def images(height=8, width=8):
    examples = Examples(torch.zeros(6, 1, height, width), torch.zeros(6, dtype=torch.int64))
    return Dataset("made_up", examples, examples, "classification", 7)


def build(name, seed=0, **settings):
    module = plugins.find("fedraclora.models", name)
    return initial_model(
        module, module.Config(**settings), input_shape=images().input_shape, num_outputs=images().num_outputs, seed=seed
    )


def bits(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_model_maps_a_batch_to_one_logit_an_output(name):
    assert build(name)(torch.rand(5, 1, 8, 8)).shape == (5, 7)


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_bits(name):
    assert bits(build(name, seed=2**63 - 1)) == bits(build(name, seed=2**63 - 1))
    assert bits(build(name, seed=1)) != bits(build(name, seed=2))


@pytest.mark.parametrize("name", MODELS)
def test_building_leaves_the_global_generator_as_it_was(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(name)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", MODELS)
def test_model_has_no_state_that_depends_on_a_clients_batches(name):
    model = build(name)
    assert not any(isinstance(module, BATCH_NORMS) for module in model.modules())
    assert list(model.buffers()) == []


@pytest.mark.parametrize("name", MODELS)
def test_an_output_depends_on_its_own_input_only(name):
    model, inputs = build(name).double(), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(inputs)[2], model(inputs[2:3])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_trained_by_the_loss(name):
    model = build(name)
    model(torch.rand(5, 1, 8, 8)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())


def test_layers_have_readable_names():
    assert list(shapes(build("mlp", hidden=[5, 6]))) == [
        f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")
    ]
    assert shapes(build("softmax_regression")) == {"fc1.weight": (7, 64), "fc1.bias": (7,)}
    parts = ["conv1", "norm1", "conv2", "norm2", "fc1", "fc2"]
    assert list(shapes(build("cnn"))) == [f"{name}.{part}" for name in parts for part in ("weight", "bias")]


def test_mlp_equals_its_formula():
    model = build("mlp", hidden=[9]).double()
    inputs = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    w1, b1, w2, b2 = (value.detach().numpy() for value in model.parameters())
    expected = np.maximum(inputs.reshape(4, 64).numpy() @ w1.T + b1, 0) @ w2.T + b2
    np.testing.assert_allclose(model(inputs).detach().numpy(), expected, atol=1e-12)


def test_mlp_without_hidden_layers_is_softmax_regression():
    assert bits(build("mlp", hidden=[])) == bits(build("softmax_regression"))


@given(hidden=st.lists(st.integers(1, 9), max_size=4), bias=st.booleans())
def test_mlp_has_the_parameters_that_its_widths_say(hidden, bias):
    model = build("mlp", hidden=hidden, bias=bias)
    widths = [64, *hidden, 7]
    expected = sum((widths[i] + bias) * widths[i + 1] for i in range(len(widths) - 1))
    assert sum(value.numel() for value in model.parameters()) == expected


@pytest.mark.parametrize("module", [mlp, softmax_regression])
def test_without_bias_zero_maps_to_zero(module):
    model = module.build(module.Config(bias=False), input_shape=(3,), num_outputs=2)
    assert torch.equal(model(torch.zeros(4, 3)), torch.zeros(4, 2))


def test_mlp_refuses_widths_below_one():
    with pytest.raises(ValueError, match=r"hidden=\[5, 0\]"):
        build("mlp", hidden=[5, 0])


@pytest.mark.parametrize("shape", [(28, 28), (9, 13), (1, 28, 28), (3, 8, 8)])
def test_cnn_takes_images_with_and_without_channels(shape):
    model = cnn.build(cnn.Config(), input_shape=shape, num_outputs=10)
    assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_cnn_of_mnist_has_the_parameters_of_its_layers():
    model = cnn.build(cnn.Config(), input_shape=(1, 28, 28), num_outputs=10)
    convolutions = (1 * 9 + 1) * 16 + (16 * 9 + 1) * 32
    linear = (32 * 7 * 7 + 1) * 64 + (64 + 1) * 10
    assert sum(value.numel() for value in model.parameters()) == convolutions + 2 * (16 + 32) + linear


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"groups": 3}, (1, 8, 8), r"groups=3 has to divide .* \[16, 32\]"),
        ({"channels": []}, (1, 8, 8), r"channels=\[\]"),
        ({"channels": [0]}, (1, 8, 8), r"channels=\[0\]"),
        ({"groups": 0}, (1, 8, 8), "groups=0"),
        ({"hidden": 0}, (1, 8, 8), "hidden=0"),
        ({}, (64,), r"shape \[64\].*model=mlp"),
        ({}, (1, 1, 8, 8), "model=cnn takes images"),
        ({"channels": [4, 4, 4, 4]}, (1, 8, 8), "at least 16 pixels a side; found 8 x 8"),
    ],
)
def test_cnn_refuses_settings_that_do_not_fit(settings, shape, message):
    with pytest.raises(ValueError, match=message):
        cnn.build(cnn.Config(**settings), input_shape=shape, num_outputs=10)


def test_a_plugin_that_builds_no_module_is_refused():
    module = types.ModuleType("strange")
    module.build = lambda config, *, input_shape, num_outputs: "model"
    with pytest.raises(TypeError, match=r"strange.build returned str"):
        initial_model(module, None, input_shape=images().input_shape, num_outputs=images().num_outputs, seed=0)


def test_dropout_changes_neither_names_nor_weights_and_lies_after_each_hidden_layer():
    plain, dropping = build("mlp", hidden=[5, 6]), build("mlp", hidden=[5, 6], dropout=0.25)
    assert bits(plain) == bits(dropping)
    assert not any(isinstance(module, nn.Dropout) for module in plain.modules())
    kinds = [type(module) for module in dropping]
    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    assert kinds == [nn.Flatten, *hidden, *hidden, nn.Linear]
    assert {module.p for module in dropping if isinstance(module, nn.Dropout)} == {0.25}
    inputs = torch.rand(5, 1, 8, 8)
    assert torch.equal(dropping.eval()(inputs), plain(inputs))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(ValueError, match=r"model\.dropout=.* must lie in \[0, 1\)"):
        build("mlp", dropout=dropout)
