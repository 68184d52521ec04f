# SPDX-License-Identifier: MIT
"""Quantization: how a weight is kept in 8 or 4 bits, and what the bits of a float mean.

A group of weights shares one floating-point number, its scale. Each weight is divided by the scale, rounded to one of
a few levels, and stored as the index q of that level. Dequantizing multiplies the level by the scale:

    int8, absmax      scale = max|x| / 127          q = round(x / scale)                    x̂ = q · scale
    int8, zero-point  scale = (max - min) / 255     q = round(x / scale) + zero_point       x̂ = (q - zero_point) · scale
                      zero_point = round(-min / scale) - 128      min and max are of x and 0: the range includes 0
    NF4               absmax = max|x|               q = argmin_i |x / absmax - codes[i]|    x̂ = codes[q] · absmax

    x              n numbers of any shape, cut into groups (groups, size): the whole tensor, its rows, or blocks
    scale, absmax  one fp32 number per group
    q              int8: the shape of x.   NF4: two 4-bit indices in a byte, packed (⌈n/2⌉,)

Nothing is trained here: the quantized weight is frozen, and qlora.py trains LoRA beside it. This is *weight-only*
quantization: each product dequantizes the weight and multiplies in bf16 or fp32. It saves memory, not arithmetic.
Generating token by token is bound by reading the weights, so 4 bits can speed it up, if one fused kernel dequantizes
and multiplies. Training and the prefill of a prompt are bound by arithmetic: they gain no speed.

One block of NF4 by hand, of 4 weights instead of 64, x = (0.3, -2, 0, 1):
    absmax = 2     x / absmax = (0.15, -1, 0, 0.5)     nearest codes: 0.1609, -1, 0, 0.4407 (0.5626 is farther from 0.5)
    q = (9, 0, 7, 12)     bytes 0x90 0x7c     x̂ = (0.3219, -2, 0, 0.8814): the largest weight and 0 come back exactly

Where NF4's values come from. Trained weights are roughly normal, so "normal float" takes quantiles of N(0, 1): levels
at equal steps of probability, dense near 0, divided by the largest so that they span [-1, 1]. 0 must be a level, as in
int8, so that padding and pruned weights stay exactly 0. That leaves 7 negative and 8 positive levels. The last
quantile, Φ⁻¹(1), would be infinite, so the outermost level is moved inside, to Φ⁻¹(0.9677083). By how much is a
convention of the authors: 0.9677083 is 1 minus the mean of 1/32 and 1/30. Everything else follows. NF4 is a table: it
has no exponent and no mantissa.

How large is the error? RMS in % of the standard deviation, for normal weights in blocks of 64:
    NF4: 9.2    even 4-bit levels, -7 to 7: 10.8    16 even levels and zero-point: 9.1    int8: 0.6 (rows of 768: 0.8)
So NF4 is no more exact here than 16 even levels, but it needs no zero-point. On real models QLoRA's authors find it
better: perplexity 27.4 with double quantization, 29.5 and 31.1 in two kinds of FP4, 34.3 in Int4 (table 2).
What does it cost in quality? Papers mostly report no loss in 8 bits, and in 4 bits a small one that shrinks as models
grow: with GPTQ, perplexity on WikiText2 rises from 27.7 to 31.1 for OPT-125M, and from 8.34 to 8.37 for OPT-175B.

Bits per weight. A block of 64 costs 4 + 32/64 = 4.5 bits. Double quantization keeps absmax in 8 bits too, in groups of
256 that share one fp32 number: 4 + 8/64 + 32/(64 · 256) = 4.127. That saves 0.373 bits, or 3 GB for 65B weights.
absmax or zero-point? absmax is symmetric: a product needs no correction, and weights are nearly symmetric. zero-point
shifts the levels to a skewed range, such as activations after a ReLU. There its step, and its error, are half as large.
Outliers. One large weight inflates the scale of its whole group. A smaller group confines the damage, and costs scales.
From 6.7B parameters on, a few feature columns of the *activations* are far larger than the others. LLM.int8()
multiplies these columns (|x| ≥ 6) in fp16, and all others in int8 with a scale per row of x and per output of W.

How others quantize:
    PTQ    post-training quantization: round the trained weights, as here. At most some calibration data, no training.
    QAT    quantization-aware training: round in each forward pass; the backward pass treats rounding as the identity.
    GPTQ   PTQ column by column: the columns still to come are changed to offset each rounding's effect on outputs.
    AWQ    PTQ that first scales up the weight channels which meet large activations, so that they round more finely.
    KIVI   The KV cache of long contexts, in 2 bits with zero-points: keys per channel, values per token.

Floats. A sign s, an exponent field E, which gives the range, and a mantissa field M of m bits, which gives precision:
    value = (-1)^s · (1 + M / 2^m) · 2^(E - bias)        bias = 2^(exponent bits - 1) - 1; the leading 1 is not stored
    E = 0:  (-1)^s · M / 2^m · 2^(1 - bias)              the subnormals, zero among them
                                                     largest    smallest normal    gap after 1
    fp32        s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm   3.4e38     1.2e-38            2^-23
    TF32        s eeeeeeee mmmmmmmmmm                3.4e38     1.2e-38            2^-10    inside tensor cores only
    fp16        s eeeee mmmmmmmmmm                   65504      6.1e-5             2^-10
    bf16        s eeeeeeee mmmmmmm                   3.4e38     1.2e-38            2^-7
    fp8 e4m3fn  s eeee mmm                           448        0.016              2^-3     no inf; weights, activations
    fp8 e5m2    s eeeee mm                           57344      6.1e-5             2^-2     gradients, which need range

fp16 or bf16? fp16 has 11 significant bits, but is infinite from 65520 on and 0 below 3e-8. bf16 has 8, and the range of
fp32. Gradients of 1e-8 vanish in fp16: loss scaling multiplies the loss, so all gradients, by 2^16 or so, and divides
them again in fp32. bf16 needs none. Both lose small updates of a weight, so adamw.py keeps an fp32 master copy, and
both are too coarse for softmax, norms and the loss, which are computed in fp32.

Pitfalls: rounding has no gradient, so q cannot be trained without QAT's trick, the straight-through estimator. Merging
LoRA into 4 bits rounds most of the update away (qlora.py). An all-zero group has scale 0: do not divide by it. Other
formats have 16-bit scales; here they stay in fp32, because the weights must be bitsandbytes' to the bit.
Typical: NF4, blocks of 64, double quantization, bf16 products (QLoRA); int8 with a scale per row where 8 bits fit.
The whole family in one table: nanopeft/__init__.py
Papers: QLoRA, arXiv 2305.14314, eq. 1 to 4; LLM.int8(), 2208.07339, section 2; 8-bit map, 2110.02861, section 1.3;
GPTQ, 2210.17323; AWQ, 2306.00978; KIVI, 2402.02750; QAT, 1712.05877; fp8, 2209.05433; loss scaling, 1710.03740.
"""

import math

import torch
import torch.nn.functional as F


def to_groups(x, granularity):
    """(groups, size): what shares a scale. "tensor", "row", or a block size; zeros fill up the last block."""
    size = {"tensor": x.numel(), "row": x.size(-1) if x.dim() else 1}.get(granularity, granularity)
    if type(size) is not int or size < 1:
        raise Error(f'granularity must be "tensor", "row" or a block size of at least 1, not {granularity!r}')
    if x.numel() % size:
        x = F.pad(x.flatten(), (0, -x.numel() % size))
    return x.reshape(-1, size)


def from_groups(groups, shape):
    """The numbers in their own shape again, without what filled up the last block."""
    return groups.flatten()[: math.prod(shape)].view(shape)


def quantize_int8(x, granularity="row"):
    """(q int8 of x's shape, scale fp32 (groups, 1)). Symmetric: -127 to 127, and 0 stays 0."""
    check(x)
    groups = to_groups(x.detach(), granularity)  # (groups, size)
    # scale = max|x| / 127, in fp64: a GPU multiplies by 1 / 127, which in fp32 may give the number next to it
    scale = (groups.abs().amax(1, keepdim=True).double() / 127).float()  # (groups, 1)
    divisor = torch.where(scale > 0, scale, 1)  # a group of zeros has scale 0
    q = torch.empty(groups.shape, dtype=torch.int8, device=x.device)
    for out, x_part, s in pieces(q, groups, divisor):
        # q = round(x / scale), in fp64: a quotient rounded to fp32 first could move over a half
        out.copy_((x_part / s.double()).round_().clamp_(-127, 127))
    return from_groups(q, x.shape), scale


def dequantize_int8(q, scale, granularity="row", dtype=torch.float32):
    """x̂ = q · scale, multiplied in fp32 and then rounded to dtype."""
    groups = to_groups(q, granularity)
    check_scale(scale, len(groups))
    x = torch.empty(groups.shape, dtype=dtype, device=q.device)
    for out, q_part, s in pieces(x, groups, scale):
        out.copy_(q_part.to(torch.promote_types(dtype, torch.float32)) * s)
    return from_groups(x, q.shape)


def quantize_zero_point(x, granularity="row"):
    """(q int8 of x's shape, scale fp32, zero_point int8): -128 to 127 stand for min to max, and zero_point for 0."""
    check(x)
    groups = to_groups(x.detach(), granularity).double()
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    # scale = (max - min) / 255
    scale = ((high - low) / 255).float()
    divisor = torch.where(scale > 0, scale, 1)
    # zero_point = round(-min / scale) - 128, above 127 only where a subnormal scale was rounded down
    zero_point = ((-low / divisor).round() - 128).clamp(max=127)
    # q = round(x / scale) + zero_point
    q = ((groups / divisor).round() + zero_point).clamp(-128, 127).to(torch.int8)
    return from_groups(q, x.shape), scale, zero_point.to(torch.int8)


def dequantize_zero_point(q, scale, zero_point, granularity="row", dtype=torch.float32):
    """x̂ = (q - zero_point) · scale."""
    groups = to_groups(q, granularity)
    check_scale(scale, len(groups))
    x = (groups.to(torch.promote_types(dtype, torch.float32)) - zero_point) * scale
    return from_groups(x, q.shape).to(dtype)


# ------------------------------------------------------------------------------------------------------------------ NF4

# normal_float() to 1e-7, in the digits that QLoRA's authors published and everybody's files use
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def normal_float():
    """NF4's derivation: quantiles of N(0, 1) at equal steps of probability, on either side of an exact 0."""
    outermost = 0.9677083  # the authors' choice, where Φ⁻¹(1) would be infinite: 1 - (1/32 + 1/30) / 2
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9)[:-1].double())  # (8,), the inverse of Φ
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8)[:-1].double())  # (7,)
    return (torch.cat((negative, torch.zeros(1), positive)).sort().values / positive.max()).float()


def nf4_codes(device):
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def nearest(x, codes):
    """argmin_i |x - codes[i]|, the nearest code's index: the number of midpoints between codes that are below x."""
    return torch.bucketize(x.contiguous(), (codes[:-1] + codes[1:]) / 2, out_int32=True)


def quantize_nf4(x, block_size=64):
    """(packed uint8 (⌈n/2⌉,), absmax fp32 (⌈n/block_size⌉,)), to the bit as in bitsandbytes."""
    check(x)
    check_block_size(block_size)
    blocks = to_groups(x.detach(), block_size)  # (blocks, block_size)
    absmax = torch.linalg.vector_norm(blocks, torch.inf, 1, keepdim=True).float()  # (blocks, 1): max|x|, with no copy
    packed = torch.empty(len(blocks), block_size // 2, dtype=torch.uint8, device=x.device)
    # bitsandbytes multiplies by 1 / absmax, but divides in a short last block. A subnormal's reciprocal may be inf.
    divides = absmax < torch.finfo(torch.float32).tiny
    divides[-1] |= x.numel() % block_size > 0
    for x_part, a, divide, out in pieces(blocks, absmax, divides, packed):
        x_part = x_part.float()
        # q = argmin_i |x / absmax - codes[i]|
        q = nearest(torch.where(divide, x_part / a.clamp(min=2**-149), x_part * (1 / a)), nf4_codes(x.device))
        out.copy_(q[:, ::2] << 4 | q[:, 1::2])  # two in a byte, the first one in the high half
    return packed.flatten()[: (x.numel() + 1) // 2].clone(), absmax.flatten()  # a view would keep the padding


def dequantize_nf4_plain(packed, absmax, shape, block_size=64):
    """The formula as it stands."""
    byte = to_groups(packed, block_size // 2)  # (blocks, block_size / 2)
    q = torch.stack((byte >> 4, byte & 15), dim=2).flatten(1)  # (blocks, block_size)
    # x̂ = codes[q] · absmax
    return from_groups(nf4_codes(packed.device)[q.int()] * absmax[:, None], shape)


# The same as it is used. On one core, 768 x 3072 weights are dequantized in 8.3 ms plainly and in 1.8 ms here. A QLoRA
# step does it twice, beside two products of 23 ms (bf16, 1,024 tokens), so a fifth of the layer's time is won.
def code_pairs(device):
    """Both codes of each of the 256 bytes. Two fp32 numbers are one int64 here: torch looks those up fastest."""
    return torch.cartesian_prod(nf4_codes(device), nf4_codes(device)).view(torch.int64).flatten()  # (256,)


def dequantize_nf4(packed, absmax, shape, dtype=torch.float32, block_size=64):
    """x̂ = codes[q] · absmax, multiplied in fp32 and then rounded to dtype."""
    check_block_size(block_size)
    n = math.prod(shape)
    check_scale(absmax, -(-n // block_size))
    if len(packed) != (n + 1) // 2:
        raise Error(f"{len(packed)} bytes do not fit {n} numbers: two of them are in a byte")
    byte = to_groups(packed, block_size // 2)  # (blocks, block_size / 2)
    pairs = table(code_pairs, packed.device)
    if torch.compiler.is_compiling():  # one kernel looks up, multiplies and rounds: a view of int64 would split it
        codes = pairs.view(torch.float32).view(256, 2)[byte.int()].flatten(1)  # (blocks, block_size)
        return from_groups((codes * absmax[:, None]).to(dtype), shape)
    x = torch.empty(len(byte), block_size, dtype=dtype, device=packed.device)
    for out, byte_part, a in pieces(x, byte, absmax[:, None]):
        codes = pairs.index_select(0, byte_part.flatten().int()).view(torch.float32)
        out.copy_(codes.view(out.shape).mul_(a))
    return from_groups(x, shape)


def dynamic_map(device):
    """bitsandbytes' 256 codes in [-1, 1]: 2^i of each sign from 10^(i-7) to 10^(i-6), so seven decades, fine near 0."""
    fp32 = dict(dtype=torch.float32, device="cpu")  # whatever the default is at the first call
    edges = [torch.linspace(0.1, 1, 2**i + 1, **fp32) for i in range(7)]
    positive = torch.cat([10.0 ** (i - 6) * ((e[:-1] + e[1:]) / 2) for i, e in enumerate(edges)])  # (127,)
    return torch.cat((-positive, torch.tensor([0.0, 1.0], **fp32), positive)).sort().values.to(device)


def quantize_scales(absmax):
    """Double quantization: (q uint8 of absmax's shape, one scale2 fp32 for each 256 of them, their mean fp32).

        scale2 = max|absmax - mean|        q = argmin_i |(absmax - mean) / scale2 - map[i]|

    Why the mean is subtracted: absmax is never negative, so the map's negative codes would lie idle. In 65,536 blocks
    of normal weights absmax is 2.6 ± 0.4 standard deviations. Less its mean it is six times smaller, of both signs, and
    mostly near 0, where the map is fine. These blocks use 243 of the 256 codes instead of 52, and absmax's relative RMS
    error falls from 0.67 % to 0.22 %. A very small absmax is poorly served, and may come back negative.
    """
    mean = absmax.mean()
    groups = to_groups(absmax - mean, 256)  # (groups, 256)
    scale2 = groups.abs().amax(1, keepdim=True)  # (groups, 1)
    scaled = (groups * (1 / scale2)).nan_to_num(-1)  # all blocks alike give 0 / 0, in bitsandbytes -1
    # Only for equal bits: bitsandbytes first rounds to a grid of 2^16 numbers. It changes 2 codes in a thousand.
    scaled = 2 * ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).floor() / 65535 - 1
    q = nearest(scaled, table(dynamic_map, absmax.device)).to(torch.uint8)
    return from_groups(q, absmax.shape).clone(), scale2[:, 0], mean  # a view would keep the padding


def dequantize_scales(q, scale2, mean):
    """absmax = map[q] · scale2 + mean."""
    groups = to_groups(table(dynamic_map, q.device).index_select(0, q.int()), 256)  # (groups, 256)
    check_scale(scale2, len(groups))
    return from_groups(groups * scale2[:, None], q.shape).add_(mean)


# -------------------------------------------------------------------------------------------------- the bits of a float

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


def split_bits(bits, dtype):
    """(s, E, M): sign, exponent field and mantissa field of bit patterns, int64."""
    exponent_bits, m, _ = format_of(dtype)
    return bits >> (exponent_bits + m), (bits >> m) % 2**exponent_bits, bits % 2**m


def value(bits, dtype):
    """What bit patterns mean, in fp64, which holds every number of the five formats."""
    exponent_bits, m, bias = format_of(dtype)
    s, E, M = split_bits(bits, dtype)
    # (1 + M / 2^m) · 2^(E - bias), and for E = 0: M / 2^m · 2^(1 - bias)
    size = ((E > 0) + M.double() / 2**m) * 2.0 ** (E.clamp(min=1) - bias).double()
    # The top exponent means infinity and NaN. e4m3fn has one NaN, all ones, and numbers in the rest of that exponent.
    special = (E == 2**exponent_bits - 1) & ((M == 2**m - 1) | (dtype != torch.float8_e4m3fn))
    size = size.masked_fill(special, torch.nan).masked_fill(special & (M == 0), torch.inf)
    return torch.where(s == 1, -size, size)


def round_to_bits(x, dtype):
    """x, in fp32 or narrower, rounded to a format by hand: the bits of x.to(dtype), as int64. NaN gives a NaN.

    To the nearest, from halfway to the even one; above the largest to infinity, or in e4m3fn to 448 (torch 2.13).
    """
    exponent_bits, m, bias = format_of(dtype)
    size = x.double().abs().clamp(max=2.0**200)  # far above each format, and finite
    # floor(log2|x|), because frexp's fraction is in [1/2, 1). Below the smallest normal number the gaps stay the same.
    exponent = torch.frexp(size.clamp(min=2.0 ** (1 - bias)))[1].double() - 1
    gaps = torch.round(size / 2.0 ** (exponent - m))  # |x| as a number of gaps, at most 2^(m+1); half goes to even
    # A normal number has E = exponent + bias and M = gaps - 2^m, so E · 2^m + M is the sum below, also where rounding
    # reaches the next power of two. A subnormal has exponent = 1 - bias: its bits are gaps alone.
    bits = (exponent + bias - 1) * 2**m + gaps
    largest = 2 ** (exponent_bits + m) - (2 if dtype == torch.float8_e4m3fn else 2**m)  # 448, below NaN; or infinity
    bits = bits.clamp(max=largest).nan_to_num(2 ** (exponent_bits + m) - 1).long()
    return bits | torch.signbit(x).long() << (exponent_bits + m)


# ------------------------------------------------------------------------------------------------------------- plumbing


class Error(ValueError):
    """A tensor or an argument that cannot be used; the message says what would be right."""


TABLES = {}  # not functools.cache, past which torch.compile makes the table again at each call


def table(make, device):
    """make(device), which is made once for each device."""
    if (make, device) not in TABLES:
        TABLES[make, device] = make(device)
    return TABLES[make, device]


def pieces(*tensors):
    """The same rows of all tensors, 2^17 numbers per core at a time: temporaries stay small, on a CPU in its cache."""
    if torch.compiler.is_compiling():  # which keeps no temporary, and traces no number of threads
        return [tensors]
    numbers = torch.get_num_threads() << 17 if tensors[0].device.type == "cpu" else 1 << 24
    return zip(*(t.split(max(1, numbers // tensors[0].size(1))) for t in tensors))


def check(x):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.numel() == 0:
        raise Error(f"fp32, fp16 or bf16 numbers can be quantized, not {x.numel()} of {x.dtype}")
    if not torch.stack(x.detach().aminmax()).isfinite().all():  # which hand inf and NaN on
        raise Error("inf or NaN cannot be quantized: no scale would fit")


def check_scale(scale, groups):
    if scale.dtype != torch.float32:
        raise Error(f"scales are kept in fp32, not {scale.dtype}: cast a model before it is quantized, not after")
    if len(scale) != groups:
        raise Error(f"{len(scale)} scales do not fit {groups} groups: give the groups that it was quantized with")


def check_block_size(block_size):
    if type(block_size) is not int or block_size < 2 or block_size % 2:
        raise Error(f"a block has an even number of weights, two in a byte, and 64 in the paper: not {block_size!r}")


if __name__ == "__main__":
    packed, absmax = quantize_nf4(torch.tensor([0.3, -2.0, 0.0, 1.0]))
    print(f"absmax {absmax.item():g}, bytes {bytes(packed.tolist()).hex(' ')}", dequantize_nf4(packed, absmax, (4,)))
    w = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    packed, absmax = quantize_nf4(w)
    double = quantize_scales(absmax)
    for name, kept, back in (
        ("int8, rows of 768", quantize_int8(w), dequantize_int8(*quantize_int8(w))),
        ("NF4", (packed, absmax), dequantize_nf4(packed, absmax, w.shape)),
        ("NF4, absmax in 8 bits", (packed, *double), dequantize_nf4(packed, dequantize_scales(*double), w.shape)),
    ):
        bits, error = 8 * sum(t.nbytes for t in kept) / w.numel(), (back - w).square().mean().sqrt()
        print(f"{name:22} {bits:.3f} bits, RMS error on N(0, 1): {error:.4f}")
    for dtype, (exponent_bits, m) in FORMATS.items():
        s, E, M = (part.item() for part in split_bits(round_to_bits(torch.tensor(-0.3), dtype), dtype))
        tiny = value(round_to_bits(torch.tensor(1e-8), dtype), dtype)
        print(f"{str(dtype):20} -0.3 = {s} {E:0{exponent_bits}b} {M:0{m}b}, and 1e-8 is {tiny:.3g}")
