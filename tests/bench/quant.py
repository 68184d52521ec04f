# SPDX-License-Identifier: MIT
"""Time of NF4 against bitsandbytes' on this machine's CPU, and the memory of a QLoRA step against LoRA's on GPT-2.

    OMP_NUM_THREADS=1 python tests/bench/quant.py [rounds] [--memory]

Both sides take turns on the same tensors, so that other load on the machine hits each alike: only the ratios mean
something, and under load those of processor time most (on one thread). --memory counts the storages of a training step
at batch 1 x 128 instead (about 1 GB, a few seconds).
"""

import importlib.util
import os
import sys
import time
import weakref
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin stall a machine with other work

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanopeft import gpt, lora, qlora, quant
from nanopeft.trainer.process import slower_than_fp32


def race(title, racers, rounds):
    """Prints best and median milliseconds of each, the processor's as well, and their ratios to the first one's."""
    wall, cpu = ({name: [] for name in racers} for _ in range(2))
    for turn in range(rounds + 2):
        for name, run in racers.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            if turn > 1:  # the first ones warm the caches
                wall[name].append(1e3 * (time.perf_counter() - start))
                cpu[name].append(1e3 * (time.process_time() - start_cpu))
    print(f"\n{title}, {rounds} rounds")
    print(f"{'':26} {'best ms':>9} {'ratio':>6} {'median ms':>10} {'ratio':>6} {'median CPU ms':>14} {'ratio':>6}")
    first = next(iter(racers))
    for name in racers:
        figures = [(reduce(t[name]), reduce(t[first])) for reduce, t in ((min, wall), (median, wall), (median, cpu))]
        columns = (f"{figure:{width}.2f} {figure / base:6.2f}" for width, (figure, base) in zip((9, 10, 14), figures))
        print(f"{name:26} " + " ".join(columns))


def speed(rounds):
    import bitsandbytes as bnb

    installed = "installed" if importlib.util.find_spec("kernels") else "not installed"
    print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, its optional `kernels` package {installed}")
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    torch.manual_seed(0)
    n_in, n_out, dtype = 768, 3072, torch.float32 if slower_than_fp32(torch.bfloat16) else torch.bfloat16
    weight = (torch.randn(n_out, n_in) * 0.02).to(dtype)
    options = dict(blocksize=64, quant_type="nf4", compress_statistics=True)

    def quantize():
        packed, absmax = quant.quantize_nf4(weight)
        return packed, quant.quantize_scales(absmax)

    def dequantize():
        return quant.dequantize_nf4(packed, quant.dequantize_scales(*scales), weight.shape, dtype)

    packed, scales = quantize()
    theirs, state = bnb.functional.quantize_4bit(weight, **options)
    race(
        "quantizing 3072 x 768, double quantization",
        {"bitsandbytes": lambda: bnb.functional.quantize_4bit(weight, **options), "ours": quantize},
        rounds,
    )
    race(
        "dequantizing it",
        {"bitsandbytes": lambda: bnb.functional.dequantize_4bit(theirs, state), "ours": dequantize},
        5 * rounds,
    )

    layer = bnb.nn.Linear4bit(n_in, n_out, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu").to(dtype).requires_grad_(False)
    dense = nn.Linear(n_in, n_out).to(dtype).requires_grad_(False)
    dense.weight.copy_(weight)
    dense.bias.copy_(layer.bias)
    ours, int8 = (nn.Linear(n_in, n_out).to(dtype).requires_grad_(False) for _ in range(2))
    for linear in (ours, int8):
        linear.weight.copy_(weight)
        linear.bias.copy_(layer.bias)
    x = torch.randn(1024, n_in, dtype=dtype).requires_grad_()
    dy = torch.randn(1024, n_out, dtype=dtype)
    layers = {
        "bitsandbytes Linear4bit": layer,
        "ours, NF4": qlora.QuantizedLinear(ours, "nf4", True),
        "ours, int8": qlora.QuantizedLinear(int8, "int8", True),
        "nn.Linear, not quantized": dense,
    }
    torch.testing.assert_close(layers["ours, NF4"](x), layer(x))  # fp32's sums may go in another order
    race(
        f"linear 3072 x 768 on 1,024 tokens, forward and backward, {dtype}",
        {name: lambda module=module: torch.autograd.grad(module(x), x, dy) for name, module in layers.items()},
        3 * rounds,
    )


class Bytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, but for `known` ones: alive now, and at the peak."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.now, self.peak = dict.fromkeys(known, 0), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key):
        self.now -= self.alive.pop(key, 0)


def memory(batch=1, length=128):
    """Item by item, the bytes of a step after the first one on GPT-2 124M in bf16, all linear layers, r = 8."""
    sizes = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    rows = {}
    for method in ("lora", "qlora nf4", "qlora int8"):
        torch.manual_seed(0)
        model = gpt.GPT(**sizes).to(torch.bfloat16)
        if method == "lora":
            lora.add_lora(model)
        else:
            qlora.add_qlora(model, quant_type=method.split()[1])
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
        ids = torch.randint(50257, (batch, length))

        def step(model=model, optimizer=optimizer, ids=ids):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        own = (*model.parameters(), *model.buffers())
        kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own}
        embeddings = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Embedding))
        adapters = sum(p.nbytes for p in trained)
        moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
        saved = {}

        def note(t, saved=saved, kept=kept):
            if t.untyped_storage()._cdata not in kept:
                saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with Bytes(kept) as counted:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                loss = model(ids, labels=ids).loss
            forward, held = counted.peak, sum(saved.values())
            loss.backward()
            optimizer.step()
        rows[method] = {
            "embeddings": embeddings,
            "linear weights, norms, biases": sum(kept.values()) - embeddings - adapters,
            "adapters": adapters,
            "Adam's moments": moments,
            "saved activations (distinct storages)": held,
            "gradients, logits and temporaries at the peak": counted.peak - held,
            "peak of the forward pass's own": forward,
            "peak of the step's own": counted.peak,
        }
        total = sum(kept.values()) + moments + counted.peak
        rows[method]["peak above the embeddings"] = total - embeddings
    print(f"\nGPT-2 124M, bf16, r = 8 on all linear layers, batch {batch} x {length}; MB")
    print(f"{'':48}" + "".join(f"{name:>14}" for name in rows))
    for item in rows["lora"]:
        print(f"{item:48}" + "".join(f"{row[item] / 1e6:14.1f}" for row in rows.values()))
    peaks = [row["peak above the embeddings"] for row in rows.values()]
    print(f"{'ratio to LoRA':48}" + "".join(f"{peak / peaks[0]:14.3f}" for peak in peaks))


if __name__ == "__main__":
    if "--memory" in sys.argv:
        memory()
    else:
        speed(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
