import itertools
import struct
import tracemalloc
import zlib
from fractions import Fraction
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedraclora import plugins
from fedraclora.compressors import COMPRESSORS
from fedraclora.compressors._bits import pack, packed_bytes, unpack
from fedraclora.compressors._scales import to_scales

NAMES = plugins.names(COMPRESSORS)
# The identity passes on whatever it is given.
CHECKING = [name for name in NAMES if name != "none"]
FIXED_SIZE = [name for name in NAMES if name != "lossless"]

# Each plug-in as it comes, and with every other way of working that a setting gives.
VARIANTS = [(name, {}) for name in NAMES] + [
    ("int8", {"stochastic": False}),
    ("int8", {"scale_per": "column"}),
    ("int4", {"stochastic": False, "scale_per": "column"}),
    ("int4", {"scale_per": "column"}),
    ("qsgd", {"levels": 1}),
    ("qsgd", {"levels": 100}),
    ("qsgd", {"levels": 2**15 - 1}),
    ("top_k", {"share": 0.001}),
    ("top_k", {"share": 1.0}),
    ("rand_k", {"share": 0.5}),
    ("rand_k", {"scale": False}),
]
CHECKING_VARIANTS = [variant for variant in VARIANTS if variant[0] in CHECKING]
BOTH_DTYPES = [torch.float32, torch.float64]

SHAPES = [(30, 4), (4, 30), (3,), (), (0, 5), (2, 3, 2)]


def codec(name, **config):
    module = plugins.find(COMPRESSORS, name)
    return module.build(module.Config(**config))


def normal(shape=(), *, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype).reshape(shape)


def several(*, seed=0, dtype=torch.float32, shapes=SHAPES):
    return [normal(shape, seed=[seed, position], dtype=dtype) for position, shape in enumerate(shapes)]


def shapes_of(tensors):
    return [tuple(tensor.shape) for tensor in tensors]


def dtype_of(tensors):
    return tensors[0].dtype if tensors else torch.float32


def num_bytes(arrays):
    return sum(array.nbytes for array in arrays.values())


def decoded(compressor, tensors, seed=0):
    return compressor.decode(compressor.encode(tensors, seed), shapes_of(tensors), dtype_of(tensors), seed)


def through(compressor, x, seed=0):
    """Return what becomes of a one-dimensional float64 array."""
    return decoded(compressor, [torch.from_numpy(x)], seed)[0].numpy()


def draws(compressor, x, count):
    """Return what becomes of `x` with each of `count` seeds, `[count, n]`."""
    return np.stack([through(compressor, x, seed) for seed in range(count)])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def same_arrays(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


@st.composite
def tensor_lists(draw, dtypes=BOTH_DTYPES):
    """Draw lists of tensors of any shapes, also empty ones, laid out in either order, with numbers of any magnitude."""
    dtype = draw(st.sampled_from(dtypes))
    numbers = st.one_of(st.floats(-10, 10, width=32), st.floats(-(2.0**120), 2.0**120, width=32), st.just(-0.0))
    tensors = []
    for shape in draw(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=4)):
        values = draw(st.lists(numbers, min_size=prod(shape), max_size=prod(shape)))
        tensor = torch.tensor(values, dtype=dtype).reshape(shape)
        tensors.append(tensor.mT.contiguous().mT if tensor.ndim > 1 and draw(st.booleans()) else tensor)
    return tensors


@st.composite
def vectors(draw, *, low=1e-3, high=1e3):
    """Draw one-dimensional float64 arrays whose numbers are zero or of magnitudes from `low` to `high`."""
    magnitudes = st.one_of(st.just(0.0), st.floats(low, high), st.floats(-high, -low))
    return np.array(draw(st.lists(magnitudes, min_size=1, max_size=30)))


# ---- laws of all compressors


@pytest.mark.parametrize(("name", "config"), VARIANTS)
@settings(max_examples=25)
@given(tensors=tensor_lists(), seed=st.integers(0, 2**63 - 1))
@example(tensors=[], seed=0)
@example(tensors=[torch.zeros(0, 3)], seed=0)
@example(tensors=[torch.zeros(4, 4)], seed=0)
def test_what_comes_back_has_the_shapes_and_dtype_and_never_more_than_the_bytes_promised(name, config, tensors, seed):
    compressor, shapes, dtype = codec(name, **config), shapes_of(tensors), dtype_of(tensors)
    arrays = compressor.encode(tensors, seed)
    found = compressor.decode(arrays, shapes, dtype, seed)
    assert shapes_of(found) == shapes
    assert all(tensor.dtype == dtype and tensor.isfinite().all() and not tensor.requires_grad for tensor in found)
    assert all(array.ndim == 1 for array in arrays.values())
    assert num_bytes(arrays) <= compressor.max_bytes(shapes, dtype)
    if name in FIXED_SIZE:
        assert num_bytes(arrays) == compressor.max_bytes(shapes, dtype)


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_arrays_have_dtypes_that_flower_carries(name, config):
    dtypes = {"uint8", "int8", "int16", "uint16", "int32", "float16", "float32", "float64"}
    for dtype in BOTH_DTYPES:
        arrays = codec(name, **config).encode(several(dtype=dtype), 0)
        assert {array.dtype.name for array in arrays.values()} <= dtypes
        assert all(array.dtype.isnative for array in arrays.values())


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_same_seed_same_arrays_and_input_untouched(name, config):
    compressor, tensors = codec(name, **config), several()
    assert same_arrays(compressor.encode(tensors, 2**63 - 1), compressor.encode(tensors, 2**63 - 1))
    assert all(same_bits(a, b) for a, b in zip(tensors, several(), strict=True))


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_memory_layout_and_gradients_do_not_enter(name, config):
    compressor, tensors = codec(name, **config), several()
    others = [torch.nn.Parameter(t.mT.contiguous().mT if t.ndim > 1 else t) for t in tensors]
    assert not others[0].is_contiguous()
    assert same_arrays(compressor.encode(tensors, 3), compressor.encode(others, 3))


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_what_comes_back_has_memory_of_its_own(name, config):
    compressor, tensors = codec(name, **config), several()
    arrays = compressor.encode(tensors, 0)
    found = compressor.decode(arrays, SHAPES, torch.float32, 0)
    before = [tensor.clone() for tensor in found]
    for array in arrays.values():
        array.fill(0)
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert all(same_bits(a, b) for a, b in zip(tensors, several(), strict=True))


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_zeros_come_back_as_zeros(name, config):
    assert all((tensor == 0).all() for tensor in decoded(codec(name, **config), [torch.zeros(3, 4), torch.zeros(2)]))


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_unbiased_compressors_are_right_on_average(name, config):
    compressor, x, count = codec(name, **config), normal(40, dtype=torch.float64).numpy(), 400
    found = draws(compressor, x, count)
    # The mean of `count` independent draws is off by V / count in mean square, V being the mean square of one draw. The
    # sum over 40 numbers hardly strays from that: three times as much is far out. Float32 scales add a rounding.
    if compressor.is_unbiased:
        limit = 3 * found.var(axis=0).sum() / count + 1e-12 * x @ x
        assert np.square(found.mean(axis=0) - x).sum() <= limit


@pytest.mark.parametrize(("name", "config"), VARIANTS)
@settings(max_examples=30)
@given(x=vectors(), seed=st.integers(0, 1000))
def test_biased_compressors_never_increase_the_distance_from_zero(name, config, x, seed):
    compressor = codec(name, **config)
    if not compressor.is_unbiased:
        error = np.square(through(compressor, x, seed) - x).sum()
        assert error <= x @ x * (1 + 1e-9)


@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_no_tensors_have_no_dtype_that_could_be_wrong(name, config):
    compressor = codec(name, **config)
    assert compressor.decode(compressor.encode([], 0), [], torch.float64, 0) == []


def test_those_that_keep_a_share_are_sparse():
    assert [name for name in ("int8", "qsgd", "rand_k", "sign", "top_k") if codec(name).is_sparse] == [
        "rand_k",
        "top_k",
    ]
    for name in ("top_k", "rand_k"):
        assert np.count_nonzero(through(codec(name, share=0.1), 1 + np.arange(200.0))) == 20


@pytest.mark.parametrize("name", CHECKING)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_encoded(name, number):
    with pytest.raises(ValueError, match="1 of 4 numbers to compress are not finite"):
        codec(name).encode([torch.ones(2), torch.tensor([1.0, number])], 0)


@pytest.mark.parametrize("name", CHECKING)
def test_other_and_mixed_dtypes_are_refused(name):
    compressor = codec(name)
    with pytest.raises(ValueError, match=r"torch.float16 .* have to be torch.float32 or torch.float64"):
        compressor.encode([torch.ones(2, dtype=torch.float16)], 0)
    with pytest.raises(ValueError, match=r"\['torch.float32', 'torch.float64'\]; give all of them one"):
        compressor.encode([torch.ones(2), torch.ones(2, dtype=torch.float64)], 0)
    with pytest.raises(ValueError, match=r"torch.int64 .* have to be"):
        compressor.decode(compressor.encode([torch.ones(2)], 0), [(2,)], torch.int64, 0)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("int8", {"scale_per": "row"}, "scale_per=row is unknown; it is one of tensor, column"),
        ("int4", {"scale_per": ""}, "scale_per= is unknown"),
        ("qsgd", {"levels": 0}, "levels=0 has to lie between 1 and 32767"),
        ("qsgd", {"levels": 2**15}, "levels=32768 has to lie between 1 and 32767"),
        ("top_k", {"share": 0.0}, r"share=0.0 has to be above 0 and at most 1"),
        ("top_k", {"share": 1.01}, "share=1.01 has to be above 0 and at most 1"),
        ("rand_k", {"share": -0.1}, "share=-0.1 has to be above 0 and at most 1"),
        ("rand_k", {"share": float("nan")}, "share=nan has to be above 0 and at most 1"),
    ],
)
def test_impossible_settings_are_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        codec(name, **config)


# ---- what a hostile sender may send


def altered(arrays, name, array):
    return {**arrays, name: array}


def corruptions(arrays):
    """Return sets of arrays that differ from the right ones in names, dtypes, lengths, shape or byte order."""
    for name, array in arrays.items():
        other = np.float64 if array.dtype == np.float32 else np.float32
        yield {key: value for key, value in arrays.items() if key != name}
        yield {("x" + key if key == name else key): value for key, value in arrays.items()}
        yield altered(arrays, name, array[:-1])
        yield altered(arrays, name, array[:0])
        yield altered(arrays, name, np.append(array, array[-1:]))
        yield altered(arrays, name, array.astype(other))
        yield altered(arrays, name, array.astype(object))
        yield altered(arrays, name, array.astype(bool))
        yield altered(arrays, name, array[None])
        yield altered(arrays, name, array[0])
        if array.itemsize > 1:
            yield altered(arrays, name, array.astype(array.dtype.newbyteorder()))
    yield {**arrays, "more": np.zeros(1, np.uint8)}
    yield {}


@pytest.mark.parametrize(("name", "config"), CHECKING_VARIANTS)
def test_arrays_of_other_names_types_lengths_and_shapes_are_refused(name, config):
    compressor = codec(name, **config)
    arrays = compressor.encode(several(), 0)
    for corrupt in corruptions(arrays):
        with pytest.raises(ValueError, match=r"expected|not a zlib stream"):
            compressor.decode(corrupt, SHAPES, torch.float32, 0)


@pytest.mark.parametrize(("name", "config"), CHECKING_VARIANTS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused_wherever_they_stand(name, config, number):
    compressor = codec(name, **config)
    arrays = compressor.encode(several(), 0)
    for key in [key for key, array in arrays.items() if array.dtype.kind == "f"]:
        for place in (0, -1):
            corrupt = arrays[key].copy()
            corrupt[place] = number
            with pytest.raises(ValueError, match=r"expected (finite|magnitudes)"):
                compressor.decode(altered(arrays, key, corrupt), SHAPES, torch.float32, 0)


def test_signalling_nans_are_refused_without_a_warning():
    numbers = {"float16": np.uint16([0x7C01]).view(np.float16), "bfloat16": np.uint16([0x7F81])}
    for name, dtype in itertools.product(numbers, BOTH_DTYPES):
        with pytest.raises(ValueError, match="1 of 1 decoded numbers are not finite"):
            codec(name).decode({"numbers": numbers[name]}, [(1,)], dtype, 0)


@pytest.mark.parametrize(("name", "config"), CHECKING_VARIANTS)
@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(BOTH_DTYPES))
def test_arbitrary_bytes_give_finite_tensors_or_a_value_error(name, config, data, dtype):
    compressor, shapes = codec(name, **config), [(5, 3), (4,)]
    right = compressor.encode(several(shapes=shapes, dtype=dtype), 0)
    noise = {
        key: np.frombuffer(data.draw(st.binary(min_size=array.nbytes, max_size=array.nbytes)), array.dtype)
        for key, array in right.items()
    }
    try:
        found = compressor.decode(noise, shapes, dtype, 0)
    except ValueError:
        return
    assert shapes_of(found) == shapes
    assert all(tensor.isfinite().all() and tensor.dtype == dtype for tensor in found)


@pytest.mark.parametrize(("name", "config"), CHECKING_VARIANTS)
@settings(max_examples=25)
@given(data=st.data())
def test_flipping_bits_gives_finite_tensors_or_a_value_error(name, config, data):
    compressor, shapes = codec(name, **config), [(20, 3), (4,)]
    arrays = compressor.encode([torch.ones(20, 3), normal(4)], 0)
    key = data.draw(st.sampled_from(sorted(arrays)))
    octets = bytearray(arrays[key].tobytes())
    for bit in data.draw(st.lists(st.integers(0, 8 * len(octets) - 1), min_size=1, max_size=4)):
        octets[bit // 8] ^= 1 << bit % 8
    try:
        found = compressor.decode(
            altered(arrays, key, np.frombuffer(octets, arrays[key].dtype)), shapes, torch.float32, 0
        )
    except ValueError:
        return
    assert shapes_of(found) == shapes
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize(("name", "levels", "octet"), [("int8", 127, 0xFF), ("int4", 7, 0xF0), ("int4", 7, 0x0F)])
def test_steps_beyond_the_grid_are_refused(name, levels, octet):
    arrays = {"steps": np.array([octet], np.uint8), "scales": np.ones(1, np.float32)}
    shape = (1,) if name == "int8" else (2,)
    with pytest.raises(ValueError, match=rf"number is {levels + 1}; expected whole numbers from -{levels} to {levels}"):
        codec(name).decode(arrays, [shape], torch.float32, 0)


def test_qsgd_refuses_the_step_that_its_bits_could_hold_beside_the_levels():
    arrays = {"steps": np.array([0b11_000000], np.uint8), "scales": np.ones(1, np.float32)}
    with pytest.raises(ValueError, match="number is 2; expected whole numbers from -1 to 1"):
        codec("qsgd", levels=1).decode(arrays, [(1,)], torch.float32, 0)


@pytest.mark.parametrize("name", ["int8", "int4", "qsgd", "sign"])
def test_negative_scales_are_refused(name):
    arrays = codec(name).encode([torch.ones(5)], 0)
    with pytest.raises(ValueError, match=r"scale is -1.0; expected finite numbers, at least 0"):
        codec(name).decode(altered(arrays, "scales", -np.ones(1, np.float32)), [(5,)], torch.float32, 0)


def test_finite_scales_whose_products_are_not_are_refused():
    arrays = {"steps": np.array([254], np.uint8), "scales": np.array([3e38], np.float32)}
    with pytest.raises(
        ValueError, match=r"1 of 1 decoded numbers are not finite in torch.float32; .* up to 3.4028235e\+38"
    ):
        codec("int8").decode(arrays, [(1,)], torch.float32, 0)
    assert codec("int8").decode(arrays, [(1,)], torch.float64, 0)[0].item() == 127 * float(np.float32(3e38))


def test_natural_refuses_the_exponent_of_infinity():
    arrays = {"signs": np.zeros(1, np.uint8), "exponents": np.array([255], np.uint8)}
    with pytest.raises(ValueError, match="exponent is 255; expected 254 at most"):
        codec("natural").decode(arrays, [(1,)], torch.float64, 0)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 10, 0, 1], "place is 10; expected 0 to 9 in a tensor of 10 numbers"),
        ([0, 9, 1, 8], "place is 8; expected 0 to 7 in a tensor of 8 numbers"),
        ([3, 3, 0, 1], "1 encoded places do not exceed the one before"),
        ([4, 3, 1, 0], "2 encoded places do not exceed the one before"),
        ([0, 65535, 0, 1], "place is 65535"),
    ],
)
def test_places_that_are_outside_repeated_or_unordered_are_refused(places, message):
    arrays = {"values": np.ones(4, np.float32), "places": np.array(places, np.uint16)}
    with pytest.raises(ValueError, match=message):
        codec("top_k", share=0.2).decode(arrays, [(10,), (2, 4)], torch.float32, 0)


def test_negative_places_are_refused_where_places_are_signed():
    num = 2**16 + 1
    arrays = {"values": np.ones(2, np.float32), "places": np.array([-1, 5], np.int32)}
    with pytest.raises(ValueError, match="place is -1; expected 0 to 65536"):
        codec("top_k", share=2 / num).decode(arrays, [(num,)], torch.float32, 0)


@pytest.mark.parametrize("shapes", [[(25_000,)], [(0,)], []])
def test_a_stream_that_unfolds_to_more_is_refused_before_it_does(shapes):
    bomb = np.frombuffer(zlib.compress(bytes(50_000_000), 9), np.uint8)
    assert bomb.nbytes < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"expected (fewer than the 0|a whole stream of 100000) bytes|fewer than the 0"
        ):
            codec("lossless").decode({"zlib": bomb}, shapes, torch.float32, 0)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_streams_of_another_length_cut_short_or_with_something_behind_are_refused():
    def decode(octets):
        return codec("lossless").decode({"zlib": np.frombuffer(octets, np.uint8)}, [(100,)], torch.float32, 0)

    right = zlib.compress(bytes(400))
    assert (decode(right)[0] == 0).all()
    wrong = [zlib.compress(bytes(399)), zlib.compress(bytes(401)), right[:-1], right + b"\0", right + right]
    for octets in wrong:
        with pytest.raises(ValueError, match="expected a whole stream of 400 bytes, and nothing behind it"):
            decode(octets)
    with pytest.raises(ValueError, match="not a zlib stream"):
        decode(right[:-1] + bytes([right[-1] ^ 1]))  # another checksum
    with pytest.raises(ValueError, match="400 compressed bytes came; expected fewer than the 400"):
        decode(bytes(400))


# ---- packed bits


@given(width=st.integers(1, 16), data=st.data())
def test_packed_numbers_are_the_bits_one_after_the_other(width, data):
    numbers = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    bits = "".join(f"{number:0{width}b}" for number in numbers)
    bits += "0" * (-len(bits) % 8)
    expected = [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]
    packed = pack(np.array(numbers, dtype=np.int64), width)
    assert packed.tolist() == expected
    assert packed.nbytes == packed_bytes(len(numbers), width)
    assert unpack(packed, len(numbers), width).tolist() == numbers


def test_int4_packs_two_a_byte_the_first_in_the_upper_half():
    steps = [-7, 7, 0, 3, -1]
    arrays = codec("int4", stochastic=False).encode([torch.tensor(steps) * 0.5], 0)
    expected = [(steps[0] + 7) << 4 | (steps[1] + 7), (steps[2] + 7) << 4 | (steps[3] + 7), (steps[4] + 7) << 4]
    assert arrays["steps"].tolist() == expected
    assert arrays["scales"].tolist() == [0.5]


@given(limit=st.floats(0, 2.0**127), steps=st.sampled_from([1, 7, 127, 2**15 - 1]))
def test_scales_are_the_smallest_of_which_the_steps_reach_the_limit(limit, steps):
    (scale,) = to_scales(np.array([limit]), steps=steps)
    below = np.nextafter(scale, np.float32(0))
    assert Fraction(float(scale)) * steps >= Fraction(limit)
    assert limit == 0 or Fraction(float(below)) * steps < Fraction(limit)


# ---- float16 and bfloat16


def all_magnitudes(count=20000):
    """Return float32 numbers from the smallest to the largest, ties between float16 and between bfloat16 included."""
    bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    bits[: count // 4] = bits[: count // 4] & 0xFFFF0000 | 0x8000
    bits[count // 4 : count // 2] = bits[count // 4 : count // 2] & 0xFFFFE000 | 0x1000
    numbers = bits.view(np.float32)
    return numbers[np.isfinite(numbers)]


def test_float16_is_the_half_precision_of_the_standard_library_up_to_its_largest_number():
    numbers = np.append(all_magnitudes(), np.float32([65504, 65519.996, 65520, 1e30, -1e30, -0.0, 2**-25, 2**-24]))
    near = np.linspace(-70000, 70000, 5000, dtype=np.float32)
    numbers = np.concatenate([numbers, near, near * np.float32(1e-9)])
    sent = codec("float16").encode([torch.from_numpy(numbers)], 0)["numbers"]
    expected = b"".join(struct.pack("<e", max(-65504.0, min(65504.0, number))) for number in numbers.tolist())
    assert sent.astype("<f2").tobytes() == expected


def test_bfloat16_is_that_of_torch_up_to_its_largest_number():
    numbers = torch.from_numpy(all_magnitudes())
    expected = numbers.to(torch.bfloat16)
    largest = torch.finfo(torch.bfloat16).max
    expected = torch.where(expected.isinf(), numbers.sign().to(torch.bfloat16) * largest, expected)
    sent = codec("bfloat16").encode([numbers], 0)["numbers"]
    assert sent.dtype == np.uint16
    assert sent.tolist() == [word & 0xFFFF for word in expected.view(torch.int16).tolist()]
    assert torch.equal(decoded(codec("bfloat16"), [numbers])[0], expected.float())


def test_numbers_beyond_the_largest_are_sent_as_the_largest():
    huge = torch.tensor([3.4028235e38, -3.4028235e38])
    assert decoded(codec("float16"), [huge])[0].tolist() == [65504, -65504]
    largest = torch.finfo(torch.bfloat16).max
    assert decoded(codec("bfloat16"), [huge])[0].tolist() == [largest, -largest]
    assert decoded(codec("bfloat16"), [torch.tensor([1e300, -1e300], dtype=torch.float64)])[0].tolist() == [
        largest,
        -largest,
    ]


# ---- grids: int8, int4, qsgd


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
@settings(max_examples=50)
@given(x=vectors(low=1e-30, high=1e30), seed=st.integers(0, 99), stochastic=st.booleans())
def test_grids_are_off_by_less_than_a_step_or_half_of_one(name, levels, x, seed, stochastic):
    step = np.abs(x).max() / levels * (1 + 2**-22)
    error = np.abs(through(codec(name, stochastic=stochastic), x, seed) - x).max()
    assert error <= (step if stochastic else step / 2) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["int8", "int4"])
@given(largest=st.floats(2.0**-100, 2.0**100, width=32), seed=st.integers(0, 99))
def test_the_largest_magnitude_is_kept_to_float32_and_never_leaves_the_grid(name, largest, seed):
    found = through(codec(name), np.array([largest, -largest]), seed)
    np.testing.assert_allclose(found, [largest, -largest], rtol=2**-23, atol=0)


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (3, 3)])
def test_columns_have_their_own_scales_along_the_shorter_axis(shape):
    axis = 0 if shape == (3, 6) else 1
    spread = torch.tensor([1.0, 1e3, 1e6]).reshape((3, 1) if axis == 0 else (1, 3))
    matrix = normal(shape) * spread
    compressor = codec("int8", scale_per="column", stochastic=False)
    arrays = compressor.encode([matrix, normal(4)], 0)
    np.testing.assert_allclose(arrays["scales"][:3], matrix.abs().amax(1 - axis).numpy() / 127, rtol=2**-22)
    assert len(arrays["scales"]) == 4
    error = (decoded(compressor, [matrix])[0] - matrix).abs() / spread
    assert (error <= matrix.abs().amax(1 - axis, keepdim=True) / spread / 127 / 2 * (1 + 1e-5)).all()


def test_one_scale_a_tensor_serves_the_whole_matrix():
    matrix = normal((6, 3))
    arrays = codec("int8").encode([matrix, normal((2, 2, 2))], 0)
    np.testing.assert_allclose(arrays["scales"][0], matrix.abs().max().item() / 127, rtol=2**-22)
    assert len(arrays["scales"]) == 2


@pytest.mark.parametrize("levels", [1, 4, 64])
@pytest.mark.parametrize("is_flat", [True, False])
def test_variance_of_qsgd_is_that_of_random_rounding_and_below_the_bound_of_the_paper(levels, is_flat):
    num, count = 100, 300
    x = np.ones(num) if is_flat else normal(num, dtype=torch.float64).numpy()
    errors = np.square(draws(codec("qsgd", levels=levels), x, count) - x).sum(axis=1)
    step = np.linalg.norm(x) / levels
    fractions = np.abs(x) / step % 1
    exact = step**2 * (fractions * (1 - fractions)).sum()
    assert exact <= min(num / levels**2, num**0.5 / levels) * x @ x
    # Six standard deviations of the mean, and the float32 rounding of the step.
    assert abs(errors.mean() - exact) <= 6 * errors.std() / count**0.5 + 1e-6 * exact


@pytest.mark.parametrize(("levels", "bits"), [(1, 2), (3, 3), (7, 4), (8, 5), (127, 8), (128, 9), (2**15 - 1, 16)])
def test_qsgd_takes_the_fewest_whole_bits_a_number(levels, bits):
    assert 2 ** (bits - 1) < 2 * levels + 1 <= 2**bits
    assert num_bytes(codec("qsgd", levels=levels).encode([normal(800)], 0)) == 100 * bits + 4


@settings(max_examples=50)
@given(x=vectors(low=1e-200, high=1e36))
def test_qsgd_never_leaves_its_grid_at_any_magnitude(x):
    (found,) = decoded(codec("qsgd", levels=1), [torch.from_numpy(x)])
    assert found.abs().max().item() <= np.linalg.norm(x) * (1 + 2**-23) + 2.0**-149


@pytest.mark.parametrize("name", ["int8", "int4", "qsgd", "sign", "natural"])
def test_magnitudes_too_large_for_the_code_are_refused_and_the_largest_allowed_are_not(name):
    for magnitude in (2.0**127 * (1 + 2**-20), 3e40, 1e200):
        with pytest.raises(ValueError, match=r"too large.* 2\^127"):
            codec(name).encode([torch.full((1,), magnitude, dtype=torch.float64)], 0)
    (found,) = decoded(codec(name), [torch.full((1,), 2.0**127)])
    assert abs(found.item() / 2.0**127 - 1) < 1e-6


def test_int8_of_a_hundred_numbers_takes_less_than_three_tenths_of_float32():
    assert num_bytes(codec("int8").encode([normal(100)], 0)) < 0.3 * 400


# ---- natural


def test_natural_sends_powers_of_two_next_to_the_number_up_with_the_right_probability():
    count = 4000
    found = through(codec("natural"), np.full(count, -4 / 3 * 2.0**-5))
    assert set(found) == {-(2.0**-5), -(2.0**-4)}
    # A binomial of probability 1/3, within six standard deviations.
    share = np.mean(found == -(2.0**-4))
    assert abs(share - 1 / 3) <= 6 * (2 / 9 / count) ** 0.5
    # The variance is largest at 4/3, where it is exactly 1/8: (1/3) (2/3) / (4/3)^2.
    assert np.isclose((2 / 3) * (1 / 3) ** 2 + (1 / 3) * (2 / 3) ** 2, (4 / 3) ** 2 / 8)


@settings(max_examples=50)
@given(x=vectors(low=2.0**-126, high=2.0**127), seed=st.integers(0, 99))
def test_natural_keeps_powers_of_two_and_zero_and_is_off_by_less_than_the_number(x, seed):
    found = through(codec("natural"), x, seed)
    powers = np.where(x == 0, 0, np.exp2(np.floor(np.log2(np.where(x == 0, 1, np.abs(x)))))) * np.sign(x)
    assert np.array_equal(through(codec("natural"), powers, seed), powers)
    mantissas, _ = np.frexp(found)
    assert set(np.abs(mantissas)) <= {0.0, 0.5}
    assert ((found / np.where(x == 0, 1, x) <= 2) & (np.abs(found) > np.abs(x) / 2) | (x == 0)).all()
    assert (np.sign(found) == np.sign(x)).all()


def test_variance_of_natural_is_an_eighth_at_most():
    x = normal(200, dtype=torch.float64).numpy()
    errors = np.square(draws(codec("natural"), x, 200) - x).sum(axis=1)
    lower = np.exp2(np.floor(np.log2(np.abs(x))))
    exact = ((np.abs(x) - lower) * (2 * lower - np.abs(x))).sum()
    assert exact <= x @ x / 8
    assert abs(errors.mean() - exact) <= 6 * errors.std() / 200**0.5


def test_natural_rounds_what_is_smaller_than_its_smallest_power_to_it_or_to_zero():
    found = through(codec("natural"), np.full(4000, 2.0**-128))
    assert set(found) == {0, 2.0**-126}
    assert abs(np.mean(found != 0) - 1 / 4) <= 6 * (3 / 16 / 4000) ** 0.5


def test_natural_takes_nine_bits_a_number():
    arrays = codec("natural").encode([normal(800)], 0)
    assert num_bytes(arrays) == 900


# ---- sign


@given(x=vectors())
def test_sign_contracts_by_the_ratio_of_the_norms(x):
    error = np.square(through(codec("sign"), x) - x).sum()
    # The squared error of scale times sign is least at the mean magnitude, so its rounding enters squared.
    assert np.isclose(error, x @ x - np.abs(x).sum() ** 2 / len(x), rtol=1e-6, atol=1e-12 * (x @ x))


def test_sign_sends_mean_magnitude_and_one_bit_a_number():
    arrays = codec("sign").encode([torch.tensor([1.0, -2.0, 0.0, -5.0]), normal(5)], 0)
    assert arrays["scales"][0] == 2
    assert arrays["signs"][0] >> 4 == 0b0101
    assert len(arrays["signs"]) == 2
    found = codec("sign").decode(arrays, [(4,), (5,)], torch.float32, 0)
    assert found[0].tolist() == [2, -2, 2, -2]


# ---- sparse


def loop_top_k(x, k):
    """The k largest magnitudes one by one; the first of equal ones."""
    kept = np.zeros_like(x)
    left = list(range(len(x)))
    for _ in range(k):
        best = max(left, key=lambda place: (abs(x[place]), -place))
        left.remove(best)
        kept[best] = x[best]
    return kept


@given(
    x=st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10)), min_size=1, max_size=30).map(np.array),
    share=st.floats(0.01, 1),
)
def test_top_k_keeps_the_largest_and_of_equals_the_first_and_contracts_by_k_over_n(x, share):
    k = max(1, round(share * len(x)))
    found = through(codec("top_k", share=share), x)
    assert np.array_equal(found, loop_top_k(x, k))
    assert np.square(found - x).sum() <= (1 - k / len(x)) * (x @ x) * (1 + 1e-12)


@pytest.mark.parametrize(("num", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_places_are_as_small_as_the_largest_tensor_allows(num, dtype):
    compressor = codec("top_k", share=2 / num)
    x = torch.zeros(num)
    x[-1], x[0] = -3, 2
    arrays = compressor.encode([normal(7), x], 0)
    assert arrays["places"].dtype == dtype
    assert arrays["places"].tolist()[1:] == [0, num - 1]
    assert num_bytes(arrays) == compressor.max_bytes([(7,), (num,)], torch.float32) == 3 * (4 + dtype().itemsize)
    assert torch.equal(decoded(compressor, [normal(7), x])[1], x)


def test_tensors_whose_places_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"2147483649 numbers is too large for top_k; it sends places up to 2\^31 - 1"):
        codec("top_k").max_bytes([(2**31 + 1,)], torch.float32)


def test_values_of_float64_are_sent_in_full():
    x = normal(20, dtype=torch.float64)
    for name in ("top_k", "rand_k"):
        assert torch.equal(decoded(codec(name, share=1.0), [x])[0], x)


@pytest.mark.parametrize(("num", "share", "k"), [(100, 0.1, 10), (3, 0.1, 1), (10, 0.26, 3), (5, 1.0, 5), (0, 0.5, 0)])
@pytest.mark.parametrize("name", ["top_k", "rand_k"])
def test_number_of_values_is_the_nearest_to_the_share_and_at_least_one(name, num, share, k):
    assert len(codec(name, share=share).encode([torch.ones(num)], 0)["values"]) == k


def test_rand_k_sends_values_and_nothing_else():
    arrays = codec("rand_k", share=0.25).encode([normal(100), normal(40)], 0)
    assert list(arrays) == ["values"]
    assert arrays["values"].nbytes == 4 * 35


@settings(max_examples=50)
@given(
    shapes=st.lists(st.integers(1, 30), min_size=1, max_size=3), share=st.floats(0.01, 1), seed=st.integers(0, 2**63)
)
def test_rand_k_keeps_k_numbers_of_each_tensor_times_n_over_k(shapes, share, seed):
    found = decoded(codec("rand_k", share=share), [1 + torch.arange(num).double() for num in shapes], seed)
    for tensor, num in zip(found, shapes, strict=True):
        k = max(1, round(share * num))
        kept = tensor.nonzero().flatten()
        assert len(kept) == k
        torch.testing.assert_close(tensor[kept], (1 + kept).double() * (num / k), rtol=1e-14, atol=0)


def test_variance_of_rand_k_is_n_over_k_minus_one():
    # With ones, k numbers are off by n/k - 1 and n - k by 1, whatever is drawn: n (n/k - 1) in sum.
    for k in (1, 3, 10, 40):
        errors = np.square(draws(codec("rand_k", share=k / 40), np.ones(40), 3) - 1).sum(axis=1)
        np.testing.assert_allclose(errors, 40 * (40 / k - 1), rtol=1e-12, atol=1e-12)


def test_unscaled_rand_k_contracts_by_k_over_n_on_average():
    x, count = normal(40, dtype=torch.float64).numpy(), 400
    errors = np.square(draws(codec("rand_k", share=0.25, scale=False), x, count) - x).sum(axis=1)
    assert abs(errors.mean() - 0.75 * x @ x) <= 6 * errors.std() / count**0.5


def test_masks_of_rand_k_are_uniform_and_differ_between_tensors_and_seeds():
    compressor, count = codec("rand_k", share=0.25), 1000
    kept = np.array([[t.numpy() != 0 for t in decoded(compressor, [torch.ones(8)] * 2, s)] for s in range(count)])
    # Each of the 28 pairs of the first tensor is drawn `count / 28` times, within six standard deviations.
    _, times = np.unique(kept[:, 0], axis=0, return_counts=True)
    assert len(times) == 28
    assert np.abs(times - count / 28).max() <= 6 * (count / 28) ** 0.5
    # Both tensors have the same pair by chance only.
    same = (kept[:, 0] == kept[:, 1]).all(axis=1).sum()
    assert abs(same - count / 28) <= 6 * (count / 28) ** 0.5


def test_masks_of_rand_k_are_where_the_largest_raw_philox_integers_lie():
    bits = np.random.Philox(key=123)
    words = [int(word) for word in bits.random_raw(12)]
    expected = sorted(sorted(range(12), key=lambda place: -words[place])[:3])
    assert decoded(codec("rand_k", share=0.25), [torch.ones(12)], 123)[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("number", [-3e38, 1e38])
def test_rand_k_refuses_numbers_that_its_factor_would_make_infinite(number):
    with pytest.raises(ValueError, match=r"e\+38 times n / k = 10 is too large for float32"):
        codec("rand_k").encode([torch.full((20,), number)], 0)


# ---- lossless


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@given(data=st.data())
def test_lossless_returns_every_bit(dtype, data):
    width = 32 if dtype == torch.float32 else 64
    finite = st.floats(allow_nan=False, allow_infinity=False, width=width)
    special = st.sampled_from([-0.0, 0.0, 2.0**-149, -(2.0**-126) + 2.0**-149])
    shape = data.draw(st.lists(st.integers(0, 5), max_size=2).map(tuple))
    numbers = data.draw(st.lists(st.one_of(finite, special), min_size=prod(shape), max_size=prod(shape)))
    tensors = [torch.tensor(numbers, dtype=dtype).reshape(shape), torch.zeros(50, dtype=dtype)]
    assert all(same_bits(a, b) for a, b in zip(decoded(codec("lossless"), tensors), tensors, strict=True))


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_lossless_is_exact_for_both_ways_of_sending(dtype):
    smallest = torch.finfo(dtype).smallest_normal
    smooth = torch.tensor([-0.0, smallest / 2, -smallest / 4, *[1.0] * 50], dtype=dtype)
    rough = torch.from_numpy(np.frombuffer(np.random.default_rng(0).bytes(64), smooth.numpy().dtype).copy())
    for tensor, name in ((smooth, "zlib"), (rough, "planes")):
        assert list(codec("lossless").encode([tensor], 0)) == [name]
        assert same_bits(decoded(codec("lossless"), [tensor])[0], tensor)


def test_planes_are_the_first_bytes_of_all_numbers_then_the_second_ones():
    tensor = torch.tensor([1.5, -2.25, 1e-3])
    words = [struct.pack("<f", number) for number in tensor.tolist()]
    sent = codec("lossless").encode([tensor], 0)["planes"]
    assert sent.tobytes() == b"".join(bytes(word[plane] for word in words) for plane in range(4))


def test_lossless_saves_bytes_on_numbers_of_like_magnitude():
    tensors = [normal(20000, seed=seed) * 1e-3 for seed in (0, 1)]
    assert num_bytes(codec("lossless").encode(tensors, 0)) < 0.9 * 160_000


def test_lossless_refuses_another_dtype_than_was_sent():
    for tensor in (torch.ones(64), normal(4)):
        with pytest.raises(ValueError, match="expected"):
            codec("lossless").decode(codec("lossless").encode([tensor], 0), shapes_of([tensor]), torch.float64, 0)
