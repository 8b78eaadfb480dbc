"""Tests of fedraclora.layers: a cohort of K clients computes what K plain models with merged weights compute."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedraclora.data import Examples
from fedraclora.layers import CohortModel, Draws, check_rows_stay_apart
from fedraclora.link import FACTORS
from fedraclora.local import LocalClient, LocalConfig, Trainer, train_cohort
from fedraclora.models import cnn
from fedraclora.targets import MatrixShape, find_dense, find_targets
from fedraclora.tasks import row_loss

SIDES = ("b", "a", "ab")
# A core of each client's own between shared factors, or a shared one beside a client's own B.
CORES = ("core", "b core")
TOLERANCE = 1e-12
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# ---- the oracle: a plain model a client, its weights merged before the forward pass ----


def _plain_model(model: nn.Module, tensors: Mapping[str, Tensor], scale: float, client: int) -> nn.Module:
    """Return a copy of `model` with the client's own tensors and `W + scale * B_c @ core_c @ A_c` as its weights."""
    plain = copy.deepcopy(model)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for key, tensor in tensors.items():
            owner, _, name = key.rpartition(".")
            if name == "lora_b":
                lora_a = tensors[f"{owner}.lora_a"]
                core = tensors.get(f"{owner}.core", torch.eye(lora_a.shape[-2], dtype=torch.float64))
                factors = (factor if factor.ndim == 2 else factor[client] for factor in (tensor, core, lora_a))
                own_b, own_core, own_a = factors
                weight = parameters[f"{owner}.weight"]
                weight.add_(scale * (own_b @ own_core @ own_a).reshape(weight.shape))
            elif name not in FACTORS:
                parameters[key].copy_(tensor[client])
    return plain


def _factors(layer: str, shape: MatrixShape, rank: int, side: str, clients: int) -> Tensors:
    """Return random factors: the trained ones with a client axis, the others shared."""
    shapes = {"lora_a": (rank, shape.in_), "lora_b": (shape.out, rank)}
    own = {"lora_a": side in ("a", "ab"), "lora_b": side in ("b", "ab", "b core"), "core": side == "core"}
    if side in CORES:
        shapes["core"] = (rank, rank)
    return {
        f"{layer}.{name}": torch.randn(*([clients] if own[name] else []), *shape, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def _own(model: nn.Module, names: list[str], clients: int) -> Tensors:
    parameters = dict(model.named_parameters())
    return {name: torch.randn(clients, *parameters[name].shape, dtype=torch.float64) for name in names}


def _is_whole(key: str) -> bool:
    return key.rpartition(".")[2] not in FACTORS


def _assert_cohort_equals_clients(model: nn.Module, tensors: Tensors, inputs: Tensor, scale: float = 0.7) -> None:
    """`inputs` are `[clients, batch, ...]`."""
    low_rank = [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]
    cohort = CohortModel(model, low_rank=low_rank, dense=[key for key in tensors if _is_whole(key)])
    cohort.set_scales(dict.fromkeys(low_rank, scale))
    cohort.bind(tensors, num_clients=len(inputs))
    with torch.no_grad():
        found = cohort(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        for client, own_inputs in enumerate(inputs):
            expected = _plain_model(model, tensors, scale, client)(own_inputs)
            torch.testing.assert_close(found[client], expected, rtol=TOLERANCE, atol=TOLERANCE)


# ---- cohort equals clients ----


@settings(max_examples=80)
@given(data=st.data())
def test_linear_cohort_equals_plain_layers_with_merged_weights(data: st.DataObject) -> None:
    small = st.integers(1, 4)
    clients, batch, fan_in, fan_out, rank = (data.draw(small) for _ in range(5))
    between = data.draw(st.lists(small, max_size=2))
    has_bias, form = data.draw(st.booleans()), data.draw(st.sampled_from([*SIDES, *CORES, "weight", "none"]))
    model = nn.Sequential(nn.Linear(fan_in, fan_out, bias=has_bias)).double()
    tensors = _factors("0", MatrixShape(fan_out, fan_in), rank, form, clients) if form in (*SIDES, *CORES) else {}
    own = (["0.weight"] if form == "weight" else []) + (["0.bias"] if has_bias and data.draw(st.booleans()) else [])
    tensors |= _own(model, own, clients)
    inputs = torch.randn(clients, batch, *between, fan_in, dtype=torch.float64)
    _assert_cohort_equals_clients(model, tensors, inputs)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=120)
@given(data=st.data())
def test_conv_cohort_equals_plain_layers_with_merged_kernels(data: st.DataObject) -> None:
    small = st.integers(1, 3)
    clients, batch, fan_in, fan_out, rank = (data.draw(small) for _ in range(5))
    kernel, dilation = (data.draw(small), data.draw(small)), (data.draw(small), data.draw(small))
    stride = (data.draw(small), data.draw(small))
    paddings: list[Any] = [0, 1, (2, 1), "valid"] + (["same"] if stride == (1, 1) else [])
    has_bias, form = data.draw(st.booleans()), data.draw(st.sampled_from([*SIDES, *CORES, "weight", "none"]))
    padding = data.draw(st.sampled_from(paddings))
    model = nn.Sequential(nn.Conv2d(fan_in, fan_out, kernel, stride, padding, dilation, bias=has_bias)).double()
    shape = MatrixShape(fan_out, fan_in * kernel[0] * kernel[1])
    tensors = _factors("0", shape, rank, form, clients) if form in (*SIDES, *CORES) else {}
    own = (["0.weight"] if form == "weight" else []) + (["0.bias"] if has_bias and data.draw(st.booleans()) else [])
    tensors |= _own(model, own, clients)
    _assert_cohort_equals_clients(model, tensors, torch.randn(clients, batch, fan_in, 8, 9, dtype=torch.float64))


def test_a_grouped_convolution_trained_in_full_equals_plain_layers() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    inputs = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)
    _assert_cohort_equals_clients(model, _own(model, ["0.weight", "0.bias"], 3), inputs)


NORMS = [
    (nn.GroupNorm(2, 6), (6,)),
    (nn.GroupNorm(3, 6), (6, 5)),
    (nn.GroupNorm(6, 6), (6, 4, 3)),
    (nn.LayerNorm(5), (5,)),
    (nn.LayerNorm(5), (3, 5)),
    (nn.LayerNorm((3, 5)), (3, 5)),
    (nn.LayerNorm((3, 5)), (2, 3, 5)),
    (nn.LayerNorm(5, bias=False), (3, 5)),
]


@pytest.mark.parametrize(("norm", "input_shape"), NORMS, ids=str)
@pytest.mark.parametrize("owned", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"]], ids="+".join)
def test_norm_cohort_equals_plain_norms_with_own_affine_parts(
    norm: nn.Module, input_shape: tuple[int, ...], owned: list[str]
) -> None:
    model = nn.Sequential(copy.deepcopy(norm)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    owned = [name for name in owned if name in dict(model.named_parameters())]
    tensors = _own(model, owned, 3)
    _assert_cohort_equals_clients(model, tensors, torch.randn(3, 2, *input_shape, dtype=torch.float64))


def _cnn() -> nn.Module:
    config = cnn.Config(channels=[4, 8], groups=2, hidden=6)
    return cnn.build(config, input_shape=(2, 8, 8), num_outputs=3).double()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dense", [[], ["norm*", "*.bias"]], ids=["low-rank", "with-dense"])
def test_cnn_cohort_equals_plain_models(side: str, dense: list[str]) -> None:
    model = _cnn()
    targets = find_targets(model, "all")
    tensors = _own(model, find_dense(model, dense, list(targets)), 3)
    for layer, shape in targets.items():
        tensors |= _factors(layer, shape, 2, side, 3)
    _assert_cohort_equals_clients(model, tensors, torch.randn(3, 2, 2, 8, 8, dtype=torch.float64))


def test_layers_of_one_model_may_train_different_sides() -> None:
    model = _cnn()
    targets = find_targets(model, "all")
    tensors: Tensors = {}
    for (layer, shape), side in zip(targets.items(), ("b", "a", "ab", "b"), strict=True):
        tensors |= _factors(layer, shape, 2, side, 4)
    _assert_cohort_equals_clients(model, tensors, torch.randn(4, 3, 2, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("side", SIDES)
def test_gradients_of_a_client_are_those_of_its_plain_model(side: str) -> None:
    model, targets = _cnn(), ["conv2", "fc1"]
    shapes = find_targets(model, targets)
    tensors: Tensors = {}
    for layer, shape in shapes.items():
        tensors |= _factors(layer, shape, 2, side, 2)
    trained = {key: tensor.requires_grad_() for key, tensor in tensors.items() if tensor.ndim == 3}
    cohort = CohortModel(model, low_rank=targets, dense=[])
    cohort.set_scales(dict.fromkeys(targets, 0.7))
    cohort.bind(tensors, num_clients=2)
    inputs = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    gradients = torch.autograd.grad(cohort(inputs.flatten(0, 1)).square().sum(), list(trained.values()))
    for client in range(2):
        weights: Tensors = dict(model.named_parameters())
        for layer in targets:
            own_b, own_a = (
                factor if factor.ndim == 2 else factor[client]
                for factor in (tensors[f"{layer}.lora_b"], tensors[f"{layer}.lora_a"])
            )
            weight = weights[f"{layer}.weight"]
            weights[f"{layer}.weight"] = weight + 0.7 * (own_b @ own_a).reshape(weight.shape)
        loss = torch.func.functional_call(model, weights, (inputs[client],)).square().sum()
        expected = torch.autograd.grad(loss, list(trained.values()))
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[client], wanted[client], rtol=TOLERANCE, atol=TOLERANCE)


# ---- a new link changes nothing; frozen things stay frozen ----


@pytest.mark.parametrize("side", ["b", "a"])
def test_a_new_link_changes_no_output_bit(side: str) -> None:
    model = _cnn().float()
    targets = find_targets(model, "all")
    cohort = CohortModel(model, low_rank=list(targets), dense=[])
    for layer, shape in targets.items():
        factors = {key: factor.float() for key, factor in _factors(layer, shape, 2, side, 3).items()}
        factors[f"{layer}.lora_{side}"].zero_()
        cohort.bind(factors, num_clients=3)
    inputs = torch.randn(6, 2, 8, 8)
    assert torch.equal(cohort(inputs), model(inputs))


def test_release_restores_the_original_function() -> None:
    model = _cnn()
    cohort = CohortModel(model, low_rank=["fc1"], dense=["fc2.weight", "norm1.bias"])
    inputs = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    cohort.bind(_factors("fc1", find_targets(model, ["fc1"])["fc1"], 2, "b", 2), num_clients=2)
    cohort.bind(_own(model, ["fc2.weight", "norm1.bias"], 2), num_clients=2)
    assert not torch.allclose(cohort(inputs), model(inputs))
    cohort.release()
    torch.testing.assert_close(cohort(inputs), model(inputs), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["b", "a"])
def test_training_moves_neither_frozen_weights_nor_the_frozen_factor(side: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    frozen_side = "a" if side == "b" else "b"
    cohort = CohortModel(model, low_rank=["0"], dense=["2.bias"])
    factors = _factors("0", MatrixShape(5, 4), 2, "none", 1)
    frozen = {f"0.lora_{frozen_side}": factors[f"0.lora_{frozen_side}"]}
    cohort.bind(frozen, num_clients=1)
    start = {f"0.lora_{side}": torch.zeros_like(factors[f"0.lora_{side}"]), "2.bias": torch.zeros(3).double()}
    before = {name: tensor.clone() for name, tensor in cohort.module.state_dict().items()}
    kept = {key: tensor.clone() for key, tensor in (frozen | start).items()}
    examples = Examples(torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))
    trainer = Trainer(cohort, examples, row_loss("classification"))
    clients = [LocalClient(torch.arange(3).numpy(), 0), LocalClient(torch.arange(3, 6).numpy(), 1)]
    results = list(train_cohort(trainer, start, clients, LocalConfig(steps=3, weight_decay=0.1, momentum=0.5)))

    assert all(tensor.abs().sum() > 0 for result in results for tensor in result.tensors.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in cohort.module.state_dict().items())
    assert all(torch.equal(tensor, kept[key]) for key, tensor in (frozen | start).items())
    held = [*cohort.module.parameters(), *cohort.module.buffers(), *frozen.values()]
    assert held
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in held)


def test_the_original_model_is_not_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cohort = CohortModel(model, low_rank=["0"], dense=[])
    cohort.load_weights({name: tensor + 1 for name, tensor in before.items()})
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- weights by name ----


def test_the_cohort_has_the_state_keys_of_the_original() -> None:
    model = _cnn()
    targets = find_targets(model, "all")
    cohort = CohortModel(model, low_rank=list(targets), dense=find_dense(model, ["norm*", "*.bias"], list(targets)))
    cohort.bind(_factors("fc1", targets["fc1"], 2, "b", 2), num_clients=2)
    assert list(cohort.module.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in cohort.module.state_dict().items())


def test_loaded_weights_are_the_ones_computed_with() -> None:
    first, second = _cnn(), _cnn()
    cohort = CohortModel(first, low_rank=list(find_targets(first, "all")), dense=["norm1.weight"])
    cohort.load_weights(second.state_dict())
    inputs = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(cohort(inputs), second(inputs), rtol=TOLERANCE, atol=TOLERANCE)


def test_batch_norm_in_training_mode_is_refused_with_advice() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match=r"'1' is a BatchNorm2d.*nn\.GroupNorm"):
        CohortModel(model, low_rank=["0"], dense=[])


def test_batch_norm_in_evaluation_mode_keeps_clients_apart() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    model(torch.randn(8, 1, 5, 5, dtype=torch.float64))
    factors = _factors("0", MatrixShape(2, 9), 2, "b", 2)
    _assert_cohort_equals_clients(model.eval(), factors, torch.randn(2, 3, 1, 5, 5, dtype=torch.float64))


class _OwnDropout(nn.Dropout):
    """Might draw in any way."""


@pytest.mark.parametrize(
    "kind", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, _OwnDropout]
)
def test_an_active_dropout_without_cohort_form_is_refused_and_an_inactive_one_is_not(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), kind(0.5))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=rf"'1' is an active {kind.__name__} \(p=0\.5\).*use nn.Dropout, or set p=0"):
        check_rows_stay_apart(model)
    check_rows_stay_apart(model.eval())
    check_rows_stay_apart(nn.Sequential(nn.Linear(2, 2), kind(0.0)))  # type: ignore[call-arg]


# ---- dropout ----


def _generators(seeds: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@settings(max_examples=40)
@given(data=st.data(), p=st.sampled_from([0.0, 0.1, 0.5, 1.0]), tokens=st.integers(1, 3))
def test_a_clients_masks_are_its_own_generators_in_any_company_and_under_any_padding(
    data: st.DataObject, p: float, tokens: int
) -> None:
    """Two calls in a row: what the first one pads must not shift what the second one draws."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    width = max(sizes) + data.draw(st.integers(0, 2))
    draws = Draws(_generators(range(len(sizes))), sizes, width)
    for call in range(2):
        x = torch.ones(len(sizes) * width * tokens, 3, dtype=torch.float64)
        found = draws.mask(x, p).view(len(sizes), width * tokens, 3)
        for client, size in enumerate(sizes):
            (own,) = _generators([client])
            drawn = [torch.rand(size * tokens, 3, generator=own) for _ in range(call + 1)][-1]
            expected = (drawn >= p).double() / (1 - p) if p < 1 else torch.zeros(size * tokens, 3).double()
            assert torch.equal(found[client, : size * tokens], expected)


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    mask = Draws(_generators([0]), [1000], 1000).mask(torch.ones(1000, 50), 0.2)
    assert set(mask.unique().tolist()) == {0.0, 1.25}
    assert float(mask.mean()) == pytest.approx(1, abs=0.01)


def test_rows_that_do_not_belong_to_the_clients_evenly_are_refused() -> None:
    with pytest.raises(
        ValueError, match="sees 7 rows of 2 clients with batches of 3; its first axis must be the batch"
    ):
        Draws(_generators([0, 1]), [3, 3], 3).mask(torch.ones(7, 2), 0.5)


def test_dropout_is_off_but_for_the_call_that_is_given_draws() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).double(), torch.randn(3, 4).double()
    cohort = CohortModel(model, low_rank=["0"], dense=[])
    expected = copy.deepcopy(model).eval()(inputs)
    dropped = cohort(inputs, Draws(_generators([0]), [3], 3))
    assert not torch.equal(dropped, expected)
    assert torch.equal(cohort(inputs), expected)
    assert cohort.has_dropout
    assert isinstance(model[1], nn.Dropout), "the user's own model is left as it is"


@pytest.mark.parametrize("dropout", [nn.Dropout(0.0), nn.Dropout(0.5).eval()], ids=["p=0", "eval"])
def test_a_dropout_that_drops_nothing_stays_the_users_own(dropout: nn.Dropout) -> None:
    cohort = CohortModel(nn.Sequential(nn.Linear(2, 2), dropout), low_rank=["0"], dense=[])
    assert not cohort.has_dropout
    assert type(cohort.module.get_submodule("1")) is nn.Dropout


def test_one_dropout_under_two_names_drops_at_both_places() -> None:
    shared = nn.Dropout(1.0)
    for place in range(2):
        layers: list[nn.Module] = [nn.Linear(2, 2), nn.Identity(), nn.Identity()]
        layers[1 + place] = shared
        model = nn.Sequential(*layers, nn.Sequential(shared))
        cohort = CohortModel(model, low_rank=["0"], dense=[])
        kinds = {type(module) for module in cohort.module.modules()}
        assert nn.Dropout not in kinds, "each name has its cohort form"
        assert not cohort(torch.ones(2, 2), Draws(_generators([0]), [2], 2)).any()


# ---- what has no cohort form ----


def test_a_reflecting_convolution_is_never_trained_as_if_it_padded_with_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")).double()
    with pytest.raises(ValueError, match="padding_mode"):
        CohortModel(model, low_rank=[], dense=find_dense(model, ["*"], []))


# ---- memory ----


def test_activation_floats_count_every_layer_output_for_one_row() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    cohort = CohortModel(model, low_rank=["0"], dense=[])
    cohort.bind({"0.lora_a": torch.randn(2, 4).double()}, num_clients=1)
    start = {"0.lora_b": torch.zeros(6, 2).double()}
    for rows in (1, 7):
        assert cohort.activation_floats(start, torch.randn(rows, 4).double()) == 4 + 6 + 6 + 3
