# SPDX-License-Identifier: MIT
"""What nanopeft/prompt.py claims, against its formula in fp64 and without another library."""

import itertools
import math
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import gpt, prompt
from nanopeft.trainer import files
from nanopeft.trainer.bases import find_checkpoint, load_gpt
from nanopeft.trainer.tokenizer import load_tokenizer

V, D, LIMIT = 64, 16, 32


def tiny_gpt(dtype=torch.float64, **options):
    """A GPT whose weights are large enough for a prompt to make a difference."""
    model = gpt.GPT(**{**dict(vocab_size=V, n_positions=LIMIT, n_embd=D, n_layer=2, n_head=2), **options})
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.4)
    return model.to(dtype).eval()


def prompted(n=5, **options):
    return prompt.PromptTuning(tiny_gpt(**options), n)


def assert_noticeable(model, ids):
    """The prompt changes the logits by at least a tenth, so that logits without it could not pass for those with it."""
    with torch.no_grad():
        y, base = model(ids).logits, model.model(ids).logits
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


def assert_close(found, expected, relative=1e-12):
    """fp64, two layers of sums of at most 64 terms: some thousand roundings of 1.1e-16."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max().clamp(min=1e-3)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))  # B, T, n
seeds = st.integers(0, 999)

# ---------------------------------------------------------------------------------------------------------- the formula


@settings(deadline=None, max_examples=12)
@given(sizes, seeds)
def test_logits_loss_and_gradient_are_those_of_the_longer_input(size, seed):
    """model(ids) is base([P ; E[ids]]) without the prompt's own logits; dP is the sum of d(base's input) over rows."""
    torch.manual_seed(seed)
    B, T, n = size
    model = prompted(n)
    ids = torch.randint(V, (B, T))
    labels = torch.where(torch.rand(B, T) < 0.3, -100, ids)
    labels[0, 0] = ids[0, 0]  # at least one is scored
    words = model.model.transformer.wte.weight[ids].detach()
    long = torch.stack([torch.cat((model.prompt_embeddings.detach(), row)) for row in words]).requires_grad_()
    logits = model.model(inputs_embeds=long).logits
    # the last prompt token predicts the first word, and so on: every label is scored, one place earlier
    loss = F.cross_entropy(logits[:, n - 1 : -1].flatten(0, 1), labels.flatten())
    (gradient,) = torch.autograd.grad(loss, long)
    assert_close(model(ids).logits, logits[:, n:])
    assert_close(model(inputs_embeds=words).logits, logits[:, n:])
    out = model(ids, labels=labels)
    assert_close(out.loss, loss)
    out.loss.backward()
    assert gradient[:, :n].abs().max() > 1e-6
    assert_close(model.prompt_embeddings.grad, gradient[:, :n].sum(0))


def test_the_prompt_is_noticed():
    """The models of these tests do change by their prompt, and by the order of its vectors."""
    torch.manual_seed(0)
    model = prompted()
    ids = torch.randint(V, (2, 9))
    assert_noticeable(model, ids)
    before = model(ids).logits
    with torch.no_grad():
        model.prompt_embeddings.copy_(model.prompt_embeddings.flip(0))
    assert (model(ids).logits - before).abs().max() >= 0.1 * before.abs().max()


# ------------------------------------------------------------------------------------------------ padding and the cache


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 3)), min_size=1, max_size=4), st.integers(1, 6), seeds)
def test_a_padded_row_gives_what_it_gives_alone(lengths, n, seed):
    """Logits, loss and generated tokens of a row do not depend on pads at its left, at its right, or in other rows."""
    torch.manual_seed(seed)
    model = prompted(n)
    rows = [torch.randint(V, (length,)) for length, _ in lengths]
    T = max(length + right for length, right in lengths)
    ids, mask = torch.randint(V, (len(rows), T)), torch.zeros(len(rows), T, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    places = [slice(T - right - length, T - right) for length, right in lengths]
    for i, (row, place) in enumerate(zip(rows, places)):
        ids[i, place], mask[i, place], labels[i, place] = row, 1, row
    logits = model(ids, attention_mask=mask).logits
    losses = []
    for i, (row, place) in enumerate(zip(rows, places)):
        assert_close(logits[i, place], model(row[None]).logits[0])
        losses.append(model(row[None], labels=row[None]).loss * len(row))
    assert_close(model(ids, attention_mask=mask, labels=labels).loss, sum(losses) / sum(map(len, rows)))

    # for generation: the same rows, all pads at the left
    for i, row in enumerate(rows):
        ids[i, T - len(row) :], mask[i] = row, (torch.arange(T) >= T - len(row)).long()
    together = gpt.generate(model, ids, 6, attention_mask=mask)
    assert torch.equal(model.generate(ids, 6, attention_mask=mask), together)
    for i, row in enumerate(rows):
        assert torch.equal(gpt.generate(model, row[None], 6)[0], together[i, T - len(row) :])


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 3), st.booleans(), seeds)
def test_steps_with_a_cache_give_what_one_call_gives(parts, pads, masked, seed):
    """The prompt goes in once: the input in pieces, each after the cache of those before, gives the whole's logits."""
    torch.manual_seed(seed)
    model = prompted()
    T = sum(parts)
    ids, mask = torch.randint(V, (2, T)), torch.ones(2, T, dtype=torch.long)
    if masked:
        mask[1, : min(pads, parts[0] - 1)] = 0
    whole = model(ids, attention_mask=mask if masked else None).logits
    cache, end, found = gpt.KVCache(), 0, []
    for part in parts:
        end += part
        seen = mask[:, :end] if masked else None
        out = model(ids[:, end - part : end], attention_mask=seen, past_key_values=cache)
        cache = out.past_key_values
        found.append(out.logits)
    assert cache.get_seq_length() == model.n_tokens + T
    real = mask.bool()
    assert_close(torch.cat(found, 1)[real], whole[real])


@pytest.mark.parametrize("options", [{}, dict(temperature=0.9, top_k=5)])
def test_generation_is_the_loop_without_a_cache(options):
    """What is generated is what the whole text, run anew for each token, says is next."""
    torch.manual_seed(0)
    model = prompted()
    ids = torch.randint(V, (2, 4))
    if options:
        options["generator"] = torch.Generator().manual_seed(3)
    found = model.generate(ids, 8, **options)
    assert found.shape == (2, 12) and torch.equal(found[:, :4], ids)
    for t in range(4, 12):
        likeliest = model(found[:, :t]).logits[:, -1].topk(5 if options else 1).indices
        assert (likeliest == found[:, t, None]).any(1).all()


def test_caller_s_positions_come_after_the_prompts():
    """position_ids count the input's own tokens, with pads or without; of shape (1, T) they hold for all rows."""
    torch.manual_seed(0)
    model = prompted()
    ids, positions = torch.randint(V, (2, 6)), torch.arange(6)[None]
    assert_close(model(ids, position_ids=positions).logits, model(ids).logits)
    assert (model(ids, position_ids=positions + 3).logits - model(ids).logits).abs().max() > 0.1
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    given_ = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert_close(given_[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


# ------------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_prompt_is_kept_in_32_bits(dtype):
    """P is fp32 beside 16 bits, and fp64 beside 64; the logits have the model's type."""
    model = prompted(dtype=dtype)
    assert model.prompt_embeddings.dtype == torch.promote_types(dtype, torch.float32)
    assert model(torch.tensor([[1, 2]])).logits.dtype == dtype
    assert model.prompt_embeddings.requires_grad and not any(p.requires_grad for p in model.model.parameters())
    assert model.config is model.model.config and model.device.type == "cpu" and model.n_tokens == 5


def test_a_prompt_from_the_vocabulary_is_words():
    """Each vector is a row of the table, of the 5,000 first, and not always the same one."""
    torch.manual_seed(0)
    base = tiny_gpt(torch.float32, vocab_size=6000, n_positions=600)
    table = base.transformer.wte.weight
    P = prompt.PromptTuning(base, 500).prompt_embeddings
    match = (P[:, None] == table[None]).all(-1)  # (500, 6000)
    assert (match.sum(1) == 1).all()
    rows = match.int().argmax(1)
    assert rows.max() < 5000
    # 500 draws of 5,000 hit 5,000 (1 - e^-0.1) = 476 different ones, give or take 5; the mean has a deviation of 65
    assert 440 <= len(set(rows.tolist())) <= 500 and abs(rows.double().mean() - 2500) < 5 * 65


def test_a_random_prompt_is_as_large_as_words():
    """Random vectors are normal with the deviation of the table's, about the 20,000 drawn numbers' error."""
    torch.manual_seed(0)
    base = tiny_gpt(torch.float32, vocab_size=2000, n_embd=64, n_positions=400)
    P = prompt.PromptTuning(base, 300, init="random").prompt_embeddings.detach()
    words = base.transformer.wte.weight
    # two deviations, each known to 1/√(2 · 19,200): 5 of them; the same for the mean
    assert P.std().item() == pytest.approx(words.std().item(), rel=5 * math.sqrt(2 / (2 * P.numel())))
    assert abs(P.mean().item()) <= 5 * P.std().item() / math.sqrt(P.numel())
    assert not (P[:, None, :4] == words[None, :, :4]).any()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=12), st.integers(1, 20), st.booleans())
def test_a_prompt_from_token_ids_repeats_or_cuts_them(ids, n, tensor):
    """P[i] is E[ids[i mod length]], for a text's ids or the class labels'."""
    base = tiny_gpt()
    P = prompt.PromptTuning(base, n, init=torch.tensor(ids) if tensor else ids).prompt_embeddings
    assert all(torch.equal(P[i], base.transformer.wte.weight[ids[i % len(ids)]]) for i in range(n))


def test_parameter_count_of_gpt2():
    """Twenty tokens of GPT-2's 124,439,808 parameters are 15,360, trained and stored."""
    with torch.device("meta"):
        model = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    model = prompt.PromptTuning(model)
    assert sum(p.numel() for p in model.model.parameters()) == 124_439_808
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 15_360
    assert sum(t.numel() for t in prompt.prompt_state_dict(model).values()) == 15_360


# ------------------------------------------------------------------------------------------------------------- training


def test_training_moves_the_prompt_and_nothing_else():
    """The loss of a text falls by more than half; the base's tensors are the same bits, and every number of P moved."""
    torch.manual_seed(0)
    model = prompted(8, dtype=torch.bfloat16).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.01)
    ids = torch.tensor([[5, 9, 2, 40]] * 2)
    losses = []
    for _ in range(60):
        losses.append(model(ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n]) == (n != "prompt_embeddings"), n
    assert (model.prompt_embeddings != before["prompt_embeddings"]).all()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "rate, after, moved", [(1e-4, 4.12, 0.004), (1e-3, 3.87, 0.019), (3e-3, 3.81, 0.034), (0.1, 3.82, 0.66)]
)
def test_learning_rates_of_the_docstring(rate, after, moved):
    """Sixty steps on the embedded base bring the loss of 4.25 to the docstring's, and move P as far as it says."""
    train, valid = files.load("reference", load_tokenizer(find_checkpoint("nano")), 48)
    held_out = list(itertools.islice(valid.batches(32), 4))
    torch.manual_seed(0)
    model = prompt.PromptTuning(load_gpt("nano"))
    torch.manual_seed(0)
    P = model.virtual_tokens().detach().clone()
    optimizer = torch.optim.AdamW([model.prompt_embeddings], lr=rate, weight_decay=0)

    @torch.no_grad()
    def loss():
        return sum(model(ids, labels=labels).loss.item() for ids, labels in held_out) / 4

    assert loss() == pytest.approx(4.25, abs=0.02)
    for _ in range(60):
        ids, labels = train.sample(8)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    assert loss() == pytest.approx(after, abs=0.04)
    assert (model.prompt_embeddings - P).square().mean().sqrt().item() == pytest.approx(moved, rel=0.2)
    assert P.square().mean().sqrt().item() == pytest.approx(0.083, abs=0.005)


# ---------------------------------------------------------------------------------------------------------------- files


def test_state_and_config_come_back():
    """A prompt built from the config and filled from the state gives the same logits to the last bit."""
    torch.manual_seed(0)
    base, ids = tiny_gpt(), torch.randint(V, (2, 5))
    for init in ("vocabulary", "random", [3, 4, 5]):
        model = prompt.PromptTuning(base, 7, init=init)
        state = {k: t.clone() for k, t in prompt.prompt_state_dict(model).items()}
        assert not state["prompt_embeddings"].requires_grad
        config = prompt.prompt_config(model)
        assert config["prompt_tuning_init"] == ("SAMPLE_VOCAB" if init == "vocabulary" else "RANDOM")
        other = prompt.PromptTuning(base, config["num_virtual_tokens"], init=init)
        with torch.no_grad():
            other.prompt_embeddings.add_(1)
        prompt.load_prompt_state_dict(other, state)
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert prompt.prompt_config(other) == config


P5 = torch.zeros(5, D)


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "not nothing"),
        ({"prompt_embeddings": P5, "score.weight": P5}, "prompt_embeddings.*, 'score.weight'"),
        ({"lora_A": P5}, "not {'lora_A'"),
        ({"prompt_embeddings": P5[:4]}, r"must be prompt_embeddings \(5, 16\).*not .*\(4, 16\)"),
        ({"prompt_embeddings": P5.t()}, r"not .*\(16, 5\)"),
        ({"prompt_embeddings": P5.long()}, "in 16 bits or more, not .*int64"),
        ({"prompt_embeddings": P5.to(torch.float8_e4m3fn)}, "in 16 bits or more, not .*float8"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, message):
    """Another method's state or another shape is refused, and the prompt is as it was."""
    model = prompted()
    before = model.prompt_embeddings.clone()
    with pytest.raises(prompt.Error, match=message):
        prompt.load_prompt_state_dict(model, state)
    assert torch.equal(model.prompt_embeddings, before)


# ------------------------------------------------------------------------------------------------------------ wrong use


@pytest.mark.parametrize("n", [0, -3, 2.0, "5", True, None])
def test_less_than_one_token_is_refused(n):
    """A prompt has a whole number of tokens, at least one."""
    with pytest.raises(prompt.Error, match="n_tokens must be a whole number from 1 to below"):
        prompt.PromptTuning(tiny_gpt(), n)


@pytest.mark.parametrize(
    "init, message",
    [
        ("words", "vocabulary, random or a list of at least one token id, 0 to 63, not 'words'"),
        ([], "at least one token id"),
        (torch.tensor([]), "at least one token id"),
        ([0, V], "0 to 63, not"),
        ([-1], "0 to 63, not"),
        ([0.5], "list of at least one token id"),
        (["email", "xml"], "list of at least one token id"),
        (torch.zeros(2, 2, dtype=torch.long), "list of at least one token id"),
    ],
)
def test_a_start_from_no_token_ids_is_refused(init, message):
    """An empty text, words that nobody tokenized and ids outside the vocabulary get one clear line."""
    base = tiny_gpt()
    with pytest.raises(prompt.Error, match=message):
        prompt.PromptTuning(base, 4, init=init)
    assert all(p.requires_grad for p in base.parameters())  # untouched


def test_a_prompt_and_a_text_share_the_context():
    """Prompt and text may fill the positions together, pads aside; one more is refused, and both are counted."""
    model = prompted(5)
    with pytest.raises(prompt.Error, match="from 1 to below the model's 32 positions, not 32"):
        prompt.PromptTuning(tiny_gpt(), LIMIT)
    ids = torch.randint(V, (1, LIMIT))
    assert model(ids[:, 5:]).logits.shape == (1, 27, V)
    refusal = "the text and 5 virtual tokens need 33 positions; the model has 32"
    for options in ({}, dict(attention_mask=torch.ones(1, 28, dtype=torch.long))):
        with pytest.raises(prompt.Error, match=refusal):
            model(ids[:, 4:], **options)
    with pytest.raises(prompt.Error, match=refusal):
        model.generate(ids[:, 5:], 2)
    # as many columns, but no row of that many tokens
    mask = (torch.arange(LIMIT) >= 10)[None].long()
    assert_close(model(ids, attention_mask=mask).logits[:, 10:], model(ids[:, 10:]).logits)


@pytest.mark.parametrize("places", [7, 11])
def test_a_mask_that_does_not_fit_the_input_is_refused(places):
    """A mask is the input's own: one with places for the prompt too would shift all positions, and is refused."""
    model, ids, wrong = prompted(3), torch.randint(V, (2, 8)), torch.ones(2, places, dtype=torch.long)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    for call in (
        lambda: model(ids, attention_mask=wrong),
        lambda: model(ids[:, 5:], attention_mask=wrong, past_key_values=cache),
    ):
        with pytest.raises(prompt.Error, match=r"attention_mask must be \(2, 8\)"):
            call()


def test_wrong_calls_are_refused():
    """A prompt around a prompt, and a call with both or neither of ids and embeddings, say what is wrong."""
    model, ids = prompted(), torch.tensor([[1, 2]])
    with pytest.raises(prompt.Error, match="the model is a PromptTuning already"):
        prompt.PromptTuning(model)
    for inputs in ({}, dict(input_ids=ids, inputs_embeds=model.model.transformer.wte(ids))):
        with pytest.raises(prompt.Error, match="either input_ids or inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize(
    "config, head",
    [(dict(is_encoder_decoder=True), True), (dict(hidden_size_per_layer_input=8), True), ({}, False)],
)
def test_a_model_that_is_no_causal_language_model_is_refused(config, head):
    """An encoder-decoder, embeddings in every layer, or no language model's head: refused, with the model untouched."""
    base = tiny_gpt()
    base.config = SimpleNamespace(**vars(base.config), **config)
    if not head:
        base.get_output_embeddings = lambda: None
    with pytest.raises(prompt.Error, match="take a causal LM"):
        prompt.PromptTuning(base)
    assert all(p.requires_grad for p in base.parameters())


def test_rows_of_one_batch_may_have_different_prompts():
    """Prompts stacked as (tasks, n, d) serve several tasks in one batch: each row gives what its own prompt gives."""
    torch.manual_seed(0)
    base, ids, task = tiny_gpt(), torch.randint(V, (4, 6)), torch.tensor([1, 0, 2, 1])
    models = [prompt.PromptTuning(base, 5, init="random") for _ in range(3)]
    P = torch.stack([model.prompt_embeddings for model in models])
    mixed = base(inputs_embeds=torch.cat((P[task], base.transformer.wte(ids)), 1)).logits[:, 5:]
    for row in range(4):
        assert_close(mixed[row : row + 1], models[task[row]](ids[row : row + 1]).logits)


def test_the_demonstration_says_what_the_docstring_claims(tmp_path, monkeypatch, capsys):
    """Alone in an empty folder, the file runs and prints agreement and a falling loss."""
    monkeypatch.setitem(sys.modules, "nanopeft", None)
    runpy.run_path(shutil.copy(prompt.__file__, tmp_path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[-1]) < 1e-5  # fp32, sums of at most 32 terms
    first, last = (float(x) for x in lines[1].split(";")[0].split("loss ")[1].split(" to "))
    assert last < 0.6 * first and lines[1].endswith("True")


def test_a_model_without_virtual_tokens():
    """To save from it, or to load into it, is one clear line."""
    for call in (prompt.prompt_state_dict, lambda model: prompt.load_prompt_state_dict(model, {})):
        with pytest.raises(prompt.Error, match="no virtual tokens: "):
            call(gpt.GPT(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1))
