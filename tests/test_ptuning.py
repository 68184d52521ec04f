# SPDX-License-Identifier: MIT
"""What nanopeft/ptuning.py claims, against its formula in fp64 and without another library."""

import copy
import itertools
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

from nanopeft import gpt, prompt, ptuning
from nanopeft.trainer import files
from nanopeft.trainer.bases import find_checkpoint, load_gpt
from nanopeft.trainer.tokenizer import load_tokenizer

V, D, LIMIT = 64, 16, 48
TEMPLATE = "[P][P]The capital of {source} is[P]:[P]"


def encode(text):
    """A token for each character."""
    return [ord(c) % V for c in text]


def tiny_gpt(dtype=torch.float64, **options):
    """A GPT whose weights are large enough for a vector to make a difference."""
    model = gpt.GPT(**{**dict(vocab_size=V, n_positions=LIMIT, n_embd=D, n_layer=2, n_head=2), **options})
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.4)
    return model.to(dtype).eval()


def tuned(*args, dtype=torch.float64, **options):
    """P-tuning on a small GPT, with vectors about as large as its words."""
    model = ptuning.PTuning(tiny_gpt(dtype), *args, **options)
    if model.encoder is not None:
        nn.init.normal_(model.encoder.mlp_head[-1].weight)
    return model


def assert_close(found, expected, relative=1e-12):
    """fp64, two layers and an encoder of sums of at most 64 terms: some thousand roundings of 1.1e-16."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max().clamp(min=1e-3)


def assert_far(found, other):
    """By a tenth of the largest value, so that the one could not pass for the other."""
    assert (found - other).abs().max() >= 0.1 * other.abs().max()


seeds = st.integers(0, 999)


@st.composite
def batches(draw, rows=None):
    """(rows of ids with n pseudo_ids at different places in each, n, pseudo_id)."""
    n = draw(st.integers(1, 4))
    pseudo_id = draw(st.sampled_from([V, V + 7, -1, 3]))  # outside the vocabulary, or a word that is given up
    word = st.integers(0, V - 1).filter(lambda i: i != pseudo_id)
    filled = []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.lists(word, min_size=1, max_size=6))
        for _ in range(n):
            row.insert(draw(st.integers(0, len(row))), pseudo_id)
        filled.append(row)
    return filled, n, pseudo_id


def pad(rows, word=9):
    T = max(map(len, rows))
    ids = torch.tensor([[word] * (T - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])


# ---------------------------------------------------------------------------------------------------------- the formula


@settings(deadline=None, max_examples=12)
@given(batches(), seeds)
def test_each_virtual_token_gets_its_vector_wherever_it_stands(batch, seed):
    """The base sees H[k] at the k-th place of each row and E[id] at every word, in one batch of different places."""
    torch.manual_seed(seed)
    rows, n, pseudo_id = batch
    model = tuned(n, pseudo_id=pseudo_id)
    ids, mask = pad(rows)
    E, H = model.model.transformer.wte.weight, model.virtual_tokens().detach()
    embeds = torch.zeros(*ids.shape, D, dtype=torch.float64)
    for b, row in enumerate(ids.tolist()):
        k = 0
        for t, i in enumerate(row):
            if i == pseudo_id:
                embeds[b, t], k = H[k], k + 1
            else:
                embeds[b, t] = E[i].detach()
        assert k == n
    embeds.requires_grad_()
    logits = model.model(inputs_embeds=embeds, attention_mask=mask).logits
    assert_close(model(ids, attention_mask=mask).logits, logits)

    # the loss is on words alone, and P gets in each place what the base's input gets there
    labels = torch.where(mask.bool() & (ids != pseudo_id), ids, -100)
    if (labels[:, 1:] != -100).any():
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, embeds)
        found = model(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss  # places not left out
        assert_close(found, loss)
        at_places = gradient[ids == pseudo_id].view(len(rows), n, D).sum(0)
        expected = torch.autograd.grad(model.virtual_tokens(), [*model.encoder.parameters()], at_places)
        for one, other in zip(torch.autograd.grad(found, [*model.encoder.parameters()]), expected):
            assert_close(one, other)


def test_moving_a_virtual_token_moves_its_vector():
    """Between other words the vector goes where its place is and the words close up, and the logits notice."""
    torch.manual_seed(0)
    model = tuned(2, pseudo_id=V)
    E, H = model.model.transformer.wte.weight, model.virtual_tokens()
    last = []
    for ids in ([V, 5, 6, V], [5, V, 6, V], [5, 6, V, V], [V, V, 5, 6]):
        row = torch.tensor([ids])
        x, *_ = model.insert(row, None, None, None, None, 0)
        words, places = row[0] != V, row[0] == V
        assert torch.equal(x[0, words], E[[5, 6]]) and torch.equal(x[0, places], H)
        last.append(model(row).logits[0, -1])
    for i in range(4):
        for j in range(i):
            assert_far(last[i], last[j])


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 5), st.sampled_from(["lstm", "mlp"]), seeds)
def test_without_a_template_the_vectors_are_in_front(n, encoder, seed):
    """Without a template, logits and loss are the base's on [H ; E[ids]]; the last vector predicts the first word."""
    torch.manual_seed(seed)
    model = tuned(n, encoder=encoder)
    ids = torch.randint(V, (2, 6))
    words = model.model.transformer.wte(ids)
    logits = model.model(inputs_embeds=torch.stack([torch.cat((model.virtual_tokens(), row)) for row in words])).logits
    assert_close(model(ids).logits, logits[:, n:])
    assert_close(model(inputs_embeds=words).logits, logits[:, n:])
    assert_close(model(ids, labels=ids).loss, F.cross_entropy(logits[:, n - 1 : -1].flatten(0, 1), ids.flatten()))
    assert_far(model(ids).logits, model.model(ids).logits)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_the_encoder_is_a_bidirectional_lstm_and_an_mlp(n, h, layers):
    """H is MLP of the forward and backward states of an LSTM over E, by the gates' equations; each knows the others."""
    torch.manual_seed(n)
    encoder = ptuning.PromptEncoder(n, D, "lstm", h, layers).double()
    x = encoder.embedding.weight
    for layer in range(layers):
        both = []
        for end, order in (("", range(n)), ("_reverse", range(n - 1, -1, -1))):
            names = (f"{kind}_l{layer}{end}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            W, U, b, c = (getattr(encoder.lstm_head, name) for name in names)
            state, cell, out = torch.zeros(h, dtype=torch.float64), torch.zeros(h, dtype=torch.float64), [None] * n
            for t in order:
                i, f, g, o = (W @ x[t] + b + U @ state + c).view(4, h)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                out[t] = state = o.sigmoid() * cell.tanh()
            both.append(torch.stack(out))
        x = torch.cat(both, 1)  # (n, 2h)
    first, _, last = encoder.mlp_head
    expected = torch.relu(x @ first.weight.t() + first.bias) @ last.weight.t() + last.bias
    assert encoder().shape == (n, D)
    assert_close(encoder(), expected)


def test_the_lstm_ties_the_virtual_tokens_together_and_the_mlp_does_not():
    """Another e at one place changes all vectors of the LSTM's, and one of the MLP's."""
    for encoder, moved in (("lstm", 5), ("mlp", 1)):
        torch.manual_seed(0)
        model = tuned(5, encoder=encoder)
        before = model.virtual_tokens().detach()
        with torch.no_grad():
            model.encoder.embedding.weight[2] += 1
        assert (model.virtual_tokens() != before).any(1).sum() == moved


@pytest.mark.parametrize(
    "n, options, trained",
    [
        (20, {}, 8_286_720),
        (6, {}, 8_275_968),
        (20, dict(hidden=768), 27_174_144),
        (20, dict(encoder="mlp"), 1_787_136),
    ],
)
def test_parameter_count_of_gpt2(n, options, trained):
    """Beside GPT-2 the paper's encoder trains 8.3 million numbers, peft's sizes 27.2, the MLP 1.8; n d are stored."""
    with torch.device("meta"):
        base = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
        model = ptuning.PTuning(base, n, **options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert ptuning.ptuning_state_dict(model)["prompt_embeddings"].numel() == n * 768
    ptuning.fold_ptuning(model)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + n * 768


# ------------------------------------------------------------------------------------------------------------ templates


@settings(deadline=None, max_examples=25)
@given(st.data(), st.lists(st.integers(0, V - 1), max_size=6))
def test_a_template_is_its_parts_in_order(data, source):
    """[P] becomes the pseudo-token, {source} the source, and any text between them its tokens, spaces included."""
    text = st.text("ab #:{}P[]\n", min_size=1, max_size=5).filter(
        lambda s: not any(mark in s for mark in ("[P]", "{source}", "[", "{"))
    )
    parts = data.draw(st.lists(st.one_of(st.just("[P]"), text), max_size=8))
    parts.insert(data.draw(st.integers(0, len(parts))), "{source}")
    expected = []
    for part in parts:
        expected += [V] if part == "[P]" else source if part == "{source}" else encode(part)
    assert ptuning.apply_template("".join(parts), source, encode, V) == expected


def test_a_template_gives_what_the_model_reads():
    """A row filled by the model has n_tokens virtual tokens and the anchors' tokens between, and is read as such."""
    torch.manual_seed(0)
    model = tuned(template=TEMPLATE)
    assert model.n_tokens == 4 and model.pseudo_id == V
    row = model.apply_template([7, 8], encode)
    assert row == [V, V, *encode("The capital of "), 7, 8, *encode(" is"), V, *encode(":"), V]
    E, H = model.model.transformer.wte.weight, model.virtual_tokens()
    by_hand = torch.cat((H[:2], E[row[2:22]], H[2:3], E[row[23:-1]], H[3:]))[None]
    assert_close(model(torch.tensor([row])).logits, model.model(inputs_embeds=by_hand).logits)


@settings(deadline=None, max_examples=6)
@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), st.sampled_from(["lstm", "mlp"]))
def test_a_template_without_virtual_tokens_is_the_base(source, encoder):
    """With no [P] the logits, loss and text are the base's on the filled template, to the last bit."""
    torch.manual_seed(0)
    model = ptuning.PTuning(tiny_gpt(), template="x: {source}\n", encoder=encoder)
    ids = torch.tensor([model.apply_template(source, encode)])
    assert ids.tolist() == [[*encode("x: "), *source, *encode("\n")]]
    for options in ({}, dict(labels=ids), dict(attention_mask=torch.ones_like(ids))):
        for one, other in zip(model(ids, **options), model.model(ids, **options)):
            assert (one is None and other is None) or torch.equal(one, other)
    assert torch.equal(model.generate(ids, 5), model.model.generate(ids, 5))
    assert ptuning.ptuning_state_dict(ptuning.fold_ptuning(model))["prompt_embeddings"].shape == (0, D)


@pytest.mark.parametrize("template", ["[P]", "", "{source}{source}", "{src}[P]"])
def test_a_template_has_its_source_once(template):
    """A template without {source}, or with two, is refused, by the model and by the function."""
    with pytest.raises(ptuning.Error, match="exactly once"):
        ptuning.PTuning(tiny_gpt(), template=template)
    with pytest.raises(ptuning.Error, match="exactly once"):
        ptuning.apply_template(template, [1], encode, V)


@pytest.mark.parametrize("more", [-1, 3])
def test_a_mask_that_does_not_fit_the_input_is_refused(more):
    """A mask is the input's own: one with places for the vectors in front would shift all positions, and is refused."""
    for model, ids in (
        (tuned(n_tokens=3), torch.randint(V, (2, 8))),
        (template := tuned(template=TEMPLATE), torch.tensor([template.apply_template([1, 2, 3], encode)] * 2)),
    ):
        T = ids.size(1)
        cache, step = model(ids, use_cache=True).past_key_values, torch.tensor([[1, 2]] * 2)
        for x, options, places in ((ids, {}, T), (step, dict(past_key_values=cache), T + 2)):
            wrong = torch.ones(2, places + more, dtype=torch.long)
            with pytest.raises(ptuning.Error, match=rf"attention_mask must be \(2, {places}\)"):
                model(x, attention_mask=wrong, **options)


def test_virtual_tokens_that_were_cut_away_are_missed():
    """A virtual token too few or too many, a batch without any, and one after the first step get one clear line."""
    model = tuned(template=TEMPLATE)
    row = model.apply_template([1, 2, 3], encode)
    for ids, counts in (([row[1:]] * 2, r"\[3, 3\]"), ([[5, *row[:-1]], row], r"\[3, 4\]"), ([[1, 2, 3]], r"\[0\]")):
        for call in (model, model.generate):
            with pytest.raises(ptuning.Error, match=f"must have 4 virtual tokens, not {counts}: in the first step all"):
                call(torch.tensor([r[: len(min(ids, key=len))] for r in ids]))
    with pytest.raises(ptuning.Error, match=r"not \[5\]"):
        model(torch.tensor([[V, *row]]))
    out = model(torch.tensor([row]), use_cache=True)
    with pytest.raises(ptuning.Error, match=r"must have 0 virtual tokens, not \[1\]: in the first step all"):
        model(torch.tensor([[V]]), past_key_values=out.past_key_values)
    with pytest.raises(ptuning.Error, match="found by their ids"):
        model(inputs_embeds=torch.zeros(1, 3, D, dtype=torch.float64))
    with pytest.raises(ptuning.Error, match="no template to apply"):
        tuned(4).apply_template([1], encode)


# ------------------------------------------------------------------------------------------------ padding and the cache


@settings(deadline=None, max_examples=10)
@given(batches(), st.booleans(), seeds)
def test_a_padded_row_gives_what_it_gives_alone(batch, front, seed):
    """Logits and generated tokens of a row do not depend on pads at its left, wherever its virtual tokens are."""
    torch.manual_seed(seed)
    rows, n, pseudo_id = batch
    if front:
        rows = [[i for i in row if i != pseudo_id] for row in rows]
    model = tuned(n, pseudo_id=None if front else pseudo_id)
    ids, mask = pad(rows)
    logits = model(ids, attention_mask=mask).logits
    n_new = 5 if front or not 0 <= pseudo_id < V else 1  # a word that is given up may be written, and is refused then
    together = gpt.generate(model, ids, n_new, attention_mask=mask)
    assert torch.equal(model.generate(ids, n_new, attention_mask=mask), together)
    for i, row in enumerate(rows):
        assert_close(logits[i, -len(row) :], model(torch.tensor([row])).logits[0])
        assert torch.equal(gpt.generate(model, torch.tensor([row]), n_new)[0], together[i, -len(row) - n_new :])


@pytest.mark.parametrize("front", [True, False])
def test_steps_with_a_cache_give_what_one_call_gives(front):
    """The vectors go in once: a row in pieces, each after the cache of those before, gives the whole's logits."""
    torch.manual_seed(0)
    model = tuned(2) if front else tuned(2, pseudo_id=V)
    ids = torch.tensor([[9, 9, 5, 6, 7, 1, 2, 3], [9, 4, 5, 6, 7, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    if not front:
        ids[0, 2:4], ids[1, 0], ids[1, 3] = V, V, V
    whole = model(ids, attention_mask=mask).logits
    cache, found = gpt.KVCache(), []
    for start, end in ((0, 4), (4, 5), (5, 8)):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        found.append(out.logits)
    assert cache.get_seq_length() == 8 + 2 * front
    assert_close(torch.cat(found, 1)[mask.bool()], whole[mask.bool()])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given_ = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(given_[mask.bool()], whole[mask.bool()])
    assert_far(model(ids, attention_mask=mask, position_ids=positions.flip(1)).logits, whole)


# ---------------------------------------------------------------------------------------------------- fold and training


@settings(deadline=None, max_examples=10)
@given(
    st.integers(1, 6), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([dict(encoder="lstm"), dict(encoder="lstm", layers=1, hidden=3), dict(encoder="mlp", hidden=5)]),
    st.booleans(), seeds,
)  # fmt: skip
def test_folding_changes_nothing(n, dtype, options, front, seed):
    """Folded, once or twice, the model infers the same bits as with its encoder, and holds n d numbers of its own."""
    torch.manual_seed(seed)
    model = tuned(n, dtype=dtype, pseudo_id=None if front else V, **options)
    ids = torch.randint(V, (2, 5))
    if not front:
        ids = torch.cat((ids[:, :2], torch.full((2, n), V), ids[:, 2:]), 1)
    trained, text, state = model(ids).logits.detach(), model.generate(ids, 3), ptuning.ptuning_state_dict(model)
    with torch.no_grad():
        logits = model(ids).logits
    # torch's LSTM has two ways, with and without gradients: some dozen roundings apart, in the logits a few hundred
    relative = 300 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 0.1
    assert_close(logits, trained, relative)
    assert model.virtual_tokens().dtype == torch.promote_types(dtype, torch.float32)
    for _ in range(2):
        assert ptuning.fold_ptuning(model) is model
        assert model.encoder is None
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits) and torch.equal(model.generate(ids, 3), text)
        assert torch.equal(ptuning.ptuning_state_dict(model)["prompt_embeddings"], state["prompt_embeddings"])
        assert {k for k, p in model.named_parameters() if not k.startswith("model.")} == {"prompt_embeddings"}
        assert model.prompt_embeddings.shape == (n, D)


def test_folding_under_autocast_changes_nothing():
    """Inside autocast too the encoder runs in its own precision, so that what is trained there is what is kept."""
    model = tuned(5, dtype=torch.float32, encoder="mlp")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, expected = model(torch.tensor([[1, 2, 3]])).logits, model.encoder()
        assert model.virtual_tokens().dtype == torch.float32 and expected.dtype == torch.bfloat16
        assert torch.equal(ptuning.fold_ptuning(model)(torch.tensor([[1, 2, 3]])).logits, logits)
    assert model.prompt_embeddings.dtype == torch.float32


@pytest.mark.parametrize("dtype, encoder", [(torch.bfloat16, "lstm"), (torch.float32, "mlp")])
def test_training_moves_the_encoder_and_nothing_else(dtype, encoder):
    """The loss of a text falls by more than half; the base is the same bits, and every tensor of the encoder moved."""
    torch.manual_seed(0)
    model = tuned(template=TEMPLATE, dtype=dtype, encoder=encoder).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    prompt, completion = model.apply_template([5, 9], encode), [40, 2, 11]
    ids = torch.tensor([prompt + completion] * 2)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    losses = []
    for _ in range(60):
        losses.append(model(ids, labels=labels).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n]) == n.startswith("model."), n
    assert {p.dtype for p in model.encoder.parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "options",
    [
        dict(n_tokens=5),
        dict(n_tokens=1, encoder="mlp", hidden=7),
        dict(encoder="lstm", hidden=3, layers=1, template=TEMPLATE),
        dict(n_tokens=3, pseudo_id=V + 5),
        dict(template="{source}"),
    ],
)
def test_state_and_config_come_back(options):
    """What the config and the state build is folded, has the same places, and gives the same logits to the last bit."""
    torch.manual_seed(0)
    model = tuned(**options)
    ids = torch.tensor([[1, 2, *[model.pseudo_id or 0] * model.n_tokens, 3]])
    config, state = ptuning.ptuning_config(model), ptuning.ptuning_state_dict(model)
    front = "template" not in options and "pseudo_id" not in options
    assert config["peft_type"] == ("P_TUNING" if front else "P_TUNING_TEMPLATE")
    other = ptuning.PTuning(copy.deepcopy(model.model), **options)
    assert ptuning.ptuning_config(other) == config
    ptuning.load_ptuning_state_dict(other, state)
    with torch.no_grad():
        assert other.encoder is None and torch.equal(other(ids).logits, model(ids).logits)
        ptuning.load_ptuning_state_dict(other, state)  # onto a folded one
        assert torch.equal(other(ids).logits, model(ids).logits)


H4 = torch.zeros(4, D)


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "not nothing"),
        ({"prompt_embeddings": H4, "score.weight": H4}, "prompt_embeddings.*, 'score.weight'"),
        ({"prompt_embeddings": H4[:3]}, r"must be prompt_embeddings \(4, 16\).*not .*\(3, 16\)"),
        ({"prompt_embeddings": torch.zeros(4, D, 1)}, r"not .*\(4, 16, 1\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, message):
    """Another method's state or another shape is refused, and the encoder is there, as it was."""
    model = tuned(4)
    before = model.virtual_tokens()
    with pytest.raises(ptuning.Error, match=message):
        ptuning.load_ptuning_state_dict(model, state)
    assert model.encoder is not None and torch.equal(model.virtual_tokens(), before)


# ------------------------------------------------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    "options, message",
    [
        *((dict(n_tokens=n), "n_tokens must be a whole number from 1 to") for n in (0, -1, 2.0, "5", True)),
        (dict(n_tokens=0, pseudo_id=V), "from 1 to"),
        (dict(n_tokens=3, template=TEMPLATE), "the template has 4 virtual tokens, and n_tokens is 3"),
        (dict(encoder="gru"), "lstm, or mlp without layers, not 'gru'"),
        (dict(encoder=None), "lstm, or mlp"),
        *((dict(hidden=h), "hidden and layers must be whole numbers of at least 1") for h in (0, 2.0, True)),
        (dict(layers=0), "hidden and layers"),
        (dict(encoder="mlp", layers=3), "mlp without layers"),
        (dict(pseudo_id="[P]"), "pseudo_id must be a token id"),
        (dict(n_tokens=LIMIT), "from 1 to below the model's 48 positions, not 48"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    """Wrong counts, encoders and sizes get one clear line, with the model untouched."""
    base = tiny_gpt()
    with pytest.raises(ptuning.Error, match=message):
        ptuning.PTuning(base, **options)
    assert all(p.requires_grad for p in base.parameters())


def test_virtual_tokens_and_text_share_the_context():
    """Virtual tokens and text may take all positions together; one more is refused, and both are counted."""
    for model, more in ((tuned(5), 0), (tuned(5, pseudo_id=V), 5)):
        ids = torch.tensor([[V] * more + [1] * (LIMIT - 5)])
        assert model(ids).logits.shape == (1, LIMIT - 5 + more, V)
        longer = torch.cat((ids, ids[:, -1:]), 1)
        for call in (model, lambda x, m=model: m(x, attention_mask=torch.ones_like(x)), model.generate):
            with pytest.raises(ptuning.Error, match="5 virtual tokens need 49 positions; the model has 48"):
                call(longer)
        mask = torch.ones_like(longer)
        mask[0, 0 if not more else -1] = 0  # as many columns, but one of them a pad
        assert model(longer, attention_mask=mask).logits.shape == (1, LIMIT - 4 + more, V)


def test_wrong_calls_are_refused():
    """P-tuning around P-tuning, and a call with both or neither of ids and embeddings, say what is wrong."""
    model, ids = tuned(3), torch.tensor([[1, 2]])
    with pytest.raises(ptuning.Error, match="the model is a PTuning already"):
        ptuning.PTuning(model)
    for inputs in ({}, dict(input_ids=ids, inputs_embeds=model.model.transformer.wte(ids))):
        with pytest.raises(ptuning.Error, match="either input_ids or inputs_embeds"):
            model(**inputs)


def test_an_encoder_decoder_is_refused():
    """What prompt.py refuses is refused here too, with the model untouched."""
    base = tiny_gpt()
    base.config = SimpleNamespace(**vars(base.config), is_encoder_decoder=True)
    with pytest.raises(ptuning.Error, match="take a causal LM"):
        ptuning.PTuning(base, template=TEMPLATE)
    assert all(p.requires_grad for p in base.parameters())


def test_the_lstm_s_virtual_tokens_start_nearly_equal():
    """On the embedded base: RMS 0.042, 0.010 around the mean; with the MLP 0.10 and 0.07; of the words 0.083."""
    base = load_gpt("nano")
    rms = lambda t: t.square().mean().sqrt().item()  # noqa: E731
    assert rms(base.transformer.wte.weight) == pytest.approx(0.083, abs=5e-4)
    for encoder, size, spread, error in (("lstm", 0.042, 0.010, 0.001), ("mlp", 0.105, 0.068, 0.01)):
        for seed in range(3):
            torch.manual_seed(seed)
            P = ptuning.PTuning(base, encoder=encoder).virtual_tokens().detach()
            assert rms(P) == pytest.approx(size, abs=2 * error)
            assert rms(P - P.mean(0)) == pytest.approx(spread, abs=error)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "encoder, before, after, moved, spread",
    [
        ("lstm", 4.33, 3.81, 0.31, 0.2),
        ("mlp", 4.63, 3.88, 1.9, 0.9),
    ],
)
def test_the_docstring_s_comparison_of_encoders(encoder, before, after, moved, spread):
    """The table's sixty steps at seed 0: losses, P's way and its spread. Prompt tuning's are in test_prompt.py."""
    train, valid = files.load("reference", load_tokenizer(find_checkpoint("nano")), 48)
    held_out = list(itertools.islice(valid.batches(32), 4))
    torch.manual_seed(0)
    model = ptuning.PTuning(load_gpt("nano"), encoder=encoder)
    torch.manual_seed(0)
    P = model.virtual_tokens().detach().clone()
    optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=3e-3, weight_decay=0)

    @torch.no_grad()
    def loss():
        return sum(model(ids, labels=labels).loss.item() for ids, labels in held_out) / 4

    assert loss() == pytest.approx(before, abs=0.02)
    for _ in range(60):
        ids, labels = train.sample(8)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    assert loss() == pytest.approx(after, abs=0.04)
    end = model.virtual_tokens().detach()
    assert (end - P).square().mean().sqrt().item() == pytest.approx(moved, rel=0.2)
    assert (end - end.mean(0)).square().mean().sqrt().item() == pytest.approx(spread, rel=0.2)


def test_the_demonstration_says_what_the_docstring_claims(tmp_path, monkeypatch, capsys):
    """Beside prompt.py in an empty folder, the file runs and prints exact agreement and the docstring's numbers."""
    monkeypatch.setitem(sys.modules, "nanopeft", None)
    monkeypatch.delitem(sys.modules, "prompt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(prompt.__file__, tmp_path)
    runpy.run_path(shutil.copy(ptuning.__file__, tmp_path), run_name="__main__")
    assert sys.modules.pop("prompt").__file__ == str(tmp_path / "prompt.py")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("[40, 40, 3, 7, 2, 21, 22, 2, 40]")
    assert float(lines[1].split()[-1]) < 1e-5  # fp32, sums of at most 32 terms
    assert lines[2].startswith("folded, 15,008 trained numbers are 96") and lines[2].endswith("True")
