# SPDX-License-Identifier: MIT
"""What nanopeft/prefix.py claims, against its formulas in fp64 and without another library."""

import copy
import json
import math
import pydoc_data.topics
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import gpt, prefix
from nanopeft.trainer.bases import find_checkpoint, load_gpt
from nanopeft.trainer.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63], [1, 1, 62, 17, 9, 30, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
EXAMPLES = pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.thorough)])


def tiny_gpt(dtype=torch.float64, *, spread=0.3, **options):
    """Our GPT with weights wide enough that attention is far from even."""
    model = gpt.GPT(**{**dict(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2), **options})
    for p in model.parameters():
        nn.init.normal_(p, std=spread)
    return model.to(dtype).eval()


def randomized(model, n=3, **options):
    """A prefix of N(0, 1) keys and values: at the default start much of what is claimed holds of a hard prompt too."""
    wrapped = prefix.PrefixTuning(model, n, **options).eval()
    for p in trained(wrapped).values():
        nn.init.normal_(p)
    return wrapped


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_noticeable(model, ids=IDS):
    """The prefix changes the logits by at least a tenth: those without it could not pass for those with it."""
    with torch.no_grad():
        y, base = model(ids).logits, model.model(ids).logits
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


def assert_close(found, expected, relative):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def norm(x, layer):
    """LayerNorm by its formula."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def by_formula(model, P, ids):
    """GPT-2's logits with keys and values P (n, 2 L d) in front, token by token and head by head: no mask, no cache."""
    n, (B, T), d = len(P), ids.shape, model.config.n_embd
    H, h = model.config.n_head, model.config.n_embd // model.config.n_head
    body = model.transformer
    rows = []
    for b in range(B):
        x = body["wte"].weight[ids[b]] + body["wpe"].weight[n : n + T]  # (T, d)
        for layer, block in enumerate(body["h"]):
            q, k, v = (norm(x, block.ln_1) @ block.attn.c_attn.weight.t() + block.attn.c_attn.bias).split(d, 1)
            start = 2 * layer * d
            k, v = (
                torch.cat((P[:, start : start + d], k)),
                torch.cat((P[:, start + d : start + 2 * d], v)),
            )  # (n + T, d)
            y = torch.zeros_like(x)
            for t in range(T):
                for head in range(H):
                    own = slice(head * h, (head + 1) * h)
                    weight = (k[: n + t + 1, own] @ q[t, own] / math.sqrt(h)).exp()
                    y[t, own] = weight @ v[: n + t + 1, own] / weight.sum()
            x = x + y @ block.attn.c_proj.weight.t() + block.attn.c_proj.bias
            x = x + block.mlp(norm(x, block.ln_2))
        rows.append(norm(x, body["ln_f"]) @ body["wte"].weight.t())
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------------ one head


def one_head(n=3, T=5, h=4, dtype=torch.float64):
    torch.manual_seed(0)
    q, K, V = torch.randn(3, 2, T, h, dtype=dtype)  # of two heads
    return q, K, V, *torch.randn(2, 2, n, h, dtype=dtype)


@EXAMPLES
def test_gated_and_concatenated_are_one_attention(examples):
    """Both forms are torch's attention over n + T keys with the docstring's mask, and λ is the softmax mass on n."""

    @settings(deadline=None, max_examples=examples)
    @given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
    def check(n, T, h):
        q, K, V, P_K, P_V = one_head(n, T, h)
        keys, mask = torch.cat((P_K, K), 1), torch.cat((torch.ones(T, n), torch.ones(T, T).tril()), 1).bool()
        expected = nn.functional.scaled_dot_product_attention(q, keys, torch.cat((P_V, V), 1), mask)
        y, gate = prefix.gated_attention(q, K, V, P_K, P_V)
        weights = (q @ keys.mT / h**0.5).masked_fill(~mask, -math.inf).softmax(-1)
        # fp64: sums of at most twelve terms, 1.1e-16 each; exp of scores up to 10 loses a digit more
        assert_close(prefix.prefix_attention(q, K, V, P_K, P_V), expected, 1e-13)
        assert_close(y, expected, 1e-13)
        assert_close(gate[..., 0], weights[..., :n].sum(-1), 1e-13)

    check()


def test_the_gate_holds_for_scores_in_the_thousands():
    """In fp32, where exp(89) overflows, the gated form is still the concatenated one, and λ runs from 0 to 1."""
    q, K, V, P_K, P_V = one_head(dtype=torch.float32)
    y, gate = prefix.gated_attention(1000 * q, K, V, P_K, P_V)
    assert_close(y, prefix.prefix_attention(1000 * q, K, V, P_K, P_V), 1e-6)
    assert gate.min() == 0 and gate.max() == 1


@pytest.mark.parametrize("n, mass", [(1, 0.083), (20, 0.643)])
def test_zero_is_no_neutral_prefix(n, mass):
    """Beside scores of 2, 1 and 0, keys of zeros take 8.3 % of the softmax, twenty 64 %, and so much of the output."""
    q, K, zeros = torch.ones(3, 1), torch.tensor([[2.0], [1.0], [0.0]]), torch.zeros(n, 1)
    y, gate = prefix.gated_attention(q, K, K, zeros, zeros)
    assert gate[-1].item() == pytest.approx(mass, abs=5e-4)
    assert y[-1].item() == pytest.approx((1 - mass) * prefix.attention(q, K, K)[-1].item(), abs=1e-3)


def test_a_neutral_prefix_cannot_learn():
    """With scores so low that λ = 0, the output is that of no prefix, and the gradients of P_K and P_V are zero."""
    q, K, V, _, P_V = one_head(1)
    q, P_K = q.abs(), torch.full_like(P_V, -1e4).requires_grad_()
    y = prefix.prefix_attention(q, K, V, P_K, P_V.requires_grad_())
    assert torch.equal(y, prefix.attention(q, K, V))
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(y.square().sum(), (P_K, P_V)))
    assert prefix.gated_attention(-q, K, V, P_K, P_V)[1].min() == 1  # low for q is high for -q: λ = 1


def test_a_prefix_keeps_the_order_of_the_input_tokens():
    """All weights on input tokens shrink by the same 1 - λ: which tokens a query prefers to which stays as it was."""
    q, K, _, P_K, _ = one_head()
    one = torch.eye(5, dtype=q.dtype)  # values that make the output the softmax's weights
    with_prefix = prefix.prefix_attention(q, K, one.expand(2, 5, 5), P_K, torch.zeros(2, 3, 5, dtype=q.dtype))
    gate = prefix.gated_attention(q, K, K, P_K, P_K)[1]
    assert_close(with_prefix, (1 - gate) * prefix.attention(q, K, one), 1e-13)
    assert gate.min() > 0.01


# ---------------------------------------------------------------------------------------------------------- all layers


@EXAMPLES
def test_every_layer_attends_to_the_prefix(examples):
    """Each query's output is the softmax over the prefix's keys and its past's, times their values, in every layer."""

    @settings(deadline=None, max_examples=examples)
    @given(
        layers=st.integers(1, 3), heads=st.integers(1, 3), head_dim=st.integers(1, 5), n=st.integers(1, 6),
        batch=st.integers(1, 3), length=st.integers(1, 6), hidden=st.sampled_from([None, 1, 7]),
    )  # fmt: skip
    def check(layers, heads, head_dim, n, batch, length, hidden):
        base = tiny_gpt(n_layer=layers, n_head=heads, n_embd=heads * head_dim)
        model = randomized(base, n, hidden=hidden)
        ids = torch.randint(64, (batch, length))
        if hidden is None:
            P = model.prompt_embeddings
        else:  # P = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂
            w = dict(model.mlp.named_parameters())
            P = (model.E @ w["0.weight"].t() + w["0.bias"]).tanh() @ w["2.weight"].t() + w["2.bias"]
        assert P.shape == (n, 2 * layers * heads * head_dim)
        # Sums of at most some hundred fp64 terms, of mixed sign: 1.1e-16 each. Three layers, whose norms divide by a
        # deviation, may magnify them a thousandfold
        with torch.no_grad():
            assert_close(model(ids).logits, by_formula(base, P, ids), 1e-10)

    torch.manual_seed(0)
    check()


def test_the_loss_and_gradient_are_those_of_the_formula():
    """The gradient of the prefix, of E and of the MLP is that of the loss by the formula."""
    for hidden in (None, 6):
        torch.manual_seed(0)
        model = randomized(tiny_gpt(), hidden=hidden)
        assert_noticeable(model)
        loss = model(IDS, labels=IDS).loss
        logits = by_formula(model.model, model.prefix(), IDS)
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        assert abs(loss - expected) <= 1e-12 * expected
        own = list(trained(model).values())
        for found, wanted in zip(torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True):
            assert wanted.abs().max() > 0
            assert_close(found, wanted, 1e-10)  # as above


@EXAMPLES
def test_a_padded_row_gives_what_it_gives_alone(examples):
    """Rows of any lengths, padded on the left or the right: each real token's logits are those of the row by itself."""

    @settings(deadline=None, max_examples=examples)
    @given(st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=4))
    def check(n, lengths):
        model = randomized(tiny_gpt(), n)
        longest = max(lengths)
        rows = [torch.randint(64, (size,)) for size in lengths]
        for left in (True, False):
            ids, mask = torch.randint(64, (len(rows), longest)), torch.zeros(len(rows), longest, dtype=torch.long)
            places = [slice(longest - len(r), longest) if left else slice(0, len(r)) for r in rows]
            for i, (row, place) in enumerate(zip(rows, places)):
                ids[i, place], mask[i, place] = row, 1
            with torch.no_grad():
                together = model(ids, attention_mask=mask).logits
                for i, (row, place) in enumerate(zip(rows, places)):
                    # the same sums, in an order of their own, in fp64
                    assert_close(together[i : i + 1, place], model(row[None]).logits, 1e-11)

    torch.manual_seed(0)
    check()


def test_a_batch_serves_several_tasks():
    """With another task's P in each row of the cache, each row's logits are those of its own prefix."""
    torch.manual_seed(0)
    base = tiny_gpt()
    tasks = [randomized(base), randomized(base)]
    with torch.no_grad():
        pairs = zip(*(model.put_prefix_into(gpt.KVCache(), 1).layers for model in tasks), strict=True)
        cache = gpt.KVCache()
        for layer, (first, second) in enumerate(pairs):
            cache.update(*(torch.cat(rows) for rows in zip(first, second)), layer)
        together = base(IDS, past_key_values=cache).logits
        for row, model in enumerate(tasks):
            assert_close(together[row], model(IDS).logits[row], 1e-11)  # as above
        assert_noticeable(tasks[0])


@EXAMPLES
def test_a_text_in_pieces_gives_what_it_gives_whole(examples):
    """With the cache handed back and a mask that grows, any cut of the text gives the same logits."""

    @settings(deadline=None, max_examples=examples)
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
    def check(pieces, padded):
        model = randomized(tiny_gpt())
        T = sum(pieces)
        ids, mask = torch.randint(64, (2, T)), None
        if padded:
            mask = torch.ones(2, T, dtype=torch.long)
            mask[1, : T // 2] = 0
        cache, found, end = None, [], 0
        with torch.no_grad():
            for size in pieces:
                begin, end = end, end + size
                seen = None if mask is None else mask[:, :end]
                out = model(ids[:, begin:end], attention_mask=seen, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                assert cache.get_seq_length() == 3 + end
                found.append(out.logits)
            real = torch.ones(2, T, dtype=torch.bool) if mask is None else mask.bool()
            whole = model(ids, attention_mask=mask).logits
        assert_close(torch.cat(found, 1)[real], whole[real], 1e-11)  # as above

    torch.manual_seed(0)
    check()


def test_embeddings_positions_and_single_logits():
    """inputs_embeds is the same call as input_ids; position_ids count real tokens from 0; other words are passed on."""
    torch.manual_seed(0)
    model = randomized(tiny_gpt())
    with torch.no_grad():
        expected = model(IDS).logits
        embeds = model.model.get_input_embeddings()(IDS)
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
        assert_close(model(IDS, position_ids=torch.arange(7)[None]).logits, expected, 1e-12)
        assert_close(model(IDS, logits_to_keep=2).logits, expected[:, -2:], 1e-12)
        moved = model(IDS, position_ids=torch.arange(7)[None] + 1).logits
    assert (moved - expected).abs().max() > 0.01 * expected.abs().max()


def test_no_call_leaves_a_trace_in_the_next():
    """A forward extends its cache; the next one starts from the prefix alone and gives the same bits."""
    model = randomized(tiny_gpt())
    start = model.prompt_embeddings.detach().clone()
    with torch.no_grad():
        first = model(IDS, use_cache=True)
        second = model(IDS)
    assert torch.equal(first.logits, second.logits)
    assert first.past_key_values is not second.past_key_values
    assert torch.equal(model.prompt_embeddings, start)


# ------------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("hidden", [None, 6, 5, 4])  # the MLP's width around the number of tokens: b₂ gives one more
@pytest.mark.parametrize("n", [1, 5])
def test_the_start_is_a_hard_prompt(n, hidden):
    """Started from token ids, with an MLP or without, the model computes what it computes after these very tokens."""
    torch.manual_seed(0)
    base = tiny_gpt().train()
    words = torch.randint(64, (n,))
    with torch.no_grad():
        expected = base(torch.cat((words.expand(2, -1), IDS), 1)).logits[:, n:]
        for init in (words, words.tolist()):
            model = prefix.PrefixTuning(base, n, hidden=hidden, init=init)
            # fp64; W₂ is solved through a random square matrix, whose condition may reach thousands
            assert_close(model(IDS).logits, expected, 1e-10)
    assert all(m.training for m in base.modules())


def test_the_start_from_the_vocabulary_is_drawn():
    """By default the tokens are drawn: two prefixes start differently, each as the hard prompt of some tokens."""
    base = tiny_gpt()
    torch.manual_seed(0)
    ids = torch.randint(64, (3,))
    torch.manual_seed(0)
    first = prefix.PrefixTuning(base, 3).prompt_embeddings
    assert torch.equal(first, prefix.PrefixTuning(base, 3, init=ids).prompt_embeddings)
    assert not torch.equal(first, prefix.PrefixTuning(base, 3).prompt_embeddings)


def test_real_tokens_disturb_a_pretrained_model_least():
    """On the small GPT-2 (3.70) the start gives 3.74 from the vocabulary, 4.40 from zeros, 4.9 from N(0, 1)."""
    torch.manual_seed(0)
    base, topics = load_gpt("nano").eval(), pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[:10_000]
    ids = torch.tensor(load_tokenizer(find_checkpoint("nano")).encode_ordinary(text)[:256]).view(1, 256)
    with torch.no_grad():
        without = base(ids, labels=ids).loss
        words = prefix.PrefixTuning(base, 20)(ids, labels=ids).loss
        model = prefix.PrefixTuning(base, 20, init="random")
        random = model(ids, labels=ids).loss
        model.prompt_embeddings.zero_()
        zeros = model(ids, labels=ids).loss
    # The text is the running Python's, and the tokens are drawn: only the order, and the gaps, are sure
    assert words - without < 0.15 and 0.4 < zeros - without and 0.6 < random - without


def test_the_random_start_is_pefts():
    """init="random" draws the prefix from N(0, 1), as peft does."""
    torch.manual_seed(0)
    P = prefix.PrefixTuning(tiny_gpt(), 24, init="random").prompt_embeddings.detach()
    n = P.numel()
    assert P.mean().abs() <= 5 / math.sqrt(n)  # 5 standard errors of the mean, and of the deviation
    assert P.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * n))


def test_zero_keys_and_values_are_not_neutral():
    """A prefix of zeros takes exp(0) of each softmax: in one layer it shrinks attention's output by Z / (Z + n)."""
    torch.manual_seed(0)
    base = tiny_gpt(n_layer=1, n_head=1)
    model = prefix.PrefixTuning(base, 3)
    nn.init.zeros_(model.prompt_embeddings)
    assert_noticeable(model)
    seen = {}
    attention = base.transformer["h"][0].attn
    attention.c_attn.register_forward_hook(lambda _, __, y: seen.update(qkv=y[0]))
    attention.c_proj.register_forward_hook(lambda _, x, __: seen.update(y=x[0][0]))
    with torch.no_grad():
        model(IDS[:1])
    q, k, v = seen["qkv"].split(16, -1)
    Z = (k @ q[-1] / 4).exp()  # the last query sees all
    assert_close(seen["y"][-1], (Z / Z.sum()) @ v * Z.sum() / (Z.sum() + 3), 1e-12)


# ----------------------------------------------------------------------------------------------------- the MLP, folding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folding_changes_nothing(dtype):
    """Folded, logits, greedy text and what is saved are the same bits, E and the MLP are gone, and twice is once."""
    torch.manual_seed(0)
    model = randomized(tiny_gpt(dtype), hidden=6)
    assert_noticeable(model)
    with torch.no_grad():
        logits, text, saved = model(IDS).logits, model.generate(IDS, 5), prefix.prefix_state_dict(model)
        assert prefix.fold_prefix(model) is model
        folded = model.prompt_embeddings
        assert prefix.fold_prefix(model).prompt_embeddings is folded
        assert torch.equal(model(IDS).logits, logits) and torch.equal(model.generate(IDS, 5), text)
    other = randomized(tiny_gpt(dtype), hidden=6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = other(IDS).logits
        assert torch.equal(prefix.fold_prefix(other)(IDS).logits, logits)
    assert torch.equal(saved["prompt_embeddings"], prefix.prefix_state_dict(model)["prompt_embeddings"])
    assert trained(model).keys() == {"prompt_embeddings"}


def test_the_cost_on_gpt2():
    """At n = 20: 368,640 numbers (0.30 %), 0.74 MB of cache in 16 bits; an MLP of 512 trains 27 times as many."""
    with torch.device("meta"):
        base = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12).bfloat16()
    plain, through_mlp = (prefix.PrefixTuning(base, 20, hidden=hidden, init="random") for hidden in (None, 512))
    stored, counted = (sum(p.numel() for p in trained(model).values()) for model in (plain, through_mlp))
    assert (stored, counted) == (368_640, 9_864_704) and round(counted / stored) == 27
    assert round(100 * stored / sum(p.numel() for p in base.parameters()), 2) == 0.3
    stored = []
    plain.put_prefix_into(SimpleNamespace(update=lambda key, value, layer: stored.extend((key, value))), 1)
    assert sum(t.nbytes for t in stored) == 737_280


def test_the_mlp_ties_positions_and_layers():
    """One of the MLP's hidden biases moves the keys and values of all virtual tokens in all layers."""
    model = prefix.PrefixTuning(tiny_gpt(), 5, hidden=6)
    with torch.no_grad():
        before = model.prefix()
        model.mlp[0].bias[0] += 0.1
        moved = (model.prefix() - before).view(5, 4, 16)  # (n, 2 L, w)
    assert moved.abs().amax(-1).min() > 0


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_moves_the_prefix_and_nothing_else(dtype, hidden):
    """After a few steps all of the base is the same bits; each trained tensor moved, and is fp32 beside 16 bits."""
    torch.manual_seed(0)
    base = tiny_gpt(dtype)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    model = prefix.PrefixTuning(base, 3, hidden=hidden)
    own = trained(model)
    start = {name: p.detach().clone() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own.values())
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
    assert not any(torch.equal(p, start[name]) for name, p in own.items())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in own.values()} == {wide}
    assert {p.numel() for p in own.values()} == ({3 * 64} if hidden is None else {48, 96, 6, 384, 64})


@pytest.mark.parametrize("hidden", [None, 16])
def test_training_lowers_the_loss(hidden):
    """What trains is the model: the loss of one text falls by more than half under the prefix alone."""
    torch.manual_seed(0)
    model = prefix.PrefixTuning(tiny_gpt(torch.float32, spread=0.4, n_embd=64), 8, hidden=hidden)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1 if hidden is None else 0.01, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = model(IDS[:1], labels=IDS[:1]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("mask", [None, MASK])
def test_generation_is_the_loop_that_recomputes_everything(mask, hidden):
    """Greedy text from gpt.generate and from .generate is that of a loop without a cache, padded on the left or not."""
    torch.manual_seed(0)
    model = randomized(tiny_gpt(), hidden=hidden)
    assert_noticeable(model)
    ids, seen = IDS, mask
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat((ids, model(ids, attention_mask=seen).logits[:, -1:].argmax(-1)), 1)
            seen = None if seen is None else torch.cat((seen, seen.new_ones(2, 1)), 1)
    assert torch.equal(gpt.generate(model, IDS, 8, attention_mask=mask), ids)
    assert torch.equal(model.generate(IDS, 8, attention_mask=mask), ids)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, attention_mask=mask, temperature=0.0), ids)
    assert not torch.equal(gpt.generate(model.model, IDS, 8, attention_mask=mask), ids)


def test_the_attributes_that_a_training_script_reads():
    """config and device are the model's own, and n_tokens is n."""
    base = tiny_gpt()
    model = prefix.PrefixTuning(base, 3)
    assert model.config is base.config and model.device == base.device and model.n_tokens == 3


# ---------------------------------------------------------------------------------------------------------------- files


def test_files_hold_what_was_trained():
    """State and config, through JSON, make the same model again; the tensor is loaded by value."""
    torch.manual_seed(0)
    base = tiny_gpt(torch.float32)
    model = randomized(copy.deepcopy(base), 4, hidden=6)
    config = json.loads(json.dumps(prefix.prefix_config(model)))
    assert config == {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 16,
        "num_attention_heads": 2, "num_layers": 2, "num_transformer_submodules": 1, "encoder_hidden_size": 16,
        "prefix_projection": False, "inference_mode": True,
    }  # fmt: skip
    state = prefix.prefix_state_dict(model)
    assert state.keys() == {"prompt_embeddings"} and not state["prompt_embeddings"].requires_grad
    other = prefix.PrefixTuning(base, config["num_virtual_tokens"]).eval()
    prefix.load_prefix_state_dict(other, state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    state["prompt_embeddings"].zero_()
    assert other.prompt_embeddings.abs().min() > 0 and other.prompt_embeddings.requires_grad


# --------------------------------------------------------------------------------------------------------------- errors


class NoCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(8, 4)

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids):
        return self.wte(input_ids)


class Careless(NoCache):
    """Takes a cache, and keeps in it what is no key and value."""

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        (past_key_values or gpt.KVCache()).conv_states[0] = 1


class Uneven(NoCache):
    """Its second layer has another number of heads."""

    shapes = (2, 1), (3, 1)

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        cache = past_key_values or gpt.KVCache()
        for layer, (heads, length) in enumerate(self.shapes):
            cache.update(torch.zeros(1, heads, length, 4), torch.zeros(1, heads, length, 4), layer)
        return gpt.Output(past_key_values=cache)


class Longer(Uneven):
    """It caches two positions for one token."""

    shapes = (2, 2), (2, 2)


@pytest.mark.parametrize(
    "base, options, message",
    [
        (tiny_gpt, dict(n_tokens=0), "n_tokens must be a whole number of at least 1, not 0"),
        (tiny_gpt, dict(n_tokens=True), "n_tokens must be a whole number"),
        (tiny_gpt, dict(n_tokens=2.0), "n_tokens must be a whole number"),
        (tiny_gpt, dict(hidden=0), "hidden must be a whole number of at least 1, not 0"),
        (tiny_gpt, dict(n_tokens=32), "1 tokens and a prefix of 32 do not fit the model's 32 positions"),
        (tiny_gpt, dict(init="zero"), "init must be 20 token ids below 64, vocabulary or random, not 'zero'"),
        (tiny_gpt, dict(n_tokens=2, init=[1]), "init must be 2 token ids below 64"),
        (tiny_gpt, dict(n_tokens=2, init=[1, 64]), "init must be 2 token ids below 64"),
        (tiny_gpt, dict(n_tokens=2, init=[-1, 3]), "init must be 2 token ids below 64"),
        (tiny_gpt, dict(n_tokens=2, init=torch.ones(2)), "init must be 2 token ids below 64"),
        (NoCache, {}, "NoCache is no causal LM that caches keys and values of one shape"),
        (Careless, dict(n_tokens=1), "Careless is no causal LM that caches keys and values"),
        (Uneven, dict(n_tokens=1), "of one shape"),
        (Longer, dict(n_tokens=1), "of one shape"),
        (lambda: prefix.PrefixTuning(tiny_gpt(), 3), {}, "has a prefix already"),
        (lambda: nn.Sequential(prefix.PrefixTuning(tiny_gpt(), 3)), {}, "has a prefix already"),
    ],
)
def test_wrong_use_says_what_would_be_right(base, options, message):
    """A prefix that cannot be is refused in one line, and the model is as it was: trainable, in its mode."""
    model = base()
    before = [(p, p.requires_grad) for p in model.parameters()]
    with pytest.raises(prefix.Error, match=message) as caught:
        prefix.PrefixTuning(model, **options)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad == needed for p, needed in before)


def test_a_prompt_longer_than_the_context():
    """A prefix of 5 leaves 27 of 32 positions: 27 tokens run, padded to 40 too; 28 are refused, and in generation."""
    model = randomized(tiny_gpt(), 5)
    long, mask = torch.randint(64, (1, 40)), torch.zeros(1, 40, dtype=torch.long)
    mask[0, 13:] = 1
    with torch.no_grad():
        expected = model(long[:, 13:]).logits
        assert_close(model(long, attention_mask=mask).logits[:, 13:], expected, 1e-11)
    message = "28 tokens and a prefix of 5 do not fit the model's 32 positions"
    mask[0, 12] = 1
    for call in (
        lambda: model(long[:, :28]),
        lambda: model(long, attention_mask=mask),
        lambda: gpt.generate(model, long[:, :27], 2),
        lambda: model.generate(long[:, :26], 3),
    ):
        with pytest.raises(prefix.Error, match=message):
            call()
    assert model.generate(long[:, :26], 2).shape == (1, 28)  # the last token is not read


def test_wrong_calls_say_what_would_be_right():
    """Two inputs or none, and a mask that counts the prefix or leaves out the past, are refused in one line."""
    model = randomized(tiny_gpt())
    with pytest.raises(prefix.Error, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(prefix.Error, match="either input_ids or inputs_embeds"):
        model(IDS, inputs_embeds=torch.zeros(2, 7, 16))
    with pytest.raises(prefix.Error, match=r"attention_mask must be \(2, 7\), not \(2, 10\)"):
        model(IDS, attention_mask=torch.ones(2, 10))
    out = model(IDS, use_cache=True)
    with pytest.raises(prefix.Error, match=r"attention_mask must be \(2, 8\), not \(2, 1\)"):
        model(IDS[:, :1], attention_mask=torch.ones(2, 1), past_key_values=out.past_key_values)


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "the file has {}"),
        ({"lora_A": torch.zeros(1)}, "the file has {'lora_A'"),
        ({"prompt_embeddings": torch.zeros(3, 64), "E": torch.zeros(1)}, "'E': "),
        ({"prompt_embeddings": torch.zeros(3, 16)}, r"prompt_embeddings \(3, 64\); .* \(3, 16, torch.float32"),
        ({"prompt_embeddings": torch.zeros(4, 64)}, r"\(4, 64, "),
        ({"prompt_embeddings": torch.zeros(3, 64, dtype=torch.long)}, "torch.int64"),
    ],
)
def test_a_state_that_does_not_fit_loads_nothing(state, message):
    """A file of something else is refused in one line, and the prefix stays as it was."""
    model = prefix.PrefixTuning(tiny_gpt(), 3)
    before = model.prompt_embeddings.detach().clone()
    with pytest.raises(prefix.Error, match=message):
        prefix.load_prefix_state_dict(model, state)
    assert torch.equal(model.prompt_embeddings, before)


def test_a_state_does_not_load_into_an_mlp():
    """What is stored is the evaluated prefix: no MLP can be found from it."""
    model = prefix.PrefixTuning(tiny_gpt(), 3, hidden=6)
    with pytest.raises(prefix.Error, match="fold_prefix"):
        prefix.load_prefix_state_dict(model, {"prompt_embeddings": torch.zeros(3, 64)})
    prefix.load_prefix_state_dict(prefix.fold_prefix(model), {"prompt_embeddings": torch.zeros(3, 64)})
    assert model.prompt_embeddings.abs().max() == 0


# ------------------------------------------------------------------------------------------------------- the file alone


def test_the_file_alone_runs_its_demonstration(tmp_path, monkeypatch, capsys):
    """Copied into an empty folder it runs without nanopeft, and prints what its docstring claims."""
    shutil.copy(Path(prefix.__file__), tmp_path / "prefix.py")
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanopeft"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.chdir(tmp_path)
    runpy.run_path("prefix.py", run_name="__main__")
    one, twenty, forms = capsys.readouterr().out.splitlines()
    assert one.endswith("0.083") and twenty.endswith("0.643")
    assert float(forms.split()[-2]) < 1e-6


def test_a_model_without_a_prefix():
    """To save from it, to fold it, or to load into it, is one clear line."""
    for call in (prefix.prefix_state_dict, prefix.fold_prefix, lambda model: prefix.load_prefix_state_dict(model, {})):
        with pytest.raises(prefix.Error, match="no virtual tokens: "):
            call(gpt.GPT(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1))
