# SPDX-License-Identifier: MIT
"""train.py where there is no Linux: a whole run with what Windows, macOS or a plain console lack taken away.

A machine of each kind is simulated: its modules, signals, functions, files and clock. Real ones differ in more.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from nanopeft.trainer import Failure, compare
from nanopeft.trainer.methods import METHODS

ROOT = Path(__file__).parent.parent
KILL = runpy.run_path(str(ROOT / "tests" / "bench" / "kill.py"))
thorough = pytest.mark.thorough

# What follows runs in a child before train.py. `console` sets the encoding of what is printed
START = f"""
import builtins, io, os, signal, sys, time
ours, system, opened = {str(ROOT)!r}, sys.platform, io.open

def console(encoding):
    for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):
        stream = io.TextIOWrapper(getattr(sys, name).buffer, encoding, errors, write_through=True)
        setattr(sys, name, stream)

def caller():
    frame = sys._getframe(2)
    while "pathlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_filename

def checked(file, mode="r", buffering=-1, encoding=None, *rest, **more):
    if str(file).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    if caller().startswith((ours + "/nanopeft", ours + "/train")) and "b" not in mode:
        assert encoding not in (None, "locale"), f"no encoding for {{file}}"
    return opened(file, mode, buffering, encoding, *rest, **more)

builtins.open = io.open = checked
"""
WINDOWS = """
import filelock  # with the lock of the system that it is really on
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
there = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN")
for name in [name for name in dir(signal) if name.startswith("SIG") and name not in there]:
    delattr(signal, name)
for name in ("fork", "uname", "sched_getaffinity", "mkfifo", "killpg", "getppid"):
    delattr(os, name)
sys.platform = "win32"
console("cp1252")
time.time = lambda: 1e9  # a clock that ticks every 16 ms stands still in a short run
replace, unlink = os.replace, os.unlink

def held(path):
    "Whether this process has a file open or mapped: Windows neither replaces nor deletes one."
    with opened("/proc/self/maps") as file:
        maps = file.read()
    path = os.path.realpath(path)
    return path in maps or any(os.path.realpath(f"/proc/self/fd/{n}") == path for n in os.listdir("/proc/self/fd"))

def refusing(function):
    def call(*paths, **options):
        if held(paths[-1]) and str(paths[-1]).startswith(folder):
            raise PermissionError(13, "Access is denied", str(paths[-1]))
        return function(*paths, **options)
    return call

os.replace, os.unlink = refusing(replace), refusing(unlink)
"""
MACOS = """
import resource
usage = resource.getrusage
class Bytes:
    def __init__(self, of): self.ru_maxrss = usage(of).ru_maxrss * 1024
resource.getrusage = Bytes
sys.platform = "darwin"
del os.sched_getaffinity
"""
NO_DISTRIBUTED = """
import torch.distributed as dist
for name in dist.distributed_c10d.__all__:
    if hasattr(dist, name):
        delattr(dist, name)
dist.is_available = lambda: False
"""
PLATFORMS = {
    "windows": START + WINDOWS,
    "macos": START + MACOS,
    "an ascii console": START + 'console("ascii")',
    "a gbk console": START + 'console("gbk")',
    "no torch.distributed": START + NO_DISTRIBUTED,
}
SHOWN = {"windows": b"?? \xe9", "an ascii console": b"?? ?", "a gbk console": "中文 é".encode("gbk")}  # of a prompt
STOP_AT_THIRD = """
from nanopeft import data
sample, calls = data.TokenStream.sample, []
def stop_at_third(self, *which):
    calls.append(1)
    if len(calls) == 3:
        signal.raise_signal(signal.SIGINT)
    return sample(self, *which)
data.TokenStream.sample = stop_at_third
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a blank and Chinese characters in its name."""
    folder = tmp_path_factory.mktemp("files") / "my files 文件"
    folder.mkdir()
    return KILL["make_files"](folder)


def run(folder, flags, first):
    """(exit code, what was printed) of train.py in a child."""
    log = folder / "log"
    names = {"script": str(ROOT / "train.py"), "flags": flags, "first": first}
    names |= {"log": str(log), "count": str(folder / "count"), "folder": str(folder)}
    child = KILL["context"].Process(target=exec, args=(KILL["CHILD"], names))
    child.start()
    child.join()
    return child.exitcode, log.read_bytes()


def training(files, out):
    return [*"--steps 4 --save-every 1 --batch 2 --length 32".split(), "--base", f"{files}/base", "--out", str(out),
            "--data", f"{files}/a.txt", "--prompt", "中文 é"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(files):
    code, log = run(files, training(files, files / "whole"), "")
    assert code == 0, log.decode()
    return files / "whole"


@pytest.mark.parametrize("platform", [pytest.param(p, marks=[thorough] * (p != "windows")) for p in PLATFORMS])
def test_a_run_on_another_platform(files, whole, tmp_path, platform):
    """Stopped, resumed and read from, a run on each platform ends with Linux's bits, and prints no traceback."""
    first, flags = PLATFORMS[platform], training(files, tmp_path / "an out")
    code, log = run(tmp_path, flags, first + STOP_AT_THIRD)
    assert code == 1 and b"--resume goes on" in log and b"Traceback" not in log, log.decode(errors="replace")
    code, log = run(tmp_path, [*flags, "--resume"], first)
    assert code == 0 and b"sample after" in log and b"Traceback" not in log, log.decode(errors="replace")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "an out" / name).read_bytes() == (whole / name).read_bytes()
    result = json.loads((tmp_path / "an out" / "result.json").read_text("utf-8"))
    if platform == "windows":
        assert result["peak_memory_bytes"] is None and b"not measured" in log
    else:
        assert 1e6 < result["peak_memory_bytes"] < 4e9
    shown = SHOWN.get(platform, "中文 é".encode())
    code, log = run(tmp_path, ["--generate", str(tmp_path / "an out"), "--prompt", "中文 é"], first)
    assert code == 0 and b"Traceback" not in log, log.decode(errors="replace")
    assert shown in log


@thorough
@pytest.mark.parametrize("method", ["full", "fusion"])
def test_files_that_are_read_can_be_replaced(files, tmp_path, method):
    """A full run and a fusion, which read more files, resume and save where no file that is open can be replaced."""
    flags = [*training(files, tmp_path / "out"), "--method", method]
    if method == "fusion":
        flags += ["--adapters", f"{files}/one", f"{files}/two"]
    code, log = run(tmp_path, flags, START + WINDOWS + STOP_AT_THIRD)
    assert code == 1, log.decode(errors="replace")
    code, log = run(tmp_path, [*flags, "--resume"], START + WINDOWS)
    assert code == 0, log.decode(errors="replace")


@pytest.mark.parametrize("system, ended", [("linux", True), ("darwin", True), ("win32", False)])
def test_ctrl_c_lets_the_run_of_a_comparison_save(monkeypatch, tmp_path, system, ended):
    """Ctrl-C in --method all is passed on to the run under way, but not on Windows, where that would kill it."""
    calls = []

    class Child:
        def __init__(self, *args, **options):
            pass

        def wait(self):
            calls.append("wait")
            if len(calls) == 1:
                raise KeyboardInterrupt
            return 1

        def terminate(self):
            calls.append("terminate")

    monkeypatch.setattr(compare.subprocess, "Popen", Child)
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "platform", system)
    args = argparse.Namespace(out=str(tmp_path), base="nano", data="reference", resume=False)
    with pytest.raises(SystemExit) as end:
        compare.compare(args, set())
    assert end.value.code == 1 and calls == ["wait", *["terminate"] * ended, "wait"]


def test_a_comparison_goes_on_after_a_method_that_fails(monkeypatch, tmp_path, capsys):
    """A method that memory does not allow, say, is missing from the table of the others, and named at the end."""
    result = dict.fromkeys(("known_loss_before", "known_loss_after", "accuracy_after"))
    result |= dict.fromkeys(("loss_before", "loss_after", "tokens_per_second"), 1.0) | {"losses": [1.0]}
    counts = ("trained_parameters", "total_parameters", "stored_parameters", "stored_bytes", "peak_memory_bytes")
    result |= dict.fromkeys(counts, 1)

    def child(command, **options):
        name = Path(command[-1].removeprefix("--out=")).name
        out = tmp_path / name
        out.mkdir()
        (out / "result.json").write_text(json.dumps(result))
        codes = {"full": -9, "dora": 1, "qlora": 2}  # killed, failed, and not for this base
        return argparse.Namespace(wait=lambda: codes.get(name, 0))

    monkeypatch.setattr(compare.subprocess, "Popen", child)
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    args = argparse.Namespace(out=str(tmp_path), base="b", data=["reference"], resume=False)
    with pytest.raises(Failure, match="^full, dora failed"):
        compare.compare(args, set())
    assert json.loads((tmp_path / "compare.json").read_text()).keys() == {*METHODS} - {"full", "dora", "qlora"}
    assert "untouched" in capsys.readouterr().out


def test_several_gpus_without_nccl(monkeypatch, capsys):
    """Where torch has no NCCL, as on Windows, --zero on GPUs is refused in one line and code 2."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), "--zero", "2", "--device", "cuda"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "NCCL" in error and "\n" not in error
