# SPDX-License-Identifier: MIT
"""nanopeft/data.py: what is scored in each batch, tasks without leaks, files split or refused as they should be."""

import json
import math
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import data, gpt
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
    assert text.bytes() == 1500


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
        "<eot> 2 + 2 = 4 <eot>", "-100 -100 -100 -100 -100 4 <eot>",
        "<eot> The cat sat <eot> <eot> <eot>", "-100 -100 -100 sat <eot> -100 -100",
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
    """Of `modules`' validation batches some 50 % is padding in random order, and some 2 % in buckets of like length."""
    dataset = data.CompletionDataset(modules()[1], ENCODING, 256)
    size = lambda item: len(item[0]) + len(item[1])  # noqa: E731

    def padding(batches):
        return 1 - sum(map(size, dataset.items)) / sum(max(map(size, batch)) * len(batch) for batch in batches)

    order = torch.randperm(len(dataset.items), generator=torch.Generator().manual_seed(0)).tolist()
    random = [[dataset.items[i] for i in order[at : at + 32]] for at in range(0, len(order), 32)]
    buckets = dataset.length_buckets(32)
    assert sorted(sum(buckets, [])) == sorted(dataset.items)
    assert 0.45 < padding(random) < 0.55 and padding(buckets) < 0.025


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
    (train,), (valid,) = data.split_text(data.read(str(path)))
    assert train + valid == text.replace("\r\n", "\n")
    assert 0.89 < len(train) / len(train + valid) < 0.95


def test_functions_are_cut_where_they_are():
    """A function is its own lines, also after a form feed, which is no end of a line to Python."""
    function = "def f(x):\n    y = x\n    return y"
    assert data.top_functions(f"a = 1\n\x0c\nb = '\u2028'\n{function}\nc = 2\n") == [function]


def test_jsonl_is_split_by_line(tmp_path):
    """A .jsonl file gives each line to one side, and all copies of a line to the same one."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": f"p{i}\u2028", "completion": f"c{i}"}) for i in range(40)]
    path.write_text("\n".join(lines + [""]), "utf-8")
    train, valid = data.split_pairs(data.read(str(path)), path)
    assert sorted(train + valid) == sorted((f"p{i}\u2028", f"c{i}") for i in range(40))
    assert len(valid) == 4
    path.write_text("\n".join(2 * lines[:5] + 2 * lines[5:10]), "utf-8")  # a tenth is one line of a pair
    train, valid = data.split_pairs(data.read(str(path)), path)
    assert len(train) == 18 and len(valid) == 2 and not set(train) & set(valid)


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
