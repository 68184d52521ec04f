# SPDX-License-Identifier: MIT
"""What nanopeft/gpt.py claims, held against torch's own loss, plain formulas in fp64, and itself done the long way."""

import functools
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nanopeft import gpt

often = settings(deadline=None, max_examples=20)
SMALL = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)  # GPT-2 small


def randomize(model, std=0.3):
    """No claim may rest on a bias of 0 or a norm's weight of 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, std)
    return model


def tiny(seed=0, dtype=torch.float64, **shape):
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2) | shape
    return randomize(gpt.GPT(**shape)).to(dtype)


def off(got, expected):
    """Largest difference, as a share of the largest expected number."""
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item()


# fp64 rounds to 1.1e-16 of a number. The sums here have under 1e3 terms and are nested ten deep: under 1e-12 in all.
FP64 = 1e-12

# --------------------------------------------------------------------------------------------------------------- model


def by_formula(model, ids):
    """The docstring's equations, a position at a time."""
    w = {key: t.detach() for key, t in model.state_dict().items()}

    def norm(x, name):
        x = x - x.mean()
        x = x / (x.square().mean() + model.config.layer_norm_epsilon).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w[name + ".bias"]

    xs = [w["transformer.wte.weight"][i] + w["transformer.wpe.weight"][t] for t, i in enumerate(ids)]
    size = model.config.n_embd // model.config.n_head
    for layer in range(model.config.n_layer):
        h = f"transformer.h.{layer}."
        qkv = [linear(norm(x, h + "ln_1"), h + "attn.c_attn").view(3, -1, size) for x in xs]  # (3, H, d/H) each
        for t, (q, _, _) in enumerate(qkv):
            heads = []
            for i in range(model.config.n_head):
                scores = torch.stack([q[i] @ k[i] / math.sqrt(size) for _, k, _ in qkv[: t + 1]])
                p = scores.exp() / scores.exp().sum()
                heads.append(sum(p[s] * qkv[s][2][i] for s in range(t + 1)))
            xs[t] = xs[t] + linear(torch.cat(heads), h + "attn.c_proj")
        for t, x in enumerate(xs):
            u = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            xs[t] = x + linear(u, h + "mlp.c_proj")
    return torch.stack([w["transformer.wte.weight"] @ norm(x, "transformer.ln_f") for x in xs])  # (T, V)


@settings(deadline=None, max_examples=15)
@given(
    n_layer=st.integers(1, 3), n_head=st.integers(1, 4), size=st.integers(1, 5), T=st.integers(1, 8),
    epsilon=st.sampled_from([1e-5, 1e-2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_logits_follow_the_formula(n_layer, n_head, size, T, epsilon, seed):
    """The logits are those of GPT-2's equations written out position by position."""
    model = tiny(seed, n_layer=n_layer, n_head=n_head, n_embd=n_head * size, layer_norm_epsilon=epsilon)
    ids = torch.randint(61, (T,))
    expected = by_formula(model, ids.tolist())
    assert off(model(ids[None]).logits[0], expected) < 10 * FP64  # a norm over one or two numbers can cancel a digit


@often
@given(T=st.integers(1, 6), past=st.integers(0, 5), h=st.integers(1, 5))
def test_plain_attention_is_sdpa(T, past, h):
    """The three lines on the whiteboard give what torch's fused attention gives, after a past and without one."""
    q, k, v = torch.randn(2, 3, T, h), torch.randn(2, 3, past + T, h), torch.randn(2, 3, past + T, h)
    q, k, v = q.double(), k.double(), v.double()
    mask = torch.full((T, past + T), -math.inf).triu(past + 1)
    assert off(gpt.plain_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask.double())) < FP64


@often
@given(B=st.integers(1, 3), H=st.integers(1, 3), T=st.integers(1, 40), h=st.integers(1, 64), seed=st.integers(0, 99))
def test_attention_of_short_rows_in_bf16(B, H, T, h, seed):
    """The plain form that a CPU takes for them is as near to fp64 as bf16 allows: outputs and gradients."""
    torch.manual_seed(seed)
    q, k, v, dy = (torch.randn(B, T, H, h).bfloat16().transpose(1, 2).requires_grad_() for _ in range(4))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with mock.patch.object(gpt, "plain_attention", wraps=gpt.plain_attention) as plain:
        y = gpt.attention(q, k, v)
    assert plain.called == (T > 1)
    y.backward(dy)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    expected.backward(dy.double())
    # A score is rounded three times, by 2^-8 of it at most, which moves a weight by as much times the score. The weight
    # and the product with v are rounded once each. dq and dk subtract numbers that may be nearly equal.
    largest = (exact[0] @ exact[1].transpose(-2, -1)).abs().max().item() / h**0.5
    bound = 5 * 2**-8 * max(1, largest)
    assert (y - expected).norm() <= bound * expected.norm()
    assert (v.grad - exact[2].grad).norm() <= bound * exact[2].grad.norm()
    for ours, theirs in zip((q, k), exact):
        assert (ours.grad - theirs.grad).norm() <= bound * (4 * theirs.grad.norm() + dy.norm() / 100)


def test_sizes_of_gpt2():
    """GPT-2 small has the docstring's parameters, and its cache the docstring's bytes: counted on meta."""
    with torch.device("meta"):
        model = gpt.GPT(**SMALL).bfloat16()
        cache = model(torch.zeros(1, 1024, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    parts = model.transformer
    assert [count(parts[name]) for name in ("wte", "wpe", "ln_f")] == [38_597_376, 786_432, 1_536]
    assert count(parts["h"][0]) == 7_087_872 and count(model) == 124_439_808
    assert round(100 * count(parts["wte"]) / count(model)) == 31
    assert sum(k.nbytes + v.nbytes for k, v in cache.layers) == 2 * 12 * 768 * 1024 * 2 == 37_748_736
    assert 4 * 256 * 50257 * 4 == 205_852_672
    for name, n_layer, n_head, n_embd, millions in [("medium", 24, 16, 1024, 355), ("xl", 48, 25, 1600, 1558)]:
        with torch.device("meta"):  # the well-known counts of the published models
            other = gpt.GPT(**SMALL | dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        assert round(count(other) / 1e6) == millions, name


def test_flops():
    """Forward takes 2 N FLOPs a token and 4·L·d·T for attention, training three times that: torch's count on meta."""
    T, N = 64, 12 * 12 * 768**2 + 50257 * 768  # the head's table is a matrix of a product as well
    with torch.device("meta"):
        model, ids = gpt.GPT(**SMALL), torch.zeros(1, T, dtype=torch.long)
    forward = T * (2 * N + 4 * 12 * 768 * T)
    for train, expected in ((False, forward), (True, 3 * forward)):
        with FlopCounterMode(display=False) as count:
            logits = model(ids).logits
            if train:
                logits.sum().backward()
        assert count.get_total_flops() == expected
    assert round(6 * N / 1e9, 2) == 0.74 and 4 * 768 * (6 * 768) == 24 * 768**2 and 6 * 768 == 4608
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as count:  # frozen: no dW
        model(inputs_embeds=torch.zeros(1, T, 768, device="meta", requires_grad=True)).logits.sum().backward()
    assert count.get_total_flops() == T * (4 * N + 3 * 4 * 12 * 768 * T)


def test_is_causal_aligns_to_the_top_left():
    """SDPA's is_causal shows query t the keys 0..t even if there are more keys: after a past a mask has to say more."""
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    flag = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert off(flag, gpt.plain_attention(q, k, v, torch.full((2, 5), -math.inf).triu(1))) < 1e-5
    _, mask = gpt.positions_and_mask(None, None, 3, torch.zeros(1, 2, 4), 9)
    assert mask.tolist() == [[True, True, True, True, False], [True, True, True, True, True]]


@often
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3), start=st.integers(0, 9), seed=st.integers(0, 99))
def test_packed_examples_see_themselves_alone(lengths, start, seed):
    """Where the positions (B, T) do not go up by one an example begins: its logits are those that it has alone."""
    model, ids = tiny(seed), torch.randint(61, (2, sum(lengths)))
    lengths = (lengths, lengths[::-1])
    positions = torch.stack([torch.cat([start + torch.arange(n) for n in row]) for row in lengths])
    logits = model(ids, position_ids=positions).logits
    for row, example, got in zip(lengths, ids, logits):
        for part, expected in zip(example.split(row), got.split(row)):
            alone = model(part[None], position_ids=start + torch.arange(len(part))).logits[0]
            assert off(expected, alone) < FP64
    x = model.transformer.wte(ids)
    assert (gpt.positions_and_mask(positions, None, 0, x, 24)[1] is None) == (len(lengths[0]) == 1)  # is_causal does it
    for cached in (torch.ones_like(ids), None):  # with a mask, or after a past, positions are positions alone
        past = 3 * (cached is None)
        _, mask = gpt.positions_and_mask(positions, cached, past, x, 99)
        causal = torch.ones(ids.size(1), ids.size(1) + past, dtype=torch.bool).tril(past)
        assert mask is None or torch.equal(mask.expand(2, 1, -1, -1)[1, 0], causal)


def test_gelu_by_tanh_is_not_the_exact_one():
    """The two forms of GELU differ by at most 0.00047, at x = 2.3 or so, and the MLP computes the one by tanh."""
    x = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    by_tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    assert 4.65e-4 < (by_tanh - exact).abs().max() < 4.75e-4
    mlp = gpt.MLP(1).double()
    with torch.no_grad():
        for p in mlp.parameters():
            p.zero_()
        mlp.c_fc.weight[0] = mlp.c_proj.weight[0, 0] = 1
    assert off(mlp(x[:, None])[:, 0], by_tanh) < FP64


@pytest.mark.parametrize("shape", [(1, 8), (2, 7), (2, 9)])
def test_labels_of_another_shape_are_refused(shape):
    """Labels that are not one for each position would be scored in other places, without a word."""
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(gpt.Error, match=r"labels are .*, and must be \(2, 8\)"):
        tiny()(ids, labels=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_damaged_model_generates_nothing(temperature):
    """Logits of NaN are an Error, drawn from or not: the likeliest of them would be token 0 for ever."""
    model = tiny()
    model.transformer.ln_f.bias.data.fill_(math.nan)
    with pytest.raises(gpt.Error, match="inf or NaN"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 4, temperature=temperature)


def test_micro_batches_add_up_by_their_labels():
    """Gradients of micro-batches, weighted by their shares of the labels, are the whole batch's; by 1/k not."""
    model, ids = tiny(), torch.randint(61, (4, 10))
    labels = ids.clone()
    labels[:2, 1:7] = -100  # 6 labels in the first half, 18 in the second
    model(ids, labels=labels).loss.backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    for weights, right in (((6 / 24, 18 / 24), True), ((1 / 2, 1 / 2), False)):
        model.zero_grad()
        for part, weight in zip((slice(0, 2), slice(2, 4)), weights):
            (model(ids[part], labels=labels[part]).loss * weight).backward()
        assert right == all((p.grad - whole[name]).abs().max() < FP64 for name, p in model.named_parameters())
    assert (10 * 1.0 + 30 * 3.0) / 40 == 2.5


def test_shift_and_mean():
    """Position t is scored on labels[t + 1], and the mean is over the labelled positions of the whole batch."""
    model, ids = tiny(), torch.randint(61, (2, 9))
    labels = ids.clone()
    labels[0, :5] = -100
    log_p = model(ids).logits.log_softmax(-1)
    scored = [-log_p[b, t, ids[b, t + 1]] for b in (0, 1) for t in range(8) if b or t + 1 >= 5]
    assert len(scored) == 12
    assert off(model(ids, labels=labels).loss, sum(scored) / 12) < FP64


def test_tied_gradient_is_the_sum_of_both_uses():
    """wte's gradient is the embedding's plus the head's, as a copy of the model with the two untied shows."""
    model, untied, ids = tiny(), tiny(), torch.randint(61, (3, 10))
    assert model.lm_head.weight is model.transformer.wte.weight
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    for m in (model, untied):
        m(ids, labels=ids).loss.backward()
    embedding, head = untied.transformer.wte.weight.grad, untied.lm_head.weight.grad
    assert embedding.any() and head.any()
    assert off(model.transformer.wte.weight.grad, embedding + head) < FP64


def test_embeddings():
    """get_input_embeddings and get_output_embeddings are the tied pair, and inputs_embeds = wte(ids) is input_ids."""
    model, ids = tiny(), torch.randint(61, (3, 10))
    wte, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert wte is model.transformer.wte and head is model.lm_head and wte.weight is head.weight
    assert torch.equal(model(inputs_embeds=wte(ids)).logits, model(ids).logits)
    assert torch.equal(model(inputs_embeds=wte(ids), labels=ids).loss, model(ids, labels=ids).loss)
    wte.weight.data.zero_()
    assert not model(ids).logits.any()


def test_meta_and_device():
    """A model built on meta runs there, shapes only, and says where it is: sizes can be known without their memory."""
    with torch.device("meta"):
        model = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=1600, n_layer=2, n_head=25)
        out = model(torch.zeros(2, 7, dtype=torch.long))
    assert out.logits.shape == (2, 7, 50257) and out.logits.is_meta
    assert model.device == torch.device("meta") and tiny().device == torch.device("cpu")


def test_bf16():
    """In bf16 loss, logits and gradients are finite, and the logits those of fp64 to bf16's few digits."""
    model, ids = gpt.GPT(n_layer=4, n_embd=64), torch.randint(3072, (2, 50))
    exact = model.double()(ids).logits
    model = model.bfloat16()
    out = model(ids)
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    # Weights, and some 10 activations a layer, are rounded to 2^-9 each: about sqrt(40) 2^-9 = 0.012 in the norm.
    assert (out.logits - exact).norm() / exact.norm() < 0.03
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_initialization():
    """Untrained, every token is about as likely; each residual branch is scaled so that depth does not add up."""
    torch.manual_seed(0)
    model, ids = gpt.GPT(n_layer=8, n_embd=64), torch.randint(3072, (4, 64))
    # Logits are a sum of 64 products of 0.02 and 1: deviation 0.16, hence ln V + 0.16² / 2 = 8.043
    assert abs(model(ids, labels=ids).loss - math.log(3072) - 0.0128) < 0.03
    assert round(0.02 * 768**0.5, 2) == 0.55 and round(math.log(50257) + 0.02**2 * 768 / 2, 2) == 10.98  # GPT-2's
    for name, p in model.named_parameters():
        if name.endswith("weight") and "ln_" not in name:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * p.numel())  # five standard errors
    with pytest.raises(TypeError):
        gpt.GPT(n_layers=3)
    with pytest.raises(gpt.Error, match="divide"):
        gpt.GPT(n_embd=10, n_head=4)


@often
@given(keep=st.integers(0, 12), B=st.integers(1, 3))
def test_logits_to_keep(keep, B):
    """logits_to_keep gives the last positions' logits alone, and 0 gives all."""
    model, ids = tiny(), torch.randint(61, (B, 10))
    logits = model(ids, logits_to_keep=keep).logits
    assert logits.size(1) == (min(keep, 10) or 10)
    assert off(logits, model(ids).logits[:, -keep:]) < FP64


# ------------------------------------------------------------------------------------------------------ cache, padding


@often
@given(cuts=st.lists(st.integers(1, 19), max_size=4), left=st.integers(0, 4), seed=st.integers(0, 99))
def test_pieces_through_the_cache(cuts, left, seed):
    """A sequence passed in pieces of any size, each after the cache of those before, gives the logits of the whole."""
    model, ids = tiny(seed), torch.randint(61, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    mask = mask if left else None
    whole = model(ids, attention_mask=mask).logits
    edges = [0, *sorted(set(cuts)), 20]
    cache, pieces = gpt.KVCache(), []
    for a, b in zip(edges, edges[1:], strict=False):
        seen = None if mask is None else mask[:, :b]
        out = model(ids[:, a:b], attention_mask=seen, past_key_values=cache, use_cache=True)
        pieces.append(out.logits)
    assert out.past_key_values is cache and cache.get_seq_length() == 20
    real = torch.ones(2, 20, dtype=torch.bool) if mask is None else mask.bool()
    assert off(torch.cat(pieces, 1)[real], whole[real]) < FP64


@often
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=4), left=st.booleans(), extra=st.integers(0, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_padding_changes_nothing(lengths, left, extra, seed):
    """A row padded on the left or on the right gives on its tokens the logits that it gives alone, and NaN nowhere."""
    model, width = tiny(seed), max(lengths) + extra
    ids, mask = torch.randint(61, (len(lengths), width)), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, width - n if left else 0 : width if left else n] = 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row in range(len(lengths)):
        real = mask[row].bool()
        assert off(logits[row, real], model(ids[row, real][None]).logits[0]) < FP64


@often
@given(padding=st.lists(st.integers(0, 6), min_size=1, max_size=3), past=st.integers(0, 3), left=st.booleans())
def test_each_position_sees_one(padding, past, left):
    """No row of the attention mask is empty, even a padding's: some of torch's kernels make NaN of it."""
    model, width = tiny(), past + 7
    ids, mask = torch.randint(61, (len(padding), width)), torch.ones(len(padding), width, dtype=torch.long)
    for row, n in enumerate(padding):
        mask[row, slice(0, past + n) if left else slice(width - n, width)] = 0
    cache = gpt.KVCache()
    if past:
        model(ids[:, :past], attention_mask=mask[:, :past], past_key_values=cache)
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
        model(ids[:, past:], attention_mask=mask, past_key_values=cache)
    for call in attention.call_args_list:
        assert call.args[3].expand(len(padding), 1, 7, width).any(-1).all()


def test_padded_loss_and_gradients():
    """A padded batch trains as its rows do alone: the same loss, and the same gradient in every parameter."""
    model, lengths = tiny(), (4, 9, 6)
    ids, mask = torch.randint(61, (3, 9)), torch.zeros(3, 9, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    padded = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for row, n in enumerate(lengths):
        (model(ids[row : row + 1, :n], labels=ids[row : row + 1, :n]).loss * (n - 1) / (sum(lengths) - 3)).backward()
    for name, p in model.named_parameters():
        assert (padded[name] - p.grad).abs().max() < FP64, name  # a key's bias moves no softmax: its gradient is 0


def test_positions_run_out():
    """More tokens than positions are refused, with a cache as well; padding takes none: what fits without it fits."""
    model, ids = tiny(n_positions=8), torch.randint(61, (2, 12))
    assert model(ids[:, :8]).logits.isfinite().all()
    with pytest.raises(gpt.Error, match="9 tokens do not fit the model's 8 positions"):
        model(ids[:, :9])
    with pytest.raises(gpt.Error, match="8 positions"):
        model(inputs_embeds=torch.zeros(1, 9, 16).double())
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(gpt.Error, match="9 tokens"):
        model(ids[:, 8:9], past_key_values=cache)
    with pytest.raises(gpt.Error, match="8 positions"):
        model.generate(ids[:, :4], 6)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :5] = 0, 0
    assert off(model(ids, attention_mask=mask).logits[1, 5:], model(ids[1:, 5:]).logits[0]) < FP64
    mask[1, 3:] = 1
    with pytest.raises(gpt.Error, match="9 tokens"):
        model(ids, attention_mask=mask)


def test_wrong_calls():
    """Neither or both inputs, and a mask that does not cover the past, are refused with the right use in one line."""
    model, ids = tiny(), torch.randint(61, (2, 5))
    x = model.transformer.wte(ids)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": x}):
        with pytest.raises(gpt.Error, match="either input_ids or inputs_embeds"):
            model(**arguments)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(gpt.Error, match="5 wide, not 10"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    for wrong in (dict(temperature=-1.0), dict(temperature=math.nan), dict(temperature=1.0, top_k=0)):
        with pytest.raises(gpt.Error, match="temperature must be at least 0 and top_k at least 1"):
            model.generate(ids, 1, **wrong)


# ---------------------------------------------------------------------------------------------------------- generation


@often
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3), n=st.integers(0, 8), pad=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_greedy_is_the_likeliest_token_each_time(lengths, n, pad, seed):
    """With the cache, and padded on the left, each row gets the tokens that recomputing it whole and alone gives it."""
    model = tiny(seed)
    width = max(lengths) if pad else min(lengths)
    ids, mask = torch.randint(61, (len(lengths), width)), torch.ones(len(lengths), width, dtype=torch.long)
    if pad:
        for row, length in enumerate(lengths):
            mask[row, : width - length] = 0
    got = gpt.generate(model, ids, n, attention_mask=mask if pad else None)
    assert torch.equal(got[:, :width], ids) and got.shape == (len(lengths), width + n)
    for row in range(len(lengths)):
        alone = ids[row, mask[row].bool()][None]
        for _ in range(n):
            alone = torch.cat((alone, model(alone).logits[:, -1:].argmax(-1)), 1)
        assert got[row, width:].tolist() == alone[0, alone.size(1) - n :].tolist()


class Script:
    """A model that says what the script says, whatever it is asked: script (n, B) are the likeliest tokens."""

    def __init__(self, script, V=10):
        self.logits, self.calls = F.one_hot(torch.tensor(script), V).float() * 50, 0

    def __call__(self, input_ids, **_):
        self.calls += 1
        return gpt.Output(logits=self.logits[self.calls - 1][:, None])


def test_end_of_text():
    """A row is filled with the end-of-text that it produced, whatever follows, and all stops at the last row's."""
    script = [[1, 9, 2], [9, 3, 4], [5, 6, 9], [7, 7, 7]]
    model = Script(script)
    got = gpt.generate(model, torch.zeros(3, 1, dtype=torch.long), 4, eos_token_id=9)
    assert got.tolist() == [[0, 1, 9, 9], [0, 9, 9, 9], [0, 2, 4, 9]] and model.calls == 3
    model = Script(script)
    got = gpt.generate(model, torch.zeros(3, 1, dtype=torch.long), 4)
    assert got[:, 1:].T.tolist() == script


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, 3), (2.0, 1), (3.0, 5), (0.7, 99)])
def test_sampling(temperature, top_k):
    """Tokens are drawn from softmax(logits / temperature) over the top_k likeliest, and never from outside them."""
    z, n = torch.tensor([0.0, 2.0, -1.0, 1.5, 0.5, 1.0]), 20000
    draw = torch.Generator().manual_seed(1)
    model = types.SimpleNamespace(logits=z.expand(n, 1, -1).clone(), past_key_values=None)
    options = dict(temperature=temperature, top_k=top_k, generator=draw)
    tokens = gpt.generate(lambda *_, **__: model, torch.zeros(n, 1, dtype=torch.long), 1, **options)[:, 1]
    best = z.argsort(descending=True)[: top_k or 6]
    p = torch.zeros(6)
    p[best] = (z[best].double() / temperature).softmax(0).float()
    share = torch.bincount(tokens, minlength=6) / n
    assert not share[p == 0].any()
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()  # five standard errors of a share


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6, 1e300, math.inf])
def test_extreme_temperatures(temperature):
    """A temperature too small to divide by is greedy, and one too large is uniform over the top_k: none fails."""
    model, ids = tiny(), torch.randint(61, (4, 3))
    got = gpt.generate(model, ids, 5, temperature=temperature, top_k=3)
    if temperature < 1:
        assert torch.equal(got, gpt.generate(model, ids, 5))


def test_generator_repeats():
    """The same generator state draws the same text, and the method is the function."""
    model, ids = tiny(), torch.randint(61, (4, 3))
    states = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    draws = [gpt.generate(model, ids, 12, temperature=1.0, generator=state) for state in states]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(model.generate(ids, 5), gpt.generate(model, ids, 5))


# ---------------------------------------------------------------------------------------------------------------- loss


class LowRank(nn.Module):
    """A head as LoRA leaves it: a frozen weight and a trained branch beside it."""

    def __init__(self, d, V):
        super().__init__()
        self.base, self.A, self.B = nn.Linear(d, V), nn.Linear(d, 2, bias=False), nn.Linear(2, V, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.B(self.A(x))


class Unused(nn.Module):
    """A head with a parameter that no logit depends on."""

    def __init__(self, d, V):
        super().__init__()
        self.used, self.unused = nn.Linear(d, V, bias=False), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.used(x)


def frozen(d, V):
    return nn.Linear(d, V).requires_grad_(False)


def frozen_weight(d, V):
    head = nn.Linear(d, V)
    head.weight.requires_grad_(False)
    return head


HEADS = {
    "linear": nn.Linear, "silu": lambda d, V: nn.Sequential(nn.Linear(d, V), nn.SiLU()), "low rank": LowRank,
    "frozen": frozen, "frozen weight": frozen_weight, "unused": Unused,
}  # fmt: skip


def loss_case(seed, kind="linear", n=20, d=5, V=7, ignored=0.3, dtype=torch.float64):
    torch.manual_seed(seed)
    head = randomize(HEADS[kind](d, V)).to(dtype)
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (n,)).masked_fill(torch.rand(n) < ignored, -100)
    return head, x, labels


def gradients(loss, head, x):
    wanted = [t for t in (x, *head.parameters()) if t.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


@often
@given(
    kind=st.sampled_from([*HEADS]), n=st.integers(1, 40), d=st.integers(1, 9), V=st.integers(1, 30),
    rows=st.integers(1, 50), ignored=st.floats(0, 0.9), train_x=st.booleans(), skips=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_loss_in_chunks_is_the_loss(kind, n, d, V, rows, ignored, train_x, skips, seed):
    """Whatever the head and the number of rows, loss and all gradients are those of the cross-entropy of all logits.

    Also where rows without a label are computed and then set to 0, as on a GPU.
    """
    head, x, labels = loss_case(seed, kind, n, d, V, ignored)
    labels[seed % n] = seed % V  # torch's mean over no row is NaN
    x.requires_grad_(train_x or kind == "frozen")
    expected = F.cross_entropy(head(x), labels, ignore_index=-100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "skips_unlabelled", lambda device: skips)
        got = gpt.chunked_loss(head, x, labels, rows)
    # A loss or a gradient can be 0 (V = 1): absolute bounds, all numbers here being of order 1
    assert abs(got - expected) < FP64
    for a, b in zip(gradients(got, head, x), gradients(expected, head, x), strict=True):
        assert (a - b).abs().max() < FP64


@often
@given(n=st.integers(1, 30), d=st.integers(1, 9), V=st.integers(1, 30), rows=st.integers(1, 40))
def test_chunks_follow_the_formula(n, d, V, rows):
    """The gradients are g W and gᵀ x with g = softmax(z) - onehot(label), a chunk as good as the whole."""
    head, x, labels = loss_case(n, n=n, d=d, V=V, ignored=0)
    x, loss = x.detach().requires_grad_(), lambda: gpt.chunked_loss(head, x, labels, rows) * n  # the sum
    with torch.no_grad():
        g = head(x).softmax(-1) - F.one_hot(labels, V)
        expected = [g @ head.weight, g.T @ x, g.sum(0)]
    for a, b in zip(gradients(loss(), head, x), expected, strict=True):
        assert (a - b).abs().max() < 10 * FP64


def test_only_arguments_get_gradients():
    """Autograd has no gradient for a weight that is reached through head and not passed: the loss is then constant."""
    head, x, labels = loss_case(0, ignored=0)
    assert not gpt.ChunkedLoss.apply(head, 8, True, labels, x.detach()).requires_grad
    assert gpt.ChunkedLoss.apply(head, 8, True, labels, x.detach(), *head.parameters()).requires_grad


@pytest.mark.parametrize("label", [-1, -99, 9])
def test_a_label_that_is_no_token(label):
    """Only -100 means no loss: any other number outside of the vocabulary is an error, as in F.cross_entropy."""
    head, x = nn.Linear(4, 9), torch.randn(3, 4, requires_grad=True)
    for loss in (gpt.plain_loss, functools.partial(gpt.chunked_loss, rows=2)):
        with pytest.raises((RuntimeError, IndexError), match="bounds"):
            loss(head, x, torch.tensor([1, label, 2]))


@pytest.mark.parametrize("kind", HEADS)
def test_no_label_no_loss(kind):
    """If every label is -100 the loss is 0 and so is each gradient, where torch's own mean is NaN."""
    head, x, labels = loss_case(0, kind)
    loss = gpt.chunked_loss(head, x, labels.fill_(-100), 8)
    assert loss.item() == 0
    loss.backward()
    trained = [x, *(p for p in head.parameters() if p.requires_grad)]
    assert all(t.grad is not None and not t.grad.any() for t in trained)


def test_a_head_that_needs_its_output_is_refused():
    """The derivative of a tanh is made from its output, which dz is written over: an error, and no wrong gradient."""
    head, x, labels = loss_case(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gpt.chunked_loss(nn.Sequential(head, nn.Tanh()), x, labels, 8)


@pytest.mark.parametrize("why", ["no_grad", "nothing trained"])
def test_no_gradient_no_cost(why):
    """Where no gradient can be asked for, none is computed: no call of autograd, no graph at the head or after."""
    head, x, labels = loss_case(0, "frozen" if why == "nothing trained" else "linear")
    x.requires_grad_(why == "no_grad")
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    never = mock.patch.object(torch.autograd, "grad", side_effect=AssertionError)
    with never, torch.set_grad_enabled(why != "no_grad"):
        loss = gpt.chunked_loss(head, x, labels, 8)
    assert seen and not any(seen) and not loss.requires_grad
    assert abs(loss - F.cross_entropy(head(x), labels)) < FP64


def test_second_derivative_is_refused():
    """A second derivative, which would come out as 0, is refused, also where another term has one."""
    head, x, labels = loss_case(0)
    for other in (0, x.square().sum()):
        with pytest.raises(gpt.Error, match="no second derivative"):
            (g,) = torch.autograd.grad(gpt.chunked_loss(head, x, labels, 8) + other, x, create_graph=True)
            torch.autograd.grad(g.square().sum(), x)


@often
@given(rows=st.integers(1, 30), factor=st.floats(-4, 4))
def test_backward_twice(rows, factor):
    """Backward leaves what it saved as it was: a second pass gives the same bits, and a factor passes through."""
    head, x, labels = loss_case(0)
    loss = gpt.chunked_loss(head, x, labels, rows)
    first = torch.autograd.grad(loss, (x, *head.parameters()), retain_graph=True)
    scaled = torch.autograd.grad(loss * factor, (x, *head.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, (x, *head.parameters()))
    for a, b, c in zip(first, second, scaled, strict=True):
        assert torch.equal(a, b)
        assert (a * factor - c).abs().max() < FP64


@often
@given(n=st.integers(1, 60), rows=st.integers(1, 70), ignored=st.floats(0, 1), seed=st.integers(0, 99))
def test_logits_are_never_whole(n, rows, ignored, seed):
    """The head sees each labelled row once, at most `rows` of them at a time, and no other row."""
    head, x, labels = loss_case(seed, n=n, ignored=ignored)
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    gpt.chunked_loss(head, x, labels, rows)
    assert max(len(chunk) for chunk in seen) <= rows
    assert torch.equal(torch.cat(seen), x[labels != -100])


def test_model_takes_its_loss_in_chunks():
    """With labels the model gives no logits, and its head has seen only some rows at a time."""
    model = gpt.GPT(vocab_size=1 << 14, n_positions=128, n_embd=4, n_layer=1, n_head=1)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    ids = torch.randint(1 << 14, (4, 128))
    out = model(ids, labels=ids)
    assert out.logits is None and sum(seen) == 4 * 127 and max(seen) <= sum(seen) / 1.5


@pytest.mark.parametrize("rows", [7, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_chunks_keep_16_bits(dtype, rows):
    """In 16 bits the head's gradient is as good after 600 chunks as after one."""
    torch.manual_seed(0)
    n, d, V = 4200, 8, 32
    head, x, labels = nn.Linear(d, V, bias=False), torch.randn(n, d), torch.randint(V, (n,))
    head, x = head.to(dtype), x.to(dtype)
    gpt.chunked_loss(head, x, labels, rows).backward()
    exact = head.weight.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ exact.T, labels).backward()
    # Each logit, each dz and each chunk's product is rounded once to u = eps/2, and the sum of chunks is in 32 bits.
    # Summed in bf16 instead, 600 chunks give 14 times the error of one.
    u = torch.finfo(dtype).eps / 2
    assert (head.weight.grad.double() - exact.grad).norm() / exact.grad.norm() < 3 * u


def test_fp16_sum_over_many_rows_does_not_overflow():
    """The gradient is kept as a sum over rows, and may pass fp16's 65,504 where the mean that is asked for is small."""
    n = 4096
    head, x = nn.Linear(1, 2, bias=False), torch.full((n, 1), 100.0)
    with torch.no_grad():
        head.weight.zero_()
    gpt.chunked_loss(head.half(), x.half(), torch.zeros(n, dtype=torch.long), 256).backward()
    # p = 1/2 for each label: dW = (p - onehot) x = (-50, 50), and n times that is 204,800. All are exact in fp16.
    assert head.weight.grad.flatten().tolist() == [-50, 50]


def test_fp16_scaled_loss_does_not_underflow():
    """The gradient of 65,536 times an fp16 loss is fp64's, though 1/n alone takes it to fp16's smallest numbers."""
    torch.manual_seed(0)
    n, d, V = 2048, 16, 64
    head, x, labels = frozen(d, V), torch.randn(n, d), torch.randint(V, (n,))
    with torch.no_grad():
        head.weight.mul_(1e-3), head.bias.zero_()  # dx is about 2.5e-4 a row; over n 1.2e-7, or two of fp16's 6e-8
    head, x = head.half(), x.half().requires_grad_()
    (gpt.chunked_loss(head, x, labels, 256) * 2.0**16).backward()
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact @ head.weight.detach().double().T, labels).backward()
    # weights and dz are rounded to 2^-11, dx to steps of 6e-8 in 2.5e-4: 2^-12. Unscaled rounding would give 0.1.
    assert (x.grad.double() / 2**16 - exact.grad).norm() / exact.grad.norm() < 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_loss_is_what_the_chunks_give(dtype):
    """The loss of all logits and the loss in chunks are one number; a bf16 sum would have rounded it to 8 bits."""
    torch.manual_seed(0)
    head, x, labels = nn.Linear(16, 3072).to(dtype), torch.randn(200, 16).to(dtype), torch.randint(3072, (200,))
    labels[::3] = -100
    plain, chunks = gpt.plain_loss(head, x, labels), gpt.chunked_loss(head, x, labels, 64)
    assert plain.dtype == chunks.dtype == torch.float32
    exact = F.cross_entropy(head(x).double(), labels)
    # fp32 sums of 3,072 and of 133 numbers: a share of some sqrt(3072) 2^-24 at most
    assert abs(plain - exact) < 1e-5 and abs(chunks - exact) < 1e-5
    assert torch.tensor(10.97).bfloat16() == 11  # the docstring's example


@pytest.mark.thorough
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="tells memory as Linux does")
def test_memory_of_the_loss():
    """GPT-2's head over 4 rows of 256 tokens: 622 MB from all logits; in chunks 65 MB frozen, 373 trained (peaks)."""
    code = """
import sys, torch
from pathlib import Path
from nanopeft import gpt
def resident(key):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[key].split()[0]) * 1024
torch.manual_seed(0)
head = torch.nn.Linear(768, 50257, bias=False).requires_grad_(sys.argv[2] == "trained")
x, labels = torch.randn(1020, 768, requires_grad=True), torch.randint(50257, (1020,))
(x @ x.detach().T).sum().backward()  # the product's own buffers
small = torch.nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True), torch.tensor([1, 2])
gpt.chunked_loss(*small, 2).backward()  # what torch imports at the first call, 35 MB
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
loss = gpt.plain_loss(head, x, labels) if sys.argv[1] == "plain" else gpt.chunked_loss(head, x, labels, 256)
loss.backward()
print(resident("VmHWM") - before)
"""
    env = os.environ | {"PYTHONPATH": str(Path(gpt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    peaks = {"plain frozen": 622, "plain trained": 622, "chunks frozen": 65, "chunks trained": 373}
    for which, megabytes in peaks.items():
        call = [sys.executable, "-c", code, *which.split()]
        done = subprocess.run(call, env=env, capture_output=True, text=True, check=True)
        assert abs(int(done.stdout) / 1e6 - megabytes) < 10, which  # the allocator's pages and the product's buffers


def test_the_compiler_is_not_imported():
    """torch's compiler takes a second to import, so that only a run that compiles waits for it."""
    code = "import nanopeft.trainer.arguments, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
