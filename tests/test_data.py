# SPDX-License-Identifier: MIT
import json

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import data, gpt

BASE = gpt.find_checkpoint("nano")
ENCODING = data.load_tokenizer(BASE)
TEXT = "".join(f"Line {i} of a text that is long enough, in paragraphs.\n" + "\n" * (i % 3 == 0) for i in range(400))


# ----------------------------------------------------------------------------------------------------------- tokenizer


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_tokenizer_round_trip(text):
    """Decoding what was encoded gives any text back, special-token text included, which never becomes the token."""
    ids = ENCODING.encode_ordinary(text + data.ENDOFTEXT)
    assert ENCODING.eot_token not in ids
    assert ENCODING.decode(ids) == text + data.ENDOFTEXT


def test_tokenizer_files_round_trip(tmp_path):
    """Saving and loading a tokenizer gives the same files and the same tokens."""
    data.save_tokenizer(ENCODING, tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text("utf-8") == (BASE / name).read_text("utf-8")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(alphabet="abc \n", min_size=1), min_size=1, max_size=20))
def test_training_merges_the_most_frequent_pair_first(texts):
    """The first merge of byte-level BPE is a pair that no other pair of neighbours inside a word outnumbers."""
    import regex

    counts = {}
    for text in texts:
        for word in regex.findall(data.PATTERN, text):
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
    if not counts:
        return
    encoding = data.train_tokenizer(texts, 258)
    first = encoding.decode_single_token_bytes(256).decode()
    assert counts[tuple(first)] == max(counts.values())


def test_trained_tokenizer_compresses_as_it_should():
    """A word seen often becomes one token, and the vocabulary has the asked size with end-of-text last."""
    encoding = data.train_tokenizer(["return self.value\n"] * 50, 256 + 18)
    assert encoding.n_vocab == encoding.eot_token + 1 == 256 + 18
    assert len(encoding.encode_ordinary(" self")) == 1


@pytest.mark.parametrize("broken", ["no vocab", "no merges", "not JSON", "no end of text", "wrong order", "a list"])
def test_broken_tokenizer_is_refused(tmp_path, broken):
    """A folder without a whole GPT-2 tokenizer gives one clear line."""
    data.save_tokenizer(ENCODING, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    if broken == "no vocab":
        (tmp_path / "vocab.json").unlink()
    elif broken == "no merges":
        (tmp_path / "merges.txt").unlink()
    elif broken == "not JSON":
        (tmp_path / "vocab.json").write_text("{")
    elif broken == "no end of text":
        del vocab[data.ENDOFTEXT]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    elif broken == "wrong order":
        vocab["!"], vocab["Ġt"] = vocab["Ġt"], vocab["!"]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    else:
        (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(data.Error) as error:
        data.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- tasks


def test_library_leaves_out_what_it_must():
    """`library` has no tests, no package of `modules`, no pydoc_data, and no text on both sides."""
    train, valid = data.library()
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
    train, valid = data.modules()
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


# ------------------------------------------------------------------------------------------------------------- batches


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 70), st.integers(1, 9))
def test_text_batches_score_each_token_once(length, size):
    """Validation windows of any length score every token after the first exactly once, in order."""
    text = data.Text([TEXT[:900], TEXT[900:1500]], ENCODING, length)
    scored = []
    for ids, labels in text.batches(size):
        assert ids.size(1) <= length and (labels[:, 0] == -100).all() and torch.equal(ids[:, 1:], labels[:, 1:])
        scored += labels[:, 1:].flatten().tolist()
    assert scored == text.tokens[1:].tolist()
    assert text.bytes() == 1500


def test_text_samples_stay_inside():
    """Training windows are runs of the stream, and the last one can be drawn too."""
    text = data.Text([TEXT[:100]], ENCODING, 8)
    runs = {tuple(text.tokens[i : i + 8].tolist()) for i in range(len(text.tokens) - 7)}
    drawn = {tuple(row) for row in text.sample(2000)[0].tolist()}
    assert drawn == runs


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), min_size=1, max_size=12), st.integers(2, 40))
def test_examples_score_the_completion_alone(pairs, length):
    """Labels are the completion and the end of text, after the prompt's end, cut to the length and padded with -100."""
    examples = data.Examples(pairs, ENCODING, length)
    ids, labels = examples.pack(examples.items)
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
    assert examples.cut == cut


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


def test_encoding_is_tiktokens():
    """The tokenizer is a plain tiktoken.Encoding, so that code written for GPT-2's works with it."""
    assert isinstance(ENCODING, tiktoken.Encoding)
    assert ENCODING.decode([ENCODING.eot_token]) == data.ENDOFTEXT
