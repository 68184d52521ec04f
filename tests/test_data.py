# SPDX-License-Identifier: MIT
"""nanopeft/data.py: what is scored in each batch, tasks without leaks, files split or refused as they should be."""

import json
import math
import runpy
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import data, gpt
from nanopeft.trainer import evaluate
from nanopeft.trainer.tokenizer import load_tokenizer

ENCODING = load_tokenizer(Path(data.__file__).parent / "base")
library, modules = cache(data.library), cache(data.modules)  # each reads hundreds of files
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
    ids, labels = examples.collate(examples.items)
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
    """`python -m nanopeft.data` prints the docstring's window and row with their labels, and the tasks' sizes."""
    runpy.run_path(data.__file__, run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.split("\n")]
    for row in (
        "<eot> The cat sat <eot>", "-100 The cat sat <eot>", "<eot> A dog ran <eot>",
        "<eot> 2 + 2 = 4 <eot> <eot> <eot>", "-100 -100 -100 -100 -100 4 <eot> -100 -100",
        "<eot> The cat sat <eot> <eot> <eot> <eot> <eot>", "-100 -100 -100 sat <eot> -100 -100 -100 -100",
    ):  # fmt: skip
        assert row.split() in lines
    assert [line[0] for line in lines[-4:-1]] == ["library:", "reference:", "modules:"]


def test_right_padding_needs_no_mask():
    """The loss of a padded batch without an attention mask is that of its rows: no token sees what is behind it."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=ENCODING.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2).double()
    dataset = data.CompletionDataset([("2 + 2 =", " 4"), ("The cat", " sat on the mat")], ENCODING, 64)
    nats = lambda batch: model(batch[0], labels=batch[1]).loss * (batch[1] != -100).sum()  # noqa: E731
    together, apart = nats(dataset.collate(dataset.items)), sum(nats(dataset.collate([i])) for i in dataset.items)
    assert abs(together - apart) < 1e-12 * apart
    ids, labels = dataset.collate(dataset.items)
    assert (ids == ENCODING.eot_token).sum() > 4 and (labels == ENCODING.eot_token).sum() == 2  # both ends are learned


def test_length_buckets_halve_the_work():
    """Of `modules`' validation batches some 50 % is padding in random order, and some 7 % in buckets of like length."""
    dataset = data.CompletionDataset(modules()[1], ENCODING, 256)
    n_tokens = sum(len(p) + len(c) for p, c in dataset.items)

    def padding(batches):
        return 1 - n_tokens / sum(dataset.collate(batch)[0].numel() for batch in batches)

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
    for ids, labels in (dataset.collate(dataset.items), dataset.sample(3)):
        T = ids.size(1)
        assert labels.shape == ids.shape and (T % 16 == 0 or T == length) and T <= length
    assert longest <= dataset.collate(dataset.items)[0].size(1) < longest + 16


def test_a_wider_batch_has_the_same_loss():
    """Padding up to a multiple of 16 changes no loss: the sums are of the same numbers, in fp64 equal to 1e-12."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=ENCODING.n_vocab, n_positions=64, n_embd=16, n_layer=2, n_head=2).double()
    dataset = data.CompletionDataset([("2 + 2 =", " 4"), ("The cat", " sat on the mat")], ENCODING, 64)
    (ids, labels), width = dataset.collate(dataset.items), max(len(p) + len(c) for p, c in dataset.items)
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


# --------------------------------------------------------------------------------------------------------------- tasks


def test_library_leaves_out_what_it_must():
    """`library` has no tests, no package of `modules`, no pydoc_data, and no text on both sides."""
    train, valid = library()
    assert len(train) > 300 and len(valid) > 10
    assert not set(train) & set(valid)
    everything = "\n".join(train + valid)
    assert "class TestCase(object):" not in everything  # unittest/case.py
    assert "class BaseEventLoop(" not in everything  # asyncio/base_events.py
    assert not any(text in everything for text in data.reference()[0])


def test_reference_is_split_by_topic():
    """`reference` holds out whole topics, 5 to 30 % of the text, and no paragraph of theirs is left to train on."""
    train, valid = data.reference()
    share = sum(map(len, valid)) / sum(map(len, train + valid))
    assert 0.05 < share < 0.3
    paragraphs = {p for text in valid for p in text.split("\n\n")}
    assert not any(p in paragraphs for text in train for p in text.split("\n\n"))


def test_modules_task():
    """`modules` has 1,500 functions or more to test on, a largest class under 25 %, and no file on both sides."""
    train, valid = modules()
    assert len(valid) >= 1500 and len(train) >= 1500
    for side in (train, valid):
        counts = [sum(package == name for _, package in side) for name in data.PACKAGES]
        assert min(counts) > 0 and max(counts) / len(side) < 0.25
    assert all(prompt.endswith("\n# module: ") for prompt, _ in train + valid)


@pytest.mark.parametrize("task", data.TASKS)
def test_no_task_validates_on_what_it_trains_on(task):
    """In no task is a text that validates, or a prompt, in training too: nor as it is, nor cut to --length."""
    train, valid = {"library": library, "modules": modules}.get(task, data.TASKS[task])()
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
    assert [f.split("(")[0] for f in data.top_functions(a + b)] == ["def a", "def b"]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("old, new", [("", ""), ("\n\n", "\n"), ("\n", " "), ("\n", "\r\n")])
def test_txt_keeps_every_character(tmp_path, old, new):
    """A .txt file is cut once, near nine tenths, and loses nothing, with paragraphs, lines, or neither."""
    path, text = tmp_path / "a.txt", TEXT.replace(old, new) if old else TEXT
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (train,), (valid,) = data.split_text(data.read(str(path)), path)
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
    (train,), (valid,) = data.split_text(text, "a.txt")
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
    (train,), (valid,) = data.split_text(text, "a.txt")
    assert train + valid == text and valid.startswith(start) and 0.085 < len(valid) / len(text) < 0.115


@pytest.mark.parametrize("end", ["\n\n", "\n", "\n \n", " \n", ". ", "。"])
def test_copies_in_a_text_do_not_validate(end):
    """A paragraph, line or sentence of the last tenth that is also in training is left out of validation."""
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0)).tolist()
    pieces = [f"The code of item {i % 40 if i < 160 else i} is {i % 40 * 7919 if i < 160 else i}" for i in order]
    (train,), (valid,) = data.split_text(end.join(pieces), "a.txt")
    split = lambda text: {piece.strip() for piece in text.split(end.strip() or end) if piece.strip()}  # noqa: E731
    assert split(valid) and not split(valid) & split(train)
    assert split(train) | split(valid) == {piece.strip() for piece in pieces}


@pytest.mark.parametrize("run", ["!", '"', '."', "\n", "\n \t", " ", "。", "”", "a"])
def test_a_long_run_is_split_in_no_time(run):
    """A run of 200,000 equal marks or blanks takes no longer than other texts: no pattern tries each part again."""
    began = time.process_time()
    (train,), (valid,) = data.split_text("a" + run * 200_000 + "b", "a.txt")
    assert train + valid == "a" + run * 200_000 + "b"
    assert time.process_time() - began < 2  # some 0.1 s; each part again: an hour


def test_a_text_of_copies_is_refused():
    """Where all of the last tenth is also in training there is nothing to validate on, and one line says so."""
    for text in ("one line and another\n" * 100, TEXT * 4, "一句话。" * 500):
        with pytest.raises(data.Error, match="a.txt repeats itself"):
            data.split_text(text, "a.txt")


def test_functions_are_cut_where_they_are():
    """A function is its own lines, also after a form feed, which is no end of a line to Python."""
    function = "def f(x):\n    y = x\n    return y"
    assert data.top_functions(f"a = 1\n\x0c\nb = '\u2028'\n{function}\nc = 2\n") == [function]


def split_jsonl(lines, path="a.jsonl"):
    return data.split_pairs(data.read_pairs("\n".join(lines), path), path)


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
        with pytest.raises(data.Error, match="one example"):
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
    train, valid = data.split_pairs(data.read_pairs(data.read(str(path)), path), path)
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
    with pytest.raises(data.Error, match=says) as error:
        data.load(str(path), ENCODING, 32)
    assert "\n" not in str(error.value)


def test_folder_is_no_file(tmp_path):
    """A folder with a file's ending is refused."""
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(data.Error, match="no such file"):
        data.load(str(tmp_path / "a.txt"), ENCODING, 32)
