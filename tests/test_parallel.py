# SPDX-License-Identifier: MIT
"""train.py with --tensor and --pipeline, held against one process. The files of the two concepts have their own tests.

Four workers (of test_zero.py) run train.py as torchrun's processes would, so that most tests wait for no imports.
"""

import contextlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import test_zero

from nanopeft import adamw, data
from nanopeft.trainer import process

ROOT = Path(__file__).parents[1]
KILL = runpy.run_path(str(ROOT / "tests" / "bench" / "kill.py"))
thorough = pytest.mark.thorough


def train(flags, stop=None, ruin=False):
    """Runs train.py in this process: (exit code or last line, standard output, standard error).

    stop: the number of the draw of a micro-batch in which Ctrl-C comes. ruin: the second update leaves NaN.
    """
    out, err, calls = io.StringIO(), io.StringIO(), []
    out.reconfigure = lambda **_: None
    sample, update = data.TokenStream.sample, adamw.AdamW.step

    def stopping(self, *which):
        calls.append(1)
        if len(calls) == stop:
            signal.raise_signal(signal.SIGINT)
        return sample(self, *which)

    def ruining(self, *args, **options):
        update(self, *args, **options)
        calls.append(1)
        for p in self.param_groups[0]["params"] if len(calls) > 1 else ():
            p.data.fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["train.py", *flags.split()])
        patch.setattr(process, "outlive_reader", lambda stream: None)
        patch.setattr(process, "slower_than_fp32", lambda dtype: False)  # also where it is: the models are small
        patch.setattr(data.TokenStream, "sample", stopping if stop else sample)
        patch.setattr(adamw.AdamW, "step", ruining if ruin else update)
        code = 0
        if dist.is_initialized():
            patch.setattr(os, "_exit", lambda code: None)  # the worker takes further jobs
            patch.setattr(dist, "init_process_group", lambda *_, **__: None)
            for name, value in {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank()}.items():
                patch.setenv(name, str(value))
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def die(flags):
    """Rank 1 is killed in the third draw of a micro-batch."""
    sample, calls = data.TokenStream.sample, []

    def dying(self, *which):
        calls.append(1)
        if len(calls) == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(self, *which)

    data.TokenStream.sample = dying
    train(flags)


# ----------------------------------------------------------------------------------------------------------- processes


ranks = test_zero.worker_pool(__file__)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base of two small layers and a text."""
    return KILL["make_files"](tmp_path_factory.mktemp("files"))


class Runs:
    """`runs(out, world, flags)`: the folder of a run's results, on so many ranks. A run of one process is made once."""

    def __init__(self, files, folder, ranks):
        self.files, self.folder, self.ranks, self.alone = files, folder, ranks, {}

    def command(self, out, flags):
        return f"--base {self.files}/base --data {self.files}/a.txt --batch 4 --length 32 --out {out} {flags}"

    def __call__(self, out, world, flags, **how):
        command = self.command(out, flags)
        self.codes, self.outputs, self.errors = zip(*self.ranks.job(world, "train", command, **how))
        return Path(out)

    def one(self, flags):
        if flags not in self.alone:
            code, _, error = train(self.command(self.folder / f"one{len(self.alone)}", flags))
            assert code == 0, error
            self.alone[flags] = self.folder / f"one{len(self.alone)}"
        return self.alone[flags]


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory, ranks):
    return Runs(files, tmp_path_factory.mktemp("one"), ranks)


def weights(out):
    found = [out / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return next(load_file(path) for path in found if path.exists())


def result(out):
    return json.loads((out / "result.json").read_text())


def same(one, other, tolerance):
    """Holds if two runs have the same losses and leave the same weights."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max() for name in first) <= tolerance
    assert result(other)["losses"] == pytest.approx(result(one)["losses"], abs=tolerance)
    assert result(other)["loss_after"] == pytest.approx(result(one)["loss_after"], abs=tolerance)


# --------------------------------------------------------------------------------------------------------------- claims

EQUAL = [
    ("full", 2, "--tensor 2", 1), ("lora --clip 0.05", 2, "--tensor 2", 2), ("adapter", 2, "--tensor 2", 1),
    ("full", 3, "--pipeline 3", 4), ("lora", 2, "--pipeline 2 --schedule gpipe", 2), ("qlora", 2, "--pipeline 2", 3),
    ("adapter --placement houlsby", 3, "--pipeline 3", 2), ("lora --targets wte,lm_head", 3, "--pipeline 3", 2),
    ("full", 1, "--tensor 1", 1), ("full", 1, "--pipeline 1", 1), ("full --clip 0.01", 2, "--tensor 2", 2),
    ("full --clip 0.01", 2, "--pipeline 2", 2),
]  # fmt: skip
DEFAULT = EQUAL[1], EQUAL[3]


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in DEFAULT else thorough, id=str(c)) for c in EQUAL])
def test_ranks_train_what_one_process_trains(runs, tmp_path, case):
    """20 steps with --tensor or --pipeline give one process's losses and weights, in fp32 within rounding.

    Sums of other order differ by some 2⁻²³ of their terms; Adam's quotient makes up to ten times that of it.
    """
    method, world, how, accumulate = case
    flags = f"--method {method} --accumulate {accumulate} --steps 20"
    out = runs(tmp_path / "out", world, f"{flags} {how}")
    assert runs.codes == (0,) * world, runs.errors
    same(runs.one(flags), out, 1e-5)
    assert result(out)["ranks"] == world


ENGINES = [(1, ""), (2, "--tensor 2"), (2, "--zero 3"), (3, "--pipeline 3"), (2, "--tensor 2"), (2, "--pipeline 2")]


@pytest.mark.parametrize(
    "method, precision",
    [("lora", "fp32"), pytest.param("full", "fp32", marks=thorough), pytest.param("full", "bf16", marks=thorough)],
)
def test_a_state_goes_on_in_any_other_engine(runs, tmp_path, method, precision):
    """A run that goes from one process to --tensor, --zero, --pipeline and back equals one that was not interrupted.

    In 16 bits the rounding of sums differs from engine to engine, by 2⁻⁸ of a value; its losses by much less.
    """
    flags = f"--method {method} --precision {precision} --accumulate 2 --steps 14"
    for i, (world, how) in enumerate([*ENGINES, (1, "")]):
        last = i == len(ENGINES)
        out = runs(tmp_path / "out", world, f"{flags} {how} --resume", stop=None if last else 3)
        assert all((code == 0) == last for code in runs.codes), runs.errors
        assert f"going on from step {2 * i}" in runs.outputs[0] or i == 0
    if precision == "fp32":
        same(runs.one(flags), out, 1e-5)
    else:
        assert result(out)["losses"] == pytest.approx(result(runs.one(flags))["losses"], abs=2e-3)


@pytest.mark.parametrize("how", ["--tensor 2", pytest.param("--pipeline 2", marks=thorough)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=thorough)])
def test_resuming_changes_no_bit(runs, tmp_path, how, precision):
    """A run that was stopped and resumed on the same ranks leaves the bits of one that was not, its loss scale too."""
    flags = f"--method full --precision {precision} --steps 5 {how}"
    whole = runs(tmp_path / "whole", 2, flags)
    runs(tmp_path / "parts", 2, flags, stop=2)
    assert all("stopped after step 2" in code for code in runs.codes)
    parts = runs(tmp_path / "parts", 2, f"{flags} --resume")
    assert runs.codes == (0, 0) and "going on from step 2" in runs.outputs[0]
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert result(whole)["losses"] == result(parts)["losses"]
    assert result(whole)["skipped_steps"] == result(parts)["skipped_steps"]


@pytest.mark.parametrize("how", [pytest.param("--tensor 2", marks=thorough), "--pipeline 2"])
def test_recomputation_changes_no_bit(runs, tmp_path, how):
    """--recompute under --tensor and --pipeline leaves the same bits."""
    flags = f"--method lora --steps 3 --accumulate 2 {how}"
    one, other = runs(tmp_path / "one", 2, flags), runs(tmp_path / "other", 2, f"{flags} --recompute")
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_what_a_pipeline_leaves(runs, tmp_path):
    """A pipeline's run leaves its timeline as a picture, and the bubble measured beside the formula's (p-1)/(m+p-1).

    Fewer micro-batches than stages are mentioned in a line at the start."""
    out = runs(tmp_path / "out", 3, "--steps 2 --accumulate 2 --pipeline 3")
    assert ElementTree.fromstring((out / "pipeline.svg").read_text()).tag.endswith("svg")
    bubble = result(out)["bubble"]
    assert bubble["formula"] == 2 / 4 and 0 < bubble["measured"] < 1
    assert "--accumulate 2 is below --pipeline 3: stages wait 50%" in runs.outputs[0]
    assert f"waiting      {bubble['measured']:.1%} of the stages' time, 50.0% by the formula" in runs.outputs[0]
    assert not any("stages wait" in output for output in runs.outputs[1:])
    runs(tmp_path / "out", 3, "--steps 2 --accumulate 2 --pipeline 3 --resume")  # no step is left: nothing to draw
    assert runs.codes == (0, 0, 0)


def test_what_a_rank_keeps_and_sends(runs, tmp_path):
    """result.json has what rank 0 keeps: about 1/t of the matrices and of m and v, or a stage's; and what it sends."""
    L, d, V, rows, T, t = 2, 32, 257, 4, 32, 2
    out = runs(tmp_path / "out", t, "--method full --steps 2 --tensor 2")
    kept, sent = result(out)["measured_bytes"], result(out)["sent_elements"]
    matrices = L * (12 * d * d + 7 * d) + (V + 1) * d  # a block's with the biases of outputs that are split
    replicated = L * 6 * d + 2 * d + 64 * d  # other biases, norms, positions
    n = matrices / t + replicated
    assert kept == {"parameters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}
    # f and g of attention, MLP, embedding and head; three numbers a scored token for the loss
    elements = (4 * L + 2) * rows * T * d + 3 * rows * (T - 1)
    assert sent == {"all_reduce": pytest.approx(2 * (t - 1) / t * elements, rel=0.01)}
    one = result(runs.one("--method full --steps 2"))["measured_bytes"]
    staged = result(runs(tmp_path / "staged", 2, "--method full --steps 2 --pipeline 2"))["measured_bytes"]
    for what in ("parameters", "gradients", "optimizer"):
        assert one[what] / 3 < staged[what] < one[what]


@pytest.mark.parametrize("how", ["--tensor 2", "--pipeline 2"])
def test_ruined_weights_do_not_replace_a_state(runs, tmp_path, how):
    """If an update leaves NaN, the state that was saved before it stays, on all ranks with one line and code 1."""
    flags = f"--method full --save-every 1 {how}"
    out = runs(tmp_path / "out", 2, f"{flags} --steps 3", ruin=True)
    for code in runs.codes:
        assert re.fullmatch(r"train.py: loss nan after step 2: [^\n]* stays as it was", code)
    assert runs.ranks.job(1, "step_of", str(out / "state.safetensors")) == [1]


def step_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["run"])["step"]


@pytest.mark.parametrize(
    "world, flags, says",
    [
        (2, "--tensor 4", "--tensor 4 with 2 processes"), (2, "--pipeline 3", "--pipeline 3 with 2 processes"),
        (2, "--tensor 2 --zero 1", "--tensor with --zero needs a mesh"), (1, "--tensor 0", "at least 1"),
        (2, "--tensor 2 --pipeline 2", "--tensor with --pipeline needs a mesh"),
        (2, "--schedule gpipe --zero 1", "--schedule belongs to --pipeline"), (4, "--tensor 4", "share n_head = 2"),
        (2, "--tensor 2 --method qlora", "is for --method full, lora, adapter: for qlora use --zero"),
        (2, "--pipeline 2 --method prefix", "for prefix use --zero"), (2, "--pipeline 2 --method all", "--method full"),
        (4, "--pipeline 4", "at most 3 stages"), (2, "--tensor 2 --targets wte", "wte is a LoRAEmbedding"),
        (2, "", "--tensor 2 or --pipeline 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(runs, tmp_path, world, flags, says):
    """Wrong numbers of processes, combinations and methods: one line that says it, code 2, and nothing written."""
    out = runs(tmp_path / "out", world, flags)
    assert runs.codes == (2,) * world
    for error in runs.errors:
        assert says in error and re.fullmatch(r"train.py: [^\n]+\n", error), error
    assert not out.exists()


def test_alone_is_refused(runs, tmp_path):
    """Without torchrun, --tensor and --pipeline say how to start them."""
    for name in ("tensor", "pipeline"):
        code, _, error = train(runs.command(tmp_path / "out", f"--{name} 2"))
        assert code == 2 and f"--{name} is for several processes: torchrun --nproc_per_node 2 train.py" in error


@thorough
@pytest.mark.parametrize("world, how", [(2, "--tensor 2"), (3, "--pipeline 3")])
def test_a_rank_that_dies_ends_all(runs, tmp_path, world, how):
    """Under torchrun, a killed rank ends all within 30 seconds, their start included, and the error names it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "die", *runs.command(tmp_path / "out", f"--steps 10000 {how}").split()]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert time.monotonic() - began < 30
    assert "local_rank: 1" in done.stderr and "SIGKILL" in done.stderr
    if "pipeline" in how:
        assert "rank 0 waits for rank 1, which died or hangs" in done.stderr


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        test_zero.serve(list(map(int, sys.argv[2:])), globals())
    die(" ".join(sys.argv[2:]))
