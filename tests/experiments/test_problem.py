"""From settings to a problem, with every mistake found before training."""

import numpy as np
import pytest
import torch
from torch import nn

from experiments.folders import check_same_run
from experiments.problem import load_dataset, prepare
from experiments.replay import replay
from experiments.run import run
from experiments.settings import ServerSettings
from fedraclora.data import Dataset, Examples
from fedraclora.files import write_tensors
from fedraclora.finished import load_run
from tests.helpers import Silent, plug_in, same_weights, settings, without_figures


def test_scale_is_alpha_over_rank_and_alpha_is_the_rank_by_default():
    adapter = prepare(settings(rank=4)).method.adapter
    assert adapter.scales == {"fc1": 1.0, "fc2": 1.0}
    adapter = prepare(settings(rank=4, alpha=6.0, ranks={"fc1": 3})).method.adapter
    assert adapter.ranks == {"fc1": 3, "fc2": 4}
    assert adapter.scales == {"fc1": 2.0, "fc2": 1.5}


def test_side_auto_takes_per_layer_what_costs_less_to_send():
    """fc1 maps 64 to 100 and fc2 100 to 10: the smaller of outputs (b) and inputs (a) is sent."""
    problem = prepare(settings(method=("rac_lora", {"side": "auto"}), model=("mlp", {"hidden": [100]})))
    assert problem.method.sides == {"fc1": "a", "fc2": "b"}


@pytest.mark.parametrize(("side", "rank"), [("b", 12), ("a", 10), ("auto", 10)])
def test_the_rank_of_a_layer_is_at_most_the_drawn_dimension(side, rank):
    """fc1 maps 64 to 12 and fc2 12 to 10: side b draws on the inputs, side a on the outputs."""
    prepare(settings(method=("rac_lora", {"side": side}), rank=rank))
    with pytest.raises(ValueError, match=f"rank {65 if side != 'a' else 13}"):
        prepare(settings(method=("rac_lora", {"side": side}), ranks={"fc1": 65 if side != "a" else 13}, rank=rank))


def test_the_same_seed_gives_the_same_problem_and_another_one_another():
    first, again, other = (prepare(settings(seed=seed)) for seed in (1, 1, 2))
    assert first.split.digest == again.split.digest != other.split.digest
    assert same_weights(first.model.state_dict(), again.model.state_dict())
    assert not same_weights(first.model.state_dict(), other.model.state_dict())


def test_the_method_does_not_enter_the_split_nor_the_weights():
    first, other = (prepare(settings(method=name)) for name in ("rac_lora", "full"))
    assert first.split.digest == other.split.digest
    assert same_weights(first.model.state_dict(), other.model.state_dict())


def test_validation_takes_from_the_training_examples_and_leaves_the_test_set_alone():
    test, validation = (load_dataset(settings(eval_split=name)) for name in ("test", "validation"))
    assert len(validation.train) + len(validation.test) == len(test.train)
    rows = {bytes(row.numpy()) for row in test.test.inputs}
    assert not rows & {bytes(row.numpy()) for row in validation.test.inputs} or len(rows) < len(test.test)


def test_dtype_and_lr_go_where_they_belong():
    problem = prepare(settings(dtype="float64", method="fed_it"))
    assert {tensor.dtype for tensor in problem.model.state_dict().values()} == {torch.float64}
    assert problem.dataset.train.inputs.dtype == torch.float64
    assert problem.dataset.train.targets.dtype == torch.int64
    assert problem.rounds.local.lr == problem.method.config.lr
    assert prepare(settings(lr=0.07)).rounds.local.lr == 0.07


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": 0.0}, "alpha"),
        ({"eval_split": "train"}, "eval_split"),
        ({"keep_versions": "some"}, "keep_versions"),
        *(
            ({limit: value}, f"{limit}={value} must be positive and finite")
            for limit in ("budget_mib", "uplink_mib", "per_client_mib", "chunk_mib")
            for value in (float("nan"), -1.0, 0.0, float("inf"))
        ),
        ({"eval_every": 0}, "eval_every"),
        ({"threads": -1}, "threads"),
        ({"device": "cuda:7"}, "not available"),
        ({"local_steps": 0}, "local_steps"),
        ({"momentum": 1.0}, "momentum"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"dense": ["fc1.weight"]}, "fc1.weight"),
        ({"targets": ["relu1"]}, "ReLU"),
        ({"method": ("rac_lora", {"rounds_per_link": -1})}, "rounds_per_link"),
        ({"server": ServerSettings(lr=0.0)}, r"server\.lr=0\.0"),
        ({"method": ("rac_lora", {"moments": "cary"})}, "did you mean 'carry'"),
        ({"method": "full", "server": ServerSettings(lr=-1.0)}, r"server\.lr=-1\.0"),
        ({"method": ("chain_of_lora", {"rounds_per_link": -1})}, "rounds_per_link"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        prepare(settings(**changes))


# ---- models from outside, looked at before anything is trained


class Plain:
    """The configuration of a model without settings."""


class Net(nn.Module):
    """Two layers, and what `extra(net)` adds to them, which the forward pass does not use."""

    def __init__(self, extra):
        super().__init__()
        self.flatten, self.fc1, self.fc2 = nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 10)
        extra(self)

    def forward(self, x):
        return self.fc2(self.fc1(self.flatten(x)).relu())


def with_model(monkeypatch, extra, **changes):
    """Return the settings of a run of `Net` with something extra in it."""
    return settings(
        model=plug_in(monkeypatch, "net", Plain, lambda config, *, input_shape, num_outputs: Net(extra)), **changes
    )


def tied_layers(net):
    net.fc3 = nn.Linear(64, 12)
    net.fc3.weight = net.fc1.weight


def tied_buffer(net):
    net.register_buffer("copy", net.fc1.bias.data)


def empty_buffers(net):
    """Two tensors without numbers have the same address, and are not tied for that."""
    net.register_buffer("empty1", torch.zeros(0))
    net.register_buffer("empty2", torch.zeros(0))


@pytest.mark.parametrize("method", ["rac_lora", "full"])
@pytest.mark.parametrize(
    ("extra", "names"), [(tied_layers, "'fc1.weight' and 'fc3.weight'"), (tied_buffer, "'copy' and 'fc1.bias'")]
)
def test_tied_weights_are_refused_by_name(monkeypatch, method, extra, names):
    with pytest.raises(ValueError, match=f"{names} are one tensor; .*untie"):
        prepare(with_model(monkeypatch, extra, method=method))


def test_empty_tensors_are_not_tied(monkeypatch):
    prepare(with_model(monkeypatch, empty_buffers))


def embedding(net):
    net.embedding = nn.Embedding(5, 4)


def root_parameter(net):
    net.scale = nn.Parameter(torch.ones(10))


@pytest.mark.parametrize(
    ("extra", "words"),
    [(embedding, "'embedding.weight' belongs to a Embedding"), (root_parameter, "'scale' belongs to a Net")],
)
def test_full_refuses_a_parameter_that_it_cannot_train_and_low_rank_methods_leave_it_alone(monkeypatch, extra, words):
    with pytest.raises(ValueError, match=f"parameter {words}; .*Linear, Conv2d, GroupNorm, LayerNorm"):
        prepare(with_model(monkeypatch, extra, method="full"))
    prepare(with_model(monkeypatch, extra))


def test_a_model_that_mixes_its_clients_is_refused(monkeypatch):
    class Mixing(Net):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    path = plug_in(monkeypatch, "net", Plain, lambda config, *, input_shape, num_outputs: Mixing(lambda net: None))
    with pytest.raises(ValueError, match="mixes the rows of different clients"):
        prepare(settings(model=path))


def test_a_dataset_that_does_not_fit_its_description_is_refused(monkeypatch):
    def build(config, *, seed):
        examples = Examples(torch.zeros(40, 64), torch.arange(40) % 11)
        return Dataset("off", examples, examples, "classification", 10)

    with pytest.raises(ValueError, match=r"off: the train targets .*from 0 to 10; .*labels from 0 to 9"):
        prepare(settings(dataset=plug_in(monkeypatch, "off", Plain, build)))


def test_clients_with_their_own_data_are_for_nodes_of_their_own(tmp_path):
    np.savez(tmp_path / "test.npz", inputs=np.ones((4, 1, 8, 8), dtype=np.float32), targets=np.arange(4))
    own = {"dataset": ("files", {"path": str(tmp_path)}), "partition": "own"}
    with pytest.raises(ValueError, match=r"needs runtime=deployment and runtime\.superlink"):
        prepare(settings(**own))
    problem = prepare(settings(**own, runtime=("deployment", {"superlink": "127.0.0.1:1"})))
    assert len(problem.dataset.train) == 0
    assert problem.card.input_shape == (1, 8, 8)


# ---- weights to start from


@pytest.fixture
def first(tmp_path, monkeypatch):
    """A finished run to start from."""
    without_figures(monkeypatch)
    run(settings(out=str(tmp_path / "first"), method="full", seed=5), Silent())
    return tmp_path / "first"


@pytest.mark.parametrize("method", ["rac_lora", "fed_it", "full", "fr_lora"])
def test_a_run_starts_from_the_weights_that_another_one_ended_with(first, tmp_path, method):
    """And its folder alone is enough to build its model again, whatever becomes of the other run."""
    one = settings(out=str(tmp_path / "second"), start_from=str(first), method=method, rounds=2)
    expected = load_run(first).chain().weights()
    assert same_weights(prepare(one).new_chain().weights(), expected)
    run(one, Silent())
    first.rename(tmp_path / "gone")
    second = load_run(tmp_path / "second")
    assert same_weights(second.model(version=0).state_dict(), expected)
    assert not same_weights(second.model().state_dict(), expected)
    assert "verified against the summary" in replay(tmp_path / "second")[1]


def test_what_a_run_starts_from_enters_its_base_and_nothing_else(first):
    plain, started = prepare(settings()), prepare(settings(start_from=str(first)))
    assert plain.setup.base != started.setup.base == started.new_chain().hash
    assert plain.split.digest == started.split.digest


def test_an_exported_model_is_started_from_as_the_run_itself(first, tmp_path):
    replay(first, export=str(tmp_path / "model.safetensors"))
    runs = [prepare(settings(start_from=str(path))) for path in (first, tmp_path / "model.safetensors")]
    assert runs[0].setup.base == runs[1].setup.base


def test_weights_to_start_from_take_the_dtype_of_the_run(first):
    found = prepare(settings(start_from=str(first), dtype="float64")).new_chain().weights()
    assert {name: tensor.float() for name, tensor in found.items()}.keys() == found.keys()
    assert same_weights({name: tensor.float() for name, tensor in found.items()}, load_run(first).chain().weights())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("fc2.bias"), r"it lacks fc2.bias \[10\]; right are exactly the model's own tensors"),
        (lambda w: w.update(head=torch.zeros(3, 1)), r"the model does not have head \[3, 1\]"),
        (
            lambda w: w.update({"fc2.weight": torch.zeros(5, 12)}),
            r"of another shape are fc2.weight \[5, 12\], where the model has \[10, 12\].*number of classes",
        ),
        (lambda w: w["fc1.bias"].fill_(float("nan")), r"NaN or infinity in fc1.bias; .*did not diverge"),
        (lambda w: w.update({f"more{i}": torch.zeros(1) for i in range(11)}), r"more6 \[1\] and 3 more; right"),
    ],
)
def test_weights_of_another_model_are_refused_with_every_difference(tmp_path, change, words):
    weights = {name: tensor.clone() for name, tensor in prepare(settings()).new_chain().weights().items()}
    change(weights)
    write_tensors(tmp_path / "start.safetensors", weights, {})
    with pytest.raises(ValueError, match=rf"start_from=.*start\.safetensors .*{words}"):
        prepare(settings(start_from=str(tmp_path / "start.safetensors")))


def test_a_place_to_start_from_that_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither the folder of a finished run nor a \.safetensors file"):
        prepare(settings(start_from=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"not a finished run: summary\.json is missing"):
        prepare(settings(start_from=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        prepare(settings(start_from=str(tmp_path / "nowhere.safetensors")))


def test_another_start_makes_another_run_and_a_folder_that_moved_with_its_start_does_not(first, tmp_path, monkeypatch):
    (tmp_path / "all").mkdir()
    first.rename(tmp_path / "all" / "first")
    one = settings(out=str(tmp_path / "all" / "second"), start_from=str(tmp_path / "all" / "first"))
    run(one, Silent())
    with pytest.raises(ValueError, match="start_from was"):
        check_same_run(tmp_path / "all" / "second", settings(out=one.out))
    for out in (one.out, None):
        with pytest.raises(ValueError, match="start_from was"):
            check_same_run(tmp_path / "all" / "second", settings(out=out, start_from=str(tmp_path / "all" / "other")))
    (tmp_path / "all").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    moved = settings(out="second", start_from="first", resume=True, rounds=4)
    check_same_run(tmp_path / "moved" / "second", moved)
    run(moved, Silent())
    assert load_run(tmp_path / "moved" / "second").versions == (0, 1, 2, 3, 4)
