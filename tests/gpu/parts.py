# SPDX-License-Identifier: MIT
"""The parts of run.py. `python tests/gpu/parts.py NAME --device cuda --out FOLDER` writes a row to a line, as JSON."""

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import kill
import step as bench
from every_method import VARIANTS, small_model
from safetensors.torch import load_file

from nanopeft import adamw, data, gpt, qlora, quant
from nanopeft.trainer import bases, process
from nanopeft.trainer.engine import Engine
from nanopeft.trainer.evaluate import mean_loss
from nanopeft.trainer.methods import METHODS

DTYPES = process.DTYPES


def row(what, found, expected=None, ok=None, **more):
    return dict(what=what, found=found, expected=expected, ok=None if ok is None else bool(ok), **more)


def attempts(function, cases):
    """The rows of function(*case) for each case. One that fails is a row too, and ends no other."""
    for case in cases:
        try:
            yield from function(*case)
        except Exception as error:
            line = (str(error).strip() or repr(error)).splitlines()[-1][:200]
            yield row(" ".join(map(str, case)), f"failed: {line}", ok=False)


def missing(*packages):
    """The first of these that is not installed, or does not import here."""
    for name in packages:
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"skipped: {name} is missing ({type(error).__name__})"


# --------------------------------------------------------------------------------------------------------- correctness

SMALL = dict(vocab_size=257, n_positions=64, n_embd=64, n_layer=2, n_head=4)


def gradients(model, ids, labels):
    loss = model(input_ids=ids, labels=labels).loss
    (1024 * loss).backward()  # fp16 has nothing below 6e-8
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {name: p.grad.double().cpu() / 1024 for name, p in trained.items()}


def correctness(device, args):
    """Loss and gradients in each type, against the CPU in fp64 with the same weights, rounded to the type beforehand.

    A number passes some 50 roundings in two blocks, forward and backward, of eps/2 each. They add up like independent
    ones, to √50/2 = 3.5 eps. Where a gradient is the difference of larger numbers, it is that much less exact: so up to
    32 eps of the norm of each tensor's gradient, and 8 of the loss, which is no difference.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def one(variant, precision):
        dtype = DTYPES[precision]
        model, _ = small_model(variant, SMALL, dtype)
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.data += 0.02 * torch.randn(p.shape).to(p.dtype)  # B is 0 at the start, and A would have no gradient
        exact, _ = small_model(variant.replace("qlora", "lora").split(" --quant")[0], SMALL, torch.float64)
        state = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, qlora.QuantizedLinear):  # what it stands for, in the type that it is used in
                state |= {f"{name}.weight": layer.dequantize(dtype)}
                state = {k: t for k, t in state.items() if k.rpartition(".")[::2] not in
                         [(name, end) for end in ("q", "scale", "scale2", "mean")]}  # fmt: skip
        exact.load_state_dict(state)
        ids = torch.randint(257, (4, 24))
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
        expected, truth = gradients(exact, ids, labels)
        loss, found = gradients(model.to(device), ids.to(device), labels.to(device))
        eps = torch.finfo(dtype).eps
        least = 1e-9 * max(g.norm() for g in truth.values())  # 0 by symmetry: a key's bias shifts all scores alike
        off = max(((found[k] - g).norm() / g.norm()).item() for k, g in truth.items() if g.norm() > least)
        loss_off = abs(loss - expected) / expected / eps
        what, good = f"{variant}, {precision}: error of gradients, in eps", found.keys() == truth.keys()
        yield row(what, off / eps, "at most 32", good and off <= 32 * eps and loss_off <= 8, loss=loss_off)

    yield from attempts(one, [(variant, precision) for variant in VARIANTS for precision in DTYPES])


# ---------------------------------------------------------------------------------------------------------------- bits


def bits(device, args):
    """Codes of NF4 and int8: this device's against the CPU's, and against bitsandbytes' own kernels; AdamW."""

    def codes(dtype):
        x = torch.randn(1000, 1001, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])  # no full last block
        for name, quantize in (("NF4", quant.quantize_nf4), ("int8", quant.quantize_int8)):
            same = [torch.equal(a.cpu(), b) for a, b in zip(quantize(x.to(device)), quantize(x))]
            yield row(f"{name} of {dtype}: bytes and scales of the CPU", sum(same), 2, all(same))
        packed, absmax = quant.quantize_nf4(x.to(device))
        double = [t.cpu() for t in quant.quantize_scales(absmax)]
        apart = (double[0].int() - quant.quantize_scales(absmax.cpu())[0].int()).abs()  # a mean's sum has its order
        what = f"scales of {dtype} in 8 bits: codes that differ from the CPU's"
        yield row(what, (apart > 0).sum().item(), "few", apart.max() <= 1)
        plain = quant.dequantize_nf4_plain(packed, absmax, x.shape).to(x.dtype)
        same = torch.equal(quant.dequantize_nf4(packed, absmax, x.shape, x.dtype), plain)
        yield row(f"NF4 to {dtype}: decoded as by the plain formula", same, True, same)
        if why := missing("bitsandbytes"):
            yield row("bitsandbytes", why)
            return
        import bitsandbytes.functional as bnb

        theirs, state = bnb.quantize_4bit(x.to(device), quant_type="nf4")
        wrong = (theirs.flatten() != packed).sum().item()
        same = torch.equal(state.absmax, absmax)
        yield row(f"NF4 of {dtype}: bytes that are not bitsandbytes'", wrong, 0, wrong == 0 and same)
        decoded = quant.dequantize_nf4(theirs.flatten(), state.absmax, x.shape, x.dtype)
        wrong = (bnb.dequantize_4bit(theirs, state) != decoded).sum().item()
        yield row(f"NF4 to {dtype}: numbers that are not bitsandbytes'", wrong, 0, wrong == 0)
        if dtype == "fp16":  # theirs divides in fp16, so a quotient near a half may go either way
            theirs, absmax, _ = bnb.int8_vectorwise_quant(x.to(device))
            apart = (theirs.int() - quant.quantize_int8(x.to(device))[0].int()).abs()
            wrong = (apart > 0).sum().item()
            yield row("int8 of fp16: codes that are not bitsandbytes'", wrong, "few", apart.max() <= 1)

    def adam(compiled, decay):
        torch.manual_seed(0)
        start = [torch.randn(shape, device=device) for shape in ((8, 768), (768, 8), (5,), (1200, 1000))]
        ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
        one = adamw.AdamW(ours, weight_decay=decay, compile=compiled)
        two = torch.optim.AdamW(theirs, weight_decay=decay, fused=True)
        for _ in range(12):
            for p, q in zip(ours, theirs):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            one.step(), two.step()
        # One rounding of θ in each of 12 steps, and ten of lr (1e-3) times a ratio of at most 7.27; theirs as well
        bounds = [2 * 12 * (6e-8 * q.abs() + 10 * 6e-8 * 7.3e-3) for q in theirs]
        off = max(((p - q).abs() / bound).max().item() for p, q, bound in zip(ours, theirs, bounds))
        what = f"AdamW, decay {decay}{', compiled' * compiled}: off torch's fused one, in bounds of rounding"
        yield row(what, off, "at most 1", off <= 1)

    yield from attempts(codes, [(dtype,) for dtype in DTYPES])
    yield from attempts(adam, [(False, 0.0), (False, 0.1), *([(True, 0.1)] if device.type == "cuda" else [])])


# ------------------------------------------------------------------------------------------------- train.py, in-process


def train(flags, stop=None, at_draw=lambda: None):
    """Runs train.py here: 0, or its exit code or last line. stop: the draw of a batch in which Ctrl-C comes."""
    draws, out = [], io.StringIO()
    out.reconfigure = lambda **_: None
    kinds = [kind for kind in vars(data).values() if isinstance(kind, type) and "sample" in vars(kind)]
    originals, outlive, argv = [kind.sample for kind in kinds], process.outlive_reader, sys.argv
    for kind, sample in zip(kinds, originals):

        def drawn(self, *which, sample=sample):
            draws.append(1)
            at_draw()
            if len(draws) == stop:
                signal.raise_signal(signal.SIGINT)
            return sample(self, *which)

        kind.sample = drawn
    try:
        sys.argv, process.outlive_reader = ["train.py", *flags.split()], lambda stream: None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv, process.outlive_reader = argv, outlive
        for kind, sample in zip(kinds, originals):
            kind.sample = sample
    return 0


def flags_of(method, files, device, out, more):
    own = kill.METHODS.get(method, f"--method {method}").format(files=files)
    own = own if "--data" in own else f"{own} --data {files}/a.txt"
    return f"--base {files}/base --batch 4 --length 32 --device {device.type} --out {out} {own} {more}"


def weights(folder):
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {(file, name): t for file, tensors in files.items() for name, t in tensors.items()}


def resume(device, args):
    """Each method, stopped in its fourth step and resumed: weights, optimizer's state and losses of one run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        files = kill.make_files(Path(folder))

        def one(method, precision):
            ends = []
            for out, stop, more in (("whole", None, ""), ("parts", 4, ""), ("parts", None, "--resume")):
                more += f" --steps 7 --precision {precision}"
                ends.append(train(flags_of(method, files, device, f"{folder}/{method}/{out}", more), stop))
            assert ends[::2] == [0, 0] and "stopped after step 4" in str(ends[1]), ends
            whole, parts = (Path(folder, method, name) for name in ("whole", "parts"))
            one, other = weights(whole), weights(parts)
            losses = [json.loads((out / "result.json").read_text())["losses"] for out in (whole, parts)]
            off = max((one[key].double() - other[key].double()).abs().max().item() for key in one)
            same = one.keys() == other.keys() and off == 0 and losses[0] == losses[1] and len(losses[0]) == 7
            yield row(f"{method}, {precision}: largest difference after --resume", off, 0, same)

        yield from attempts(one, [(method, "bf16" if device.type == "cuda" else "fp32") for method in METHODS])


class HostReads(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: .item() and the like, and results of a size that it must learn.

    Not in functions that read what a GPU never has: labels before they are copied, AdaLoRA's count of steps.
    """

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            frame = sys._getframe(1)
            ours = str(ROOT / "nanopeft"), str(ROOT / "train.py")
            while frame and not frame.f_code.co_filename.startswith(ours):
                frame = frame.f_back
            if frame and frame.f_code.co_name not in ("count_labels", "update"):
                self.found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return function(*args, **kwargs or {})


def host_reads(method, files, device, out):
    """What made the host wait in one step of train.py, by place. On a CPU: what would, with the loss as on a GPU."""
    found, marks, on_gpu = [], [], device.type == "cuda"
    flags = flags_of(method, files, device, out, "--steps 6 --eval-every 100 --save-every 100")
    with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            skips, gpt.skips_unlabelled = gpt.skips_unlabelled, lambda device: False
            stack.callback(setattr, gpt, "skips_unlabelled", skips)
            stack.enter_context(HostReads(found))
        end = train(flags, at_draw=lambda: marks.append((len(found), len(caught))))
        assert end == 0, end
        if on_gpu:  # from the fourth draw to the fifth: Adam's state is there, and nothing is evaluated
            some = [w for w in caught[marks[3][1] : marks[4][1]] if "synchroniz" in str(w.message)]
            return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in some)
    return Counter(found[marks[3][0] : marks[4][0]])


def syncs(device, args):
    """How often the host waits for the device in a step: for the norm, and then for the loss that is printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = kill.make_files(Path(folder))

        def one(method):
            found = host_reads(method, files, device, f"{folder}/out/{method}")
            where = ", ".join(f"{n} x {place}" for place, n in found.items())
            # ptuning's --template: whether each row has all its places; and in backward masked_select's size
            own = 2 + (method == "ptuning") * (2 if device.type == "cuda" else 1)
            yield row(f"{method}: waits in a step", found.total(), own, found.total() == own, where=where)

        yield from attempts(one, [(method,) for method in METHODS])


# ------------------------------------------------------------------------------------------------ memory, compile, race


def memory(device, args):
    """Peak of a step in bf16, predicted by memory.py, against what torch's allocator had given out."""
    shape = dict(n_embd=768, n_layer=12, n_head=12) if device.type == "cuda" else dict(n_embd=64, n_layer=2, n_head=2)
    with tempfile.TemporaryDirectory() as folder:
        files, model = kill.make_files(Path(folder)), gpt.GPT(vocab_size=257, n_positions=512, **shape)
        bases.save_gpt(model, files / "base")

        def one(method):
            gc.collect()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            flags = f"--base {files}/base --data {files}/a.txt --method {method} --batch 16 --length 256"
            flags += " --steps 3 --eval-every 3"
            end = train(f"{flags} --precision bf16 --device {device.type} --out {folder}/{method}")
            assert end == 0, end
            result = json.loads(Path(folder, method, "result.json").read_text())
            for what in result["predicted_bytes"]:
                predicted, measured = result["predicted_bytes"][what], result["measured_bytes"][what]
                bound = 0.01 * predicted
                if what == "peak":  # it also has cuBLAS's workspace, 32 MiB on an H100, and blocks are rounded up
                    measured -= before
                    bound = 0.1 * predicted + (1 << 26 if device.type == "cuda" else 1 << 20)
                both = dict(predicted_bytes=predicted, measured_bytes=measured)
                yield row(f"{method}: {what}", measured, predicted, abs(measured - predicted) <= bound, **both)

        methods = ("lora", "qlora", "adapter", "prefix", "prompt", "ptuning", "full")
        yield from attempts(one, [(method,) for method in methods])


def compiled(device, args):
    """Graph breaks of a step of each method, and the time of a step, eager and compiled."""
    make, wait = torch.compile, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    compile_blocks = runpy.run_path(str(ROOT / "train.py"))["compile_blocks"]

    def steps(variant, shape, backend, size, count, dtype):
        adamw.compiled_step.cache_clear()  # it is of the backend before
        model, settings = small_model(variant, shape, dtype)
        model, blocks = model.to(device).train(), bases.blocks(model)
        settings.compile = backend is not None
        if settings.compile:
            torch.compile = lambda function: make(function, backend=backend)
            torch.nn.Module.compile = lambda self: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl))
            compile_blocks(blocks)
        engine, method = Engine(settings, model, blocks, dtype, None), METHODS[settings.method]
        ids = torch.randint(64, size)
        for i in range(3 + count):
            if i == 3:
                wait()
                began = time.perf_counter()
            engine.backward(mean_loss(model, (ids, ids), device) + method.penalty(model))
            engine.step(1e-3, 1.0)
        wait()
        return (time.perf_counter() - began) / count

    def breaks(variant):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        steps(variant, SMALL, "eager", (2, 16), 1, torch.float32)
        counters = torch._dynamo.utils.counters
        found = sum(counters["graph_break"].values()) + len(counters["unimplemented"])
        yield row(f"{variant}: graph breaks", found, 0, found == 0 and counters["stats"]["unique_graphs"] > 0)

    def times(variant):
        torch._dynamo.reset()
        on_gpu = device.type == "cuda"
        shape = SMALL | (dict(vocab_size=3072, n_positions=512, n_embd=768, n_layer=6, n_head=12) if on_gpu else {})
        size, dtype = ((16, 512), torch.bfloat16) if on_gpu else ((2, 16), torch.float32)
        eager, fast = (steps(variant, shape, backend, size, 10, dtype) for backend in (None, "inductor"))
        yield row(f"{variant}: ms of a step, eager and compiled", f"{eager * 1e3:.2f}, {fast * 1e3:.2f}")

    yield from attempts(times, [("lora",), ("full",)])
    yield from attempts(breaks, [(variant,) for variant in VARIANTS])
    yield from attempts(times, [("qlora",), ("dora",)])


LORA, QLORA, FULL = ("gpt2", "lora"), ("llama", "qlora"), ("gpt2", "full")
RACES = [(*which, compiled) for compiled in (False, True) for which in (LORA, ("llama", "lora"), FULL, QLORA)]
RACES += [(*which, compiled) for which in (("medium", "lora"), ("gpt2", "qlora")) for compiled in (False, True)]


def race(device, args):
    """Tokens per second and peak memory, against transformers + peft, each side with a batch that fills the card."""
    on_gpu, until, workers = device.type == "cuda", time.monotonic() + args.limit - 20, {}  # 20 s to import and to end
    settings = argparse.Namespace(length=1024, rank=8, steps=10, device=device.type)
    if not on_gpu:
        settings.length, settings.steps = 32, 1
    for shape, method, is_compiled in RACES if on_gpu else [("nano", "lora", False), ("nano", "qlora", True)]:
        if shape == "llama" and (why := missing("transformers")):
            yield row(f"{shape}, {method}", why)
            continue
        settings.limit = max(1, until - time.monotonic())
        batch = bench.gpu_batch(shape, settings.length) if on_gpu else 2
        found = bench.race_on_gpu(workers, method, shape, batch, settings, is_compiled)
        name, _, sides = bench.gpu_line(found).partition("; ")
        yield row(", ".join(name.split()), sides, None, "seconds" in found["ours"], race=found)


# ------------------------------------------------------------------------------------------------------------- engines


def engines(device, args):
    """train.py's engines under torchrun, on all cards by NCCL and with two ranks by gloo: the losses of one process."""
    cards = torch.cuda.device_count() if device.type == "cuda" else 2
    kinds = "--zero 1", "--zero 2", "--zero 3", "--fsdp", "--tensor {n}", "--pipeline {n}"
    cases = [(flags, "full" if "zero" in flags else "lora", cards, device.type) for flags in kinds]
    if device.type == "cuda":  # NCCL refuses two ranks on one card
        cases += [(flags, method, 2, "cpu") for flags, method, _, _ in cases[1:2] + cases[4:]]
    with tempfile.TemporaryDirectory() as folder:
        files = kill.make_files(Path(folder))
        alone = {}
        for method, where in {(method, where) for _, method, _, where in cases}:  # LoRA's A is drawn on its device
            out = f"{folder}/{method}-{where}"
            assert train(flags_of(method, files, torch.device(where), out, "--steps 5")) == 0
            alone[method, where] = json.loads(Path(out, "result.json").read_text())["losses"]

        def one(flags, method, n, where):
            what = f"{flags.format(n=n)}, {method}, {n} ranks on {where}"
            out = f"{folder}/{len(what)}{what.replace(' ', '')}"
            flags = flags_of(method, files, torch.device(where), out, f"--steps 5 {flags.format(n=n)}")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
            command += [str(ROOT / "train.py"), *flags.split()]
            run = subprocess.run(command, capture_output=True, text=True, timeout=max(10, args.limit - 15))
            if run.returncode:
                lines = [line for line in run.stderr.splitlines() if "Error" in line or line.startswith("train.py:")]
                return [row(what, f"failed: {lines[-1] if lines else run.stderr[-200:]}", ok=False)]
            losses = json.loads(Path(out, "result.json").read_text())["losses"]
            off = max(abs(a - b) for a, b in zip(losses, alone[method, where], strict=True))
            # fp32 sums in another order differ by some 2^-23 of their terms, Adam's quotients by up to ten times that
            return [row(f"{what}: losses differ from one process's by", off, "at most 1e-4", off <= 1e-4)]

        with ThreadPoolExecutor(len(cases) if device.type == "cuda" else 1) as pool:
            for rows in pool.map(lambda case: list(attempts(one, [case])), cases):
                yield from rows


PARTS = {"correctness": correctness, "syncs": syncs, "bits": bits, "race": race, "memory": memory, "resume": resume,
         "compile": compiled, "engines": engines}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--limit", type=float, default=120)
    args = parser.parse_args()
    process.slower_than_fp32 = lambda dtype: False  # a run is to compute in what was asked for
    with open(args.out / f"{args.part}.jsonl", "w") as file:
        for found in PARTS[args.part](torch.device(args.device), args):
            file.write(json.dumps(found) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # without a clean-up that may hang: all rows are written
