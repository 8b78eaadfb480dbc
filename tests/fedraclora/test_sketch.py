"""Tests of fedraclora.sketch."""

import hashlib
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.seeding import derive_seed
from fedraclora.sketch import LAWS, SketchKey, digest, digest_all, draw

KEY = SketchKey(law="orthonormal", seed=7, link=2, layer="fc1", side="b", rank=3, dim=7)
SCALED_LAWS = [law for law in LAWS if law != "raw"]
ORTHONORMAL_LAWS = ["orthonormal", "selector", "selector_without_replacement", "sparse_sign"]
NESTING_LAWS = ["gaussian", "raw", "rademacher", "selector"]
ROOT = Path(__file__).parents[2]


@st.composite
def keys(draw_value: st.DrawFn) -> SketchKey:
    dim = draw_value(st.integers(1, 40))
    return SketchKey(
        law=draw_value(st.sampled_from(LAWS)),
        seed=draw_value(st.integers(0, 2**63 - 1)),
        link=draw_value(st.integers(0, 100)),
        layer=draw_value(st.sampled_from(["fc1", "encoder.0.attention.q"])),
        side=draw_value(st.sampled_from(["b", "a", "ab"])),
        rank=draw_value(st.integers(1, dim)),
        dim=dim,
    )


def _rows(key: SketchKey) -> Tensor:
    drawn = draw(key).double()
    return drawn.T if key.side == "a" else drawn


def _philox(key: int, count: int) -> list[int]:
    """Return the first integers of Philox 4x64-10 (Salmon et al., 2011), from its definition."""
    mask, words = 2**64 - 1, []
    for counter in range(1, -(-count // 4) + 1):
        x, k = [counter, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            left, right = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [right >> 64 ^ x[1] ^ k[0], right & mask, left >> 64 ^ x[3] ^ k[1], left & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += x
    return words[:count]


# ---- the numbers are fixed for all time ----


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("orthonormal", "e1564574813496cf8cdecc6bb277cf255aca1561f7d6d2771a6de56476adabbd"),
        ("gaussian", "cecff105ccde117ae720c9f62218b5d990579ce9411949875b89443c75ba38b6"),
        ("rademacher", "50718621677c36bd9de1b897484f61120c3a0f526c7c07f1229394a5a328d33f"),
        ("selector", "db72ac3357a4347bb42a19cc431e1c180b8e88c9bcf93c0d7e4c8c26b5a740f8"),
        ("selector_without_replacement", "81a01e644b02abdb932620a3fbd9a156c0d4635a218a16d3757a9c098645e576"),
        ("sparse_sign", "2bcc94e22c19b5048ee66568b730f7599211f2126612075c08232cebf2b186ba"),
        ("raw", "cadb9311507ed2682a44a915e61e1f89df8a130a466eca4b9f7c01ce6d09ed42"),
    ],
)
def test_golden_digest(law: str, expected: str) -> None:
    assert digest(draw(replace(KEY, law=law))) == expected


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("orthonormal", [[-0.2360873, 0.1439686, -0.2072803, -0.5323196, 0.7727914],
                         [-0.7946435, 0.3890825, -0.3271262, 0.1866831, -0.2743982]]),
        ("gaussian", [[-0.06740026, 0.04110142, -0.05917619, -0.15197127, 0.22062327],
                      [-0.80371106, 0.38213634, -0.28667977, 0.42468733, -0.62036115]]),
        ("rademacher", [[-(5**-0.5), 5**-0.5, -(5**-0.5), 5**-0.5, -(5**-0.5)],
                        [5**-0.5, -(5**-0.5), 5**-0.5, -(5**-0.5), -(5**-0.5)]]),
        ("selector", [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        ("selector_without_replacement", [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]]),
        ("sparse_sign", [[-(3**-0.5), 3**-0.5, 0, 3**-0.5, 0], [0, 0, 2**-0.5, 0, 2**-0.5]]),
        ("raw", [[-0.15071157, 0.09190556, -0.13232198, -0.33981809, 0.49332863],
                 [-1.79715252, 0.85448283, -0.64103550, 0.94962972, -1.38716972]]),
    ],
)  # fmt: skip
def test_golden_vector(law: str, expected: list[list[float]]) -> None:
    found = draw(replace(KEY, law=law, rank=2, dim=5))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=2e-7, atol=1e-7)


def test_raw_law_is_philox_pieces_of_16_bits_through_the_normal_quantiles() -> None:
    seed = derive_seed(7, "sketch", 2, "fc1", "b")
    pieces = [word >> shift & 0xFFFF for word in _philox(seed, 6) for shift in (0, 16, 32, 48)][:21]
    quantiles = [statistics.NormalDist().inv_cdf((piece + 0.5) / 2**16) for piece in pieces]
    assert torch.equal(draw(replace(KEY, law="raw")), torch.tensor(quantiles, dtype=torch.float32).view(3, 7))


def test_rademacher_law_is_the_bits_of_philox_from_the_lowest() -> None:
    words = _philox(derive_seed(7, "sketch", 2, "fc1", "b"), 2)
    bits = [words[i // 64] >> i % 64 & 1 for i in range(90)]
    expected = torch.tensor([1 if bit else -1 for bit in bits]).view(3, 30) * torch.tensor(1 / math.sqrt(30))
    assert torch.equal(draw(replace(KEY, law="rademacher", dim=30)), expected)


def test_selector_law_sorts_philox_words() -> None:
    words = _philox(derive_seed(7, "sketch", 2, "fc1", "b"), 7)
    order = sorted(range(7), key=words.__getitem__)
    assert torch.equal(draw(replace(KEY, law="selector")), torch.eye(7)[order[:3]])


def test_sparse_sign_law_takes_the_sign_from_the_bit_that_does_not_sort() -> None:
    words = _philox(derive_seed(7, "sketch", 2, "fc1", "b"), 7)
    order = sorted(range(7), key=lambda i: words[i] >> 1)
    expected = torch.zeros(3, 7)
    for row, block in enumerate([order[:3], order[3:5], order[5:]]):
        for i in block:
            expected[row, i] = (1 if words[i] & 1 else -1) / math.sqrt(len(block))
    assert torch.equal(draw(replace(KEY, law="sparse_sign")), expected)


def test_normal_table_has_the_moments_of_a_standard_normal() -> None:
    table = sketch._normal_quantiles().astype(np.float64)
    assert np.array_equal(table, -table[::-1])  # so that odd moments vanish
    assert np.all(np.diff(table) > 0)
    # One number stands for each cell of probability 2^-16. That matters in the two outermost ones, x beyond +-c,
    # where by parts E[x^2; x > c] = c phi(c) + 2^-16 and E[x^4; x > c] = (c^3 + 3 c) phi(c) + 3 * 2^-16.
    c = statistics.NormalDist().inv_cdf(1 - 2**-16)
    phi = statistics.NormalDist().pdf(c)
    lost_square = 2 * (c * phi + 2**-16 * (1 - table[-1] ** 2))
    lost_fourth = 2 * ((c**3 + 3 * c) * phi + 2**-16 * (3 - table[-1] ** 4))
    assert 1 - (table**2).mean() == pytest.approx(lost_square, rel=0.2)
    assert 3 - (table**4).mean() == pytest.approx(lost_fourth, rel=0.2)
    assert lost_square < 3e-5


def test_another_normal_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "_TABLE_SHA256", "0" * 64)
    with pytest.raises(
        RuntimeError, match=r"SHA-256 1cfbba1e.*expected 0000.*would not be those of the other machines"
    ):
        sketch._normal_quantiles.__wrapped__()


# ---- what a draw depends on ----


@given(keys())
@settings(deadline=None)
def test_draws_are_finite_float32_of_the_stated_shape_and_repeat(key: SketchKey) -> None:
    drawn = draw(key)
    assert drawn.shape == ((key.dim, key.rank) if key.side == "a" else (key.rank, key.dim))
    assert drawn.dtype == torch.float32
    assert drawn.device.type == "cpu"
    assert drawn.is_contiguous()
    assert torch.isfinite(drawn).all()
    assert torch.equal(drawn, draw(replace(key)))


@given(keys())
@settings(deadline=None)
def test_draws_do_not_share_memory(key: SketchKey) -> None:
    first = draw(key)
    expected = first.clone()
    first.zero_()
    assert torch.equal(draw(key), expected)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("change", [{"seed": 8}, {"layer": "fc2"}, {"side": "ab"}, {"link": 40}])
def test_seed_layer_side_and_link_change_the_draw(law: str, change: dict[str, int | str]) -> None:
    key = replace(KEY, law=law, dim=60)
    assert not torch.equal(draw(key), draw(replace(key, **change)))  # type: ignore[arg-type]  # fields of mixed types


@pytest.mark.parametrize("law", LAWS)
def test_draw_does_not_depend_on_other_layers_or_the_order_of_calls(law: str) -> None:
    layers = [replace(KEY, law=law, layer=name, dim=dim) for name, dim in [("fc1", 9), ("fc2", 50), ("fc3", 7)]]
    forwards = [draw(key) for key in layers]
    torch.manual_seed(1)
    np.random.default_rng(1)
    backwards = [draw(key) for key in reversed(layers)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_c13_another_process_with_other_threads_draws_the_same() -> None:
    program = (
        "from fedraclora.sketch import *\n"
        "for law in reversed(LAWS):\n"
        "    for side in ('a', 'b'):\n"
        "        print(law, side, digest(draw(SketchKey(law, 5, 3, 'fc1', side, 16, 784))))\n"
    )
    num_threads = "1" if torch.get_num_threads() > 1 else "2"
    environment = os.environ | dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"], num_threads)
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    expected = {
        f"{law} {side} {digest(draw(SketchKey(law, 5, 3, 'fc1', side, 16, 784)))}" for law in LAWS for side in "ab"
    }
    assert set(found.stdout.splitlines()) == expected


@given(keys(), st.data())
@settings(deadline=None)
def test_first_rows_of_a_larger_rank_are_the_smaller_rank(key: SketchKey, data: st.DataObject) -> None:
    key = replace(key, law=data.draw(st.sampled_from(NESTING_LAWS)))
    smaller = data.draw(st.integers(1, key.rank))
    assert torch.equal(_rows(key)[:smaller], _rows(replace(key, rank=smaller)))


@given(keys(), st.data())
@settings(deadline=None)
def test_rows_are_the_first_rows_of_the_whole_draw_bit_for_bit(key: SketchKey, data: st.DataObject) -> None:
    """For every law, also those that do not nest: the whole factor is drawn, and its first rows are kept."""
    rows = data.draw(st.integers(1, key.rank))
    cut = replace(key, rows=rows)
    assert torch.equal(_rows(cut), _rows(key)[:rows])
    assert tuple(draw(cut).shape) == cut.shape == ((key.dim, rows) if key.side == "a" else (rows, key.dim))
    assert draw(cut).is_contiguous()


def test_orthonormal_law_nests_up_to_rounding() -> None:
    key = replace(KEY, rank=12, dim=100)
    for rank in range(1, 12):
        torch.testing.assert_close(_rows(key)[:rank], _rows(replace(key, rank=rank)), rtol=0, atol=2**-23)


def test_gaussian_raw_and_orthonormal_span_the_same_subspace() -> None:
    raw, gaussian, orthonormal = (_rows(replace(KEY, law=law)) for law in ("raw", "gaussian", "orthonormal"))
    torch.testing.assert_close(raw / math.sqrt(7), gaussian, rtol=2e-7, atol=0)
    torch.testing.assert_close(raw @ orthonormal.T @ orthonormal, raw, rtol=0, atol=1e-6)


# ---- the laws ----


@pytest.mark.parametrize("law", ORTHONORMAL_LAWS)
@pytest.mark.parametrize(("rank", "dim"), [(1, 1), (3, 7), (7, 7), (16, 784)])
@pytest.mark.parametrize("side", ["a", "b"])
def test_rows_are_orthonormal_to_float32_rounding(law: str, rank: int, dim: int, side: str) -> None:
    rows = _rows(replace(KEY, law=law, rank=rank, dim=dim, side=side))
    # Entries carry relative errors of 2^-24, so a product of two unit rows errs by at most 2^-23 and a little.
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank).double(), rtol=0, atol=2**-22)


def test_orthonormal_law_is_the_exact_factorisation_rounded_to_float32() -> None:
    key = replace(KEY, rank=8, dim=300)
    basis: list[np.ndarray] = []
    for row in _rows(replace(key, law="raw")).numpy().astype(np.longdouble):
        rest = row
        for direction in basis * 2:  # Gram-Schmidt, done twice, is as accurate as its arithmetic
            rest = rest - (rest @ direction) * direction
        basis.append(rest / np.sqrt(rest @ rest))
    assert torch.equal(draw(key), torch.from_numpy(np.stack(basis).astype(np.float32)))


def test_orthonormal_signs_make_the_diagonal_of_r_positive() -> None:
    key = replace(KEY, rank=7)
    r = _rows(key) @ _rows(replace(key, law="raw")).T
    assert (r.diagonal() > 0).all()
    torch.testing.assert_close(r.tril(-1), torch.zeros(7, 7).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("law", SCALED_LAWS)
def test_expected_gram_matrix_is_the_identity(law: str) -> None:
    rank, dim, count = 3, 12, 1000
    draws = torch.stack([_rows(replace(KEY, law=law, rank=rank, dim=dim, link=i)) for i in range(count)])
    mean = (draws @ draws.mT).mean(0)
    # The widest law is the Gaussian: the variance of an entry of A A^T is at most 2 / dim. Six standard deviations.
    torch.testing.assert_close(mean, torch.eye(rank).double(), rtol=0, atol=6 * math.sqrt(2 / dim / count))


@pytest.mark.parametrize("law", LAWS)
def test_entries_have_mean_zero_but_for_selectors(law: str) -> None:
    rank, dim, count = 2, 6, 1000
    mean = torch.stack([_rows(replace(KEY, law=law, rank=rank, dim=dim, link=i)) for i in range(count)]).mean(0)
    # A selector's entries are 0 or 1, with mean 1 / dim; the others are symmetric.
    expected = 1 / dim if "selector" in law else 0.0
    # The variance is at most the mean square.
    variance = 1 if law == "raw" else 1 / dim
    torch.testing.assert_close(mean, torch.full_like(mean, expected), rtol=0, atol=6 * math.sqrt(variance / count))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_c1_projector_has_rank_r_and_is_isotropic_on_average(law: str, side: str) -> None:
    rank, dim, count = 4, 16, 1000
    draws = torch.stack([_rows(replace(KEY, law=law, side=side, rank=rank, dim=dim, link=i)) for i in range(count)])
    projectors = draws.mT @ torch.linalg.pinv(draws @ draws.mT, hermitian=True, rtol=1e-9) @ draws
    torch.testing.assert_close(projectors @ projectors, projectors, rtol=0, atol=1e-6)
    torch.testing.assert_close(projectors.mT, projectors, rtol=0, atol=1e-6)
    ranks = torch.linalg.matrix_rank(draws, rtol=1e-5)
    # Two of the four rows of signs coincide or are opposite with probability at most 6 * 2 / 2^16.
    assert (ranks < rank).sum() <= (3 if law == "rademacher" else 0)
    share = rank / dim
    # Diagonal: numbers in [0, 1] of mean r/n. Off the diagonal: the squares of H add up to r, over n (n - 1) places.
    variance = share * (1 - share) * torch.where(torch.eye(dim, dtype=torch.bool), 1.0, 1 / (dim - 1))
    deviations = (projectors.mean(0) - share * torch.eye(dim)).abs() / (variance / count).sqrt()
    assert deviations.max() < 6


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5), st.sampled_from(["a", "b", "ab"]))
@settings(deadline=None)
def test_selector_without_replacement_covers_all_coordinates_in_each_cycle(
    rank: int, dim: int, cycle: int, side: str
) -> None:
    rank = min(rank, dim)
    length = math.ceil(dim / rank)
    key = SketchKey("selector_without_replacement", 1, 0, "fc1", side, rank, dim)
    chosen = [_rows(replace(key, link=cycle * length + i)).argmax(1).tolist() for i in range(length)]
    assert all(len(set(coordinates)) == rank for coordinates in chosen)
    in_order = [coordinate for coordinates in chosen for coordinate in coordinates]
    assert sorted(in_order[:dim]) == list(range(dim))
    assert in_order[dim:] == in_order[: len(in_order) - dim]


def test_selector_without_replacement_permutes_afresh_in_each_cycle() -> None:
    key = replace(KEY, law="selector_without_replacement", rank=20, dim=40)
    first, second = _rows(replace(key, link=0)), _rows(replace(key, link=2))
    assert not torch.equal(first, second)


@given(keys())
@settings(deadline=None)
def test_selectors_are_distinct_rows_of_the_identity(key: SketchKey) -> None:
    rows = _rows(replace(key, law="selector"))
    assert torch.equal(rows.sum(1), torch.ones(key.rank).double())
    assert (rows.count_nonzero(1) == 1).all()
    assert (rows.count_nonzero(0) <= 1).all()


@given(keys())
@settings(deadline=None)
def test_sparse_signs_partition_the_coordinates_into_balanced_blocks(key: SketchKey) -> None:
    rows = _rows(replace(key, law="sparse_sign"))
    sizes = rows.count_nonzero(1)
    assert (rows.count_nonzero(0) == 1).all()
    assert sizes.max() - sizes.min() <= 1
    torch.testing.assert_close(rows.abs().amax(1), sizes.double() ** -0.5, rtol=1e-7, atol=0)
    assert torch.equal(rows.abs().float().amax(1)[:, None] * (rows != 0), rows.abs().float())


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"law": "normal"}, "unknown sketch law 'normal'; the laws are orthonormal, gaussian, .*, raw"),
        ({"side": "c"}, "unknown side 'c' of layer 'fc1'; it is one of 'b', 'a', 'ab'"),
        ({"link": -1}, "link -1 of layer 'fc1' is negative"),
        ({"rank": 0}, "rank 0 of layer 'fc1' is too small; it is at least 1"),
        ({"rows": 4}, "rows 4 of layer 'fc1' must lie between 0 and its rank 3"),
        ({"rows": -1}, "rows -1 of layer 'fc1' must lie between 0 and its rank 3"),
        (
            {"rank": 900, "dim": 784},
            r"rank 900 exceeds the 784 inputs of layer 'fc1' \(side b: lora_a is drawn, .* layer's inputs",
        ),
        (
            {"rank": 11, "dim": 10, "side": "a"},
            r"rank 11 exceeds the 10 outputs of layer 'fc1' \(side a: lora_b is drawn, .* layer's outputs",
        ),
    ],
)
def test_keys_that_name_no_sketch_are_refused(change: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(KEY, **change)  # type: ignore[arg-type]  # fields of mixed types


# ---- digests ----


def test_digest_hashes_dtype_shape_and_little_endian_bytes() -> None:
    tensor = torch.tensor([[1.0, 2.0, -3.0]])
    content = b"float32[1, 3]" + np.array([1, 2, -3], dtype="<f4").tobytes()
    assert digest(tensor) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_digest_takes_every_real_dtype_any_layout_and_no_elements(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    assert digest(tensor.T) == digest(tensor.T.contiguous()) != digest(tensor.reshape(3, 2))
    assert digest(tensor[:0]) != digest(tensor[:, :0])
    assert digest(tensor[0, 0]) != digest(tensor[0, :1])


def test_digest_tells_dtypes_shapes_and_single_bits_apart() -> None:
    zeros = torch.zeros(2, 2)
    others = [zeros.int(), zeros.view(4), zeros.view(1, 4), -zeros, zeros + torch.tensor([0, 1e-45])]
    assert len({digest(tensor) for tensor in [zeros, *others]}) == 6


def test_digest_of_a_parameter_is_that_of_its_values() -> None:
    assert digest(torch.nn.Parameter(torch.ones(2))) == digest(torch.ones(2))


def test_digest_all_depends_on_names_and_tensors_but_not_on_their_order() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert digest_all({"x": x, "y": y}) == digest_all({"y": y, "x": x})
    different = [{"x": x, "y": y}, {"x": y, "y": x}, {"x": x}, {"xy": x}, {}, {"x": x, "z": y}]
    assert len({digest_all(tensors) for tensors in different}) == len(different)
