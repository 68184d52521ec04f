# SPDX-License-Identifier: MIT
"""train.py --compile: one graph after the other in each block, and none of them broken.

"eager" traces as torch.compile's own backend does, and runs torch's operations: it needs no compiler. Each test runs in
a process of its own, because torch.compile leaves tensors without memory behind, which other tests would count.
"""

import functools
import io
import multiprocessing
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from every_method import VARIANTS, small_model

from nanopeft import qlora, quant
from nanopeft.trainer import bases, process
from nanopeft.trainer.engine import Engine
from nanopeft.trainer.evaluate import mean_loss
from nanopeft.trainer.methods import METHODS

ROOT = Path(__file__).parents[1]


def alone(function, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result(timeout=300)


def steps(variant):
    """Three steps as train.py makes them, compiled and not: torch's counters, and the largest difference of losses."""
    torch.compile = functools.partial(torch.compile, backend="eager")
    compile_blocks = runpy.run_path(str(ROOT / "train.py"))["compile_blocks"]
    found = []
    for compiles in (True, False):
        model, args = small_model(variant)
        args.compile, blocks = compiles, bases.blocks(model)
        if compiles:
            torch.nn.Module.compile = lambda self: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl))
            compile_blocks(blocks)
        engine, method = Engine(args, model, blocks, torch.float32, None), METHODS[args.method]
        method.attach(model, engine.optimizer, args)
        ids, losses = torch.randint(64, (3, 2, 16), generator=torch.Generator().manual_seed(1)), []
        for batch in ids:
            loss = mean_loss(model.train(), (batch, batch), batch.device)
            engine.backward(loss + method.penalty(model))
            engine.step(1e-3, 1.0)
            losses.append(loss.item())
        found.append(losses)
    counters = torch._dynamo.utils.counters
    broken = [reason.split("\n")[0] for kind in ("graph_break", "unimplemented") for reason in counters[kind]]
    return broken, counters["stats"]["unique_graphs"], max(abs(a - b) for a, b in zip(*found))


SOME = ("lora", "qlora", "prefix")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.thorough] * (v not in SOME)) for v in VARIANTS])
def test_no_graph_breaks(variant):
    """No method breaks the graph of a block or of AdamW, or needs more variants of it than torch makes."""
    broken, graphs, apart = alone(steps, variant)
    assert not broken and graphs > 0
    # The operations are the same, but for NF4's look-up, which has the same bits, too
    assert apart <= 1e-6  # fp32 losses of 4


def run(flags):
    """train.py in this process: (its lines, torch's counters)."""
    torch.compile = functools.partial(torch.compile, backend="eager")
    torch.nn.Module.compile = lambda self: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl))
    process.slower_than_fp32 = lambda dtype: False
    sys.argv = ["train.py", *flags.split()]
    with redirect_stderr(io.StringIO()):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return {kind: dict(found) for kind, found in torch._dynamo.utils.counters.items()}


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_training_is_compiled_whatever_came_before(method, tmp_path):
    """Validation and a sample come before the first step of a run, and leave all of torch's variants to training.

    In bf16, where short rows take another attention."""
    small = runpy.run_path(str(ROOT / "tests" / "bench" / "kill.py"))["make_files"](tmp_path)
    flags = f"--method {method} --base {small}/base --data {small}/a.txt --batch 4 --length 32 --steps 4 --eval-every 1"
    counters = alone(run, f"{flags} --compile --precision bf16 --out {tmp_path}/out")
    assert not counters.get("graph_break") and not counters.get("unimplemented")
    # x of the first block needs no gradient and that of the others does; a prefix differs in each of the two blocks
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantizing_for_the_compiler_gives_the_same_bits(quant_type, dtype, monkeypatch):
    """What torch.compile traces of NF4 and int8, a gather without pieces, gives the bits of the faster form."""
    layer = qlora.QuantizedLinear(torch.nn.Linear(70, 30), quant_type, True)  # 2,100: the last block is not full
    expected = layer.dequantize(dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(layer.dequantize(dtype), expected)
    assert quant.TABLES or quant_type == "int8"
