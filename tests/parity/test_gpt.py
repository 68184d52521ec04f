# SPDX-License-Identifier: MIT
"""nanopeft/gpt.py gives the numbers of transformers' GPT2LMHeadModel, and the two open each other's files."""

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from nanopeft import gpt
from nanopeft.trainer.bases import load_gpt, save_gpt
from nanopeft.trainer.tokenizer import load_tokenizer

BASE = Path(gpt.__file__).parent / "base"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

often = settings(deadline=None, max_examples=12)

# Both do the same operations, in fp64 to 1.1e-16 and in fp32 to 6e-8 each, in another order. The sums have some 1e3
# terms and are nested some 10 deep, so the largest number is off by some 1e-14 and 5e-6; a slip gives 1e-3 or more.
BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


def off(got, expected):
    """Largest difference, as a share of the largest expected number."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def random_hf(seed=0, **changes):
    """A GPT2LMHeadModel whose every parameter is random, in fp32, without dropout."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=60, eos_token_id=60)
    hf = GPT2LMHeadModel(GPT2Config(**sizes | changes)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(0, 0.3)
    return hf


def pair(dtype=torch.float64, seed=0, **changes):
    """(transformers' model, ours from its files)."""
    hf = random_hf(seed, **changes)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return hf.to(dtype), load_gpt(folder, dtype)


def chunks_of(rows):
    """Makes the model take its loss over so many rows at a time."""
    chunked_loss = gpt.chunked_loss
    return mock.patch.object(gpt, "chunked_loss", lambda head, x, labels, _: chunked_loss(head, x, labels, rows))


def same_training(hf, ours, ids, labels, dtype, rows):
    """Logits, loss and every gradient of the two agree."""
    expected = hf(input_ids=ids, labels=labels)
    assert off(ours(ids).logits, expected.logits) < BOUND[dtype]
    with chunks_of(rows):
        out = ours(ids, labels=labels)
    assert out.logits is None and off(out.loss, expected.loss) < BOUND[torch.float32]
    # transformers takes the loss of an fp64 model in fp32, so to the last digits it is taken here from its logits
    loss = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert off(out.loss, loss) < BOUND[dtype]
    loss.backward(), out.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    # As a share of the model's largest gradient: a key's bias moves no softmax, and its own gradient is rounding alone
    largest = max(g.abs().max() for g in grads.values())
    for name, p in hf.named_parameters():
        transposed = isinstance(hf.get_submodule(name.rpartition(".")[0]), Conv1D) and name.endswith("weight")
        g = grads.pop(name)
        assert ((g.T if transposed else g) - p.grad).abs().max() / largest < BOUND[dtype], name
    assert not grads


@often
@given(
    # Not 2 numbers wide: LayerNorm makes ±1 of any two, so that a gradient is rounding alone
    dtype=st.sampled_from([*BOUND]), n_layer=st.integers(1, 3), n_head=st.integers(1, 4), size=st.integers(4, 8),
    V=st.integers(2, 99), B=st.integers(1, 3), T=st.integers(2, 32), rows=st.integers(1, 100),
    ignored=st.floats(0, 0.9), epsilon=st.sampled_from([1e-5, 1e-3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_training_is_that_of_transformers(dtype, n_layer, n_head, size, V, B, T, rows, ignored, epsilon, seed):
    """Logits, the loss over labels with -100 among them, and all gradients are transformers', in chunks of any size."""
    shape = dict(vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=n_head * size, layer_norm_epsilon=epsilon)
    hf, ours = pair(dtype, seed, **shape, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(V, (B, T))
    labels = ids.masked_fill(torch.rand(B, T) < ignored, -100)
    labels[0, -1] = ids[0, -1]  # transformers' mean over no row is NaN
    same_training(hf, ours, ids, labels, dtype, rows)


@pytest.mark.parametrize("rows", [1, 2, 7, 61, 62, 63, 1000])
def test_every_chunk_size(rows):
    """One row at a time, all at once, or a chunk that does not divide them: the same loss and gradients in fp64."""
    hf, ours = pair()
    ids = torch.randint(61, (2, 32))  # 62 rows
    same_training(hf, ours, ids, ids, torch.float64, rows)


@pytest.mark.parametrize("dtype", BOUND)
def test_training_of_the_base(dtype):
    """On the embedded base too logits, loss and all gradients are transformers'."""
    hf, ours = GPT2LMHeadModel.from_pretrained(BASE, dtype=dtype).eval(), load_gpt("nano", dtype)
    torch.manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (2, 40))
    same_training(hf, ours, ids, ids.masked_fill(torch.rand(2, 40) < 0.3, -100), dtype, rows=13)


def test_base_opens_in_transformers():
    """The embedded base is a GPT-2 checkpoint: transformers opens its model, and its tokenizer gives our token ids."""
    hf, report = GPT2LMHeadModel.from_pretrained(BASE, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = "def café(x):\n    return {'a': x ** 2}  # naïve →\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    assert tokenizer(text)["input_ids"] == load_tokenizer(BASE).encode_ordinary(text)
    assert len(tokenizer) == hf.config.vocab_size


@often
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), left=st.booleans(), dtype=st.sampled_from([*BOUND]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_padding(lengths, left, dtype, seed):
    """With a mask, our positions are those that transformers must be given by hand, and the logits are the same."""
    hf, ours = pair(dtype, seed)
    width = max(lengths)
    ids, mask = torch.randint(61, (len(lengths), width)), torch.zeros(len(lengths), width, dtype=torch.long)
    positions = torch.zeros_like(mask)
    for row, n in enumerate(lengths):
        real = slice(width - n, width) if left else slice(0, n)
        mask[row, real], positions[row, real] = 1, torch.arange(n)
    expected = hf(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    assert off(ours(ids, attention_mask=mask).logits[mask.bool()], expected) < BOUND[dtype]
    assert off(ours(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()], expected) < BOUND[dtype]


@often
@given(T=st.integers(1, 20), seed=st.integers(0, 99))
def test_position_ids_and_inputs_embeds(T, seed):
    """position_ids and inputs_embeds mean what they mean to transformers: beside a cache it does not pack rows."""
    hf, ours = pair(seed=seed)
    x, positions = torch.randn(2, T, 16, dtype=torch.float64), torch.randint(32, (2, T))
    expected = hf(inputs_embeds=x, position_ids=positions, use_cache=False).logits
    assert off(ours(inputs_embeds=x, position_ids=positions).logits, expected) < BOUND[torch.float64]


@often
@given(cuts=st.lists(st.integers(1, 15), max_size=3), seed=st.integers(0, 99))
def test_dynamic_cache(cuts, seed):
    """transformers' DynamicCache serves as past_key_values, is handed back, and ends up with transformers' content."""
    hf, ours = pair(seed=seed)
    ids, theirs, cache = torch.randint(61, (2, 16)), DynamicCache(), DynamicCache()
    expected = hf(input_ids=ids, past_key_values=theirs, use_cache=True).logits
    edges = [0, *sorted(set(cuts)), 16]
    pieces = [ours(ids[:, a:b], past_key_values=cache, use_cache=True) for a, b in zip(edges, edges[1:], strict=False)]
    assert all(out.past_key_values is cache for out in pieces) and cache.get_seq_length() == 16
    assert off(torch.cat([out.logits for out in pieces], 1), expected) < BOUND[torch.float64]
    for got, wanted in zip(cache.layers, theirs.layers, strict=True):
        assert off(got.keys, wanted.keys) < BOUND[torch.float64]
        assert off(got.values, wanted.values) < BOUND[torch.float64]


@often
@given(B=st.integers(1, 3), T=st.integers(1, 10), n=st.integers(1, 15), seed=st.integers(0, 99))
def test_greedy_generation(B, T, n, seed):
    """Our generate gives on our model and on transformers' the tokens of transformers' own, end of text included."""
    hf, ours = pair(seed=seed)
    ids = torch.randint(60, (B, T))
    expected = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=60)
    for model in (ours, hf):
        assert gpt.generate(model, ids, n, eos_token_id=60).tolist() == expected.tolist()
    eos = expected[0, T].item()  # now one that does come
    stopped = hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=eos
    )
    assert ours.generate(ids, n, eos_token_id=eos).tolist() == stopped.tolist()


@settings(deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(1, 8), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_greedy_generation_from_padded_prompts(lengths, seed):
    """A batch padded on the left is continued as transformers continues it."""
    hf, ours = pair(seed=seed)
    ids = torch.randint(60, (len(lengths), max(lengths)))
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, : max(lengths) - n] = 0
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=60)
    expected = hf.generate(ids, attention_mask=mask, **options)
    assert ours.generate(ids, 10, attention_mask=mask).tolist() == expected.tolist()


@settings(deadline=None, max_examples=10)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_files_in_both_directions(dtype, n_layer, n_head, seed):
    """What either saves the other loads: the same bits in each dtype, nothing missing, nothing left over."""
    hf, ours = pair(dtype, seed, n_layer=n_layer, n_head=n_head, n_embd=4 * n_head)
    with tempfile.TemporaryDirectory() as folder:
        save_gpt(ours, folder)
        again, report = GPT2LMHeadModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        hf.save_pretrained(folder)  # over it
        back = load_gpt(folder, dtype)
    assert again.config.embd_pdrop == again.config.attn_pdrop == again.config.resid_pdrop == 0
    assert again.dtype == dtype and again.lm_head.weight is again.transformer.wte.weight
    for key, t in hf.state_dict().items():
        assert torch.equal(again.state_dict()[key], t), key
    for key, t in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], t), key
    if dtype in BOUND:
        ids = torch.randint(61, (2, 9))
        assert off(ours(ids).logits, again.eval()(input_ids=ids).logits) < BOUND[dtype]


@pytest.mark.parametrize("changes", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 64}, {"n_inner": None}])
def test_other_words_for_the_same_model(changes):
    """Configs that say GPT-2's own activation and width in other words load, and give transformers' logits."""
    hf, ours = pair(**changes)
    ids = torch.randint(61, (2, 9))
    assert off(ours(ids).logits, hf(input_ids=ids).logits) < BOUND[torch.float64]
