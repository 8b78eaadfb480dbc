"""A model of shapes has the names, shapes and targets of the model that it describes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedraclora.shapes import expand, module_of_shapes
from fedraclora.targets import find_targets

NAMES = st.lists(st.sampled_from(["fc", "query", "dense", "proj", "head"]), min_size=1, max_size=4, unique=True)


def described(model: nn.Module) -> dict:
    """Return a model as its shapes."""
    layers, tensors = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers[name] = {"out": module.out_features, "in": module.in_features, "bias": module.bias is not None}
        elif isinstance(module, nn.Conv2d):
            layers[name] = {
                "out": module.out_channels, "in": module.in_channels, "kernel": list(module.kernel_size),
                "bias": module.bias is not None,
            }  # fmt: skip
        else:
            tensors |= {f"{name}.{own}": list(t.shape) for own, t in module.named_parameters(recurse=False)}
    return {"layers": layers, "tensors": tensors}


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Draw a small tree of layers."""
    model = nn.Module()
    for block in draw(NAMES):
        inner = nn.Module()
        for name in draw(NAMES):
            kind = draw(st.sampled_from(["linear", "conv", "norm"]))
            out, in_, bias = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans())
            layer = nn.LayerNorm(out) if kind == "norm" else None
            if kind == "linear":
                layer = nn.Linear(in_, out, bias=bias)
            elif kind == "conv":
                layer = nn.Conv2d(in_, out, draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), bias=bias)
            inner.add_module(name, layer)
        model.add_module(block, inner)
    model.add_module("last", nn.Linear(2, 3))
    return model


@settings(max_examples=60, deadline=None)
@given(models())
def test_a_described_model_has_the_same_names_shapes_and_targets(model):
    shapes = module_of_shapes(described(model))
    found = {name: tuple(tensor.shape) for name, tensor in shapes.named_parameters()}
    assert found == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    # One is in the order of the description, which has no norms between its layers.
    assert find_targets(shapes, "all") == find_targets(model, "all")
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())


def test_a_single_number_is_a_tensor_too():
    model = module_of_shapes({"layers": {"fc": {"out": 1, "in": 2}}, "tensors": {"scale": []}, "targets": ["fc"]})
    assert model.state_dict()["scale"].shape == ()


@given(st.integers(0, 30), st.integers(0, 5), st.integers(0, 3))
def test_a_range_stands_for_each_of_its_numbers(first, more, other):
    names = expand(f"block.{{{first}..{first + more}}}.fc{{0..{other}}}")
    assert names == [f"block.{i}.fc{j}" for i in range(first, first + more + 1) for j in range(other + 1)]
    assert expand("plain") == ["plain"]


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({}, "needs 'layers'"),
        ({"layers": {"fc": {"out": 3}}}, "expected {out"),
        ({"layers": {"fc": {"out": 3, "in": 2, "stride": 1}}}, "expected {out"),
        ({"layers": {"fc": [3, 2]}}, "expected {out"),
        ({"layers": {"fc": {"out": 0, "in": 2}}}, "positive whole numbers"),
        ({"layers": {"fc": {"out": 1.5, "in": 2}}}, "positive whole numbers"),
        ({"layers": {"a.fc": {"out": 1, "in": 2}, "{0..1}a": {"out": 1, "in": 1}, "0a": {"out": 1, "in": 1}}}, "twice"),
        ({"layers": {"fc": {"out": 1, "in": 2}}, "tensors": {"fc.weight": [1, 2]}}, "twice"),
        ({"layers": {"fc": {"out": 1, "in": 2}}, "tensors": {"w": "12"}}, "positive whole numbers"),
        ({"layers": {"fc": {"out": 1, "in": 2}}, "tensors": {"fc.weight.x": [1]}}, "is a tensor"),
        ({"layers": {"block.{3..1}.fc": {"out": 1, "in": 2}}}, "a range that is none"),
        ({"layers": {"fc": {"out": 1, "in": 2}}, "tensor": {"w": [1]}}, "no 'tensor'; did you mean 'tensors'"),
        ({"layers": {"fc": {"out": 1, "in": 2, "kernel": [3]}}}, r"kernel \[3\]; expected \[height, width\]"),
        ({"layers": {"fc": {"out": 1, "in": 2, "bias": "false"}}}, "expected true or false"),
        ({"layers": {"fc": {"out": True, "in": 2}}}, "positive whole numbers"),
        ({"layers": {0: {"out": 1, "in": 2}}}, "the name 0, which is no text"),
        ({"layers": {"a..b": {"out": 1, "in": 2}}}, "'a..b' has an empty part"),
        ({"layers": ["fc"]}, "expected a mapping"),
        ({"layers": {"block.{a..b}.fc": {"out": 1, "in": 2}}}, "a range that is none"),
    ],
)
def test_what_describes_no_model_is_refused(description, reason):
    with pytest.raises(ValueError, match=reason):
        module_of_shapes(description)
