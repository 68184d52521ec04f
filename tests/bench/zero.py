# SPDX-License-Identifier: MIT
"""ZeRO against torch's own: step time, peak memory and bytes on the wire, on gloo ranks, in one run.

    python tests/bench/zero.py --shape gpt2 --rounds 3

Each runs in processes of its own, in turn, one thread a rank: only the ratios mean something. Of several rounds the
medians are shown, written as JSON and drawn. GPT-2's 124M shape takes up to 2.7 GB a rank.

ms: median step. best: the shortest. cpu: the least processor time of rank 0 in a step, gloo's threads included, which
tells more where the machine has other work. peak: most resident memory during the last step, over what the process had
before the model. anonymous: the resident memory without mapped files, after it. sent: what a rank sent in the step by
the loopback interface's counter, over Ψ (N - 1)/N: 2 for stages 0 to 2, and 3 for stage 3.

glibc keeps freed memory of up to 32 MB a piece, and so a peak tells of its habits: blocks come and go in stage 3 and in
FSDP2. With --memory pieces above 1 MB go back to the system at once, for everyone, which takes time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin stall a machine with other work

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanopeft.gpt import GPT
from nanopeft.zero import ZeRO

RACERS = (
    "stage 0", "DDP", "stage 1", "stage 2", "ZeroRedundancyOptimizer", "stage 2 cpu", "stage 2 disk", "stage 3",
    "FSDP2", "stage 3 cpu",
)  # fmt: skip
SHAPES = {
    "base": {},
    "gpt2": dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
}


def resident(key):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def loopback():
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def prepare(name, model, blocks):
    """(one step on a batch, the rest of what must live) of a racer."""
    how = dict(lr=1e-3)
    if name.startswith("stage"):
        _, stage, *offload = name.split()
        how |= dict(blocks=blocks, stage=int(stage), offload=offload[0] if offload else None)
        engine = ZeRO(model, torch.optim.AdamW, **how)

        def step(parts):
            for ids in parts:
                engine.backward(model(ids, labels=ids).loss / dist.get_world_size())
            engine.step()

        return step
    if name == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        called, optimizer = model, torch.optim.AdamW(model.parameters(), **how)
    else:
        called = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        if name == "DDP":
            optimizer = torch.optim.AdamW(model.parameters(), **how)
        else:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **how)

    def step(parts):
        for ids in parts:
            called(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def race(rank, path, name, args):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(path, args.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
    before = resident("VmRSS")
    torch.manual_seed(0)
    model = GPT(**SHAPES[args.shape]).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    psi, width = sum(p.numel() for p in model.parameters()), model.lm_head.weight.itemsize
    step = prepare(name, model, model.transformer.h)
    times, work = [], []
    for i in range(args.steps + 1):  # the first makes the optimizer's state
        ids = torch.randint(
            model.config.vocab_size, (args.batch, 256), generator=torch.Generator().manual_seed(i + rank)
        )
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        wire, start, busy = loopback(), time.perf_counter(), time.process_time()
        step(ids.split(args.batch // args.micro_batches))
        work.append(time.process_time() - busy)
        dist.barrier()
        times.append(time.perf_counter() - start)
    sent = (loopback() - wire) / args.ranks
    if rank == 0:
        result = {
            "ms": 1e3 * statistics.median(times[1:]), "best": 1e3 * min(times[1:]), "cpu": 1e3 * min(work[1:]),
            "peak": resident("VmHWM") - before,
            "anonymous": resident("RssAnon"), "sent": sent / width / max(1, psi * (args.ranks - 1) / args.ranks),
        }  # fmt: skip
        Path(path + ".json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", default=",".join(RACERS))
    parser.add_argument("--micro-batches", type=int, default=1, help="forwards and backwards in a step")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="let no freed memory count")
    parser.add_argument("--out", default="out/bench/zero", help="without its suffix")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        race(int(args.worker[0]), args.worker[1], args.worker[2], args)
        return
    title = f"{args.ranks} gloo ranks, {args.shape}, {args.dtype}, batch {args.batch} x 256 each"
    if args.micro_batches > 1:
        title += f" in {args.micro_batches} micro-batches"
    print(f"{title}, {args.steps} steps, {args.rounds} rounds")
    print(f"{'':24} {'ms':>8} {'best':>8} {'cpu':>8} {'peak MB':>8} {'anon. MB':>8} {'sent':>6}", flush=True)
    found = {}
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"MALLOC_MMAP_THRESHOLD_": "1000000"} if args.memory else {})
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for name in args.only.split(","):
                path = f"{folder}/{turn}-{name.replace(' ', '-')}"
                command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
                ranks = [subprocess.Popen([*command, str(rank), path, name], env=env) for rank in range(args.ranks)]
                try:
                    codes = [process.wait(timeout=300) for process in ranks]
                finally:
                    for process in ranks:
                        process.kill()
                if any(codes):
                    print(f"{name:24} failed")
                    continue
                result = json.loads(Path(path + ".json").read_text())
                found.setdefault(name, []).append(result)
                show(name, result)
    medians = {
        name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for name, rounds in found.items()
    }
    if args.rounds > 1:
        print("medians")
        for name, result in medians.items():
            show(name, result)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"title": title, "medians": medians, "rounds": found}, indent=2))
    draw(out.with_suffix(".png"), title, medians)
    print(f"{out}.json, {out}.png")


def show(name, r):
    numbers = [r["ms"], r["best"], r["cpu"], r["peak"] / 1e6, r["anonymous"] / 1e6]
    print(f"{name:24} {' '.join(f'{x:8.0f}' for x in numbers)} {r['sent']:6.2f}", flush=True)


def draw(path, title, medians):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    colors = ["tab:blue" if name.startswith("stage") else "tab:gray" for name in medians]
    for axis, key, factor, label in ((axes[0], "ms", 1, "ms a step"), (axes[1], "peak", 1e-6, "MB at the peak")):
        bars = axis.barh(list(medians), [r[key] * factor for r in medians.values()], color=colors)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        axis.set(xlabel=label)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
