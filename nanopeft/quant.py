# SPDX-License-Identifier: MIT
"""Numbers in few bits: what a float's bits mean, and how a weight is kept in 8 or 4 of them.

A float is a sign s, an exponent field E and a mantissa field M of m bits:

    value = (-1)^s · (1 + M / 2^m) · 2^(E - bias)        bias = 2^(exponent bits - 1) - 1
    E = 0:  (-1)^s · M / 2^m · 2^(1 - bias)              the subnormals, zero among them

                sign / exponent / mantissa     largest      smallest normal    gap after 1
    fp32           1 / 8 / 23                  3.4e38       1.2e-38            2^-23
    fp16           1 / 5 / 10                  65504        6.1e-5             2^-10
    bf16           1 / 8 / 7                   3.4e38       1.2e-38            2^-7
    fp8 e4m3fn     1 / 4 / 3                   448          0.016              2^-3     (no infinity)
    fp8 e5m2       1 / 5 / 2                   57344        6.1e-5             2^-2

The exponent sets the range, the mantissa the precision. fp16's 5 bits are an exponent, not an "integer part"; its 10
follow a first 1 that is not stored, which makes 11 significant bits, and 8 in bf16.

To quantize is to scale, round and store: a group of numbers shares one scale, and each keeps a small whole number.

    int8, absmax:      scale = max|x| / 127             q = round(x / scale)             x̂ = q · scale
    int8, zero-point:  scale = (max - min) / 255        q = round(x / scale) + zero      x̂ = (q - zero) · scale
    NF4:               scale = max|x|                   q = nearest of 16 codes          x̂ = codes[q] · scale

The smaller the group, the less one outlier spoils, and the more scales there are to keep. NF4 ("normal float") has its
codes where a normal distribution has its mass; it has no exponent and no mantissa, it is a table. In blocks of 64 it
costs 4 + 32/64 = 4.5 bits per number; the scales themselves in 8 bits, "double quantization", make it
4 + 8/64 + 32/(64 · 256) = 4.127. On normal weights the RMS error is 9.2 % of their deviation (int8: 0.6 %).

Dimensions: x of any shape with n numbers; groups of one size, the last one filled up with zeros; one scale per group.
Nothing is trained here: qlora.py puts such weights under LoRA. NF4's bytes, scales and decoded values are bitsandbytes'
to the bit, wherever a block's largest number is a normal one in fp32.

Papers: QLoRA, arXiv 2305.14314, eq. 1 to 4 and appendix E; LLM.int8(), arXiv 2208.07339, section 2; the 8-bit map,
arXiv 2110.02861, section 1.3; fp8, arXiv 2209.05433; mixed precision, arXiv 1710.03740.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F


class Error(ValueError):
    """A tensor or an argument that cannot be used; the message says what would be right."""


# ------------------------------------------------------------------------------------------------------ number formats

FORMATS = {  # exponent bits, mantissa bits; the sign is one more
    torch.float32: (8, 23), torch.float16: (5, 10), torch.bfloat16: (8, 7),
    torch.float8_e4m3fn: (4, 3), torch.float8_e5m2: (5, 2),
}  # fmt: skip


def format_of(dtype):
    """(exponent bits, mantissa bits, bias) of a float type."""
    if dtype not in FORMATS:
        raise Error(f"{dtype} is none of the formats fp32, fp16, bf16, fp8 e4m3fn and fp8 e5m2")
    exponent_bits, m = FORMATS[dtype]
    return exponent_bits, m, 2 ** (exponent_bits - 1) - 1


def stored_bits(x):
    """The bits that a float tensor is kept in, as whole numbers from 0 on, int64."""
    exponent_bits, m, _ = format_of(x.dtype)
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    return x.view(same_size).long() & (2 ** (1 + exponent_bits + m) - 1)


def split_bits(bits, dtype):
    """(sign, exponent field, mantissa field) of bit patterns, int64."""
    exponent_bits, m, _ = format_of(dtype)
    return bits >> (exponent_bits + m), (bits >> m) % 2**exponent_bits, bits % 2**m


def value(bits, dtype):
    """What bit patterns mean, in fp64, which holds every number of the five formats."""
    exponent_bits, m, bias = format_of(dtype)
    sign, exponent, mantissa = split_bits(bits, dtype)
    hidden = (exponent > 0).double()  # the 1 that normal numbers begin with
    # (1 + M / 2^m) · 2^(E - bias), and for E = 0: M / 2^m · 2^(1 - bias)
    size = (hidden + mantissa / 2**m) * 2.0 ** (exponent.clamp(min=1) - bias).double()
    # The top exponent is infinity's and NaN's; e4m3fn has no infinity and one NaN, and leaves it to numbers
    special = exponent == 2**exponent_bits - 1
    if dtype == torch.float8_e4m3fn:
        special &= mantissa == 2**m - 1
    size = size.masked_fill(special, torch.nan).masked_fill(special & (mantissa == 0), torch.inf)
    return torch.where(sign == 1, -size, size)


def largest_bits(dtype):
    """Where rounding stops: infinity's pattern, or in e4m3fn that of 448, its largest number, as in torch's cast."""
    exponent_bits, m, _ = format_of(dtype)
    return 2 ** (exponent_bits + m) - 2 if dtype == torch.float8_e4m3fn else (2**exponent_bits - 1) << m


def limits(dtype):
    """(largest, smallest normal, smallest subnormal, gap after 1) of a format."""
    _, m, bias = format_of(dtype)
    largest = largest_bits(dtype) - (dtype != torch.float8_e4m3fn)
    return value(torch.tensor(largest), dtype).item(), 2.0 ** (1 - bias), 2.0 ** (1 - bias - m), 2.0**-m


def exponent_of(x, dtype):
    """floor(log2|x|), or that of the smallest normal number, below which the gaps stay the same. fp64."""
    _, _, bias = format_of(dtype)
    exponent = torch.frexp(x.double())[1] - 1  # frexp's fraction is in [1/2, 1)
    return torch.where(x == 0, 1 - bias, exponent.clamp(min=1 - bias)).double()


def spacing(x, dtype):
    """The gap between a format's numbers at x: 2^(exponent - m). It doubles at every power of two."""
    return 2.0 ** (exponent_of(x, dtype) - format_of(dtype)[1])


def round_to_bits(x, dtype):
    """x, in fp32 or narrower, rounded to a format by hand: the bits of x.to(dtype), as int64. NaN gives a NaN.

    To the nearest, from halfway to the even one; above the largest to infinity, or in e4m3fn to 448 (torch 2.13).
    """
    exponent_bits, m, bias = format_of(dtype)
    size = x.double().abs().clamp(max=2.0**200)  # far above each format, and finite
    exponent = exponent_of(size, dtype)
    count = torch.round(size / spacing(size, dtype))  # of gaps, at most 2^(m+1); torch rounds half to even
    # The field E = exponent + bias and the hidden 1 = 2^m gaps fall together: E · 2^m + (count - 2^m). If rounding
    # carries over to the next power of two, so does this sum; and a subnormal, exponent + bias = 1, is its count.
    bits = count + (exponent + bias - 1) * 2**m
    bits = bits.clamp(max=largest_bits(dtype)).nan_to_num(2 ** (exponent_bits + m) - 1).long()
    return bits | torch.signbit(x).long() << (exponent_bits + m)


# -------------------------------------------------------------------------------------------- int8: scale, round, store


def in_groups(x, by):
    """(groups, size): what shares a scale, "tensor", "row", or blocks of `by` numbers; zeros fill the last block."""
    if by == "tensor":
        return x.reshape(1, -1)
    if by == "row":
        return x.reshape(-1, x.size(-1) if x.dim() else 1)
    if type(by) is not int or by < 1:
        raise Error(f'by must be "tensor", "row" or a block size of at least 1, not {by!r}')
    x = x.flatten()
    return (F.pad(x, (0, -len(x) % by)) if len(x) % by else x).view(-1, by)


def pieces(group_size, device):
    """How many groups to work on at a time: on a CPU 2^17 numbers per thread, which stay in its cache."""
    return max(1, (torch.get_num_threads() << 17 if device.type == "cpu" else 1 << 24) // group_size)


def check(x):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.numel() == 0:
        raise Error(f"fp32, fp16 or bf16 numbers can be quantized, not {x.numel()} of {x.dtype}")


def check_finite(scale):
    if not scale.isfinite().all():  # a maximum hands inf and NaN on
        raise Error("inf or NaN cannot be quantized: no scale would fit")


def check_scale(scale):
    if scale.dtype != torch.float32:
        raise Error(f"scales are kept in fp32, not {scale.dtype}: cast a model before it is quantized, not after")


def check_groups(scale, groups):
    if len(scale) != len(groups):
        raise Error(f"{len(scale)} scales do not fit {len(groups)} groups: give the `by` that it was quantized with")


def check_block_size(block_size):
    if type(block_size) is not int or block_size < 2 or block_size % 2:
        raise Error(f"a block has an even number of weights, two in a byte, and 64 in the paper: not {block_size!r}")


def quantize_int8(x, by="row"):
    """(q int8 of x's shape, scale fp32 (groups, 1)): symmetric, and -128 is not used."""
    check(x)
    groups = in_groups(x.detach(), by)
    # scale = max|x| / 127
    scale = groups.abs().amax(1, keepdim=True).float() / 127
    check_finite(scale)
    q = torch.empty(groups.shape, dtype=torch.int8, device=x.device)
    # In fp64, where the quotient's own error cannot move it over a half; a scale of 0 has nothing to divide
    divisor = torch.where(scale > 0, scale, 1).double()
    step = pieces(groups.size(1), x.device)
    for out, part, d in zip(q.split(step), groups.split(step), divisor.split(step)):
        out.copy_((part / d).round_().clamp_(-127, 127))
    return q.flatten()[: x.numel()].view(x.shape), scale


def dequantize_int8(q, scale, by="row", dtype=torch.float32):
    check_scale(scale)
    groups = in_groups(q, by)
    check_groups(scale, groups)
    x = torch.empty(groups.shape, dtype=dtype, device=q.device)
    step = pieces(groups.size(1), q.device)
    wide = torch.promote_types(dtype, torch.float32)
    for out, part, s in zip(x.split(step), groups.split(step), scale.split(step)):
        out.copy_(part.to(wide) * s)
    return x.flatten()[: q.numel()].view(q.shape)


def quantize_zero_point(x, by="row"):
    """(q int8 of x's shape, scale fp32, zero int8): all 256 codes, over a range that includes 0, so that 0 is exact."""
    check(x)
    groups = in_groups(x.detach(), by).double()
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    # scale = (max - min) / 255,  zero = round(-min / scale) - 128
    scale = ((high - low) / 255).float()
    check_finite(scale)
    divisor = torch.where(scale > 0, scale, 1).double()
    zero = ((-low / divisor).round() - 128).clamp(max=127)
    q = ((groups / divisor).round() + zero).clamp(-128, 127).to(torch.int8)
    return q.flatten()[: x.numel()].view(x.shape), scale, zero.to(torch.int8)


def dequantize_zero_point(q, scale, zero, by="row", dtype=torch.float32):
    wide = torch.promote_types(dtype, torch.float32)
    groups = in_groups(q, by)
    check_groups(scale, groups)
    x = (groups.to(wide) - zero) * scale
    return x.flatten()[: q.numel()].view(q.shape).to(dtype)


# ------------------------------------------------------------------------------------------------------------------ NF4

# 7 below zero, zero, 8 above: normal_float() rounded as QLoRA's authors had it, and so in everybody's files
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def normal_float():
    """Where NF4's codes come from: normal quantiles at equal steps of probability, on each side of an exact zero."""
    # Φ⁻¹(1) is infinite, so the outermost lies half a step inside: 1 - (1/32 + 1/30) / 2, in the authors' digits
    outermost = 0.9677083
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9)[:-1].double())  # (8,)
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8)[:-1].double())  # (7,)
    codes = torch.cat((below, torch.zeros(1), above)).sort().values
    return (codes / codes.max()).float()


def quantize_nf4(x, block_size=64):
    """(packed uint8 (⌈n/2⌉,), scale fp32 (⌈n/block_size⌉,)): two nibbles in a byte, the first in the high half."""
    check(x)
    check_block_size(block_size)
    x = x.detach().flatten()
    n, device = x.numel(), x.device
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    scale = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    codes = torch.tensor(NF4, dtype=torch.float32, device="cpu")
    midpoints = (codes[:-1] + codes[1:]) / 2
    step = block_size * pieces(block_size, device)
    for start in range(0, n, step):
        piece = x[start : start + step].float()
        blocks = in_groups(piece, block_size)
        top = blocks.abs().amax(1, keepdim=True)  # (blocks, 1)
        scaled = blocks * (1 / top)
        # What has no exact reciprocal is divided: a maximum below the normal numbers. bitsandbytes also divides in a
        # last block that is short.
        divided = top[:, 0] < torch.finfo(torch.float32).tiny
        divided[-1] |= piece.numel() % block_size > 0
        if divided.any():
            scaled[divided] = blocks[divided] / top[divided].clamp(min=2**-149)
        # q = how many midpoints lie below; one on a midpoint goes to the lower code
        q = torch.zeros(blocks.shape, dtype=torch.uint8, device=device)
        for midpoint in midpoints:
            q += scaled > midpoint
        q = q.flatten()[: piece.numel() + piece.numel() % 2]  # an odd one out is paired with a zero
        packed[start // 2 : (start + step) // 2] = q[::2] << 4 | q[1::2]
        scale[start // block_size : (start + step) // block_size] = top[:, 0]
    check_finite(scale)
    return packed, scale


@cache
def code_pairs(device):
    """For each byte its two codes, side by side in the 8 bytes of an int64: one lookup for two weights."""
    codes = torch.tensor(NF4, dtype=torch.float32, device="cpu")
    return torch.cartesian_prod(codes, codes).view(torch.int64)[:, 0].to(device)  # (256,)


def dequantize_nf4(packed, scale, shape, dtype=torch.float32, block_size=64):
    """codes[q] · scale, multiplied in fp32 and then cast."""
    check_block_size(block_size)
    check_scale(scale)
    n = math.prod(shape)
    if len(packed) != -(-n // 2) or len(scale) != -(-n // block_size):
        raise Error(f"{len(packed)} bytes and {len(scale)} scales do not fit {n} numbers in blocks of {block_size}")
    device = packed.device
    pairs = code_pairs(device)
    x = torch.empty(shape, dtype=dtype, device=device)
    step = block_size * min(len(scale), pieces(block_size, device))
    # All pieces go through the same memory, which stays in the cache
    index = torch.empty(step // 2, dtype=torch.int32, device=device)
    found = torch.empty(step // 2, dtype=torch.int64, device=device)
    values = found.view(torch.float32)  # (step,)
    blocks = values.view(-1, block_size)
    parts = (packed.split(step // 2), scale[:, None].split(step // block_size), x.view(-1).split(step))
    for byte, s, out in zip(*parts):
        if len(out) < step:  # the last piece; past its end blocks may hold what nobody reads
            index, found, blocks, values = index[: len(byte)], found[: len(byte)], blocks[: len(s)], values[: len(out)]
        torch.index_select(pairs, 0, index.copy_(byte), out=found)
        blocks.mul_(s)
        out.copy_(values)
    return x


# -------------------------------------------------------------------------------------------------- double quantization


@cache
def dynamic_map(device):
    """256 sorted numbers in [-1, 1], fp32: 2^i of them in each decade 10^(i-7) to 10^(i-6), on either side of 0."""
    fp32 = dict(dtype=torch.float32, device="cpu")  # whatever the default is at the first call
    edges = [torch.linspace(0.1, 1, 2**i + 1, **fp32) for i in range(7)]
    positive = torch.cat([10.0 ** (i - 6) * ((e[:-1] + e[1:]) / 2) for i, e in enumerate(edges)])  # (127,)
    return torch.cat((-positive, torch.tensor([0.0, 1.0], **fp32), positive)).sort().values.to(device)


def quantize_scales(scale):
    """(q uint8 of scale's shape, one scale fp32 for each 256 of them, their mean fp32).

    scale = mean + map[q] · scale2, off by up to 0.7 % of the largest distance from the mean among its 256. A block far
    smaller than its neighbours is poorly served, and may even get a scale below 0, in bitsandbytes as here.
    """
    mean = scale.mean()
    groups = in_groups(scale - mean, 256)
    scale2 = groups.abs().amax(1, keepdim=True)
    codes = dynamic_map(scale.device)
    # Looked up on a grid of 2^16 steps over [-1, 1], as bitsandbytes does on a CPU; 0/0 lands on its lowest step
    steps = ((groups * (1 / scale2)).nan_to_num(-1).clamp(-1, 1) + 1) * 0.5 * 65535
    on_grid = 2 * (steps + 0.5).floor() / 65535 - 1
    q = torch.bucketize(on_grid, (codes[:-1] + codes[1:]) / 2).to(torch.uint8)
    return q.flatten()[: scale.numel()].clone(), scale2[:, 0], mean  # a view would keep what fills up the last group


def dequantize_scales(q, scale2, mean):
    check_scale(scale2)
    x = in_groups(dynamic_map(q.device).index_select(0, q.int()), 256).mul_(scale2[:, None])
    return x.view(-1)[: len(q)].add_(mean)


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype, (exponent_bits, m) in FORMATS.items():
        sign, exponent, mantissa = (
            part.item() for part in split_bits(stored_bits(torch.tensor(-0.3).to(dtype)), dtype)
        )
        largest, normal, _, gap = limits(dtype)
        print(f"{str(dtype):20} -0.3 = {sign} {exponent:0{exponent_bits}b} {mantissa:0{m}b}", end=", ")
        print(f"largest {largest:.5g}, smallest normal {normal:.2g}, gap after 1 {gap:.2g}")
    for number, dtype in ((1 + 2**-8, torch.bfloat16), (2049.0, torch.float16), (65520.0, torch.float16)):
        x = torch.tensor(number)
        print(f"{number} in {dtype}: {value(round_to_bits(x, dtype), dtype)}, and torch has {x.to(dtype)}")
    print(f"NF4's constants are off their derivation by {(normal_float() - torch.tensor(NF4)).abs().max():.1e} at most")
    w = torch.randn(768, 768)
    packed, scale = quantize_nf4(w)
    double = quantize_scales(scale)
    bits = 8 * sum(t.numel() * t.element_size() for t in (packed, *double)) / w.numel()
    for name, kept in (
        ("int8, a scale per tensor", dequantize_int8(*quantize_int8(w, "tensor"), "tensor")),
        ("int8, a scale per row", dequantize_int8(*quantize_int8(w))),
        ("int8, blocks of 64", dequantize_int8(*quantize_int8(w, 64), 64)),
        ("NF4, blocks of 64, 4.5 bits", dequantize_nf4(packed, scale, w.shape)),
        (f"NF4, scales in 8 bits, {bits:.3f} bits", dequantize_nf4(packed, dequantize_scales(*double), w.shape)),
    ):
        print(f"{name:35} RMS error on N(0, 1): {(kept - w).square().mean().sqrt():.4f}")
