"""Tests of fedraclora.rebase."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.link import Link, LowRank, Stack, Zero, draw
from fedraclora.rebase import rebase
from fedraclora.sketch import SketchKey

OUT, IN = 7, 9


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _link(index: int, side: str, rank: int = 2, *, law: str = "gaussian", seed: int | None = None) -> Link:
    drawn = SketchKey(law, 5, index if seed is None else seed, "fc1", side, rank, IN if side == "b" else OUT)
    zero = Zero((OUT, rank) if side == "b" else (rank, IN))
    return Link(index, (LowRank("fc1", 0.5, *((drawn, zero) if side == "b" else (zero, drawn))),))


def _drawn(link: Link, side: str) -> np.ndarray:
    term = link.low_rank_terms()["fc1"]
    key = term.lora_a if side == "b" else term.lora_b
    assert isinstance(key, SketchKey)
    return sketch.draw(key).double().numpy()


def _transported(moment: Tensor, old: Link, new: Link, side: str) -> Tensor:
    key = f"fc1.lora_{side}"
    return rebase({key: moment}, old, new, mode="transport")[0][key]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    rank=st.integers(1, 5),
    law=st.sampled_from(["gaussian", "orthonormal", "raw", "rademacher"]),
)
def test_a_moment_of_b_becomes_the_nearest_one_that_the_new_rows_hold(seed: int, rank: int, law: str) -> None:
    """`m A_old A_new^T (A_new A_new^T)^+` solves min over m' of |m' A_new - m A_old|, here by least squares."""
    old, new = _link(seed, "b", rank, law=law), _link(seed + 1, "b", rank, law=law)
    moment = _numbers(seed, OUT, rank)
    expected = np.linalg.lstsq(_drawn(new, "b").T, (moment.numpy() @ _drawn(old, "b")).T, rcond=1e-10)[0].T
    found = _transported(moment, old, new, "b")
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 999), rank=st.integers(1, 5))
def test_a_moment_of_a_is_transported_in_the_mirror_image(seed: int, rank: int) -> None:
    old, new = _link(seed, "a", rank), _link(seed + 1, "a", rank)
    moment = _numbers(seed, rank, IN)
    expected = np.linalg.lstsq(_drawn(new, "a"), _drawn(old, "a") @ moment.numpy(), rcond=1e-10)[0]
    found = _transported(moment, old, new, "a")
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_transport_into_the_same_basis_is_the_identity() -> None:
    for side, shape in (("b", (OUT, 3)), ("a", (3, IN))):
        old, new = (_link(index, side, 3, law="orthonormal", seed=2) for index in (2, 3))
        moment = _numbers(0, *shape)
        # The rows are orthonormal to float32's precision; the pseudo-inverse is exact for whatever they are.
        torch.testing.assert_close(_transported(moment, old, new, side), moment, rtol=1e-12, atol=1e-12)


def test_transport_into_an_orthogonal_basis_forgets_everything() -> None:
    """Selectors without replacement take other coordinates in each link of a cycle."""
    old, new = (_link(index, "b", 2, law="selector_without_replacement") for index in (0, 1))
    assert np.all(_drawn(old, "b") @ _drawn(new, "b").T == 0)
    assert _transported(_numbers(0, OUT, 2), old, new, "b").abs().max() < 1e-12


def test_transport_into_the_whole_space_keeps_the_direction_in_weight_space() -> None:
    old, new = _link(0, "b", 2), _link(1, "b", IN)
    moment = _numbers(0, OUT, 2)
    direction = _transported(moment, old, new, "b") @ torch.from_numpy(_drawn(new, "b"))
    torch.testing.assert_close(direction, moment @ torch.from_numpy(_drawn(old, "b")), rtol=1e-9, atol=1e-9)


MODES = ("drop", "carry", "transport", "keep")


@pytest.mark.parametrize("mode", MODES)
def test_in_the_same_basis_nothing_changes_and_nothing_is_lost(mode: str) -> None:
    remembered = {"fc1.lora_b": _numbers(0, OUT, 2)}
    assert rebase(remembered, _link(3, "b"), _link(3, "b"), mode=mode) == (remembered, 0.0)


def test_carry_and_keep_leave_tensors_as_they_are_and_drop_leaves_zeros() -> None:
    remembered = {"fc1.lora_b": _numbers(0, OUT, 2)}
    for mode in ("carry", "keep"):
        carried, _ = rebase(remembered, _link(3, "b"), _link(4, "b"), mode=mode)
        assert torch.equal(carried["fc1.lora_b"], remembered["fc1.lora_b"])
    dropped, lost = rebase(remembered, _link(3, "b"), _link(4, "b"), mode="drop")
    assert not dropped["fc1.lora_b"].any()
    assert lost == pytest.approx(1.0)


@pytest.mark.parametrize("mode", MODES)
def test_whole_tensors_and_cores_have_no_basis(mode: str) -> None:
    remembered = {"fc1.bias": _numbers(1, OUT), "head.weight": _numbers(2, 3, 3), "fc1.core": _numbers(3, 2, 2)}
    kept, lost = rebase(remembered, _link(3, "b"), _link(4, "b"), mode=mode)
    assert list(kept) == list(remembered)
    assert all(torch.equal(kept[key], tensor) for key, tensor in remembered.items())
    assert lost == 0


@pytest.mark.parametrize("mode", MODES)
def test_beside_a_factor_that_trains_too_nothing_changes(mode: str) -> None:
    """It moves a little in each round; what is remembered goes with it."""
    first = Link(0, (LowRank("fc1", 1.0, _numbers(0, 2, IN), _numbers(1, OUT, 2)),)).skeleton()
    second = Link(1, (LowRank("fc1", 1.0, _numbers(2, 2, IN), _numbers(3, OUT, 2)),))
    remembered = {"fc1.lora_b": _numbers(4, OUT, 2), "fc1.lora_a": _numbers(5, 2, IN)}
    assert rebase(remembered, first, second, mode=mode) == (remembered, 0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_back", [False, True])
def test_where_only_one_of_the_links_has_a_drawn_factor_there_is_no_other_basis(mode: str, *, is_back: bool) -> None:
    """Where both factors train A is drawn in a link's first round, and numbers in the later ones."""
    first = _link(0, "b")
    later = Link(0, (LowRank("fc1", 0.5, _numbers(0, 2, IN), _numbers(1, OUT, 2)),)).skeleton()
    remembered = {"fc1.lora_b": _numbers(4, OUT, 2), "fc1.lora_a": _numbers(5, 2, IN)}
    links = (later, first) if is_back else (first, later)
    assert rebase(remembered, *links, mode=mode) == (remembered, 0.0)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), mode=st.sampled_from(MODES))
def test_the_basis_of_a_stack_is_that_of_all_its_draws_and_what_was_given_counts_as_drawn(seed: int, mode: str) -> None:

    def link(index: int, *, is_given: bool) -> Link:
        keys = tuple(SketchKey("gaussian", seed + part, index, "fc1", "b", 1, IN) for part in (0, 1))
        stacked = Link(index, (LowRank("fc1", 0.5, Stack(keys), Zero((OUT, 2))),))
        return stacked.with_given([draw(Stack(keys))]) if is_given else stacked

    tensor = {"fc1.lora_b": _numbers(seed, OUT, 2)}
    plain = rebase(tensor, link(0, is_given=False), link(1, is_given=False), mode=mode)
    given_ = rebase(tensor, link(0, is_given=True), link(1, is_given=True), mode=mode)
    assert torch.equal(plain[0]["fc1.lora_b"], given_[0]["fc1.lora_b"])
    if mode == "transport":
        old, new = (draw(link(index, is_given=False).drawn[0]).double().numpy() for index in (0, 1))
        expected = np.linalg.lstsq(new.T, (tensor["fc1.lora_b"].numpy() @ old).T, rcond=1e-10)[0].T
        np.testing.assert_allclose(plain[0]["fc1.lora_b"].numpy(), expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), side=st.sampled_from(["a", "b"]), mode=st.sampled_from(MODES))
def test_the_loss_is_the_share_of_the_weight_space_norm_that_is_gone(seed: int, side: str, mode: str) -> None:
    old, new = _link(seed, side), _link(seed + 1, side)
    key, tensor = f"fc1.lora_{side}", _numbers(seed, *((OUT, 2) if side == "b" else (2, IN)))
    kept, lost = rebase({key: tensor, "fc1.bias": _numbers(1, OUT)}, old, new, mode=mode)

    def in_weight_space(matrix: Tensor, link: Link) -> np.ndarray:
        return matrix.numpy() @ _drawn(link, side) if side == "b" else _drawn(link, side) @ matrix.numpy()

    was, remains = in_weight_space(tensor, old), in_weight_space(kept[key], new)
    bias = float(_numbers(1, OUT).square().sum())
    expected = (np.square(was - remains).sum() / (np.square(was).sum() + bias)) ** 0.5
    assert lost == pytest.approx(float(expected), rel=1e-9)


def test_a_skeleton_is_enough_to_transport_from() -> None:
    """Clients store links without their explicit numbers."""
    old, moment = _link(3, "b"), _numbers(0, OUT, 2)
    trained = Link(3, (LowRank("fc1", 0.5, old.low_rank_terms()["fc1"].lora_a, _numbers(5, OUT, 2)),))
    expected = _transported(moment, old, _link(4, "b"), "b")
    assert torch.equal(_transported(moment, trained.skeleton(), _link(4, "b"), "b"), expected)
