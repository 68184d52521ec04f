# SPDX-License-Identifier: MIT
"""Every kind of parallelism, and recomputation, each beside torch's own: time, memory and bytes sent of a step.

    python tests/bench/parallel.py            GPT-2's shape, half an hour
    python tests/bench/parallel.py --quick    a small shape, a minute

A step is forward, backward and AdamW, on the same batch for all: data parallelism gives each rank its share of the
rows, a pipeline makes a micro-batch of each row. Each rank has one thread. Ours and torch's live in the same processes
and take steps in turn, so other work on the machine disturbs both.

    ms       the median step, and ratio: the median over rounds of our time over torch's
    states   MB of live tensors between backward and update, and peak: the most MB of them in a step. Both of the rank
             that has most. What gloo itself allocates is not seen
    sent     MB that a rank sends, the mean over ranks, by the loopback interface's counter: other traffic adds to it
    bubble   the share of the time in which a stage waits. The formula assumes equal stages, so the last rows are of a
             pipeline without a large head, and a core for each rank
    alive    how many micro-batches' activations each stage keeps at once, by their bytes
"""

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin stall a machine with other work

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed import pipelining
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanopeft import pipeline, tensor_parallel
from nanopeft.gpt import GPT, chunked_loss
from nanopeft.recompute import recompute
from nanopeft.trainer.measure import peak_bytes, saved_bytes, storages
from nanopeft.zero import ZeRO

SHAPES = {"nano": {}, "gpt2": dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)}
ROWS, LENGTH = 8, 128  # of a batch; a pipeline makes a micro-batch of each row
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
ALONE = ["one process"], ["recompute", "checkpoint"]
PAIRS = (
    ["ZeRO 0", "DDP"], ["ZeRO 1", "ZeroRedundancyOptimizer"], ["ZeRO 2", "FSDP2, gathered once"], ["ZeRO 3", "FSDP2"],
    ["tensor", "parallelize_module"], ["gpipe", "ScheduleGPipe"], ["1f1b", "Schedule1F1B"],
    ["gpipe, equal stages"], ["1f1b, equal stages"],
)  # fmt: skip
AdamW = functools.partial(torch.optim.AdamW, lr=1e-4, fused=True)


def racer(name, shape):
    """(model, backward(ids), step(), our Pipeline or None) of a racer."""
    torch.manual_seed(0)
    kind, world = name.split(",")[0], dist.get_world_size()
    model = called = GPT(**({**shape, "vocab_size": 256} if "equal" in name else shape))
    blocks, mesh = model.transformer.h, dist.device_mesh.init_device_mesh("cpu", (world,))
    shares_rows = kind.startswith(("ZeRO ", "DDP", "FSDP2", "ZeroRedundancy"))
    rows = slice(dist.get_rank(), None, world) if shares_rows else slice(None)

    def backward(ids):
        called(ids[rows], labels=ids[rows]).loss.backward()

    def step():
        optimizer.step()
        optimizer.zero_grad()

    if kind == "recompute":
        recompute(blocks)
    elif kind == "checkpoint":
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    elif kind == "tensor":
        tensor_parallel.shard(model)
    elif kind == "parallelize_module":
        backward = torch_tensor(model, mesh)
    elif kind.startswith("Schedule"):
        backward = torch_pipeline(model, kind)
    elif kind == "FSDP2":
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=name == "FSDP2")
    elif kind in ("DDP", "ZeroRedundancyOptimizer"):
        called = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if kind.startswith("ZeRO "):
        zero = ZeRO(model, AdamW, blocks=blocks, stage=int(kind[-1]))
        return model, lambda ids: zero.backward(model(ids[rows], labels=ids[rows]).loss / world), zero.step, None
    if kind == "ZeroRedundancyOptimizer":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4, fused=True)
    else:
        kinds = {type(p) for p in model.parameters()}  # the fused update takes no DTensors together with plain ones
        optimizer = AdamW([{"params": [p for p in model.parameters() if type(p) is t]} for t in kinds])
    if kind in ("gpipe", "1f1b"):
        pipe = pipeline.Pipeline(model, optimizer, schedule=kind)
        return model, lambda ids: pipe.backward([{"input_ids": x, "labels": x} for x in ids.split(1)]), pipe.step, pipe
    return model, backward, step, None


def torch_tensor(model, mesh):
    """GPT by parallelize_module. Attention is on H/t heads, as ours has it: in a random model any rows may be q."""
    plan = {f"transformer.h.*.{name}": ColwiseParallel() for name in ("attn.c_attn", "mlp.c_fc")}
    plan |= {f"transformer.h.*.{name}": RowwiseParallel() for name in ("attn.c_proj", "mlp.c_proj")}
    plan["transformer.wte"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, plan)
    model.tie_weights()
    for block in model.transformer.h:
        block.attn.n_head //= mesh.size()

    def backward(ids):
        with loss_parallel():
            z = model(ids[:, :-1]).logits.flatten(0, 1)
            nn.functional.cross_entropy(z, ids[:, 1:].flatten()).backward()

    return backward


def torch_pipeline(model, schedule):
    """The same stages by torch.distributed.pipelining, which leaves a tied table's gradient to its user."""
    s, p, head = dist.get_rank(), dist.get_world_size(), model.lm_head
    stages, ends = pipeline.split(model, p), dist.new_group([0, p - 1])
    for name in {"lm_head"}.union(*(stage for stage in stages if stage is not stages[s])):
        pipeline.replace(model, name, pipeline.Skip())
    model.head = head if s == p - 1 else None  # its product is in the loss
    model.forward = lambda x: GPT.forward(model, **{"inputs_embeds" if s else "input_ids": x}).logits  # (B, T, d)

    def loss(x, ids):
        return chunked_loss(head, x[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), 256)  # no row is longer

    schedule = getattr(pipelining, schedule)(pipelining.PipelineStage(model, s, p, torch.device("cpu")), ROWS, loss)

    def backward(ids):
        schedule.step(*[ids] * (s == 0), target=ids if s == p - 1 else None, return_outputs=False)
        if s in (0, p - 1):
            dist.all_reduce(head.weight.grad, group=ends)

    return backward


def live_tensors():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]


def prepare(name, shape, ids):
    """A racer, and what it holds. The second step is measured: the first makes the optimizer's state."""
    before = sum(storages(live_tensors()).values())
    model, backward, step, pipe = racer(name, shape)
    backward(ids)
    step()
    with peak_bytes(live_tensors(), torch.device("cpu")) as peak:
        backward(ids)
        grads = [p.grad for p in model.parameters()]  # Python sees them once they are asked for
        held = {"states": sum(storages(live_tensors()).values()) - before}
        del grads
        step()
    held["peak"] = peak() - before
    if pipe:
        kept = []
        hook = model.register_forward_hook(lambda *_: kept.append(count()))
        with saved_bytes([*model.parameters(), *model.buffers()]) as count:
            backward(ids)
        hook.remove()
        step()
        held["alive"] = max(kept) / kept[0]
    return (name, backward, step, pipe), held


def race(names, args):
    """{name: result} of racers that take turns."""
    batches = [torch.randint(256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(i)) for i in range(9)]
    racers, held = zip(*(prepare(name, SHAPES[args.shape], batches[0]) for name in names))
    found = {name: {"seconds": [], "sent": [], "bubble": []} for name in names}
    for turn in range(args.rounds):
        for name, backward, step, pipe in racers[:: -1 if turn % 2 else 1]:
            dist.barrier()
            sent, start = int(LOOPBACK.read_text()), time.perf_counter()
            backward(batches[turn % 9])
            step()
            dist.barrier()
            found[name]["seconds"].append(time.perf_counter() - start)
            found[name]["sent"].append((int(LOOPBACK.read_text()) - sent) / dist.get_world_size())
            if pipe and (timeline := pipe.timeline()):
                found[name]["bubble"].append(pipeline.waiting(timeline))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    for result, *ranks in zip(found.values(), *everyone):
        result |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    for ours, theirs in [found.values()] if len(found) == 2 else []:
        ours["ratio"] = statistics.median(a / b for a, b in zip(ours["seconds"], theirs["seconds"]))
    return found


def row(name, r, p):
    megabytes = " ".join(f"{x / 1e6:8.0f}" for x in (max(r["states"]), max(r["peak"]), min(r["sent"])))
    ratio = f"{r['ratio']:.3f}" if "ratio" in r else ""
    line = f"{name:24} {1e3 * statistics.median(r['seconds']):8.0f} {ratio:>7} {megabytes}"
    if r["bubble"]:
        line += f"   {statistics.median(r['bubble']):.3f}   {' '.join(f'{x:.2f}' for x in r['alive'])}"
    return line + (f"   (formula {pipeline.bubble(p, ROWS):.3f})" if "equal" in name else "")


def work(rank, folder, world, args):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
    found = {}
    for names in ALONE if world == 1 else PAIRS:
        found |= (results := race(names, args) if args.only in " ".join(names) else {})
        if rank == 0 and results:
            print("\n".join(row(name, r, world) for name, r in results.items()), flush=True)
    Path(f"{folder}/{world}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="pairs with this in their names")
    parser.add_argument("--quick", action="store_true", help="--shape nano --ranks 1 2 --rounds 2")
    parser.add_argument("--out", default="out/bench/parallel.json")
    args, found = parser.parse_args(), {}
    if args.quick:
        args.shape, args.ranks, args.rounds = "nano", [1, 2], 2
    print(f"{ROWS} x {LENGTH} tokens, {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for world in args.ranks:
            print(f"\n{f'{world} ranks, {args.shape}':24}       ms   ratio   states     peak     sent   bubble  alive")
            torch.multiprocessing.start_processes(work, (folder, world, args), nprocs=world, start_method="fork")
            found[world] = json.loads(Path(f"{folder}/{world}-0.json").read_text())
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
