# SPDX-License-Identifier: MIT
"""nanopeft/quant.py against bitsandbytes on the CPU: the same bytes, scales and decoded values."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanopeft import quant

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TINY = 2**-126  # fp32's smallest normal number


def often(*strategies, few=40, many=300):
    """A property that is drawn some times by default, and many times in the thorough run."""

    def decorate(property_):
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.thorough)])
        def test(examples):
            settings(deadline=None, max_examples=examples)(given(*strategies)(property_))()

        test.__name__, test.__doc__ = property_.__name__, property_.__doc__
        return test

    return decorate


def their_decoding(packed, scale, shape, dtype, block_size):
    """bitsandbytes' definition, without its kernel for AVX-512, which takes wrong scales for many shapes (2.4)."""
    codes = bnb.get_4bit_type("nf4", device="cpu")
    nibbles = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()[: math.prod(shape)].long()
    return (codes[nibbles] * scale.repeat_interleave(block_size)[: len(nibbles)]).to(dtype).view(shape)


@st.composite
def tensors(draw, smallest=-30, largest=30):
    shape = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 5000))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    kind = draw(st.sampled_from(("normal", "constant", "steps", "midpoints", "rising")))
    if kind == "constant":
        x = torch.full(shape, draw(st.floats(0.5, 1, width=32)))
    elif kind == "steps":
        x = (x * 10).round() + 0.5
    elif kind == "midpoints":  # where dividing and multiplying by a reciprocal part ways
        codes = torch.tensor(quant.NF4)
        x = ((codes[1:] + codes[:-1]) / 2)[torch.randint(15, shape, generator=torch.Generator().manual_seed(x.numel()))]
        x.view(-1)[::32] = 1
        x = x * draw(st.floats(0.5, 1, width=32))
    elif kind == "rising":
        x = x * torch.linspace(0.1, 3, x.size(-1))
    return (x.double() * 10.0 ** draw(st.integers(smallest, largest))).to(draw(st.sampled_from(FLOATS)))


@often(tensors(), st.sampled_from((32, 64, 128, 256, 4096)))
def test_nf4_is_bitsandbytes_to_the_bit(x, block_size):
    """Bytes, block scales and values decoded to each type, wherever the block maximum is a normal number."""
    assume(x.isfinite().all())
    assume(all(b.abs().max() >= TINY for b in x.float().flatten().split(block_size)))
    theirs, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
    packed, scale = quant.quantize_nf4(x, block_size)
    assert torch.equal(packed, theirs[:, 0]) and torch.equal(scale, state.absmax)
    for dtype in FLOATS:
        decoded = quant.dequantize_nf4(packed, scale, x.shape, dtype, block_size)
        assert torch.equal(decoded, their_decoding(theirs, state.absmax, x.shape, dtype, block_size))


@often(tensors(-25, 25))
def test_double_quantization_is_bitsandbytes_to_the_bit(x):
    """The scales' codes, their own scales, the mean and the decoded scales, also with one block or all blocks equal."""
    assume(x.isfinite().all() and all(b.abs().max() >= TINY for b in x.float().flatten().split(64)))
    theirs, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    packed, scale = quant.quantize_nf4(x)
    q, scale2, mean = quant.quantize_scales(scale)
    assume((scale2 >= TINY).logical_or(scale2 == 0).all())
    assert torch.equal(packed, theirs[:, 0]) and torch.equal(mean, state.offset)
    assert torch.equal(q, state.absmax) and torch.equal(scale2, state.state2.absmax)
    decoded = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(quant.dequantize_scales(q, scale2, mean), decoded)


@often(st.integers(1, 3000), st.integers(-20, 20), st.integers(0, 1000))
def test_scales_are_coded_as_bitsandbytes_does(n, magnitude, seed):
    """Any scales at all, near the midpoints of the map as well, have bitsandbytes' codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = quant.dynamic_map(torch.device("cpu"))
    middle = ((codes[1:] + codes[:-1]) / 2)[torch.randint(255, (n,), generator=generator)]
    scale = 3 + middle + torch.randn(n, generator=generator) * 1e-6
    scale[::256] = 4
    scale = scale * 10.0**magnitude
    state_q, state2 = bnb.quantize_blockwise(scale - scale.mean(), blocksize=256)
    q, scale2, _ = quant.quantize_scales(scale)
    assert torch.equal(q, state_q) and torch.equal(scale2, state2.absmax)


def test_the_tables_are_bitsandbytes():
    """The 16 codes of NF4 and the 256 of the dynamic map are theirs to the bit."""
    assert torch.equal(torch.tensor(quant.NF4), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(quant.dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_decodes_as_in_bitsandbytes_own_kernel(dtype, double):
    """On a shape that their AVX-512 kernel gets right, (300, 768), its decoded matrix is ours in each type."""
    torch.manual_seed(0)
    x = (torch.randn(300, 768) * 0.02).to(dtype)
    theirs, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=double)
    packed, scale = quant.quantize_nf4(x)
    if double:
        scale = quant.dequantize_scales(*quant.quantize_scales(scale))
    assert torch.equal(quant.dequantize_nf4(packed, scale, x.shape, dtype), bnb.dequantize_4bit(theirs, state))


def test_int8_by_row_is_bitsandbytes():
    """Row-wise int8 of fp16 has bitsandbytes' codes, but where a quotient is within fp16's rounding of a half."""
    torch.manual_seed(0)
    x = torch.randn(300, 768).half()
    theirs, absmax, _ = bnb.int8_vectorwise_quant(x)
    q, scale = quant.quantize_int8(x)
    assert torch.equal(scale[:, 0], absmax / 127)
    differs = q != theirs
    quotient = x.double() / scale.double()
    # theirs is a product of 127/absmax rounded to fp32
    assert (
        ((quotient - quotient.floor()) - 0.5).abs()[differs] <= 127 * 2**-22
    ).all() and differs.float().mean() < 1e-3
