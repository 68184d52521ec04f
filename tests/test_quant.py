# SPDX-License-Identifier: MIT
"""What nanopeft/quant.py claims: formats against torch's own casts, and the errors of rounding as properties."""

import math
import runpy
import statistics

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanopeft import quant

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
EPS = 2**-23  # of fp32
TINY = 2**-126  # its smallest normal number


def often(*strategies, few=30, many=300):
    """A property that is drawn a few times by default, and many times in the thorough run."""

    def decorate(property_):
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.thorough)])
        def test(examples):
            settings(deadline=None, max_examples=examples)(given(*strategies)(property_))()

        test.__name__, test.__doc__ = property_.__name__, property_.__doc__
        return test

    return decorate


def with_bits(bits, dtype):
    """The numbers of a format that have these bits."""
    size = {1: (torch.uint8, 0), 2: (torch.int16, 2**16), 4: (torch.int32, 2**32)}[dtype.itemsize]
    signed = torch.where(bits >= size[1] // 2, bits - size[1], bits) if size[1] else bits
    return signed.to(size[0]).view(dtype)


def stored_bits(x):
    """The bits that a float tensor is kept in, as whole numbers from 0 on."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    return x.view(size).long() & (2 ** (8 * x.dtype.itemsize) - 1)


def same_numbers(one, other):
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one[~one.isnan()].double().view(torch.int64), other[~other.isnan()].double().view(torch.int64)
    )


# ------------------------------------------------------------------------------------------------------ number formats


@pytest.mark.parametrize("dtype", NARROW)
def test_every_bit_pattern_has_its_value(dtype):
    """Each of a format's 2^8 or 2^16 bit patterns means what torch reads in it, signs of zero included."""
    bits = torch.arange(2 ** (8 * dtype.itemsize))
    assert same_numbers(quant.value(bits, dtype), with_bits(bits, dtype).double())


@often(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_fp32_bit_patterns_have_their_value(patterns):
    """The same for fp32, over drawn patterns; and the three fields put together are the pattern again."""
    bits = torch.tensor(patterns)
    assert same_numbers(quant.value(bits, torch.float32), with_bits(bits, torch.float32).double())
    sign, exponent, mantissa = quant.split_bits(bits, torch.float32)
    assert torch.equal(sign * 2**31 + exponent * 2**23 + mantissa, bits)


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_at_every_number_and_midpoint(dtype):
    """Every number of a format, every midpoint of two, and fp32's next ones on both sides round to torch's bits."""
    x = with_bits(torch.arange(2 ** (8 * dtype.itemsize)), dtype).double()
    x = x[x.isfinite()].sort().values
    middle = (x[1:] + x[:-1]) / 2  # exact in fp32 too: one bit more than the format's
    above, below = x[-1] + (x[-1] - x[-2]) / 2, x[-1] + (x[-1] - x[-2])  # where overflow begins, and past it
    points = torch.cat((x, middle, torch.stack((above, below, -above, -below)))).float()
    infinity = torch.tensor(torch.inf)
    points = torch.cat((points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)))
    points = torch.cat((points, torch.tensor([torch.inf, -torch.inf, -0.0])))
    if dtype == torch.float8_e4m3fn and torch.tensor(1e4).to(dtype).isnan():
        points = points[points.abs() < 464]  # older torch overflows to NaN there
    assert torch.equal(quant.round_to_bits(points, dtype), stored_bits(points.to(dtype)))


@often(st.sampled_from((torch.float32, *NARROW)), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_of_any_fp32_is_torchs_cast(dtype, patterns):
    """Any fp32 bits, subnormals, infinities and NaN among them, round to the bits of torch's cast; NaN stays NaN."""
    x = with_bits(torch.tensor(patterns), torch.float32)
    if dtype == torch.float8_e4m3fn and torch.tensor(1e4).to(dtype).isnan():
        x = x[x.abs() < 464]
    found, expected = quant.round_to_bits(x, dtype), stored_bits(x.to(dtype))
    assert torch.equal(found[~x.isnan()], expected[~x.isnan()])
    assert quant.value(found[x.isnan()], dtype).isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, *NARROW))
def test_the_table_of_formats(dtype):
    """Largest, smallest normal number and gap after 1 by their bit patterns: torch.finfo's and the docstring's."""
    info = torch.finfo(dtype)
    exponent_bits, m, _ = quant.format_of(dtype)
    assert 1 + exponent_bits + m == 8 * dtype.itemsize
    one = quant.round_to_bits(torch.tensor(1.0), dtype)
    gap = quant.value(one + 1, dtype) - 1
    assert (quant.value(torch.tensor(1 << m), dtype), gap) == (info.tiny, info.eps)
    largest = quant.round_to_bits(torch.tensor(torch.inf), dtype) - int(dtype != torch.float8_e4m3fn)
    assert quant.value(largest, dtype) == info.max
    name = {torch.float8_e4m3fn: "fp8 e4m3fn", torch.float8_e5m2: "fp8 e5m2"}.get(dtype)
    name = name or {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    row = next(line for line in quant.__doc__.splitlines() if line.startswith(f"    {name} "))
    *layout, large, normal, step = row.removeprefix(f"    {name}").split()[:6]
    assert [len(bits) for bits in layout] == [1, exponent_bits, m]
    assert float(large) == pytest.approx(info.max, rel=0.02) and float(normal) == pytest.approx(info.tiny, rel=0.05)
    assert 2.0 ** int(step.removeprefix("2^")) == gap


def test_golden_numbers_of_formats():
    """bf16: 256 + 1 is 256, and the gap after 1 is 2^-7; fp16: 65519 is 65504, 65520 is infinite, 2048 + 1 is 2048."""
    for x, dtype, expected in (
        (257.0, torch.bfloat16, 256.0), (1 + 2**-8, torch.bfloat16, 1.0), (3.4e38, torch.bfloat16, math.inf),
        (65519.0, torch.float16, 65504.0), (65520.0, torch.float16, math.inf), (2049.0, torch.float16, 2048.0),
    ):  # fmt: skip
        assert quant.value(quant.round_to_bits(torch.tensor(x), dtype), dtype) == expected


def test_why_fp16_needs_loss_scaling_and_bf16_does_not():
    """1e-8 is 0 in fp16 and kept in bf16; times 2^16 fp16 keeps it as well. fp16 ends at 3e-8 and 65520."""
    kept = lambda x, dtype: quant.value(quant.round_to_bits(torch.tensor(x), dtype), dtype).item()  # noqa: E731
    assert kept(1e-8, torch.float16) == kept(2.9e-8, torch.float16) == 0 < kept(3e-8, torch.float16)
    assert kept(1e-8, torch.bfloat16) == pytest.approx(1e-8, rel=2**-8)
    assert kept(1e-8 * 2**16, torch.float16) / 2**16 == pytest.approx(1e-8, rel=2**-11)
    assert kept(65519.0, torch.float16) == 65504 and kept(65520.0, torch.float16) == math.inf


# ----------------------------------------------------------------------------------------------------- drawing tensors


@st.composite
def tensors(draw, dtypes=FLOATS, smallest=-30, largest=30):
    """Of any shape and length, in steps of magnitude from 1e-30 to 1e30, with zeros, constants and subnormals."""
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 3000))
    dtype = draw(st.sampled_from(dtypes))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    kind = draw(st.sampled_from(("normal", "heavy", "positive", "constant", "zeros", "sparse", "steps")))
    if kind == "heavy":
        x = x.double().pow(9).float()
    elif kind == "positive":
        x = x.abs() + 1
    elif kind == "constant":
        x = torch.full(shape, draw(st.floats(-1, 1, width=32)))
    elif kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "sparse":
        x = x * (x > 1)
    elif kind == "steps":
        x = (x * 100).round() / 2  # many on half a step
    x = (x.double() * 10.0 ** draw(st.integers(smallest, largest))).to(dtype)
    assume(x.isfinite().all())
    return x


@st.composite
def subnormals(draw):
    n = draw(st.integers(1, 300))
    bits = torch.randint(2 ** draw(st.integers(1, 23)), (n,), generator=torch.Generator().manual_seed(n))
    return with_bits(bits, torch.float32) * torch.randn(n).sign()


groupings = st.one_of(st.sampled_from(("tensor", "row")), st.integers(1, 300))
block_sizes = st.sampled_from((2, 32, 64, 100, 128, 4096))


def spread(scale, granularity, shape):
    """The scale of each number."""
    n = math.prod(shape)
    size = {"tensor": n, "row": shape[-1]}.get(granularity, granularity)
    return scale.flatten().repeat_interleave(size)[:n].view(shape)


# ----------------------------------------------------------------------------------------------------------------- int8


@often(tensors(), groupings)
def test_int8_absmax_is_off_by_half_a_scale(x, granularity):
    """|x - q · scale| <= scale/2 for every shape, type, magnitude and grouping; no -128, and no sign flips."""
    q, scale = quant.quantize_int8(x, granularity)
    assert q.dtype == torch.int8 and q.shape == x.shape and scale.dtype == torch.float32 and q.min() >= -127
    s = spread(scale, granularity, x.shape).double()
    decoded = quant.dequantize_int8(q, scale, granularity, torch.float64)  # 7 bits by 24: exact
    # The quotient is rounded once in fp64. At ±127 scale's own rounding, ε/2 of it, counts 127-fold only where |x| is
    # the maximum itself, which is far from a half.
    normal = s >= TINY
    assert ((x.double() - decoded).abs() <= s / 2 * (1 + 8 * EPS))[normal].all()
    assert (x.double() * decoded >= 0).all()
    # and in fp32 or narrower that number is rounded once
    for dtype in FLOATS:
        assert torch.equal(quant.dequantize_int8(q, scale, granularity, dtype), decoded.float().to(dtype))


@pytest.mark.parametrize("wrong", ["row", "tensor", 32])
def test_scales_of_other_groups_are_refused(wrong):
    """Decoding by other groups than those of the scales is refused: it would multiply by the wrong ones."""
    x = torch.randn(6, 128)
    with pytest.raises(quant.Error, match="scales do not fit"):
        quant.dequantize_int8(*quant.quantize_int8(x, 64), wrong)
    with pytest.raises(quant.Error, match="scales do not fit"):
        quant.dequantize_zero_point(*quant.quantize_zero_point(x, 64), wrong)


@often(st.integers(1, 300), st.sampled_from([32, 64, 128]), st.integers(1, 300), st.sampled_from([32, 64, 128]))
def test_nf4_of_another_size_is_refused(n, block_size, m, other):
    """NF4 read with a size or block that its bytes and scales do not fit is refused, never filled with garbage."""
    packed, scale = quant.quantize_nf4(torch.randn(n), block_size)
    if (-(-n // 2), -(-n // block_size)) == (-(-m // 2), -(-m // other)):
        assert quant.dequantize_nf4(packed, scale, (m,), block_size=other).shape == (m,)
    else:
        with pytest.raises(quant.Error, match="do not fit"):
            quant.dequantize_nf4(packed, scale, (m,), block_size=other)


@often(subnormals(), groupings)
def test_int8_of_subnormals_is_finite(x, granularity):
    """Below the normal numbers a scale loses its digits, but nothing is lost to 0/0, and no sign flips."""
    for decoded in (
        quant.dequantize_int8(*quant.quantize_int8(x, granularity), granularity, torch.float64),
        quant.dequantize_zero_point(*quant.quantize_zero_point(x, granularity), granularity, torch.float64),
    ):
        assert (decoded * x.double() >= 0).all() and decoded.abs().max() <= 256 * x.abs().max().double()


@often(tensors(), groupings)
def test_zero_point_holds_zero_and_is_off_by_half_a_scale(x, granularity):
    """|x - x̂| <= scale/2, 0 comes back as 0, and the range from the lowest to the highest number includes 0."""
    q, scale, zero = quant.quantize_zero_point(x, granularity)
    assert q.dtype == zero.dtype == torch.int8 and q.shape == x.shape
    s = spread(scale, granularity, x.shape).double()
    decoded = quant.dequantize_zero_point(q, scale, zero, granularity, torch.float64)
    # A q of 128 is clipped only if max / scale and -min / scale both end in a half. (max - min) / scale is 255 but for
    # scale's own rounding, ε/2 of it
    assert ((x.double() - decoded).abs() <= s * (0.5 + 255 * EPS))[s >= TINY].all()
    assert (decoded[x == 0] == 0).all()
    # what the codes -128 and 127 stand for: the ends of the range, each up to half a scale off, and 0 between them
    ends = [spread((end - zero.double()) * scale, granularity, x.shape) for end in (-128, 127)]
    assert (ends[0] <= 0).all() and (ends[1] >= 0).all()
    assert ((ends[0] <= x.double() + 0.51 * s) & (ends[1] >= x.double() - 0.51 * s))[s >= TINY].all()


def test_zero_point_uses_its_codes_on_one_side():
    """On numbers of one sign zero-point halves absmax's error: 255 steps against 127 over the same range."""
    torch.manual_seed(0)
    x = torch.rand(1000, 64) + 0.0
    absmax = quant.dequantize_int8(*quant.quantize_int8(x)) - x
    zero_point = quant.dequantize_zero_point(*quant.quantize_zero_point(x)) - x
    # 64,000 nearly uniform errors: the ratio of their RMS is 127/255 to about 1/√64000
    assert (zero_point.square().mean() / absmax.square().mean()).sqrt().item() == pytest.approx(127 / 255, rel=0.02)


def test_smaller_groups_confine_an_outlier():
    """One outlier of 100 in a normal matrix spoils the tensor, its row, or its block of 64, and no more."""
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    x[3, 7] = 100
    expected = {"tensor": x.numel(), "row": 256, 64: 64}
    for granularity, spoilt in expected.items():
        error = (quant.dequantize_int8(*quant.quantize_int8(x, granularity), granularity) - x).abs()
        # under a scale of 100/127 errors are uniform up to 0.39; under the others' at most 5/254
        assert 0.8 * spoilt <= (error > 0.02).sum() / 0.95 <= 1.05 * spoilt


# ------------------------------------------------------------------------------------------------------------------ NF4

GAPS = torch.tensor(quant.NF4).double().diff()


def test_codebook_is_its_derivation():
    """The constants are the derived ones to 1e-7: 7 below an exact zero and 8 above, the outermost at 0.9677083."""
    codes = torch.tensor(quant.NF4)
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    assert round(outermost, 7) == 0.9677083
    # The second level is then the quantile one step further in: positive ones in 8 steps from 1/2, negative in 7
    Q = statistics.NormalDist().inv_cdf
    for steps, code in ((8, codes[14]), (7, -codes[1])):
        step = (outermost - 0.5) / steps
        assert Q(outermost - step) / Q(outermost) == pytest.approx(code.item(), abs=1e-6)
    assert (quant.normal_float() - codes).abs().max() <= 1e-7
    assert codes[7] == 0 and codes[0] == -1 and codes[15] == 1 and (codes.diff() > 0).all()


def test_a_block_by_hand():
    """The docstring's block: 0.3, -2, 0, 1 are stored as 0x90 0x7c and 2, and come back as 0.3219, -2, 0, 0.8814."""
    packed, absmax = quant.quantize_nf4(torch.tensor([0.3, -2.0, 0.0, 1.0]))
    assert (packed.tolist(), absmax.tolist()) == ([0x90, 0x7C], [2])
    back = quant.dequantize_nf4(packed, absmax, (4,)).tolist()
    assert [round(x, 4) for x in back] == [0.3219, -2, 0, 0.8814]


@often(st.one_of(tensors(), subnormals()), block_sizes, st.sampled_from(FLOATS))
def test_dequantizing_plainly_and_fast_is_the_same(x, block_size, dtype):
    """One lookup per byte gives to the bit what unpacking the nibbles and codes[q] · absmax give."""
    packed, absmax = quant.quantize_nf4(x, block_size)
    plain = quant.dequantize_nf4_plain(packed, absmax, x.shape, block_size)
    assert torch.equal(quant.dequantize_nf4(packed, absmax, x.shape, dtype, block_size), plain.to(dtype))


@often(tensors(smallest=-20, largest=20), block_sizes)
def test_each_weight_gets_its_nearest_code(x, block_size):
    """q = argmin_i |x / absmax - codes[i]|, computed in fp64, but where x / absmax is a midpoint to fp32's rounding."""
    packed, absmax = quant.quantize_nf4(x, block_size)
    q = torch.stack((packed >> 4, packed & 15), 1).flatten()[: x.numel()].long()
    codes, s = torch.tensor(quant.NF4).double(), spread(absmax, block_size, (x.numel(),)).double()
    scaled = torch.where(s > 0, x.double().flatten() / s, 0)
    expected = (scaled[:, None] - codes).abs().argmin(1)
    # The reciprocal and the product, or the quotient, are rounded by ε/2 each, and so is the midpoint
    near = (scaled - (codes[q] + codes[expected]) / 2).abs() <= 3 * EPS
    assert ((q == expected) | near).all()


def test_nearest_at_midpoints():
    """fp32's next number on either side of a midpoint has the nearer code's index, the midpoint the lower one's."""
    codes = torch.tensor(quant.NF4)
    middle, lower = (codes[:-1] + codes[1:]) / 2, torch.arange(15)
    below, above = middle.nextafter(codes[:-1]), middle.nextafter(codes[1:])
    for x, expected in ((below, lower), (middle, lower), (above, lower + 1)):
        assert torch.equal(quant.nearest(x, codes).long(), expected)


@often(st.one_of(tensors(), subnormals()), block_sizes)
def test_nf4_error_sign_and_order(x, block_size):
    """|x - x̂| <= half the widest gap · block maximum; no sign flips; what was larger in a block is not smaller now."""
    packed, scale = quant.quantize_nf4(x, block_size)
    n = x.numel()
    assert packed.dtype == torch.uint8 and packed.shape == (-(-n // 2),) and scale.shape == (-(-n // block_size),)
    decoded = quant.dequantize_nf4(packed, scale, x.shape, torch.float32, block_size)
    s = spread(scale, block_size, (n,)).double()
    x, decoded = x.double().flatten(), decoded.double().flatten()
    assert torch.equal(s, torch.stack([b.abs().max() for b in x.split(block_size)]).repeat_interleave(block_size)[:n])
    # the reciprocal, the quotient and the product are each rounded to ε/2; below the normal numbers to half the
    # smallest one
    bound = GAPS.max() / 2 * s + 3 * EPS * s + 2**-149
    assert ((x - decoded).abs() <= bound).all()
    assert (x * decoded >= 0).all() and (decoded[x == 0] == 0).all()
    for before, after in zip(x.split(block_size), decoded.split(block_size)):
        assert (after[before.argsort()].diff() >= 0).all()
        assert after.abs().max() == before.abs().max()


@often(st.one_of(tensors(), subnormals()), block_sizes, st.sampled_from(FLOATS))
def test_a_decoded_tensor_is_quantized_to_itself(x, block_size, dtype):
    """Quantizing what was decoded, in whatever type, gives the same scales and numbers, and, if normal, bytes."""
    assume(x.to(dtype).isfinite().all())
    packed, scale = quant.quantize_nf4(x.to(dtype), block_size)
    decoded = quant.dequantize_nf4(packed, scale, x.shape, dtype, block_size)
    packed_again, scale_again = quant.quantize_nf4(decoded, block_size)
    assert torch.equal(scale, scale_again)
    assert torch.equal(quant.dequantize_nf4(packed_again, scale_again, x.shape, dtype, block_size), decoded)
    # Among subnormals two codes may fall on one number, so that the bytes differ. 1/20 is less than each code.
    if ((scale >= 20 * torch.finfo(dtype).tiny) | (scale == 0)).all():
        assert torch.equal(packed, packed_again)


@often(tensors(dtypes=(torch.float32, torch.bfloat16)), st.sampled_from((torch.float32, torch.bfloat16)))
def test_double_quantization_keeps_the_nibbles(x, dtype):
    """Decoded with scales in 8 bits and quantized again, a tensor has the nibbles that it had."""
    packed, scale = quant.quantize_nf4(x)
    rounded = quant.dequantize_scales(*quant.quantize_scales(scale))
    assume((rounded >= 20 * TINY).all())  # not so for a block far below the others, whose scale may vanish
    decoded = quant.dequantize_nf4(packed, rounded, x.shape, dtype)
    assume(decoded.isfinite().all())
    again, _ = quant.quantize_nf4(decoded)
    # A zero stays one; a number that had a nibble keeps it, unless all of its block was zero and its scale is not
    assert torch.equal(again, packed)


@often(st.integers(1, 2000), st.integers(-30, 30), st.floats(0, 3))
def test_scales_in_8_bits(n, magnitude, width):
    """A scale comes back to 0.71 % of the largest distance from the mean among its 256, and the mean itself exactly."""
    scale = torch.rand(n, generator=torch.Generator().manual_seed(n)) * width + 1
    scale *= 10.0**magnitude
    q, scale2, mean = quant.quantize_scales(scale)
    assert q.dtype == torch.uint8 and q.shape == scale.shape and scale2.shape == (-(-n // 256),)
    decoded = quant.dequantize_scales(q, scale2, mean)
    distance = (scale - mean).abs()
    largest = torch.stack([d.max() for d in distance.split(256)]).repeat_interleave(256)[:n]
    # The map's gaps near 1 are 0.9/64, half of that 0.00703; the grid of 2^16 adds half a step of 2/65535; -1 alone is
    # off by as much, since the map begins at -0.99297. Then roundings of the sum, ε of its size.
    assert ((decoded - scale).abs() <= (0.00704 + 1 / 65535) * largest + 4 * EPS * scale).all()


@pytest.mark.parametrize("shape", [(1024, 1024), (768, 2304)])
def test_bits_per_parameter(shape):
    """NF4 keeps 4.5 bits per weight, and with double quantization 4.127, counted over the tensors that are kept."""
    packed, scale = quant.quantize_nf4(torch.randn(shape))
    q, scale2, mean = quant.quantize_scales(scale)
    n = math.prod(shape)
    bits = lambda *kept: 8 * sum(t.numel() * t.element_size() for t in kept) / n  # noqa: E731
    assert bits(packed, scale) == 4.5
    assert bits(packed, q, scale2) == 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125
    assert bits(packed, q, scale2, mean) == 4.126953125 + 32 / n
    for kept in (packed, q, scale2, mean):  # no view of something larger
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    if shape == (768, 2304):  # GPT-2's c_attn
        assert scale.numel() == 27_648 and scale2.numel() == 108


def test_golden_bytes():
    """[1, -1, 0, 0.5] is f0 7c; midpoints go down; an odd one out is paired with 7, the code of 0."""
    packed, scale = quant.quantize_nf4(torch.tensor([1, -1, 0, 0.5]))
    assert packed.tolist() == [0xF0, 0x7C] and scale.tolist() == [1]
    codes = torch.tensor(quant.NF4)
    middle = (codes[1:] + codes[:-1]) / 2
    packed, _ = quant.quantize_nf4(torch.cat((torch.ones(1), middle)))
    assert torch.stack((packed >> 4, packed & 15), 1).flatten().tolist() == [15, *range(15)]
    packed, scale = quant.quantize_nf4(torch.cat((torch.zeros(64), torch.ones(1))))
    assert packed.tolist() == [0x77] * 32 + [0xF7] and scale.tolist() == [0, 1]


def test_golden_errors():
    """On N(0, 1), blocks of 64: RMS error 9.2 % in NF4, 8-bit absmax or not, int8 0.6 %, and 0.8 % in rows of 768.

    Even 4-bit levels give 10.8 % from -7 to 7, and 9.1 % when all 16 span min to max with a zero-point.
    """
    torch.manual_seed(0)
    x = torch.randn(1000, 768)
    packed, absmax = quant.quantize_nf4(x)
    rounded = quant.dequantize_scales(*quant.quantize_scales(absmax))
    rms = lambda back: (back.view(x.shape) - x).square().mean().sqrt().item()  # noqa: E731
    assert rms(quant.dequantize_nf4(packed, absmax, x.shape)) == pytest.approx(0.0920, abs=0.0005)
    assert rms(quant.dequantize_nf4(packed, rounded, x.shape)) == pytest.approx(0.0920, abs=0.0005)
    assert rms(quant.dequantize_int8(*quant.quantize_int8(x, 64), 64)) == pytest.approx(0.0059, abs=0.0002)
    assert rms(quant.dequantize_int8(*quant.quantize_int8(x))) == pytest.approx(0.0077, abs=0.0002)
    blocks = x.view(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    assert rms((blocks / step).round() * step) == pytest.approx(0.1077, abs=0.0005)
    step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
    zero_point = (-blocks.amin(1, keepdim=True) / step).round()
    q = ((blocks / step).round() + zero_point).clamp(0, 15)
    assert rms((q - zero_point) * step) == pytest.approx(0.0911, abs=0.0005)


def test_why_the_mean_is_subtracted():
    """absmax is 2.6 ± 0.4; its 8 bits take 243 codes and lose 0.22 %, and without the mean 52 codes and 0.67 %.

    bitsandbytes' grid of 2^16 numbers changes 2 codes in a thousand.
    """
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    _, absmax = quant.quantize_nf4(x)
    assert absmax.mean().item() == pytest.approx(2.6, abs=0.05) and absmax.std().item() == pytest.approx(0.42, abs=0.02)
    q, scale2, mean = quant.quantize_scales(absmax)
    codes = quant.dynamic_map(absmax.device)
    raw = absmax.view(-1, 256)
    raw_q = (raw / raw.amax(1, keepdim=True))[..., None].sub(codes).abs().argmin(-1)
    without = (codes[raw_q] * raw.amax(1, keepdim=True)).flatten()
    lost = lambda back: (back / absmax - 1).square().mean().sqrt().item()  # noqa: E731
    assert lost(quant.dequantize_scales(q, scale2, mean)) == pytest.approx(0.0022, abs=0.0002)
    assert lost(without) == pytest.approx(0.0067, abs=0.0003)
    on_no_grid = quant.nearest((absmax - mean).view(-1, 256) / scale2[:, None], codes)
    assert (on_no_grid.flatten() != q).float().mean().item() == pytest.approx(0.002, abs=0.0005)
    assert abs(q.unique().numel() - 243) <= 8 and abs(raw_q.unique().numel() - 52) <= 3


@pytest.mark.parametrize("n", [1, 63, 64, 128, 129, 64 * 6, 64 * 6 + 1, 64 * 7 + 63])
def test_pieces_do_not_show(n, monkeypatch):
    """Worked on two groups at a time, tensors that end within a piece, a block or a byte are what they are whole."""
    x = torch.randn(n)
    whole = quant.quantize_nf4(x), quant.dequantize_nf4(*quant.quantize_nf4(x), (n,))
    whole8 = quant.quantize_int8(x, 64), quant.dequantize_int8(*quant.quantize_int8(x, 64), 64)
    monkeypatch.setattr(quant, "pieces", lambda *tensors: zip(*(t.split(2) for t in tensors)))
    packed, scale = quant.quantize_nf4(x)
    assert torch.equal(packed, whole[0][0]) and torch.equal(scale, whole[0][1])
    assert torch.equal(quant.dequantize_nf4(packed, scale, (n,)), whole[1])
    q, scale = quant.quantize_int8(x, 64)
    assert torch.equal(q, whole8[0][0]) and torch.equal(scale, whole8[0][1])
    assert torch.equal(quant.dequantize_int8(q, scale, 64), whole8[1])


# --------------------------------------------------------------------------------------------------------------- misuse


@often(tensors(), st.sampled_from((math.inf, -math.inf, math.nan)), st.integers(0, 10**6))
def test_inf_and_nan_are_refused(x, bad, place):
    """One inf or NaN anywhere is refused by each of the three, with a message that names it."""
    x.view(-1)[place % x.numel()] = bad
    for quantize in (quant.quantize_int8, quant.quantize_zero_point, quant.quantize_nf4):
        with pytest.raises(quant.Error, match="inf or NaN"):
            quantize(x)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: quant.quantize_nf4(torch.ones(4), 63), "even number of weights"),
        (lambda: quant.quantize_nf4(torch.ones(4), 0), "even number of weights"),
        (lambda: quant.quantize_nf4(torch.ones(4), 64.0), "not 64.0"),
        (lambda: quant.quantize_nf4(torch.ones(4, dtype=torch.float64)), "float64"),
        (lambda: quant.quantize_nf4(torch.ones(4).int()), "int32"),
        (lambda: quant.quantize_nf4(torch.ones(0)), "not 0 of"),
        (lambda: quant.quantize_int8(torch.ones(4), "column"), "'column'"),
        (lambda: quant.quantize_int8(torch.ones(4), 0), "not 0"),
        (lambda: quant.quantize_zero_point(torch.ones(4).long()), "int64"),
        (lambda: quant.dequantize_nf4(torch.zeros(2, dtype=torch.uint8), torch.ones(1).half(), (4,)), "cast a model"),
        (lambda: quant.dequantize_nf4(torch.zeros(3, dtype=torch.uint8), torch.ones(1), (4,)), "3 bytes do not fit 4"),
        (lambda: quant.value(torch.tensor(1), torch.float64), "float64"),
    ],
)
def test_wrong_use(wrong, message):
    """Block size, grouping, type and scales that cannot be: an Error of one clear line."""
    with pytest.raises(quant.Error, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_does_not_matter(dtype):
    """Tables made while another default dtype holds are the same, and so is what is decoded with them later."""
    x = torch.randn(4, 64)

    def all_of_it():
        packed, scale = quant.quantize_nf4(x)
        stored = quant.quantize_scales(scale)
        return packed, scale, *stored, quant.dequantize_nf4(packed, quant.dequantize_scales(*stored), x.shape)

    expected = all_of_it()
    quant.TABLES.clear()
    torch.set_default_dtype(dtype)
    try:
        found = all_of_it()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), expected))


@pytest.mark.parametrize("quantize", [quant.quantize_int8, quant.quantize_zero_point, quant.quantize_nf4])
def test_what_is_quantized_needs_no_gradient(quantize):
    """A parameter can be quantized as it is: nothing that comes out is tied to it."""
    assert not any(t.requires_grad for t in quantize(torch.randn(4, 64, requires_grad=True)))


def test_demonstration(capsys):
    """python nanopeft/quant.py prints the formats and the errors that the docstring claims."""
    runpy.run_path(quant.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    back = "bytes 90 7c tensor([ 0.3219, -2.0000,  0.0000,  0.8814])"
    for claim in (back, "4.127 bits", "1 01101 0011001101, and 1e-8 is 0\n"):
        assert claim in printed
