# SPDX-License-Identifier: MIT
"""data.py: what is scored in each batch, padded or packed, and in which order rows come.
trainer/tasks.py and files.py: no leaks, and files that are read, split or refused as they should be."""

import itertools
import json
import math
import runpy
import time
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import data, gpt
from nanopeft.trainer import Error, evaluate, files, tasks
from nanopeft.trainer.tokenizer import load_tokenizer

ENCODING = load_tokenizer(Path(data.__file__).parent / "base")
library, modules = cache(tasks.library), cache(tasks.modules)  # each reads hundreds of files
TEXT = "".join(f"Line {i} of a text that is long enough, in paragraphs.\n" + "\n" * (i % 3 == 0) for i in range(400))


# ------------------------------------------------------------------------------------------------------------- batches


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 70), st.integers(1, 9))
def test_text_batches_score_each_token_once(length, size):
    """Validation windows of any length score every token after the first exactly once, in order."""
    text = data.TokenStream([TEXT[:900], TEXT[900:1500]], ENCODING, length)
    scored = []
    for ids, labels in text.batches(size):
        assert ids.size(1) <= length and (labels[:, 0] == -100).all() and torch.equal(ids[:, 1:], labels[:, 1:])
        scored += labels[:, 1:].flatten().tolist()
    assert scored == text.tokens[1:].tolist()
    assert evaluate.count_bytes(text) == 1500


def test_text_samples_stay_inside():
    """Training windows are runs of the stream, and the last one can be drawn too."""
    text = data.TokenStream([TEXT[:100]], ENCODING, 8)
    runs = {tuple(text.tokens[i : i + 8].tolist()) for i in range(len(text.tokens) - 7)}
    drawn = {tuple(row) for row in text.sample(2000)[0].tolist()}
    assert drawn == runs


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), min_size=1, max_size=12), st.integers(2, 40))
def test_examples_score_the_completion_alone(pairs, length):
    """Labels are the completion and the end of text, after the prompt's end, cut to the length and padded with -100."""
    examples = data.CompletionDataset(pairs, ENCODING, length)
    ids, labels = examples.collate(examples.rows)
    assert ids.shape == labels.shape and ids.size(1) <= length
    cut = 0
    for (prompt, completion), row, target in zip(pairs, ids.tolist(), labels.tolist()):
        whole = [*ENCODING.encode_ordinary(completion), ENCODING.eot_token]
        scored = [t for t in target if t != -100]
        assert scored == whole[: length - 1]
        at = target.index(scored[0])
        assert row[at : at + len(scored)] == scored
        context = [ENCODING.eot_token, *ENCODING.encode_ordinary(prompt)]
        assert row[:at] == context[-at:] and at >= 1
        cut += len(context) + len(whole) > length
    assert examples.n_truncated == cut


def test_diagrams(capsys):
    """`python -m nanopeft.data` prints the docstring's rows with their labels, and trainer.tasks the tasks' sizes."""
    runpy.run_path(data.__file__, run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.split("\n")]
    for row in (
        "<eot> The cat sat <eot>", "-100 The cat sat <eot>", "<eot> A dog ran <eot>",
        "<eot> 2 + 2 = 4 <eot> <eot> <eot>", "-100 -100 -100 -100 -100 4 <eot> -100 -100",
        "<eot> The cat sat <eot> <eot> <eot> <eot> <eot>", "-100 -100 -100 sat <eot> -100 -100 -100 -100",
        r"<eot> User: Hi \n Assistant: Hello <eot> User: 2 + 2 = \n Assistant: 4 <eot>",
        "-100 -100 -100 -100 -100 Hello <eot>" + 7 * " -100" + " 4 <eot>",
        "<eot> 2 + 2 = 4 <eot> <eot> The cat sat <eot> <eot>",
        "-100 -100 -100 -100 -100 4 <eot> -100 -100 -100 sat <eot> -100", "0 1 2 3 4 5 6 0 1 2 3 4 0",
    ):  # fmt: skip
        assert row.split() in lines
    runpy.run_path(tasks.__file__, run_name="__main__")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["library:", "reference:", "modules:"]


def test_right_padding_needs_no_mask():
    """The loss of a padded batch without an attention mask is that of its rows: no token sees what is behind it."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=ENCODING.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2).double()
    dataset = data.CompletionDataset([("2 + 2 =", " 4"), ("The cat", " sat on the mat")], ENCODING, 64)
    nats = lambda batch: model(batch[0], labels=batch[1]).loss * (batch[1] != -100).sum()  # noqa: E731
    together, apart = nats(dataset.collate(dataset.rows)), sum(nats(dataset.collate([row])) for row in dataset.rows)
    assert abs(together - apart) < 1e-12 * apart
    ids, labels = dataset.collate(dataset.rows)
    assert (ids == ENCODING.eot_token).sum() > 4 and (labels == ENCODING.eot_token).sum() == 2  # both ends are learned


def test_length_buckets_halve_the_work():
    """Of `modules`' validation batches some 50 % is padding in random order, and some 7 % in buckets of like length."""
    dataset = data.CompletionDataset(modules()[1], ENCODING, 256)
    n_tokens = sum(len(p) + len(c) for p, c in dataset.items)

    def padding(batches):
        return 1 - n_tokens / sum(dataset.collate([[item] for item in batch])[0].numel() for batch in batches)

    order = torch.randperm(len(dataset.items), generator=torch.Generator().manual_seed(0)).tolist()
    random = [[dataset.items[i] for i in order[at : at + 32]] for at in range(0, len(order), 32)]
    buckets = dataset.length_buckets(32)
    assert sorted(sum(buckets, [])) == sorted(dataset.items)
    assert 0.45 < padding(random) < 0.55 and padding(buckets) < 0.075


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(2, 80))
def test_widths_are_multiples_of_16(sizes, length):
    """A batch is as wide as the next multiple of 16 above its longest row, and never wider than --length."""
    dataset = data.CompletionDataset([("a" * n, "b") for n in sizes], ENCODING, length)
    longest = max(len(p) + len(c) for p, c in dataset.items)
    for ids, labels in (dataset.collate(dataset.rows), dataset.sample(3)):
        T = ids.size(1)
        assert labels.shape == ids.shape and (T % 16 == 0 or T == length) and T <= length
    assert longest <= dataset.collate(dataset.rows)[0].size(1) < longest + 16


def test_a_wider_batch_has_the_same_loss():
    """Padding up to a multiple of 16 changes no loss: the sums are of the same numbers, in fp64 equal to 1e-12."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=ENCODING.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2).double()
    dataset = data.CompletionDataset([("2 + 2 =", " 4"), ("The cat", " sat on the mat")], ENCODING, 64)
    (ids, labels), width = dataset.collate(dataset.rows), max(len(p) + len(c) for p, c in dataset.items)
    assert ids.size(1) == 16 > width
    loss, narrow = model(ids, labels=labels).loss, model(ids[:, :width], labels=labels[:, :width]).loss
    assert abs(loss - narrow) < 1e-12


def test_bits_per_byte():
    """The docstring's numbers: library source has some 3.28 bytes a token; 2.46 nats each are 1.08 bits per byte."""
    text = library()[1]
    n_tokens = sum(map(len, ENCODING.encode_ordinary_batch(text))) + len(text)
    n_bytes = sum(len(t.encode()) for t in text)
    assert abs(n_bytes / n_tokens - 3.28) < 0.1  # of each Python it is another text
    assert round(2.46 / math.log(2) / 3.28, 2) == 1.08


# ------------------------------------------------------------------------------------------------------- conversations


class Encoding:
    """A tokenizer with what a Hugging Face one may have beside tiktoken's members."""

    def __init__(self, **members):
        vars(self).update(members)

    def __getattr__(self, name):
        return getattr(ENCODING, name)


def message(role, content):
    return {"role": role, "content": content}


CONVERSATION = [message("system", "Be brief."), message("user", "Hi"), message("assistant", "Hello"),
                message("user", "2 + 2?"), message("assistant", "4")]  # fmt: skip
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.builds(message, ROLES, st.text(max_size=20)), max_size=9)
MESSAGES = MESSAGES.filter(lambda messages: any(m["role"] == "assistant" for m in messages))


@settings(deadline=None, max_examples=60)
@given(st.lists(MESSAGES, min_size=1, max_size=4))
def test_each_answer_of_a_conversation_is_scored(conversations):
    """Rows are the plain template's text, and scored are the answers alone, each with end-of-text after it."""
    dataset = data.CompletionDataset(conversations, ENCODING, 4000)
    ids, labels = dataset.collate(dataset.rows)
    for messages, row, target in zip(conversations, ids.tolist(), labels.tolist()):
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        end = {"assistant": "<|endoftext|>", "user": "\n", "system": "\n"}
        text = "".join(f"{m['role'].title()}: {m['content']}{end[m['role']]}" for m in messages[: last + 1])
        assert ENCODING.decode(row).startswith("<|endoftext|>" + text)
        runs = itertools.groupby(zip(row, target), lambda pair: pair[1] != -100)
        scored = [[i for i, _ in run] for is_scored, run in runs if is_scored]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert [ENCODING.decode(run) for run in scored] == [f" {answer}<|endoftext|>" for answer in answers]
        assert all(t in (-100, i) for i, t in zip(row, target))


def test_a_single_answer_is_a_pair():
    """A conversation with one answer is an item of two, and one with more has the labels of its prompt as a third."""
    one, more = data.CompletionDataset([CONVERSATION[:3], CONVERSATION], ENCODING, 99).items
    assert [ENCODING.decode(ids) for ids in one] == [
        "<|endoftext|>System: Be brief.\nUser: Hi\nAssistant:", " Hello<|endoftext|>",
    ]  # fmt: skip
    prompt, completion, labels = more
    assert ENCODING.decode(completion) == " 4<|endoftext|>" and len(labels) == len(prompt)
    assert ENCODING.decode([t for t in labels if t != -100]) == " Hello<|endoftext|>"


def test_a_template_of_the_tokenizer():
    """With encoding.chat the turns are its own, no token is added, and what comes after the last answer is left out."""
    seen = []

    def chat(messages):
        seen.append(messages)
        return [([1, 2], False), ([3, 4], True), ([5], False), ([6, 7], True), ([8], False)]

    dataset = data.CompletionDataset([CONVERSATION, ("a", "b")], Encoding(chat=chat, bos_token=9), 99)
    assert seen == [CONVERSATION]
    assert dataset.items[0] == ([1, 2, 3, 4, 5], [6, 7], [-100, -100, 3, 4, -100])
    a, b = ENCODING.encode_ordinary("a"), ENCODING.encode_ordinary("b")
    assert dataset.items[1] == ([9, *a], [*b, ENCODING.eot_token])
    with pytest.raises(data.Error, match="no answer"):
        data.CompletionDataset([CONVERSATION], Encoding(chat=lambda messages: [([1], False)]), 99)
    with pytest.raises(data.Error, match="no answer"):
        data.CompletionDataset([CONVERSATION[:2]], ENCODING, 99)
    plain = data.CompletionDataset([CONVERSATION], Encoding(chat=None), 99)  # a tokenizer without a template
    assert plain.items == data.CompletionDataset([CONVERSATION], ENCODING, 99).items


@settings(deadline=None, max_examples=40)
@given(MESSAGES, st.integers(2, 60))
def test_a_long_conversation_loses_its_beginning(messages, length):
    """Cut to any length, a conversation keeps the end of its prompt with its labels, and its first token has none."""
    whole = data.CompletionDataset([messages], ENCODING, 9999)
    ids, labels = (t[0].tolist() for t in whole.collate(whole.rows))
    n = data.count_tokens(*whole.items)
    n_completion = len(whole.items[0][1])
    dataset = data.CompletionDataset([messages], ENCODING, length)
    cut, cut_labels = (t[0].tolist() for t in dataset.collate(dataset.rows))
    assert len(cut) <= length and dataset.n_truncated == (n > length)
    keep = slice(max(0, n - max(0, n_completion - length + 1) - length), n - max(0, n_completion - length + 1))
    expected, expected_labels = ids[keep], [-100, *labels[keep][1:]]
    assert cut[: len(expected)] == expected and cut_labels[: len(expected)] == expected_labels
    assert set(cut_labels[len(expected) :]) <= {-100}


def test_start_tokens():
    """Rows and streams start with bos_token, or with no token if it is None; without bos_token, with end-of-text."""
    a, eot = ENCODING.encode_ordinary("a"), ENCODING.eot_token
    for encoding, start in ((ENCODING, [eot]), (Encoding(bos_token=7), [7]), (Encoding(bos_token=None), [])):
        assert data.TokenStream(["a", "a"], encoding, 2).tokens.tolist() == [*start, *a, eot, *a, eot]
        pair, empty = data.CompletionDataset([("a", "a"), ("", "a")], encoding, 16).rows
        dataset = data.CompletionDataset([("a", "a"), ("", "a")], encoding, 16)
        assert dataset.items == [([*start, *a], [*a, eot]), (start, [*a, eot])]
        assert (dataset.collate(dataset.rows)[1][:, 0] == -100).all()  # nothing predicts a row's first token


# -------------------------------------------------------------------------------------------------------------- packing

PAIRS = st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=20)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(40, 80))
def test_rows_are_packed_well(sizes, length):
    """Every item is in one row, no row is too long, and no two rows would fit into one, in whatever order."""
    items = [([i] * (n - 1), [n]) for i, n in enumerate(sizes)]
    rows = data.pack_rows(items, length)
    assert sorted(sum(rows, [])) == sorted(items)
    filled = sorted(data.count_tokens(*row) for row in rows)
    assert filled[-1] <= length and (len(rows) == 1 or filled[0] + filled[1] > length)
    reverse = data.pack_rows(items[::-1], length)
    assert sorted(data.count_tokens(*row) for row in reverse) == filled


def test_best_fit_decreasing():
    """The longest item first, each goes into the fullest row that it fits."""
    rows = data.pack_rows([([0] * (n - 1), [0]) for n in (2, 3, 4, 5, 6, 8)], 10)
    assert [[data.count_tokens(item) for item in row] for row in rows] == [[8, 2], [6, 4], [5, 3]]


@settings(deadline=None, max_examples=40)
@given(PAIRS, st.integers(2, 60), st.sampled_from([0, None]))
def test_packed_rows_hold_the_padded_ones(pairs, length, bos):
    """Cut where the positions are 0, packed rows are the padded rows' ids and labels, each example once."""
    encoding = Encoding(bos_token=bos)
    padded, packed = (data.CompletionDataset(pairs, encoding, length, pack) for pack in (False, True))
    expected, found = [], []
    for row in padded.rows:
        n = data.count_tokens(*row)
        ids, labels = (t[0, :n].tolist() for t in padded.collate([row]))
        expected.append((ids, labels))
    for batch in packed.batches(3):
        assert batch[0].shape == batch[1].shape == batch[2].shape and batch[0].size(1) <= length
        for ids, labels, positions in zip(*(t.tolist() for t in batch)):
            starts = [t for t, position in enumerate(positions) if position == 0] + [len(positions)]
            for start, end in itertools.pairwise(starts):
                assert positions[start:end] == list(range(end - start)) and labels[start] == -100
                found.append((ids[start:end], labels[start:end]))
    padding = ([encoding.eot_token], [-100])
    found = [example for example in found if example != padding]
    assert sorted(found) == sorted(example for example in expected if example != padding)


def random_model(name):
    """A small random causal LM in fp64, ours or transformers', whose every parameter is random."""
    torch.manual_seed(0)
    V, sizes = ENCODING.n_vocab, dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    if name == "ours":
        model = gpt.GPT(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    elif name == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        )
    elif name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, num_key_value_heads=1, **sizes))
    else:
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=V, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model.double().eval()


def loss_sum(model, ids, labels, *positions):
    """Nats of all labels, from the logits: transformers' own loss is in fp32."""
    options = {"position_ids": positions[0]} if positions else {}
    logits = model(input_ids=ids, use_cache=False, **options).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("name", ["ours", "llama", "neox", "gpt2"])
def test_packed_loss_and_gradients_are_the_padded_ones(name):
    """Packed rows give the loss and the gradients of padded ones; without their positions they do not."""
    model, pairs = random_model(name), [("2 + 2 =", " 4"), ("The cat", " sat on the mat"), ("", "One."), ("a b c", "")]
    results = []
    for pack in (False, True):
        dataset = data.CompletionDataset([*pairs, CONVERSATION, *pairs[::-1]], ENCODING, 64, pack)
        loss = sum(loss_sum(model, *batch) for batch in dataset.batches(2))
        results.append((loss, torch.autograd.grad(loss, [*model.parameters()])))
    (padded, padded_grads), (packed, packed_grads) = results
    assert len(dataset.rows) < 4  # nine examples
    # fp64 rounds to 1.1e-16 of a number; the sums here have some 1e3 terms and are nested some ten deep
    assert abs(packed - padded) < 1e-12 * padded
    for grad, expected in zip(packed_grads, padded_grads):
        assert (grad - expected).abs().max() < 1e-12 * max(1, expected.abs().max())
    mixed = sum(loss_sum(model, ids, labels) for ids, labels, _ in dataset.batches(2))
    assert abs(mixed - padded) > 1e-6 * padded


def test_packing_leaves_little_padding():
    """Of the training rows of `modules`, packed to 256 tokens, some 1 % is padding."""
    dataset = data.CompletionDataset(modules()[0], ENCODING, 256, pack=True)
    n_tokens, n_positions = data.count_tokens(*dataset.items), sum(b[0].numel() for b in dataset.batches(32))
    assert 1 - n_tokens / n_positions < 0.015


# ------------------------------------------------------------------------------------------------------ order and parts


def numbered(n, pack=False):
    """A dataset whose completions are the numbers below n, of some 4 to 6 tokens each."""
    return data.CompletionDataset([("n", f" {i}") for i in range(n)], ENCODING, 16, pack)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_an_epoch_has_each_row_once(n, size, seed, pack):
    """Rows in an epoch are all rows once, in whatever batches, whatever the global generator has done."""
    dataset = numbered(n, pack)
    n = len(dataset.rows)
    torch.manual_seed(seed)
    batches = [dataset.sample(size, first, seed)[0] for first in range(0, 3 * n * size, size)]
    torch.manual_seed(seed + 1)
    rows = [tuple(row[row != dataset.pad].tolist()) for batch in batches for row in batch]
    every = sorted(tuple(t[t != dataset.pad].tolist()) for t in (dataset.collate([row])[0][0] for row in dataset.rows))
    for epoch in range(3 * size):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == every
    one = [dataset.sample(1, i, seed)[0][0] for i in range(3 * n)]
    assert [tuple(row[row != dataset.pad].tolist()) for row in one] == rows[: 3 * n]


def test_epochs_and_seeds_have_their_own_order():
    """Each epoch, and each seed, has another permutation, and without first the rows are drawn at random."""
    dataset = numbered(50)
    orders = [dataset.sample(50, 50 * epoch, seed)[0] for seed in (0, 1) for epoch in (0, 1)]
    orders.append(dataset.sample(50, 0, 0)[0])
    same = [[torch.equal(a, b) for b in orders] for a in orders]
    assert same == [[a == b or {a, b} == {0, 4} for b in range(5)] for a in range(5)]
    torch.manual_seed(0)
    a, b = dataset.sample(50)[0], dataset.sample(50)[0]
    torch.manual_seed(0)
    assert torch.equal(dataset.sample(50)[0], a) and not torch.equal(a, b)


def test_steps_of_an_epoch():
    """An epoch takes as many steps as it has rows, or windows that score each token once, over the rows of a step."""
    assert numbered(30).steps_per_epoch(8) == 30 / 8
    packed = numbered(30, pack=True)
    assert packed.steps_per_epoch(4) == len(packed.rows) / 4 < 30 / 4
    text = data.TokenStream([TEXT], ENCODING, 33)
    n_scored = sum((labels != -100).sum().item() for _, labels in text.batches(8))
    assert abs(text.steps_per_epoch(4) * 4 * 32 - n_scored) <= 1


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(1, 3000))
def test_a_part_of_a_text(length, n_tokens):
    """A text's head is some of its windows, spread from its start to its end, of about n_tokens; or all of it."""
    numbers = Encoding(encode_ordinary_batch=lambda texts: [range(1, 1500)], bos_token=0)
    text = data.TokenStream(["x"], numbers, length)
    part = text.head(n_tokens)
    if len(text.tokens) <= n_tokens:
        assert part is text
        return
    windows = [ids for batch, _ in part.batches(3) for ids in batch]
    starts = [ids[0].item() for ids in windows]
    assert all(torch.equal(ids, text.tokens[start : start + length]) for ids, start in zip(windows, starts))
    assert max(1, n_tokens // (length - 1)) == len(windows)
    numbers = [start // (length - 1) for start in starts]
    assert starts[0] == 0 and all(start % (length - 1) == 0 for start in starts)
    gaps = [b - a for a, b in itertools.pairwise([*numbers, 1500 // (length - 1)])]  # the last one: to the end
    assert min(gaps) > 0 and max(gaps) - min(gaps) <= 2
    assert next(text.batches(9999))[0].shape == text.windows.shape  # the whole is as it was
    assert len(part.head(2 * n_tokens).windows) == len(part.windows)  # a part's part has no window twice


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 600), st.booleans())
def test_a_part_of_the_examples(n, n_tokens, pack):
    """A dataset's head is evenly spread examples of about n_tokens in all, packed anew; or all of it."""
    dataset = numbered(n, pack)
    part, total = dataset.head(n_tokens), data.count_tokens(*dataset.items)
    if total <= n_tokens:
        assert part is dataset
        return
    at = [dataset.items.index(item) for item in part.items]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert at[0] == 0 and (not gaps or max(gaps) - min(gaps) <= 1 and min(gaps) > 0)
    assert n - at[-1] <= n / len(at) + 1
    # The longest example has some 7 tokens, and one at least is kept
    assert len(at) == 1 or abs(data.count_tokens(*part.items) - n_tokens) <= 7 + 0.4 * n_tokens
    assert sorted(sum(part.rows, [])) == sorted(part.items) and len(dataset.items) == n
    assert part.pack == pack and len(next(part.batches(2))) == 2 + pack


def test_changed_items_are_the_ones_that_are_sampled():
    """Items that somebody has changed, as P-tuning's template does, are in the rows, packed or not."""
    for pack in (False, True):
        dataset = numbered(5, pack)
        dataset.items = [([1, 2, 3], [4])] * 3
        assert sum(dataset.rows, []) == dataset.items and dataset.sample(1, 0)[0][0, :4].tolist() == [1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------------- tasks


def test_library_leaves_out_what_it_must():
    """`library` has no tests, no package of `modules`, no pydoc_data, and no text on both sides."""
    train, valid = library()
    assert len(train) > 300 and len(valid) > 10
    assert not set(train) & set(valid)
    everything = "\n".join(train + valid)
    assert "class TestCase(object):" not in everything  # unittest/case.py
    assert "class BaseEventLoop(" not in everything  # asyncio/base_events.py
    assert not any(text in everything for text in tasks.reference()[0])


def test_reference_is_split_by_topic():
    """`reference` holds out whole topics, 5 to 30 % of the text, and no paragraph of theirs is left to train on."""
    train, valid = tasks.reference()
    share = sum(map(len, valid)) / sum(map(len, train + valid))
    assert 0.05 < share < 0.3
    paragraphs = {p for text in valid for p in text.split("\n\n")}
    assert not any(p in paragraphs for text in train for p in text.split("\n\n"))


def test_modules_task():
    """`modules` has 1,500 functions or more to test on, a largest class under 25 %, and no file on both sides."""
    train, valid = modules()
    assert len(valid) >= 1500 and len(train) >= 1500
    for side in (train, valid):
        counts = [sum(package == name for _, package in side) for name in tasks.PACKAGES]
        assert min(counts) > 0 and max(counts) / len(side) < 0.25
    assert all(prompt.endswith("\n# module: ") for prompt, _ in train + valid)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_task_validates_on_what_it_trains_on(task):
    """In no task is a text that validates, or a prompt, in training too: nor as it is, nor cut to --length."""
    train, valid = {"library": library, "modules": modules}.get(task, tasks.TASKS[task])()
    assert not set(train) & set(valid)
    if task == "modules":
        assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in valid}
        sides = [data.CompletionDataset(side, ENCODING, 256).items for side in (train, valid)]
        train, valid = ({(*prompt, *completion) for prompt, completion in side} for side in sides)
        assert not train & valid


def test_top_functions_are_not_nested():
    """Functions and methods of three lines are found through classes, if and try; shorter or nested ones are not."""
    a = "def a(x):\n  def inner():\n    pass\n  return x\n"
    b = "class B:\n  if 1:\n    def b(self):\n      x = 1\n      pass\n  def c(self):\n    pass\n"
    assert [f.split("(")[0] for f in tasks.top_functions(a + b)] == ["def a", "def b"]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("old, new", [("", ""), ("\n\n", "\n"), ("\n", " "), ("\n", "\r\n")])
def test_txt_keeps_every_character(tmp_path, old, new):
    """A .txt file is cut once, near nine tenths, and loses nothing, with paragraphs, lines, or neither."""
    path, text = tmp_path / "a.txt", TEXT.replace(old, new) if old else TEXT
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (train,), (valid,), _ = files.split_texts([files.read(str(path))], path)
    assert train + valid == text.replace("\r\n", "\n")
    assert 0.89 < len(train) / len(train + valid) < 0.91


PIECES = {"a paragraph": "\n\n", "a line": "\n", "a sentence": ". ", "a Chinese sentence": "。", "nothing": ""}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 200), st.sampled_from([*PIECES])), min_size=5, max_size=60))
def test_about_a_tenth_validates(pieces):
    """Whatever ends where in a text, 5 to 15 % of it validate, and no character is lost.

    The pieces are numbers in Chinese characters, so that none repeats another.
    """
    text = "".join(f"{chr(0x4E00 + i)}{'文' * n}{chr(0x5E00 + i)}{PIECES[end]}" for i, (n, end) in enumerate(pieces))
    (train,), (valid,), _ = files.split_texts([text], "a.txt")
    assert train + valid == text
    size = len(text.strip())
    # Within 5 % of the text on each side, but for the rounding of a text that is short to whole characters
    assert size * 0.05 - 1 <= len(valid.rstrip()) <= size * 0.15 + 1


@pytest.mark.parametrize(
    "text, start",
    [
        (TEXT + "\n\nTHE END\n", "Line 36"),  # paragraphs of three lines: 1 in 400 has its end at nine tenths
        (TEXT.replace("\n\n", "\n") + "\n\nTHE END\n", "Line 36"),
        (TEXT.replace("\n\n", "\n").replace("\n", "\n\n", 30), "Line 36"),
        (TEXT.replace("\n\n", "\n").replace("\n", " "), "Line 36"),
        ("".join(f"第{i}句话，说的是第{i * i}件事。" for i in range(400)), "第36"),
        ("".join(f"第{i}句话，是第{i * i}件事吗？！" for i in range(400)), "第36"),
        ("".join(f"第{i}句话，说的是第{i * i}件事。\n" for i in range(400)), "第36"),
        ("".join(f"“第{i}句话？”她说：“第{i * i}件事！”" for i in range(400)), ("“第36", "她说")),
        ("".join(f"He asked ({i * i}.) why {i}? " for i in range(900)), ("He asked", "why")),
    ],
)
def test_a_text_is_cut_at_an_end_near_nine_tenths(text, start):
    """Wherever the last blank line is, validation begins with a paragraph, a line or a sentence near nine tenths."""
    (train,), (valid,), _ = files.split_texts([text], "a.txt")
    assert train + valid == text and valid.startswith(start) and 0.085 < len(valid) / len(text) < 0.115


@pytest.mark.parametrize("end", ["\n\n", "\n", "\n \n", " \n", ". ", "。"])
def test_copies_in_a_text_do_not_validate(end):
    """A paragraph, line or sentence of the last tenth that is also in training is left out of validation."""
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0)).tolist()
    pieces = [f"The code of item {i % 40 if i < 160 else i} is {i % 40 * 7919 if i < 160 else i}" for i in order]
    (train,), (valid,), _ = files.split_texts([end.join(pieces)], "a.txt")
    split = lambda text: {piece.strip() for piece in text.split(end.strip() or end) if piece.strip()}  # noqa: E731
    assert split(valid) and not split(valid) & split(train)
    assert split(train) | split(valid) == {piece.strip() for piece in pieces}


@pytest.mark.parametrize("run", ["!", '"', '."', "\n", "\n \t", " ", "。", "”", "a"])
def test_a_long_run_is_split_in_no_time(run):
    """A run of 200,000 equal marks or blanks takes no longer than other texts: no pattern tries each part again."""
    began = time.process_time()
    (train,), (valid,), _ = files.split_texts(["a" + run * 200_000 + "b"], "a.txt")
    assert train + valid == "a" + run * 200_000 + "b"
    assert time.process_time() - began < 2  # some 0.1 s; each part again: an hour


def test_a_text_of_copies_is_refused():
    """Where all of the last tenth is also in training there is nothing to validate on, and one line says so."""
    for text in ("one line and another\n" * 100, TEXT * 4, "一句话。" * 500):
        with pytest.raises(Error, match="a.txt repeats itself"):
            files.split_texts([text], "a.txt")


def test_functions_are_cut_where_they_are():
    """A function is its own lines, also after a form feed, which is no end of a line to Python."""
    function = "def f(x):\n    y = x\n    return y"
    assert tasks.top_functions(f"a = 1\n\x0c\nb = '\u2028'\n{function}\nc = 2\n") == [function]


def split_jsonl(lines, path="a.jsonl"):
    """(training, validation), through a file's text."""
    examples = sorted(files.read_examples("\n".join(lines), path), key=repr)  # as read_files does
    return files.split_examples(examples, path)[:2]


def same(text):
    """Texts that differ in white space alone are one text to whoever reads them."""
    return " ".join(text.split())


TEXTS = st.text(max_size=9) | st.sampled_from(["", "a", " a", "a\n", "b c", "b  c", "é", "\u2028", "1", "2", "3", "4"])


@st.composite
def jsonl(draw):
    """(pairs, lines): pairs of which many are alike, each on lines that say it in several ways."""
    pairs = draw(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=30))
    pairs = [pair for pair in pairs for _ in range(draw(st.integers(1, 4)))]
    lines = []
    for i, (prompt, completion) in enumerate(draw(st.permutations(pairs))):
        blank = st.sampled_from(["", " ", "\t"])
        example = {"prompt": prompt, "completion": draw(blank) + completion + draw(blank)}
        example |= {"id": i} if draw(st.booleans()) else {}
        keys = draw(st.permutations(sorted(example)))
        lines.append(json.dumps({key: example[key] for key in keys}, ensure_ascii=draw(st.booleans())))
    return pairs, lines


@settings(deadline=None, max_examples=150)
@given(jsonl())
def test_no_validation_example_has_been_trained_on(example):
    """However a pair is written down, and how often, all its lines are on one side, and none of them is lost.

    All completions of a prompt are on one side too, unless the prompt is that of over a fifth of the lines. The ways
    of writing are other keys and their order, escapes, and white space around.
    """
    pairs, lines = example
    distinct = {(same(p), same(c)) for p, c in pairs}
    if len(distinct) == 1:
        with pytest.raises(Error, match="one example"):
            split_jsonl(lines)
        return
    train, valid = ([(same(p), same(c)) for p, c in side] for side in split_jsonl(lines))
    assert train and valid and sorted(train + valid) == sorted((same(p), same(c)) for p, c in pairs)
    assert not set(train) & set(valid)
    for prompt in {p for p, _ in train} & {p for p, _ in valid}:
        assert sum(same(p) == prompt for p, _ in pairs) > max(1, len(pairs) // 5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=100, max_size=200), st.randoms(use_true_random=False))
def test_a_tenth_of_the_pairs_validates(counts, random):
    """Of a hundred prompts or more, with one to five completions each, 10 to 15 % validate, in whatever order."""
    lines = [json.dumps({"prompt": f"p{i}", "completion": f"c{j}"}) for i, n in enumerate(counts) for j in range(n)]
    train, valid = split_jsonl(lines)
    assert 0.1 <= len(valid) / len(lines) <= 0.15
    assert split_jsonl(random.sample(lines, len(lines))) == (train, valid)


@pytest.mark.parametrize("prompts", [[""], ["Write a poem."], ["Translate:", "Summarize:", "Answer:"]])
def test_instructions_that_many_lines_share(prompts):
    """Where a few prompts stand for all lines, a tenth of the completions validates, each of them unseen."""
    train, valid = split_jsonl([json.dumps({"prompt": p, "completion": f"c{i}"}) for p in prompts for i in range(100)])
    assert len(valid) == 10 * len(prompts) and not set(train) & set(valid)


def test_jsonl_keeps_its_texts(tmp_path):
    """A .jsonl file gives each line to one side as it is, white space and separators of other languages included."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": f" p{i}\u2028", "completion": f"\tc{i}"}) for i in range(40)]
    path.write_text("\n".join(lines + [""]), "utf-8")
    train, valid, _ = files.split_examples(files.read_files([str(path)]), path)
    assert sorted(train + valid) == sorted((f" p{i}\u2028", f"\tc{i}") for i in range(40)) and len(valid) == 4


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n", "empty"),
        ("a.txt", b"caf\xe9 " * 100, "UTF-8"),
        ("a.txt", b"short", "fewer"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n\nno json\n', "line 3"),
        ("a.jsonl", b'{"prompt": "a", "completion": 1}\n', "line 1"),
        ("a.jsonl", b'["prompt"]\n', "line 1"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n', "one example"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 9, "one example"),
        ("a.txt", b"again and again\n" * 99, "repeats itself"),
        ("a.csv", b"a,b", "no data"),
        (None, None, "no such file"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, name, content, says):
    """Each kind of bad file is refused with a line that says what is wrong, and where."""
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises((Error, data.Error), match=says) as error:
        files.load(str(path), ENCODING, 32)
    assert "\n" not in str(error.value)


def test_folder_is_no_file(tmp_path):
    """A folder with a file's ending is refused."""
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(Error, match="no such file"):
        files.load(str(tmp_path / "a.txt"), ENCODING, 32)


@pytest.mark.parametrize(
    "line, example",
    [
        ({"messages": CONVERSATION, "id": 3}, CONVERSATION),
        ({"messages": [m | {"name": "x"} for m in CONVERSATION]}, CONVERSATION),
        ({"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}, CONVERSATION),
        ({"prompt": "a", "completion": ""}, ("a", "")),
        ({"text": "a document"}, "a document"),
        (
            {"instruction": "Add {these}.", "input": "", "output": "4"},
            (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nAdd {these}.\n\n### Response:",
                "4",
            ),
        ),
        (
            {"instruction": "Add.", "input": "2 and 2", "output": "4"},
            (
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
                "### Input:\n2 and 2\n\n### Response:",
                "4",
            ),
        ),
    ],
)
def test_forms_of_a_line(line, example):
    """Each form gives its example: messages, a pair, a text, and an instruction in Alpaca's words."""
    found = files.read_examples(json.dumps(line), "a.jsonl")
    assert found == [example]
    if "instruction" in line:
        empty, null = line | {"input": ""}, line | {"input": None}
        missing = {key: line[key] for key in ("instruction", "output")}
        for other in (null, missing):
            assert files.read_example(other, "") == files.read_example(empty, "")


@pytest.mark.parametrize(
    "line, says",
    [
        ({"question": "a", "answer": "b"}, 'needs a text for "prompt".*"messages"; it has "question", "answer"'),
        ({"prompt": "a", "completion": None}, "needs a text"),
        ({"prompt": [message("user", "a")], "completion": "b"}, "needs a text"),
        ({"instruction": "a", "input": 7, "output": "b"}, "needs a text"),
        ({"messages": "a"}, "needs a text"),
        ([CONVERSATION], "needs a text"),
        ({"messages": []}, '"assistant"'),
        ({"messages": CONVERSATION[:2]}, '"assistant"'),
        ({"messages": [message("human", "a"), message("gpt", "b")]}, '"assistant"'),
        ({"messages": [*CONVERSATION, message("assistant", " \n")]}, "empty"),
        ({"instruction": "a", "output": ""}, "empty"),
        ({"text": " "}, "empty"),
        ({"messages": [{"role": "assistant", "content": None}]}, "each message needs"),
        ({"messages": [{"from": "human", "value": "a"}]}, "each message needs"),
        ({"messages": ["a"]}, "each message needs"),
        ({"messages": [message("user", "\ud800"), message("assistant", "a")]}, "surrogate"),
        ({"messages": [message("\udfff", "a"), message("assistant", "a")]}, "surrogate"),
        ({"instruction": "\ud800", "output": "a"}, "surrogate"),
        ({"text": "\ud800"}, "surrogate"),
        ({"messages": [message("user", " " * 100_000), message("assistant", "a")]}, "blanks"),
        ({"instruction": "a", "input": "\n" * 100_000 + "a", "output": "a"}, "blanks"),
        ({"text": "a" + "\n" * 100_000 + "a"}, "blanks"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, says):
    """What is of no form, has nothing to learn or cannot be tokenized is refused in one line with its number."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(line) + "\n")
    with pytest.raises(Error, match=says) as error:
        files.load([str(path)], ENCODING, 32)
    assert "a.jsonl, line 2" in str(error.value) and "\n" not in str(error.value)


def test_a_text_that_is_too_short_for_a_window_is_named(tmp_path):
    """Which of training and validation has too few tokens is said: of a text, a tenth validates."""
    path = tmp_path / "a.txt"
    for n, which in ((40, "validation"), (5, "training")):
        path.write_text("".join(f"Sentence number {i}. " for i in range(n)))
        with pytest.raises(Error, match=f"^{which} data: .* tokens, fewer than --length 64"):
            files.load([str(path)], ENCODING, 64)


def test_a_folder_named_like_a_text(tmp_path):
    """A folder is read for its files alone, whatever a folder in it is called."""
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "b.txt" / "c.txt").write_text("text")
    assert files.read_files([str(tmp_path)]) == ["text"]


def test_the_checksum_is_of_the_data_as_they_were_read(tmp_path):
    """The same file has the same checksum under any tokenizer: a chat template may put the day into its ids."""
    path, found = tmp_path / "a.jsonl", []
    for words in ("a", "a", "b"):
        path.write_text("\n".join(json.dumps({"prompt": f"{words}{i}", "completion": "c"}) for i in range(20)))
        found.append(files.load([str(path)], ENCODING, 32)[1].checksum)
    assert found[0] == found[1] != found[2]


def test_forms_are_not_mixed(tmp_path):
    """Two forms in a file are refused in a line that names both; two files of examples may have a form each."""
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    a.write_text("\n".join(json.dumps({"prompt": f"p{i // 2}", "completion": f"c{i}"}) for i in range(20)))
    chats = [[message("user", f"u{i}"), message("assistant", "c")] for i in range(20)]
    b.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    c.write_text(a.read_text() + "\n" + b.read_text())
    with pytest.raises(Error, match="c.jsonl, line 21 has messages, and the first line prompt and completion"):
        files.load([str(c)], ENCODING, 32)
    train, valid = files.load([str(a), str(b)], ENCODING, 32)
    assert len(train.items) + len(valid.items) == 40
    a.write_text("\n".join(a.read_text().split("\n")[::-1]))
    swapped = files.load([str(b), str(a)], ENCODING, 32)  # the order of files and lines changes nothing
    assert [side.items for side in swapped] == [train.items, valid.items]
    (tmp_path / "d.txt").write_text(TEXT)
    with pytest.raises(Error, match="cannot be mixed"):
        files.load([str(a), str(tmp_path / "d.txt")], ENCODING, 32)
    with pytest.raises(Error, match="must both be"):
        files.load([str(a)], ENCODING, 32, valid=[str(tmp_path / "d.txt")])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=3), min_size=2, max_size=40), st.integers(1, 4))
def test_conversations_that_begin_alike_are_on_one_side(turns, n_starts):
    """All conversations with the same first message of the user validate, or none; so do copies; none is lost."""
    conversations = []
    for i, answers in enumerate(turns):
        first = [message("system", "s"), message("user", f"start {i // n_starts}")]
        conversations.append(first + [message(role, x) for x in answers for role in ("assistant", "user")][:-1])
    lines = [json.dumps({"messages": conversation}) for conversation in conversations]
    if len(conversations) <= n_starts:
        return
    train, valid = split_jsonl(lines)
    assert sorted(train + valid, key=repr) == sorted(conversations, key=repr)
    assert not any(example in train for example in valid)
    for start in {example[1]["content"] for example in valid} & {example[1]["content"] for example in train}:
        assert sum(c[1]["content"] == start for c in conversations) > max(1, len(conversations) // 5)


def write(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_several_texts_are_split_at_their_ends(sizes):
    """Of several texts 5 to 15 % of the characters validate, whole texts if one ends there, and nothing is lost."""
    texts = ["".join(f"Line {k} of text {i}, {k * i}.\n" for k in range(n)) for i, n in enumerate(sizes)]
    train, valid, n_leaked = files.split_texts(texts, "a")
    assert n_leaked == 0 and sorted("".join(train + valid)) == sorted("".join(texts))
    assert all(any(part in text for text in texts) for part in train + valid)
    size = sum(map(len, texts))
    assert 0.05 * size - 2 <= sum(map(len, valid)) <= 0.15 * size + 2 or size < 500
    ends = set(itertools.accumulate(map(len, sorted(texts, key=lambda text: zlib.crc32(text.encode())))))
    if any(0.86 * size < end < 0.94 * size for end in ends):
        assert set(train + valid) == set(texts)
    assert files.split_texts(texts[::-1], "a") == (train, valid, 0)


def test_folders_and_several_files(tmp_path):
    """A folder is all .txt files below it, several names are all of them, and documents may stand in a .jsonl."""
    text = lambda name: "".join(f"{name} {i} is a text. " for i in range(9))  # noqa: E731
    texts = {f"{name}.txt": text(name) for name in ("a", "b", "sub/c", "sub/sub/d")}
    write(tmp_path, texts | {"e.md": "no", "f.jsonl": json.dumps({"text": "one\n\ntwo"}) + "\n"})
    assert files.read_files([str(tmp_path)]) == list(texts.values())
    names = [str(tmp_path / name) for name in ("b.txt", "f.jsonl", "sub")]
    assert files.read_files(names) == [texts["b.txt"], "one\n\ntwo", texts["sub/c.txt"], texts["sub/sub/d.txt"]]
    train, valid = files.load([str(tmp_path)], ENCODING, 8)
    assert isinstance(train, data.TokenStream) and (train.tokens == ENCODING.eot_token).sum() >= 4
    (tmp_path / "none").mkdir()
    for name, says in (("none", "no .txt file"), ("missing", "no data"), ("e.md", "no data")):
        with pytest.raises(Error, match=says):
            files.load([str(tmp_path / name)], ENCODING, 8)
    write(tmp_path, {"sub/empty.txt": ""})
    with pytest.raises(Error, match="empty.txt is empty"):
        files.load([str(tmp_path)], ENCODING, 8)


def test_a_validation_file(tmp_path):
    """With valid all of the data trains, and what stands in both is left out of validation and counted."""
    pair = lambda i: json.dumps({"prompt": f"p{i}", "completion": f"c{i}"})  # noqa: E731
    write(tmp_path, {
        "train.jsonl": "\n".join(map(pair, range(20))), "valid.jsonl": "\n".join(map(pair, range(17, 23))),
        "copy.jsonl": pair(3).replace("c3", " c3"), "copy.txt": TEXT[: TEXT.index("\n\n", 200)],
        "train.txt": TEXT, "valid.txt": "New.\n\n" + TEXT[:200] + "\n\nEnd.\n",
    })  # fmt: skip
    path = lambda name: str(tmp_path / name)  # noqa: E731
    train, valid = files.load([path("train.jsonl")], ENCODING, 32, valid=[path("valid.jsonl")])
    assert len(train.items) == 20 and len(valid.items) == 3 and valid.n_leaked == 3
    assert not {repr(item) for item in valid.items} & {repr(item) for item in train.items}
    train, valid = files.load(path("train.txt"), ENCODING, 8, valid=path("valid.txt"))
    assert ENCODING.decode(train.tokens.tolist()) == f"<|endoftext|>{TEXT}<|endoftext|>"
    left = ENCODING.decode(valid.tokens.tolist())
    assert left.startswith("<|endoftext|>New.\n\n") and left.endswith("\n\nEnd.\n<|endoftext|>") and valid.n_leaked > 0
    paragraphs = [paragraph.strip() for paragraph in TEXT.split("\n\n")]
    assert not any(paragraph in left for paragraph in paragraphs if paragraph)
    for kind in ("jsonl", "txt"):
        with pytest.raises(Error, match="all of it is in"):
            files.load([path(f"train.{kind}")], ENCODING, 8, valid=[path(f"copy.{kind}")])
    with pytest.raises(Error, match="reference has validation data"):
        files.load("reference", ENCODING, 8, valid=[path("valid.txt")])


def test_packed_files(tmp_path):
    """pack packs examples on both sides, and is refused for plain text."""
    lines = [json.dumps({"prompt": f"{i}", "completion": "c"}) for i in range(40)]
    write(tmp_path, {"a.txt": TEXT, "a.jsonl": "\n".join(lines)})
    train, valid = files.load([str(tmp_path / "a.jsonl")], ENCODING, 32, pack=True)
    assert train.pack and valid.pack and len(train.rows) < len(train.items) == 36
    with pytest.raises(Error, match="--pack is for examples"):
        files.load([str(tmp_path / "a.txt")], ENCODING, 32, pack=True)


@pytest.mark.thorough
def test_many_lines_are_read_in_seconds():
    """100,000 lines of either form are read, split and packed in some seconds of one core: nothing is quadratic."""
    for text in ('{"prompt": "p%d", "completion": "c"}', '{"text": "Document %d."}'):
        began = time.process_time()
        found = files.read_examples("\n".join(text % i for i in range(100_000)), "a.jsonl")
        (files.split_texts if isinstance(found[0], str) else files.split_examples)(found, "a.jsonl")
        assert time.process_time() - began < 15  # some 2 s
    began = time.process_time()
    data.pack_rows([([0] * (i * 7919 % 500), [0]) for i in range(100_000)], 512)
    assert time.process_time() - began < 15
