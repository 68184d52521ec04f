# SPDX-License-Identifier: MIT
"""Runs that are killed, disks that are full, files from strangers, data as it comes, numbers that go wrong.

The longer forms: python tests/bench/kill.py --kills 100, and CASES=100000 pytest -m thorough tests/test_survives.py.
"""

import argparse
import copy
import functools
import json
import math
import os
import random
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from nanopeft import adamw, adapter, data, gpt, lora, prefix, prompt, ptuning, quant
from nanopeft.trainer import Error, bases, checkpoint, evaluate, generation, methods, peft_config, process, tokenizer
from nanopeft.trainer import files as files_of
from nanopeft.trainer.bases import load_gpt, save_gpt

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train.py"
KILL = runpy.run_path(str(ROOT / "tests" / "bench" / "kill.py"))
CPU = torch.device("cpu")
ENCODING = tokenizer.train_tokenizer([], 257)
CASES = int(os.environ.get("CASES", 3000))
thorough = pytest.mark.thorough


@pytest.fixture(autouse=True)
def every_type_counts_as_fast(monkeypatch):
    """So that a CPU of any kind computes in the type that is asked for: the models here are small."""
    monkeypatch.setattr(process, "slower_than_fp32", lambda dtype: False)
    monkeypatch.setattr(process, "outlive_reader", lambda stream: None)  # the runs of this process share its streams


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small base, a text, examples, and two adapters for a fusion."""
    return KILL["make_files"](tmp_path_factory.mktemp("files"))


def train(monkeypatch, files, out, flags=""):
    """Runs train.py in this process: its exit code, 0 if it came to the end."""
    quick = f"--base {files}/base --data {files}/a.txt --steps 6 --batch 2 --length 32 --save-every 2 --out {out}"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *quick.split(), *flags.format(files=files).split()])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):  # the interpreter prints it and exits with 1
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def last_line(capsys):
    """What stderr ends with, after the progress bar: one line, and no traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.strip().split("\r")[-1].split("\n")[-1]
    assert line.startswith("train.py: "), error
    return line


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=thorough) for m in KILL["METHODS"] if m != "lora")])
def test_a_killed_run_ends_as_a_whole_one(files, tmp_path, method):
    """Killed at random moments and resumed, a run of any method ends with the bits of one that nobody killed.

    Each kill loses at most the steps from one save to the next.
    """
    flags = KILL["METHODS"][method]
    whole, seconds = KILL["whole_run"](files, tmp_path / "whole", flags)
    draw = random.Random(method)
    for number in (signal.SIGTERM, signal.SIGKILL):
        killed = KILL["kill_once"](files, tmp_path / "killed", flags, number, draw.uniform(0, seconds))
        assert killed is None or killed[0] <= KILL["SAVE_EVERY"]
    last, _ = KILL["whole_run"](files, tmp_path / "killed", flags + " --resume")
    assert KILL["differences"](last, whole) == []


# Runs in the child before train.py: {what} happens in the {n}-th call of save_file for the state or the model
IN_A_SAVE = """
import safetensors.torch, resource, signal
save, calls, replace = safetensors.torch.save_file, [], os.replace
def save_file(tensors, path, metadata=None):
    now = {file!r} in os.path.basename(path) and (calls.append(1) or len(calls) == {n})
    if now and {what!r} == "the disk is full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    save(tensors, path, metadata)
    if now and {what!r} == "half is written":
        os.truncate(path, os.path.getsize(path) // 2)
    if now and {what!r} in ("half is written", "all is written"):
        os.kill(os.getpid(), signal.SIGKILL)
def replaced(*paths):
    replace(*paths)
    if len(calls) == {n} and {what!r} == "it is in its place" and {file!r} in os.path.basename(paths[1]):
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file, os.replace = save_file, replaced
"""


@pytest.fixture(scope="module")
def whole(files):
    return KILL["whole_run"](files, files / "whole", "--method lora")[0]


WHEN = ("half is written", "all is written", "it is in its place")
# The first state is of step 3. The second best adapter is written before the state of step 6, the last at the end
SAVES = [("state", 1, "", 0), ("model", 2, "", 3), ("model", 1, "--keep last", KILL["STEPS"])]
KILLS = [("half is written", *SAVES[0]), ("it is in its place", *SAVES[1])]
MORE_KILLS = [(what, *save) for what in WHEN for save in SAVES if (what, *save) not in KILLS]


@pytest.mark.parametrize("what, file, n, flags, at", [*KILLS, *(pytest.param(*k, marks=thorough) for k in MORE_KILLS)])
def test_killed_in_a_save(files, tmp_path, whole, what, file, n, flags, at):
    """A kill inside of a save leaves the old file or the new one, and --resume ends with a whole run's bits."""
    flags = f"--method lora {flags}"
    process = KILL["start"](files, tmp_path / "o", flags, IN_A_SAVE.format(what=what, n=n, file=file))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    has_new_state = what == "it is in its place" and file == "state"
    assert KILL["state_step"](tmp_path / "o") == at + KILL["SAVE_EVERY"] * has_new_state
    last, _ = KILL["whole_run"](files, tmp_path / "o", f"{flags} --resume")
    if "last" in flags:
        whole, _ = KILL["whole_run"](files, tmp_path / "whole", flags)
    assert KILL["differences"](last, whole) == []


FULL = [("lora", "model", 1, "--keep last", KILL["STEPS"]), ("full", "model", 1, "--keep last", KILL["STEPS"])]
FULL = [("lora", "state", 3, "", 6), *(pytest.param(*case, marks=thorough) for case in FULL)]


@pytest.mark.parametrize("method, file, n, flags, at", FULL)
def test_disk_full(files, tmp_path, whole, method, file, n, flags, at):
    """A disk that is full ends the run with exit code 1 and one line; the last good state stays, and can be resumed."""
    flags, first = f"--method {method} {flags}", IN_A_SAVE.format(what="the disk is full", n=n, file=file)
    process = KILL["start"](files, tmp_path / "o", flags, first)
    process.join()
    log = (tmp_path / "o.log").read_text()
    assert process.exitcode == 1 and "Traceback" not in log
    line = log.strip().split("\n")[-1]
    assert line.startswith("train.py: ") and "File too large" in line and "--resume" in line and str(tmp_path) in line
    assert KILL["state_step"](tmp_path / "o") == at
    assert not list((tmp_path / "o").glob("*.new"))
    last, _ = KILL["whole_run"](files, tmp_path / "o", f"{flags} --resume")
    assert "last" in flags or KILL["differences"](last, whole) == []


def test_interrupted_before_the_first_step(monkeypatch, files, tmp_path, capsys):
    """Ctrl-C while the base is loaded ends in one line with exit code 1, and --resume then starts from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with monkeypatch.context() as patch:
        patch.setattr(bases, "load_gpt", lambda *_: signal.raise_signal(signal.SIGINT))
        assert train(patch, files, tmp_path / "o") == 1
    signal.signal(signal.SIGINT, before)
    assert "--resume" in last_line(capsys) and not (tmp_path / "o").exists()
    assert train(monkeypatch, files, tmp_path / "o", "--resume") == 0


def test_interrupted_in_a_step_says_where_it_saved(monkeypatch, files, tmp_path, capsys):
    """Ctrl-C in a step ends after it with exit code 1 and a line that names the step, the state and --resume."""
    sample = data.TokenStream.sample

    def interrupt(self, *which):
        signal.raise_signal(signal.SIGINT)
        return sample(self, *which)

    monkeypatch.setattr(data.TokenStream, "sample", interrupt)
    assert train(monkeypatch, files, tmp_path / "o") == 1
    line = last_line(capsys)
    assert "step 1" in line and str(tmp_path / "o" / "state.safetensors") in line and "--resume" in line


# ----------------------------------------------------------------------------------------------- the folder of results


def stop_after(monkeypatch, n):
    """Ctrl-C in the n-th step from here."""
    sample, calls = data.TokenStream.sample, []

    def interrupt(self, *which):
        calls.append(1)
        if len(calls) == n:
            signal.raise_signal(signal.SIGINT)
        return sample(self, *which)

    monkeypatch.setattr(data.TokenStream, "sample", interrupt)


def test_a_new_run_keeps_the_state_of_one_that_did_not_end(monkeypatch, files, tmp_path, capsys):
    """Without --resume, an unfinished run's state is kept under another name, and said to be; from it one can go on."""
    out = tmp_path / "o"
    for n, seed in ((4, 1), (3, 2)):
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert train(patch, files, out, f"--seed {seed}") == 1
    names = {"adapter_config.json", "adapter_model.safetensors"}  # the best so far
    assert {path.name for path in out.iterdir()} == names | {"state.safetensors", "state-1.safetensors"}
    assert capsys.readouterr().out.count("the state of a run that did not end is kept as") == 1
    os.replace(out / "state-1.safetensors", out / "state.safetensors")
    assert train(monkeypatch, files, out, "--seed 1 --resume") == 0
    assert "going on from step 4" in capsys.readouterr().out


def test_the_same_command_twice(monkeypatch, files, tmp_path, capsys):
    """A run that ended is done again by the same command, over its own files, and leaves the same and no others."""
    out, found = tmp_path / "o", []
    for _ in range(2):
        assert train(monkeypatch, files, out) == 0
        found.append({path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("adapter")})
        assert len([*out.iterdir()]) == 5
    assert found[0] == found[1] and len(found[0]) == 2 and "kept as" not in capsys.readouterr().out


def test_a_damaged_state_is_kept_as_well(monkeypatch, files, tmp_path):
    """A state that nobody could go on from does not keep a new run from its folder, and is not lost."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "state.safetensors").write_bytes(b"\0" * 50)
    assert train(monkeypatch, files, tmp_path / "o") == 0 and KILL["state_step"](tmp_path / "o") == 6
    assert (tmp_path / "o" / "state-1.safetensors").read_bytes() == b"\0" * 50


def test_a_run_that_fails_early_moves_nothing(monkeypatch, files, tmp_path, capsys):
    """Wrong use and a base that is damaged leave an unfinished run's state where it is."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(patch, files, tmp_path / "o") == 1
    before = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    monkeypatch.setattr(gpt, "chunked_loss", lambda *args: torch.tensor(math.nan))
    assert train(monkeypatch, files, tmp_path / "o") == 1 and train(monkeypatch, files, tmp_path / "o", "--rank 0") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def test_two_runs_in_one_folder(monkeypatch, files, tmp_path, capsys):
    """A run in a folder where another is at work is refused in one line with code 2; once that is killed, it is not."""
    first = "import nanopeft.trainer.methods as m, time; m.load_base = lambda *_: time.sleep(1000)"
    other = KILL["start"](files, tmp_path / "o", "--method lora", first)
    while not (tmp_path / "o" / ".lock0").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    for flags in ("", "--resume"):
        assert train(monkeypatch, files, tmp_path / "o", flags) == 2
        assert "another run is at work" in last_line(capsys)
    other.kill()
    other.join()
    assert train(monkeypatch, files, tmp_path / "o") == 0
    assert not (tmp_path / "o" / ".lock0").exists() and ".lock" not in capsys.readouterr().out


def test_a_comparison_in_the_folder_of_a_run(monkeypatch, files, tmp_path, capsys):
    """--method all, too, is refused where a run is at work, and leaves that its folder."""
    with checkpoint.claim(tmp_path / "o"):
        assert train(monkeypatch, files, tmp_path / "o", "--method all") == 2
        assert "another run is at work" in last_line(capsys) and (tmp_path / "o").exists()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("way", ["a file", "a file above", "no folder can be", "read only"])
def test_out_that_cannot_be_written_to(monkeypatch, files, tmp_path, capsys, way):
    """An --out that cannot be written to is refused at once, before the base is loaded, in one line with code 2."""
    monkeypatch.setattr(methods, "load_base", lambda *_: pytest.fail("the base was loaded"))
    (tmp_path / "file").write_text("mine")
    outs = {"a file": tmp_path / "file", "a file above": tmp_path / "file" / "o", "no folder can be": "/proc/o"}
    outs["read only"] = "/proc"
    assert train(monkeypatch, files, outs[way]) == 2
    assert f"--out {outs[way]} cannot be written to" in last_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_without_space(monkeypatch, files, tmp_path, capsys):
    """A disk without the space for two states, an old and a new one, is refused before the first evaluation."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100_000))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("it was evaluated"))
    assert train(monkeypatch, files, tmp_path / "o", "--method full") == 2
    assert "0.1 MB free, and states take 0.9 MB" in last_line(capsys) and not (tmp_path / "o").exists()


READERS = [("--help", "stdout"), ("--generate {files}/base", "both"), ("--steps 2", "stdout"), ("--steps 2", "both")]
READERS = [("--generate {files}/base", "stdout"), *(pytest.param(*case, marks=thorough) for case in READERS)]


@pytest.mark.parametrize("flags, streams", READERS)
def test_a_reader_that_goes(files, tmp_path, flags, streams):
    """`| head`, and `2>&1 | head`, end no run and no sample: what nobody reads is dropped, and the exit code is 0."""
    flags = flags.format(files=files).split()
    if "--steps" in flags:
        flags += ["--base", files / "base", "--data", files / "a.txt", "--length", "32", "--out", tmp_path / "o"]
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if streams == "both" else subprocess.PIPE
    done = subprocess.run([sys.executable, SCRIPT, *flags], stdout=writer, stderr=errors, text=True)
    os.close(writer)
    assert done.returncode == 0 and "Traceback" not in (done.stderr or "") and "Broken" not in (done.stderr or "")
    assert "--steps" not in flags or (tmp_path / "o" / "result.json").exists()


# ------------------------------------------------------------------------------------------------------------- samples


def sample(model, encoding, text):
    ids = data.start_token(encoding) + encoding.encode_ordinary(text)
    return generation.sample(model, encoding, ids, CPU, 0)


def test_a_prompt_that_leaves_little_room(monkeypatch, files, capsys):
    """A prompt of --generate that leaves fewer tokens than are asked for says on stderr how many."""
    model, encoding = methods.load(files / "base", torch.float32, CPU)
    go_on = functools.partial(generation.go_on, temperature=0.0, top_k=1, stream=lambda ids: None)
    for n in (1, 61):  # and <eot>, of 64 positions
        go_on(model, encoding, [encoding.eot_token, *encoding.encode_ordinary("x" * n)], CPU, 80)
        assert f"the prompt takes {n + 1} of 64 positions: {63 - n} are left" in capsys.readouterr().err
    model.config.n_positions = 200
    monkeypatch.setattr(gpt, "generate", lambda model, ids, *_, **__: ids)
    go_on(model, encoding, encoding.encode_ordinary("x"), CPU, 80)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["中文", "é", "😀", "a"])
def test_a_sample_ends_with_a_whole_character(monkeypatch, files, text):
    """A sample whose last token is a part of a character ends before that; bytes that are no character stay visible."""
    model, encoding = methods.load(files / "base", torch.float32, CPU)
    tokens = [encoding.encode_single_token(bytes([byte])) for byte in b"a\xffb"]
    added = encoding.encode_ordinary(text)[:-1] if text != "a" else tokens
    monkeypatch.setattr(gpt, "generate", lambda model, ids, *_, **__: torch.cat((ids, torch.tensor([added])), 1))
    shown = sample(model, encoding, "中")
    assert shown == "中" + text[:-1] if text != "a" else shown == "中a\ufffdb"


# ------------------------------------------------------------------------------------------------------- our own state


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_in_the_state_is_seen(files, whole, data):
    """A state with any bit flipped, or cut short, is refused before any of it is used."""
    good = files / "whole" / "state.safetensors"
    content = bytearray(good.read_bytes())
    run = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["run"])
    shapes = {key[2:]: t.shape for key, t in load_file(good).items() if key.startswith("m ")}
    header = 8 + int.from_bytes(content[:8], "little")
    where = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)), "byte")
    if data.draw(st.integers(0, 9)) == 0:
        del content[where:]
    else:
        content[where] ^= 1 << data.draw(st.integers(0, 7), "bit")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        path.write_bytes(content)
        with pytest.raises(Error):
            checkpoint.load_state(path, run["settings"], shapes, run["checksums"], False)
        path.write_bytes(good.read_bytes())
        progress, _ = checkpoint.load_state(path, run["settings"], shapes, run["checksums"], False)
        assert progress.step == KILL["STEPS"]


@pytest.mark.parametrize("shape", [dict(n_embd=16), dict(n_layer=1), dict(n_layer=3)])
def test_state_of_another_base(monkeypatch, files, tmp_path, capsys, shape):
    """A state whose base has been exchanged for one of other shapes is refused in one line with exit code 2."""
    shutil.copytree(files / "base", tmp_path / "base")
    assert train(monkeypatch, files, tmp_path / "o", f"--base {tmp_path}/base --rank 4") == 0
    capsys.readouterr()
    sizes = dict(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2) | shape
    save_gpt(gpt.GPT(**sizes), tmp_path / "base")
    assert train(monkeypatch, files, tmp_path / "o", f"--base {tmp_path}/base --rank 4 --resume") == 2
    assert "the base is not the one" in last_line(capsys)


def stop_after_two(monkeypatch, files, out, flags):
    """A run of 6 steps that Ctrl-C ended after the second."""
    calls = []

    def interrupting(sample):
        def interrupt(*which):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return sample(*which)

        return interrupt

    with monkeypatch.context() as patch:
        for kind in (data.TokenStream, data.CompletionDataset):
            patch.setattr(kind, "sample", interrupting(kind.sample))
        assert train(patch, files, out, flags) == 1


def swap_numbers(folder):
    """Another base of the same shape: two of its numbers are exchanged."""
    state = load_file(folder / "model.safetensors")
    wte = state["transformer.wte.weight"]
    wte[[3, 4]] = wte[[4, 3]]
    save_file(state, folder / "model.safetensors")


def fewer_heads(folder):
    """Another base of the same weights: only its config.json says how they are used."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_head": 1}))


def other_tokens(folder):
    """Another base of the same weights: two tokens have changed places."""
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "vocab.json").write_text(json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1]))))


DATA = {
    "a.txt": lambda text: text.replace("comes", "goes", 1), "a.jsonl": lambda text: text.replace("odd", "ODD", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_resuming_over_other_data(monkeypatch, files, tmp_path, capsys, name):
    """--resume after the data file was edited is refused in one line that names it, and with --force goes on."""
    path, out = tmp_path / name, tmp_path / "o"
    shutil.copy(files / name, path)
    flags = f"--data {path}"
    stop_after_two(monkeypatch, files, out, flags)
    state, text = (out / "state.safetensors").read_bytes(), path.read_text()
    path.write_text(DATA[name](text))
    capsys.readouterr()
    assert train(monkeypatch, files, out, f"{flags} --resume") == 2
    line = last_line(capsys)
    assert f"--data {path}" in line and "--force" in line and (out / "state.safetensors").read_bytes() == state
    shutil.copytree(out, tmp_path / "forced")
    path.write_text(text)
    assert train(monkeypatch, files, out, f"{flags} --resume") == 0
    path.write_text(DATA[name](text))
    assert train(monkeypatch, files, tmp_path / "forced", f"{flags} --resume --force") == 0
    assert "--data: not what it was" in capsys.readouterr().out
    assert train(monkeypatch, files, tmp_path / "forced", f"{flags} --resume") == 0  # the state is of the edited file


def test_resuming_over_the_same_pairs(monkeypatch, files, tmp_path):
    """What is not learned may change in a .jsonl: the order of its lines, other keys, escapes."""
    path, out = tmp_path / "a.jsonl", tmp_path / "o"
    shutil.copy(files / "a.jsonl", path)
    stop_after_two(monkeypatch, files, out, f"--data {path}")
    lines = [json.loads(line) | {"id": i} for i, line in enumerate(path.read_text().split("\n"))]
    path.write_text("\n".join(json.dumps(line, sort_keys=True) for line in reversed(lines)))
    assert train(monkeypatch, files, out, f"--data {path} --resume") == 0


OTHERS = [(swap_numbers, "lora"), (other_tokens, "full")]
MORE_OTHERS = [(other_tokens, "lora"), (fewer_heads, "lora"), (swap_numbers, "full"), (fewer_heads, "full")]


@pytest.mark.parametrize("change, method", [*OTHERS, *(pytest.param(*case, marks=thorough) for case in MORE_OTHERS)])
def test_another_base_of_the_same_shape(monkeypatch, files, tmp_path, capsys, change, method):
    """Over another base in the same folder neither --resume nor --generate goes on, unless --force is given."""
    base, out = tmp_path / "base", tmp_path / "o"
    shutil.copytree(files / "base", base)
    flags = f"--base {base} --method {method} --precision bf16"
    assert train(monkeypatch, files, out, flags) == 0
    assert train(monkeypatch, files, out, f"{flags} --resume") == 0
    change(base)
    capsys.readouterr()
    assert train(monkeypatch, files, out, f"{flags} --resume") == 2
    line = last_line(capsys)
    assert f"--base {base}" in line and "--force" in line
    assert train(monkeypatch, files, out, f"{flags} --resume --force") == 0
    if method == "lora":
        shutil.rmtree(base), shutil.copytree(files / "base", base)  # the forced run has left its own base's checksum
        for force, expected in (([], 2), (["--force"], 0)):
            capsys.readouterr()
            monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--generate", str(out), "--prompt", "ab", *force])
            try:
                code = runpy.run_path(str(SCRIPT), run_name="__main__") and 0
            except SystemExit as end:
                code = end.code
            assert code == expected
            if not force:
                line = last_line(capsys)
                assert str(out) in line and str(base) in line and "--force" in line


def test_fusion_of_adapters_of_two_bases(monkeypatch, files, tmp_path, capsys):
    """A fusion takes adapters of its own base, in whatever precision they were trained, and of unknown bases.

    Those of another one it takes with --force alone, and an adapter that is trained again stops --resume.
    """
    base, other = files / "base", tmp_path / "other"
    shutil.copytree(base, other)
    swap_numbers(other)
    adapters = f"--method adapter --reduction 4 --precision bf16 --out {tmp_path}"
    assert train(monkeypatch, files, tmp_path / "one", adapters + "/one") == 0
    assert train(monkeypatch, files, tmp_path / "two", f"{adapters}/two --base {other}") == 0
    capsys.readouterr()
    flags = f"--method fusion --adapters {tmp_path}/one {tmp_path}/two"
    assert train(monkeypatch, files, tmp_path / "o", flags) == 2
    line = last_line(capsys)
    assert f"{tmp_path}/two" in line and str(base) in line and "--force" in line and not (tmp_path / "o").exists()
    assert train(monkeypatch, files, tmp_path / "o", f"{flags} --force") == 0
    flags = f"--method fusion --adapters {tmp_path}/one {files}/one"
    stop_after_two(monkeypatch, files, tmp_path / "p", flags)
    assert train(monkeypatch, files, tmp_path / "one", f"{adapters}/one --seed 1") == 0
    capsys.readouterr()
    assert train(monkeypatch, files, tmp_path / "p", f"{flags} --resume") == 2
    assert "--adapters" in last_line(capsys)


def test_force_alone_is_refused(monkeypatch, files, tmp_path, capsys):
    """--force without --resume, --generate or a fusion would do nothing, and is refused."""
    assert train(monkeypatch, files, tmp_path / "o", "--force") == 2
    assert "--force is for" in last_line(capsys)


# -------------------------------------------------------------------------------------------- what is read and written


@pytest.mark.parametrize("resume", ["", " --resume"])
@pytest.mark.parametrize(
    "out, flags, flag",
    [
        ("full", "--method full --base full", "--base"), ("full", "--base ../{here}/full/.", "--base"),
        ("full", "--base link", "--base"), (".", "--method all --base full", "--base"),
        (".", "--method all --data full/merges.txt", "--data"),
        ("full", "--method full --data full/merges.txt", "--data"),
        ("one", "--method fusion --adapters {files}/two one", "--adapters"),
    ],
)  # fmt: skip
def test_a_run_does_not_write_over_what_it_reads(monkeypatch, files, tmp_path, capsys, out, flags, flag, resume):
    """A base, an adapter or a text in the place of the results is refused in one line, and keeps its bytes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files / "base", "full"), shutil.copytree(files / "one", "one"), os.symlink("full", "link")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = flags.replace("{here}", tmp_path.name) + resume
    assert train(monkeypatch, files, out, flags) == 2
    line = last_line(capsys)
    assert flag in line and "--out" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_data_beside_the_results(monkeypatch, files, tmp_path, method):
    """A text in the folder of the results is trained on, and keeps its bytes; --resume finds it as it was."""
    shutil.copy(files / "a.txt", tmp_path / "a.txt")
    assert train(monkeypatch, files, tmp_path, f"--method {method} --data {tmp_path}/a.txt") == 0
    assert train(monkeypatch, files, tmp_path, f"--method {method} --data {tmp_path}/a.txt --resume") == 0
    assert (tmp_path / "a.txt").read_bytes() == (files / "a.txt").read_bytes()


# ------------------------------------------------------------------------------------------------- files from strangers


class Allocations(TorchDispatchMode):
    """The largest tensor in real memory that torch makes inside the `with`, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.device.type == "cpu":
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def make_adapters(folder):
    """A base of one layer and an adapter of each kind on it, as train.py leaves them."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    save_gpt(gpt.GPT(**sizes), folder / "base")
    tokenizer.save_tokenizer(ENCODING, folder / "base")

    def base():
        return load_gpt(folder / "base")

    bottleneck = adapter.add_adapter(base(), placement="pfeiffer", reduction=2)
    one = adapter.adapter_config(bottleneck), adapter.adapter_state_dict(bottleneck)
    parts = {
        "lora": (lora, lora.add_lora(base(), r=2)),
        "ranks": (lora, lora.add_lora(base(), ["c_attn", "c_fc"], r=2, ranks={"c_fc": 3})),
        "adapter": (adapter, bottleneck),
        "prefix": (prefix, prefix.PrefixTuning(base(), 3)),
        "prompt": (prompt, prompt.PromptTuning(base(), 3)),
        "ptuning": (ptuning, ptuning.PTuning(base(), 3)),
        "template": (ptuning, ptuning.PTuning(base(), template="[P]a{source}[P]")),
    }
    fused = adapter.add_fusion(base(), [one] * 2)
    found = {"fusion": (adapter.fusion_state_dict, adapter.fusion_config, fused)}
    for name, (part, model) in parts.items():
        verb = part.__name__.rpartition(".")[2]
        found[name] = getattr(part, f"{verb}_state_dict"), getattr(part, f"{verb}_config"), model
    found["qlora"] = found["lora"]
    for name, (state_dict, config, model) in found.items():
        (folder / name).mkdir()
        config = config(model) | {"base_model_name_or_path": str(folder / "base")}
        config |= {"base_quantization": "nf4"} if name == "qlora" else {}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(state_dict(model), folder / name / "adapter_model.safetensors")
    return ["base", *found]


def make_shards(base, folder):
    """The same base as transformers 5 leaves it: its tensors in two files, and tokenizer.json alone."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    state = load_file(base / "model.safetensors")
    for i in (0, 1):
        part = {key: t for n, (key, t) in enumerate(state.items()) if n % 2 == i}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors")
    vocab = json.loads((base / "vocab.json").read_text("utf-8"))
    stored = {
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "added_tokens": [{"id": vocab.pop(tokenizer.ENDOFTEXT), "content": tokenizer.ENDOFTEXT}],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(stored))


NUMBERS = [0, -1, 1, 2, 7, 10**9, 2**31, 2**63, 10**18, 10**400, 0.0, 0.5, -1.5, math.nan, math.inf, 1e300]
NAMES = [
    "", "x", "nano", "..", "/", "../../..", "/dev/stdin", "a" * 5000, "\0", "\ud800", "a\nb\x1b[2J", "all-linear",
    "blocks", "(a+)+$", "(.|.)" * 40, ".?" * 40 + "x", "(.*)*x", ".*" * 30 + "x", "(", "a{99999999999}", "softmax",
    "bilinear", "nf4", "int8", "[P]" * 40 + "{source}", "gpt2", "LORA", "P_TUNING", "lstm", "F64", "I8", "F8_E4M3",
]  # fmt: skip
HOSTILE = [None, True, False, [], {}, [[]], ["c_attn"], [0] * 50, {"c_attn": 10**9}, {"(a+)+$": 2}, *NUMBERS, *NAMES]


def places(tree, found):
    """Every (container, key) in what JSON gave."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found.append((tree, key))
        places(tree[key], found)
    return found


def spoil_json(draw, text):
    tree = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(tree, [(tree, "new key")])))
        how = draw(st.integers(0, 9))
        if how == 0 and key in container:
            del container[key]
        else:
            value = draw(st.sampled_from(HOSTILE) if how < 8 else st.integers() | st.floats() | st.text())
            container[key] = copy.deepcopy(value)
        if not tree:
            break
    return json.dumps(tree).encode()


def spoil_bytes(draw, content):
    content, how = bytearray(content), draw(st.integers(0, 4))
    where = draw(st.integers(0, min(len(content), draw(st.sampled_from([40, 2000, 10**9])))))
    if how == 0:
        return content[:where]
    if how == 1:
        return content[:where] + draw(st.binary(max_size=9)) + content[where:]
    if how == 2:
        return draw(
            st.sampled_from([b"", b"[" * 100_000, b"9" * 5000, b"\xff" * 9, struct.pack("<Q", 1 << 40) + b"{}"])
        )
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return content


def spoil_header(draw, content):
    """A safetensors header that says something else: shapes, types, offsets, names."""
    length = int.from_bytes(content[:8], "little")
    header = spoil_json(draw, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def spoil_tensors(draw, path):
    """Tensors renamed, left out, added, or of another shape, type or value, in a file that is sound."""
    state = load_file(path)
    key = draw(st.sampled_from(sorted(state)))
    t, how = state.pop(key), draw(st.integers(0, 6))
    if how == 0:
        state[key + draw(st.sampled_from(["x", ".weight", "\n"]))] = t
    elif how == 1:
        state |= {key: t, draw(st.sampled_from(NAMES).filter(lambda name: name != "\ud800")): torch.zeros(2)}
    elif how == 2:
        state[key] = t.t().contiguous() if t.dim() == 2 else t[:-1].clone()
    elif how == 3:
        state[key] = t[None].clone()
    elif how == 4:
        types = [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
        state[key] = t.to(draw(st.sampled_from([*types, torch.int64])))
    elif how == 5:
        state[key] = t * draw(st.sampled_from([math.nan, math.inf, 1e38, -1e30, 0]))
    save_file(state, path)


def spoil(draw, path):
    """One of the ways for a file to be bad, by its kind."""
    content, how = path.read_bytes(), draw(st.integers(0, 2))
    if path.suffix == ".safetensors" and how == 0:
        spoil_tensors(draw, path)
    elif path.suffix == ".safetensors" and how == 1:
        path.write_bytes(spoil_header(draw, content))
    elif path.suffix == ".json" and how < 2:
        path.write_bytes(spoil_json(draw, content))
    else:
        path.write_bytes(spoil_bytes(draw, content))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [300, pytest.param(CASES, marks=thorough)])
def test_bad_files_are_refused_or_load(tmp_path, cases):
    """Whatever is wrong with a base, its tokenizer or an adapter: it loads and writes a text, or the project's Error.

    Never another exception, never a tensor of over ten times the files, and never longer than some seconds.
    """
    good = tmp_path / "good"
    good.mkdir()
    kinds = [*make_adapters(good), "shards"]
    make_shards(good / "base", good / "shards")
    outcomes = {"loaded": 0, "refused": 0}

    @settings(
        deadline=timedelta(seconds=30), max_examples=cases, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def one(data):
        kind = data.draw(st.sampled_from(kinds), "kind")
        folder = good / kind
        path = data.draw(st.sampled_from(sorted(folder.iterdir())), "file")
        whole = path.read_bytes()
        spoil(data.draw, path)
        size = sum(p.stat().st_size for p in (*folder.iterdir(), *(good / "base").iterdir()))
        with Allocations() as seen:
            try:
                model, encoding = methods.load(folder, torch.float32, CPU)
                sample(model, encoding, "ab")
                outcomes["loaded"] += 1
            except process.ERRORS:
                outcomes["refused"] += 1
            finally:
                path.write_bytes(whole)
        assert seen.largest <= 10 * size

    one()
    assert min(outcomes.values()) > cases // 20, outcomes


@pytest.mark.parametrize("cases", [100, pytest.param(CASES, marks=thorough)])
def test_bad_data_is_refused_or_read(tmp_path, cases):
    """Whatever bytes a .txt or a .jsonl holds, it is read or refused by data.Error in one line."""

    @settings(deadline=timedelta(seconds=30), max_examples=cases, database=None)
    @given(st.sampled_from(["a.txt", "a.jsonl"]), st.data())
    def one(name, draw):
        path = tmp_path / name
        line = json.dumps({"prompt": "été 😀\r", "completion": "b\0<|endoftext|>"}, ensure_ascii=False).encode()
        path.write_bytes(b"\n".join([line] * 5))
        if draw.draw(st.booleans()) and name == "a.jsonl":
            path.write_bytes(b"\n".join([line, spoil_json(draw.draw, line), line]))
        else:
            path.write_bytes(spoil_bytes(draw.draw, path.read_bytes()))
        try:
            for side in files_of.load(str(path), ENCODING, 8):
                side.sample(2), list(side.batches(2)), evaluate.count_bytes(side)
                generation.opening(argparse.Namespace(prompt=None), ENCODING, side)
        except process.ERRORS as error:
            assert "\n" not in str(error)

    one()


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("lora", {"r": 10**9}), ("lora", {"r": 10**18}), ("lora", {"rank_pattern": {"c_fc": 10**9}}),
        ("lora", {"lora_alpha": 10**400}),
        ("lora", {"lora_alpha": math.nan}), ("lora", {"target_modules": "(.*)*x"}), ("qlora", {"base_quantization": 7}),
        ("adapter", {"reduction": None, "bottleneck": 10**9}), ("adapter", {"reduction": -1}),
        ("adapter", {"reduction": None, "bottleneck": 10**18}), ("adapter", {"reduction": None, "bottleneck": 2**63}),
        ("prefix", {"num_virtual_tokens": 10**9}), ("prompt", {"num_virtual_tokens": 10**9}),
        ("ptuning", {"num_virtual_tokens": 10**9}),
        ("template", {"pseudo_id": 10**400}), ("fusion", {"adapters": []}),
        ("prompt", {"base_model_name_or_path": "../../.."}), ("prompt", {"base_model_name_or_path": "/dev"}),
        ("prompt", {"base_model_name_or_path": "a" * 5000}), ("prompt", {"base_model_name_or_path": 7}),
    ],
)  # fmt: skip
def test_hostile_numbers_cost_nothing(monkeypatch, tmp_path, capsys, kind, changes):
    """A config with a huge, negative or endless value is refused in one line before a large tensor is made."""
    make_adapters(tmp_path)
    path = tmp_path / kind / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--generate", str(tmp_path / kind), "--prompt", "a"])
    with Allocations() as seen, pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2 and last_line(capsys)
    assert seen.largest <= 1_000_000


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_patterns_that_take_forever(kind):
    """A regular expression from a file that could be tried for years is refused unread; peft's usual ones are not."""
    read = {"lora": peft_config.lora_arguments, "adapter": peft_config.adapter_arguments}[kind]
    config = {"placement": "houlsby", "reduction": 2, "activation": "relu"}
    for pattern in ("(a+)+$", "(.*)*x", "(.|.)" * 40, ".?" * 40 + "x", ".*" * 30 + "x"):
        with pytest.raises(Error, match="repeats"):
            read(config | {"target_modules": pattern})
    for pattern in (
        "all-linear",
        r".*\.(q_proj|k_proj|v_proj|o_proj)",
        r"transformer\.h\.\d+\.(attn|mlp)\.c_(proj|fc)",
    ):
        assert read(config | {"target_modules": pattern})["targets"] == pattern


@pytest.mark.parametrize("pseudo_id", [-1, 3, 10**6])
def test_virtual_tokens_are_no_text(tmp_path, pseudo_id):
    """Whatever number marks a template's virtual tokens, in the vocabulary or not, a sample is written without them."""
    make_adapters(tmp_path)
    path = tmp_path / "template" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pseudo_id": pseudo_id}))
    model, encoding = methods.load(tmp_path / "template", torch.float32, CPU)
    assert "ab" in sample(model, encoding, "ab")


def test_huge_encoder_is_not_made(tmp_path):
    """P-tuning's file has no encoder: one that its config calls huge is not made, and the prompt loads all the same."""
    make_adapters(tmp_path)
    path = tmp_path / "ptuning" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"encoder_hidden_size": 10**9, "encoder_num_layers": 10**9}
    path.write_text(json.dumps(config))
    with Allocations() as seen:
        methods.load(tmp_path / "ptuning", torch.float32, CPU)
    assert seen.largest <= 1_000_000


def test_nothing_is_half_loaded(tmp_path):
    """Where the last tensor of an adapter does not fit, the ones before it are not in the model either."""
    make_adapters(tmp_path)
    model = lora.add_lora(load_gpt(tmp_path / "base"), r=2)
    state = {key: torch.ones_like(t) for key, t in lora.lora_state_dict(model).items()}
    last = sorted(state)[-1]
    before = {key: t.clone() for key, t in lora.lora_state_dict(model).items()}
    for bad in (state[last][:1], state[last].to(torch.int8), state[last].to(torch.float8_e4m3fn)):
        with pytest.raises(lora.Error):
            lora.load_lora_state_dict(model, state | {last: bad})
    assert all(torch.equal(t, before[key]) for key, t in lora.lora_state_dict(model).items())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_pipes_are_not_waited_for(tmp_path, name):
    """A named pipe in the place of a file is refused, and nobody waits for what it will say."""
    make_adapters(tmp_path)
    (tmp_path / "base" / name).unlink()
    os.mkfifo(tmp_path / "base" / name)
    with pytest.raises(process.ERRORS):
        methods.load(tmp_path / "base", torch.float32, CPU)


def test_names_in_files_cannot_write_on_the_terminal(monkeypatch, tmp_path, capsys):
    """A tensor whose name has line ends and control characters is named in one line without them."""
    make_adapters(tmp_path)
    path = tmp_path / "prompt" / "adapter_model.safetensors"
    save_file({"a\n\x1b[2Jb": torch.zeros(2)}, path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--generate", str(tmp_path / "prompt")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and "[2Jb" in error


def test_no_file_is_unpickled():
    """No part of the program opens a pickle, or runs a text that is not its own, as memory.py's formulas are."""
    for path in (SCRIPT, *(ROOT / "nanopeft").rglob("*.py")):
        source = path.read_text("utf-8")
        assert (
            "torch.load(" not in source
            and "import pickle" not in source
            and (path.name == "memory.py" or "eval(" not in source.replace(".eval(", ""))
        )


# -------------------------------------------------------------------------------------------------------- data as it is


def examples(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "nul \0 in it",
        "שלום עולם",
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        tokenizer.ENDOFTEXT,
        "",
        "\r",
        "\u2028",
        "[P]{source}",
        "x" * 5000,
        "\ufeff",
    ],
)
def test_any_text_is_kept(tmp_path, text):
    """Odd texts, as prompt and as completion, come out of the tokens as they went in, and never as a special token."""
    lines = [{"prompt": text + word, "completion": text} for word in ("", "one", "two")]
    path = examples(tmp_path, [*lines, b"", b"   ", b"\r"])
    train_side, valid = files_of.load(str(path), ENCODING, 20_000)
    assert len(train_side.items) + len(valid.items) == 3 and train_side.n_truncated == valid.n_truncated == 0
    for p, c in train_side.items + valid.items:
        assert ENCODING.decode(p[1:]).removesuffix("one").removesuffix("two") == ENCODING.decode(c[:-1]) == text
        assert p.count(ENCODING.eot_token) == c.count(ENCODING.eot_token) == 1


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"prompt": "\\ud800", "completion": "b"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "completion": "\\udfff b"}', "half of a surrogate pair"),
        (b'{"prompt": "a\x00", "completion": "b"}', "no JSON"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"prompt": "' + b"\\n" * 200_000 + b'x", "completion": "b"}', "blanks"),
        (b'{"prompt": "a", "completion": "\xe9"}', "no UTF-8"),
        (b'{"prompt": "a", "completion": null}', "needs a text"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, says):
    """What cannot be read is refused in one line with the number of its line."""
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(Error, match=says) as error:
        files_of.load(str(examples(tmp_path, [good, b"", line, good])), ENCODING, 16)
    assert "line 3" in str(error.value) and "\n" not in str(error.value)


def test_texts_of_ten_megabytes_on_a_line(tmp_path):
    """10 MB of words on one line are read whole; a run of blanks that the tokenizer would panic over names its line."""
    encoding = tokenizer.load_tokenizer(bases.find_checkpoint("nano"))
    path = tmp_path / "a.txt"
    path.write_text("words and words, " * 600_000)
    train_side, valid = files_of.load(str(path), encoding, 128)
    assert evaluate.count_bytes(train_side) + evaluate.count_bytes(valid) == 10_200_000
    path.write_text("one\ntwo" + " " * 2_000_000 + "three")
    with pytest.raises(Error, match="line 2: 100,000 blanks"):
        files_of.load(str(path), encoding, 128)
    path.write_text("one\ntwo" + " " * 99_999 + "three")
    assert sum(map(evaluate.count_bytes, files_of.load(str(path), encoding, 8))) == 7 + 99_999 + 5


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_named(tmp_path, kind):
    """A folder or a named pipe in the place of a text is refused, and not waited for."""
    path = tmp_path / "a.txt"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(Error, match="a folder or a device"):
        files_of.load(str(path), ENCODING, 16)


def test_a_file_that_shrinks(tmp_path):
    """A text that is cut short between its opening and its reading is what is left of it."""
    path = tmp_path / "a.txt"
    path.write_text("one line and another\n" * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os.path, "isfile", lambda p: os.truncate(path, 1050) is None)
        text = files_of.read(str(path))
    assert text == "one line and another\n" * 50


def test_what_is_cut_is_counted(monkeypatch, files, tmp_path, capsys):
    """Prompts longer than the context train, and the run says how many examples were cut, also of cut emoji."""
    path = examples(tmp_path, [{"prompt": f"{i} " + "😀" * (40 * (i % 2)), "completion": "y"} for i in range(20)])
    assert train(monkeypatch, files, tmp_path / "o", f"--data {path} --length 64") == 0
    assert "10 examples have more than 64 tokens and were cut" in capsys.readouterr().out


@pytest.mark.parametrize("mark, says", [(tokenizer.ENDOFTEXT, True), ("", False)])
def test_a_marker_between_documents_is_text(monkeypatch, files, tmp_path, capsys, mark, says):
    """Where a text has <|endoftext|>, one line says how often, and that it is read as text."""
    path = tmp_path / "a.txt"
    path.write_text((files / "a.txt").read_text().replace("\n\n", f"\n{mark}\n\n"))
    assert train(monkeypatch, files, tmp_path / "o", f"--data {path} --steps 1") == 0
    said = capsys.readouterr().out
    assert (f"{tokenizer.ENDOFTEXT} stands 100 times in the data: it is read as text" in said) == says


def test_validation_shows_that_it_goes_on(files, capsys):
    """A validation of over a second shows a bar, and leaves no line of it behind."""

    class Slow(torch.nn.Module):
        def forward(self, ids, labels):
            time.sleep(0.2)
            return gpt.Output(loss=torch.ones(()), logits=None, past_key_values=None)

    examples = data.TokenStream(["a" * 32 * 7 * 32], ENCODING, 32)
    evaluate.evaluate(Slow(), examples, process.Ranks(0, 1, CPU))
    assert "validation" in capsys.readouterr().err
    evaluate.evaluate(Slow(), data.TokenStream(["a" * 40], ENCODING, 32), process.Ranks(0, 1, CPU))
    assert "validation" not in capsys.readouterr().err


def test_a_dollar_in_the_name(monkeypatch, files, tmp_path):
    """The picture shows a file's name as it is, where dollars would begin a formula."""
    shutil.copy(files / "a.txt", tmp_path / "$\\x$.txt")
    assert train(monkeypatch, files, tmp_path / "o", f"--data {tmp_path}/$\\x$.txt --steps 1") == 0


# ------------------------------------------------------------------------------------------------ numbers that go wrong


SAVED = [("--save-every 100", 3), ("--keep last --save-every 1", 3), ("--keep last --save-every 100", 0)]


@pytest.mark.parametrize("flags, saved", SAVED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_stops_the_run(monkeypatch, files, tmp_path, capsys, bad, flags, saved):
    """Weights that a step has ruined end the run at once: the step's name, exit code 1, and the last good state."""
    step, calls = adamw.AdamW.step, []

    def ruin(self, *args, **options):
        step(self, *args, **options)
        calls.append(1)
        if len(calls) == 4:
            self.param_groups[0]["params"][0].data.fill_(bad)

    monkeypatch.setattr(adamw.AdamW, "step", ruin)
    assert train(monkeypatch, files, tmp_path / "o", flags) == 1
    line = last_line(capsys)
    assert "after step 4" in line and "--lr" in line and len(calls) == 4
    assert KILL["state_step"](tmp_path / "o") == saved
    assert ("stays as it was" if saved else "nothing was saved") in line


HOT = [("lora", "fp16"), ("prefix", "bf16")]
MORE_HOT = [(method, kind) for method in ("full", "lora", "prefix", "prompt") for kind in ("fp32", "bf16", "fp16")]
MORE_HOT = [case for case in MORE_HOT if case not in HOT]


@pytest.mark.parametrize("method, precision", [*HOT, *(pytest.param(*case, marks=thorough) for case in MORE_HOT)])
def test_a_learning_rate_of_1e10(monkeypatch, files, tmp_path, capsys, method, precision):
    """A learning rate of 1e10 ends with finite figures, or with one line and exit code 1."""
    code = train(monkeypatch, files, tmp_path / "o", f"--method {method} --precision {precision} --lr 1e10")
    assert code in (0, 1, 2)
    if code == 0:
        assert math.isfinite(json.loads((tmp_path / "o" / "result.json").read_text())["loss_after"])
    else:
        assert code == 1 and last_line(capsys)


def test_damaged_base_is_named(monkeypatch, files, tmp_path, capsys):
    """A base with a NaN in it is named before the first step."""
    shutil.copytree(files / "base", tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["transformer.ln_f.weight"][0] = math.nan
    save_file(state, tmp_path / "base" / "model.safetensors")
    assert train(monkeypatch, files, tmp_path / "o", f"--base {tmp_path}/base") == 1
    assert "before any step" in last_line(capsys) and not (tmp_path / "o").exists()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--generate", f"{tmp_path}/base"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2 and "inf or NaN" in last_line(capsys)


def test_overflow_in_fp16_is_skipped_and_counted(monkeypatch, files, tmp_path, capsys):
    """Where a gradient overflows fp16 the weights stay, the scale is halved, and the report counts the step."""
    chunked, moved = gpt.chunked_loss, []
    step = adamw.AdamW.step

    def spy(self, *args, **options):
        moved.append(1)
        return step(self, *args, **options)

    # The first scale that fits 100 times the loss is some halvings below 2^16
    monkeypatch.setattr(gpt, "chunked_loss", lambda *args: 100 * chunked(*args))
    monkeypatch.setattr(adamw.AdamW, "step", spy)
    assert train(monkeypatch, files, tmp_path / "o", "--method full --precision fp16 --steps 12 --lr 0.0001") == 0
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert 0 < result["skipped_steps"] < 12 and len(moved) == 12 - result["skipped_steps"]
    assert f"{result['skipped_steps']} steps, on which a gradient overflowed fp16" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--batch 1", "--length 2", "--batch 1 --length 2 --accumulate 3", "--rank 32"])
def test_smallest_sizes_train(monkeypatch, files, tmp_path, flags):
    """A batch of one, a sequence of one token and its successor, and a rank as large as the layer all train."""
    assert train(monkeypatch, files, tmp_path / "o", flags) == 0
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert all(map(math.isfinite, result["losses"]))


# -------------------------------------------------------------------------------------------------------------- errors


def test_rank_above_the_layers(monkeypatch, files, tmp_path, capsys):
    """A rank above every layer's is wrong use: exit code 2 and one line."""
    assert train(monkeypatch, files, tmp_path / "o", "--rank 1000000000") == 2
    assert "32" in last_line(capsys)


def test_out_of_memory_is_one_line(monkeypatch, files, tmp_path, capsys):
    """A batch that no machine can hold is a failure: exit code 1 and one line."""
    assert train(monkeypatch, files, tmp_path / "o", f"--batch {10**15}") == 1
    assert "out of memory" in last_line(capsys)


@pytest.mark.parametrize("flags, code", [("--steps -1", 2), (f"--batch {10**15}", 1)])
def test_debug_shows_the_traceback(monkeypatch, files, tmp_path, capsys, flags, code):
    """--debug shows where an error came from, above the same line and with the same exit code."""
    assert train(monkeypatch, files, tmp_path / "o", f"{flags} --debug") == code
    error = capsys.readouterr().err
    assert "Traceback" in error and error.strip().split("\n")[-1].startswith("train.py: ")


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch, files, tmp_path):
    """A mistake in the program shows its traceback: only what is known to go wrong becomes a line."""
    monkeypatch.setattr(quant, "quantize_nf4", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(monkeypatch, files, tmp_path / "o", "--method qlora")
