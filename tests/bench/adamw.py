# SPDX-License-Identifier: MIT
"""Time of an AdamW step against torch's three implementations, on GPT-2's 124,439,808 parameters and on LoRA's few.

    python tests/bench/adamw.py [rounds]

All take turns on the same parameters and gradients, so that other load on the machine hits each alike: only the ratios
mean something. Peak memory is about 8 GB.
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin stall a machine with other work

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanopeft.adamw import AdamW

d = 768
GPT2 = [(50257, d), (1024, d)]
for _ in range(12):
    GPT2 += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
GPT2 += [(d,), (d,)]
LORA = [(2, 1024)] * 48


def race(title, shapes, rounds, repeats=1):
    """Prints best and median milliseconds of a step, and their ratios to torch's fused kernel."""
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    for p, q in zip(params, narrow):
        p.grad = torch.randn_like(p).mul_(1e-3)
        q.grad = p.grad.bfloat16()
    racers = {
        "torch, fused": torch.optim.AdamW(params, fused=True),
        "ours": AdamW(params),
        "ours, compiled": AdamW(params, compile=True),
        "torch, foreach": torch.optim.AdamW(params, foreach=True),
        "torch, loop": torch.optim.AdamW(params, foreach=False),
        "ours, bf16 + master": AdamW(narrow),
        "the same, compiled": AdamW(narrow, compile=True),
    }
    times = {name: [] for name in racers}
    for turn in range(rounds + 3):
        for name, optimizer in racers.items():
            start = time.perf_counter()
            for _ in range(repeats):
                optimizer.step()
            if turn > 2:  # the first ones allocate the state and compile
                times[name].append(1e3 * (time.perf_counter() - start) / repeats)
    print(f"\n{title}: {sum(p.numel() for p in params):,} parameters in {len(params)} tensors, {rounds} rounds")
    print(f"{'':20} {'best ms':>9} {'ratio':>6} {'median ms':>10} {'ratio':>6}")
    fused = times["torch, fused"]
    for name, t in times.items():
        best, median = min(t), statistics.median(t)
        print(f"{name:20} {best:9.2f} {best / min(fused):6.2f} {median:10.2f} {median / statistics.median(fused):6.2f}")


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    race("LoRA", LORA, 10 * rounds, repeats=10)
    race("GPT-2", GPT2, rounds)
