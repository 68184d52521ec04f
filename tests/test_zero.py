# SPDX-License-Identifier: MIT
"""What nanopeft/zero.py claims, on real processes that talk over loopback, held against one process on the whole batch.

Four processes are started once and take jobs from the tests: functions of this file, named in `job`. A job on fewer
ranks leaves the others idle. Every wait has an end: a job that hangs fails its test, and takes the processes with it.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanopeft import gpt, lora, zero
from nanopeft.adamw import AdamW
from nanopeft.trainer import engine
from nanopeft.trainer.bases import load_gpt, save_gpt
from nanopeft.zero import Error, ZeRO, zero_bytes, zero_traffic

STAGES = (0, 1, 2, 3)
KINDS = ("full", "lora", "top")  # what is trained
SHAPE = dict(vocab_size=53, n_positions=9, n_embd=12, n_layer=3, n_head=3)  # divides by nothing much
LIMIT = 60  # seconds for a job
thorough = pytest.mark.thorough

# ------------------------------------------------------------------------------------------------ jobs, in the workers


def model_of(kind, dtype=torch.float64, seed=0):
    """A small model, the same for the same seed; with "lora" or "top" most of it is frozen."""
    torch.manual_seed(seed)
    model = gpt.GPT(**SHAPE).to(dtype)
    if kind == "lora":
        lora.add_lora(model, r=3)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    if kind == "top":  # the last block and the norm after it
        for name, p in model.named_parameters():
            p.requires_grad_("h.2." in name or "ln_f" in name)
    return model


def blocks_of(model):
    return getattr(model, "blocks", None) or model.transformer.h


def batches_of(step, n_batches, rows=4, seed=0):
    """[(ids, labels)]: another number of labelled tokens in each row."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    out = []
    for _ in range(n_batches):
        ids = torch.randint(SHAPE["vocab_size"], (rows, SHAPE["n_positions"]), generator=generator)
        labels = ids.clone()
        for row, count in enumerate(torch.randint(2, SHAPE["n_positions"], (rows,), generator=generator)):
            labels[row, count:] = -100
        out.append((ids, labels))
    return out


def count(labels):
    return (labels[:, 1:] != -100).sum().item()


def groups_of(model):
    matrices, vectors = (
        [p for p in model.parameters() if p.requires_grad and (p.dim() > 1) == x] for x in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 0.02}]
    return [group for group in groups if group["params"]]


OPTIMIZERS = {
    "AdamW": (AdamW, dict(lr=0.01, eps=1e-4)),
    "torch AdamW": (torch.optim.AdamW, dict(lr=0.01, eps=1e-4)),
    "SGD": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "NAdam": (torch.optim.NAdam, dict(lr=0.01, eps=1e-4)),
    "RMSprop": (torch.optim.RMSprop, dict(lr=0.01, eps=1e-4)),
}


def micro_step(model, engine, step, micro, rows, rank=0, world=1):
    """Forward and backward of a rank's rows of each micro-batch; what train.py does."""
    batches = batches_of(step, micro, rows)
    mine = [(ids[rank::world], labels[rank::world]) for ids, labels in batches]
    total = zero.all_sum(sum(count(labels) for _, labels in mine))
    assert total == sum(count(labels) for _, labels in batches)
    for ids, labels in mine:
        loss = model(ids, labels=labels).loss * (count(labels) / total)
        engine.backward(loss)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(kind, stage, *, dtype="float64", steps=20, micro=1, clip=None, optimizer="AdamW", offload=None, rows=4,
          seed=0, start=None):  # fmt: skip
    """Trains on this job's ranks; the parameters after it, and the norms."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # Every rank but the first starts from other numbers: rank 0's must be taken
    model = model_of(kind, getattr(torch, dtype), seed + 100 * rank)
    cls, settings = OPTIMIZERS[optimizer]
    engine = ZeRO(model, cls, groups_of(model), blocks=blocks_of(model), stage=stage, offload=offload, **settings)
    norms = []
    for step in range(steps):
        micro_step(model, engine, step, micro, rows, rank, world)
        norms.append(engine.step(clip))
    with engine.whole():
        return trained(model), norms


def train_all(kind, stages=STAGES, **how):
    return [train(kind, stage, **how) for stage in stages]


def alone(kind, *, dtype="float64", steps=20, micro=1, clip=None, optimizer="AdamW", rows=4, seed=0):
    """The same in one process, on the whole batch, with torch's own clipping."""
    model = model_of(kind, getattr(torch, dtype), seed)
    cls, settings = OPTIMIZERS[optimizer]
    single, norms = cls(groups_of(model), **settings), []
    for step in range(steps):
        batches = batches_of(step, micro, rows)
        total = sum(count(labels) for _, labels in batches)
        for ids, labels in batches:
            (model(ids, labels=labels).loss * (count(labels) / total)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip).item())
        single.step()
        single.zero_grad()
    return trained(model), norms


class Odd(nn.Module):
    """Blocks of parameters of any shapes; one is never used, and one block recomputes its forward in backward."""

    def __init__(self, shapes, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(len(shapes))
        draw = lambda s: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))  # noqa: E731
        self.first, self.unused = nn.ParameterList([draw((3,))]), draw((2,))
        self.blocks = nn.ModuleList(OddBlock([draw(s) for s in group]) for group in shapes)

    def forward(self, x):
        x = x * self.first[0].sum()  # (B,)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if i == 1 else block(x)
        return (x + self.first[0].prod()).square()


class OddBlock(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, x):
        for i, p in enumerate(self.params):
            x = x + 0.1 * (p * torch.arange(1, p.numel() + 1, dtype=p.dtype).view(p.shape).cos()).sum() * x.sin() / (
                i + 1
            )
        return x


def train_odd(shapes, stage, rank=0, world=1, steps=3):
    model, x = Odd(shapes), torch.linspace(-1, 2, 13, dtype=torch.float64)
    if stage is None:
        single = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-3)
        for _ in range(steps):
            model.unused.grad = torch.zeros_like(model.unused)  # a shard cannot tell: it decays
            model(x).mean().backward()
            single.step()
            single.zero_grad()
        return trained(model)
    engine = ZeRO(model, torch.optim.AdamW, blocks=blocks_of(model), stage=stage, lr=0.1, eps=1e-3)
    for _ in range(steps):
        engine.backward(model(x[rank::world]).sum() / len(x))
        engine.step()
    for flat in engine.trained:  # padding stays zero
        with engine.whole():
            assert not flat.full[sum(shape.numel() for shape in flat.shapes) :].any()
    with engine.whole():
        return trained(model)


def odd(shapes):
    return [train_odd(shapes, stage, dist.get_rank(), dist.get_world_size()) for stage in STAGES]


def alive():
    """Bytes of the memory of all tensors that Python knows of."""
    readings = []
    for _ in range(4):
        time.sleep(0.02)  # gloo's thread lets go of what it has sent a moment after it is there
        gc.collect()
        found = {}
        for x in gc.get_objects():
            if type(x) in (torch.Tensor, nn.Parameter):
                for t in (x, x.grad if x.is_leaf else None):
                    if t is not None:
                        found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        readings.append(sum(found.values()))
    return min(readings)


def everything(job, kinds, *arguments):
    return {(kind, stage): globals()[job](kind, stage, *arguments) for kind in kinds for stage in STAGES}


def measure(kind, stage, dtype, offload):
    """Bytes kept at the end of backward, all tensors counted; sizes and widths of what is sharded; trained elements."""
    rank, world = dist.get_rank(), dist.get_world_size()
    before = alive()
    model = model_of(kind, getattr(torch, dtype))
    engine = ZeRO(model, AdamW, groups_of(model), blocks=blocks_of(model), stage=stage, offload=offload, lr=0.01)
    micro_step(model, engine, 0, 1, 4, rank, world)
    engine.step()
    micro_step(model, engine, 1, 1, 4, rank, world)
    kept = alive() - before
    sizes = {"trained": [], "frozen": []}
    for flat in engine.flat_params:
        n = sum(shape.numel() for shape in flat.shapes)
        assert 0 <= flat.world * flat.size - n < world  # less than one element of padding on each rank
        sizes["trained" if flat in engine.trained else "frozen"].append((flat.world * flat.size, flat.full.itemsize))
    if stage < 3:
        sizes["frozen"] = [(p.numel(), p.itemsize) for p in model.parameters() if not p.requires_grad]
    return kept, sizes, sum(p.numel() for p in model_of(kind).parameters() if p.requires_grad)


@contextlib.contextmanager
def counted():
    """{collective: elements that this rank sends}, numbers that go alone aside: they are norms and token counts."""
    sent = {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}
    real = dist.all_reduce, dist.all_to_all_single, dist.isend
    world = dist.get_world_size()

    def all_reduce(x, **how):
        sent["all_reduce"] += 2 * x.numel() * (world - 1) // world if x.dim() else 0
        return real[0](x, **how)

    def all_to_all_single(out, x, **how):
        sent["reduce_scatter"] += x.numel() * (world - 1) // world
        return real[1](out, x, **how)

    def isend(x, to):
        sent["all_gather"] += x.numel()
        return real[2](x, to)

    def refuse(*_, **__):
        raise AssertionError("a collective that is not counted")

    names = dict(all_reduce=all_reduce, all_to_all_single=all_to_all_single, isend=isend)
    others = (
        "broadcast reduce gather scatter all_to_all all_gather all_gather_into_tensor reduce_scatter "
        "reduce_scatter_tensor send"
    )
    with mock.patch.multiple(dist, **names, **dict.fromkeys(others.split(), refuse)):
        yield sent


def traffic(kind, stage, micro):
    model = model_of(kind)
    engine = ZeRO(model, AdamW, groups_of(model), blocks=blocks_of(model), stage=stage, lr=0.01)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(2):
        with counted() as sent:
            micro_step(model, engine, step, micro, 4, rank, world)
            engine.step(1.0)
    sizes = [0, 0]
    for flat in engine.flat_params:
        sizes[flat in engine.trained] += world * flat.size
    return sent, sizes, sum(p.numel() for p in model_of(kind).parameters() if p.requires_grad), len(engine.flat_params)


class Watch(TorchDispatchMode):
    """The most gradient bytes alive at any operation, above the shards: parameters' and all that the engine makes."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.inside, self.buffers, self.peak, self.early = engine, 0, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.inside and isinstance(out, torch.Tensor):
            self.buffers.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
            self.addresses = getattr(self, "addresses", {})
            self.addresses[self.buffers[-1].cdata] = out.untyped_storage().nbytes()
        self.buffers = [ref for ref in self.buffers if not ref.expired()]
        live = {ref.cdata: self.addresses[ref.cdata] for ref in self.buffers}
        for flat in self.engine.trained:
            for p in flat.params:
                if p.grad is not None:
                    live[p.grad.untyped_storage()._cdata] = p.grad.untyped_storage().nbytes()
        for flat in self.engine.trained:
            if flat.grad is not None:
                live.pop(flat.grad.untyped_storage()._cdata, None)
        self.peak = max(self.peak, sum(live.values()))
        return out


def live_gradients(stage, vocabulary):
    """Peak of gradient bytes in backward above the shards; bytes of a shard and a bucket, the largest; overlap seen."""
    model = gpt.GPT(**{**SHAPE, "vocab_size": vocabulary})
    zero.BUCKET, bucket = 500, zero.BUCKET
    engine = ZeRO(model, AdamW, groups_of(model), blocks=blocks_of(model), stage=stage, lr=0.01)
    zero.BUCKET = bucket
    watch, overlap = Watch(engine), []
    for name in ("grad_ready", "reduce_scatter", "wait_and_accumulate"):
        real = getattr(engine, name)

        def wrapped(*args, real=real):
            watch.inside += 1
            real(*args)
            watch.inside -= 1
            overlap.append((len(engine.queue), engine.in_flight is not None))

        setattr(engine, name, wrapped)
    ids, _ = batches_of(0, 1)[0]
    with watch:
        engine.backward(model(ids, labels=ids).loss)
    shards = max(flat.grad.nbytes for flat in engine.trained)
    return watch.peak, shards, max(flat.full.nbytes for flat in engine.trained), overlap, len(engine.trained)


def blocks_held():
    """Stage 3: at the start of each block's forward and backward, the units that are unsharded or in flight."""
    model = model_of("full")
    engine = ZeRO(model, AdamW, blocks=blocks_of(model), stage=3, lr=0.01)
    held, there = [], lambda: sorted({f.unit for f in engine.flat_params if f.is_unsharded or f.in_flight is not None})

    def look(*_):
        held.append(there())

    def look_again(module, args, output):
        if output.requires_grad:
            output.grad_fn.register_hook(look)  # when the last operation of the block has had its backward

    for block in model.transformer.h:
        block.register_forward_pre_hook(look)
        block.register_forward_hook(look_again)
    ids, _ = batches_of(0, 1)[0]
    between = [p.numel() for p in model.parameters()]
    loss = model(ids, labels=ids).loss
    at_loss = there()
    engine.backward(loss)
    with torch.no_grad():
        model(ids)
    flat = engine.units[1][0]
    flat.unshard()
    before = [p.numel() for p in flat.params]
    flat.wait()
    after = [p.shape for p in flat.params] == flat.shapes
    flat.reshard()
    return held, at_loss, between, there(), before, after


def overflow(stages):
    """fp16 with the loss scaled by hand: in the second step a gradient of the last rank overflows, in one shard."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for stage in stages:
        model = model_of("full", torch.float16)
        engine = ZeRO(model, AdamW, blocks=blocks_of(model), stage=stage, lr=0.01)
        (ids, labels), seen, element = batches_of(0, 1)[0], [], torch.zeros(SHAPE["vocab_size"], SHAPE["n_embd"])
        model.lm_head.weight.register_hook(lambda g, e=element: g + e.to(g.dtype))
        for step, scale in enumerate((2.0**10, 2.0**9, 2.0**9)):
            element[0, 0] = math.inf if step == 1 and rank == world - 1 else 0.0
            with engine.whole():
                before = trained(model)
            steps = [state["step"] for state in engine.optimizer.state.values()]
            engine.backward(model(ids[rank::world], labels=labels[rank::world]).loss / world * scale)
            norm = engine.step(1.0, loss_scale=scale)
            with engine.whole():
                moved = any(not torch.equal(before[name], p) for name, p in model.named_parameters())
            counted = steps != [state["step"] for state in engine.optimizer.state.values()]
            seen.append((norm, moved, counted))
        results.append(seen)
    return results


def scaled(stage, scale):
    """fp32: norms and parameters with a scaled loss; powers of two round nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of("full", torch.float32)
    engine, norms = ZeRO(model, AdamW, blocks=blocks_of(model), stage=stage, lr=0.01), []
    for step in range(2):
        ids, labels = batches_of(step, 1)[0]
        engine.backward(model(ids[rank::world], labels=labels[rank::world]).loss / world * scale)
        norms.append(engine.step(0.5, loss_scale=scale))
    with engine.whole():
        return trained(model), norms


def narrow(stage, dtype, offload=None):
    """16 bits: parameters are the masters rounded, and steps too small for 16 bits add up in the masters."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of("full", getattr(torch, dtype))
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    engine = ZeRO(model, AdamW, blocks=blocks_of(model), stage=stage, offload=offload, lr=1e-6, weight_decay=0.0)
    for step in range(30):
        micro_step(model, engine, step % 2, 1, 4, rank, world)
        engine.step()
    state = engine.state_dict()
    with engine.whole():
        equal = (
            all(torch.equal(p, state[name]["master"].to(p.dtype)) for name, p in model.named_parameters())
            if state
            else True
        )
    moved = max((state[name]["master"] - x).abs().max().item() for name, x in before.items()) if state else 0
    return equal, moved


def interrupted(kind, first, second, dtype="float64", steps=3, path=None, load=False):
    """The first or the second half of a run, with a checkpoint between."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stage, offload = second if load else first
    model = model_of(kind, getattr(torch, dtype))
    engine = ZeRO(
        model,
        torch.optim.AdamW,
        groups_of(model),
        blocks=blocks_of(model),
        stage=stage,
        offload=offload,
        lr=0.01,
        eps=1e-4,
    )
    if load:
        engine.load_state_dict(torch.load(path, weights_only=True))
    for step in range(steps * load, steps * (load + 1)):
        micro_step(model, engine, step, 1, 4, rank, world)
        engine.step(1.0)
    state = engine.state_dict()
    if rank == 0 and not load:
        torch.save(state, path)
    with engine.whole():
        return trained(model), state


def fresh(optimizer, stage):
    """Parameters after a step: of a run, and of another that has stepped and loads the first one's start."""
    rank, world, results = dist.get_rank(), dist.get_world_size(), []
    cls, settings = OPTIMIZERS[optimizer]
    first, second = (model_of("full", torch.bfloat16, seed) for seed in (0, 1))
    one, other = (ZeRO(x, cls, groups_of(x), blocks=blocks_of(x), stage=stage, **settings) for x in (first, second))
    micro_step(second, other, 1, 1, 4, rank, world)
    other.step()
    state = [one.state_dict()]
    dist.broadcast_object_list(state)
    other.load_state_dict(state[0])
    for model, own in ((first, one), (second, other)):
        micro_step(model, own, 0, 1, 4, rank, world)
        own.step()
        with own.whole():
            results.append(trained(model))
    return results


def saved(kind, stage, folder):
    """The trained model or adapter in its own format, written by rank 0."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of(kind, torch.float32)
    engine = ZeRO(model, AdamW, groups_of(model), blocks=blocks_of(model), stage=stage, lr=0.01)
    micro_step(model, engine, 0, 1, 4, rank, world)
    engine.step()
    with engine.whole():
        out = model(batches_of(0, 1)[0][0]).logits.detach()  # with as many passes as it likes, without the others
        if rank == 0 and kind == "full":
            save_gpt(model, folder)
        if rank == 0 and kind == "lora":
            torch.save(lora.lora_state_dict(model), f"{folder}/adapter.pt")
    return out


def plain_head(stage):
    """With logits, a loss outside the model, two passes before one backward, and evaluation between."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of("full")
    engine = ZeRO(model, AdamW, blocks=blocks_of(model), stage=stage, lr=0.01, eps=1e-4)
    for step in range(3):
        loss = 0.0
        for ids, _ in batches_of(step, 2):
            logits = model(ids[rank::world]).logits
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), ids[rank::world].flatten(), reduction="sum")
            with torch.no_grad():
                model(ids)
        engine.backward(loss / 50)
        engine.step()
    with engine.whole():
        return trained(model)


def anonymous(offload):
    """RssAnon after a step in bf16, over what it was before the optimizer's state."""
    model = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(8))).bfloat16()
    engine = ZeRO(model, AdamW, blocks=model, stage=2, offload=offload, lr=0.01)
    for _ in range(2):
        engine.backward(model(torch.ones(1, 1000, dtype=torch.bfloat16)).sum())
        engine.step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is only kept for later
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024, sum(flat.size for flat in engine.flat_params)


def wrong(what):
    model = model_of("full")
    if what == "params":
        ZeRO(model, AdamW, list(model.parameters())[1:], blocks=blocks_of(model), stage=1)
    if what == "frozen":
        ZeRO(model.requires_grad_(False), AdamW, blocks=blocks_of(model), stage=1)
    engine = ZeRO(model, AdamW, blocks=blocks_of(model), stage=2)
    state = engine.state_dict() or {name: {"master": p.data} for name, p in model.named_parameters()}
    if what == "left over":
        state["another"] = state["lm_head.weight" if "lm_head.weight" in state else "transformer.wte.weight"]
    if what == "shape":
        state["transformer.wte.weight"] = {"master": torch.zeros(3, 3)}
    engine.load_state_dict(state)


class Late(nn.Module):
    """A head that reads the embedding's weight without calling the embedding, and ranks that arrive late."""

    def __init__(self):
        super().__init__()
        self.wte, self.blocks = nn.Embedding(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, ids):
        x = self.wte(ids)
        for i, block in enumerate(self.blocks):
            if i == 2:
                time.sleep(0.1 * dist.get_rank())
            x = torch.tanh(block(x))
        return nn.functional.linear(x, self.wte.weight).logsumexp(-1).mean()


def late(stage):
    """Losses: of two forwards without gradients, two steps, and a forward that is looked at but not learned from."""
    torch.manual_seed(0)
    model, ids, losses = Late().double(), torch.arange(8), []
    engine = ZeRO(model, torch.optim.SGD, blocks=model.blocks, stage=stage, lr=1.0)
    for _ in range(2):
        with torch.no_grad():
            losses.append(model(ids).item())
        engine.backward(model(ids) / dist.get_world_size())
        model(ids)  # with gradients, and no backward follows
        losses.append(engine.step())
    return [*losses, model(ids).item()]


def visits(stage):
    """The bias after each step, of a layer that gets its gradient in two visits of one backward."""
    model = nn.Sequential(nn.Linear(4, 4)).double()
    nn.init.zeros_(model[0].bias)
    engine = ZeRO(model, torch.optim.SGD, blocks=model, stage=stage, lr=1.0)
    x, biases = torch.ones(1, 4, dtype=torch.float64, requires_grad=True), []
    for _ in range(3):
        loss = sum(checkpoint(model[0], k * x, use_reentrant=True).sum() for k in (1, 2))
        engine.backward(loss / dist.get_world_size())
        engine.step()
        with engine.whole():
            biases.append(-model[0].bias[0].item())
    return biases


class Gap(nn.Module):
    """A block with a vector before its linear that only some ranks use, so the others have no gradient for it."""

    def __init__(self, used):
        super().__init__()
        self.vector, self.linear, self.used = nn.Parameter(torch.ones(5)), nn.Linear(5, 5), used

    def forward(self, x):
        return torch.tanh(self.linear(x * self.vector if self.used else x))


def gaps(users):
    """The parameters after three steps of each stage, where the ranks in `users` alone use the vectors."""
    rank, world, before, results = dist.get_rank(), dist.get_world_size(), None, []
    x = torch.linspace(-1, 2, 30, dtype=torch.float64).view(6, 5)
    for stage in STAGES:
        torch.manual_seed(0)
        model = nn.Sequential(*(Gap(rank in users) for _ in range(3))).double()
        engine = ZeRO(model, torch.optim.SGD, blocks=model, stage=stage, lr=0.5)
        before = before or trained(model)
        for _ in range(3):
            engine.backward(model(x[rank::world]).square().sum() / len(x))
            engine.step()
        with engine.whole():
            results.append(trained(model))
    return before, results


def long_norm(n, dtype):
    """The norm that step() returns of a drawn gradient of n elements, and what it is in fp64."""
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros_like(grad))
    engine = ZeRO(model, torch.optim.SGD, blocks=[], stage=1, lr=1.0)
    engine.backward((model.weight * grad).sum())
    return engine.step(), sum(piece.double().square().sum() for piece in grad.split(1 << 20)).sqrt().item()


@torch.no_grad()
def write(model, how):
    """Writes drawn numbers into the parameters in one of the ways in which people do it."""
    generator = torch.Generator().manual_seed(5)
    new = {name: torch.randn(p.shape, generator=generator).to(p) * 0.1 for name, p in model.named_parameters()}
    if how == "load_state_dict":
        model.load_state_dict(new, strict=False)  # without the tied head
    if how == "to and back":  # the numbers lie in other memory in between
        model.load_state_dict(new, strict=False)
        model.double()
    for name, p in model.named_parameters():
        if how == "copy_":
            p.copy_(new[name])
        if how == "one element" and "h.1" in name:
            p.view(-1)[1] = new[name].view(-1)[1]
        if how == ".data =":
            p.data = new[name]
        if how == "transposed" and p.dim() == 2 and p.shape[0] == p.shape[1]:
            p.data = p.data.t()
    if how == "merge_lora":
        lora.merge_lora(model)


def written(kind, stage, how, *, dtype="float64", offload=None, writers=(0, 1, 2, 3), steps=2):
    """Parameters after two steps, a write, and more steps; the optimizer's state before and after the write."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of(kind, getattr(torch, dtype))
    cls, settings = OPTIMIZERS["AdamW"]
    own = ZeRO(model, cls, groups_of(model), blocks=blocks_of(model), stage=stage, offload=offload, **settings)
    for step in range(2):
        micro_step(model, own, step, 1, 4, rank, world)
        own.step()
    before = own.state_dict()
    with own.whole():
        old = trained(model)
        if rank in writers:
            write(model, how)
    after = own.state_dict()
    with own.whole():
        new, dtypes = trained(model), {p.dtype for p in model.parameters()}
    for step in range(2, 2 + steps):
        micro_step(model, own, step, 1, 4, rank, world)
        own.step()
    with own.whole():
        return old, new, dtypes, before, after, trained(model)


def written_alone(kind, how):
    model = model_of(kind)
    cls, settings = OPTIMIZERS["AdamW"]
    single = cls(groups_of(model), **settings)
    for step in range(4):
        ids, labels = batches_of(step, 1)[0]
        model(ids, labels=labels).loss.backward()
        single.step()
        single.zero_grad()
        if step == 1:
            write(model, how)
            model.to(torch.float64)
    return trained(model)


def misused(what, stage, dtype="float32"):
    """What people do with parameters that whole() or the next step must refuse; the error of each rank."""
    model = model_of("full", getattr(torch, dtype))
    own = ZeRO(model, AdamW, blocks=blocks_of(model), stage=stage, lr=0.01)
    new = {name: torch.ones(shape, dtype=p.dtype) for (name, p), shape in
           zip(model.named_parameters(), [p.shape for p in model_of("full").parameters()])}  # fmt: skip
    new |= {"lm_head.weight": new["transformer.wte.weight"]}
    micro_step(model, own, 0, 1, 4, dist.get_rank(), dist.get_world_size())
    try:
        if what == "load outside":
            model.load_state_dict(new)
        if what == "save outside":
            model.transformer.state_dict()
        with own.whole() if "outside" not in what else contextlib.nullcontext():
            if what == "assign":
                model.load_state_dict(new, assign=True)
            if what == "untie":
                model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
            if what == "shape":
                model.transformer.ln_f.bias.data = torch.ones(1)
        own.step()
    except Error as error:
        return str(error)


def failed_inside():
    """Stage 3: what comes out of a whole() that fails inside, and whether all is sharded again."""
    model = model_of("full")
    own = ZeRO(model, AdamW, blocks=blocks_of(model), stage=3, lr=0.01)
    try:
        with own.whole():
            model.transformer.ln_f.bias = nn.Parameter(model.transformer.ln_f.bias.detach().clone())
            raise OSError("the disk is full")
    except Exception as error:
        return repr(error), any(flat.is_unsharded or flat.n_whole for flat in own.flat_params)


def nested():
    """Stage 3: parameters after a step inside whole() inside whole(), and after one outside; then one more step."""
    rank, world, results = dist.get_rank(), dist.get_world_size(), []
    for inside in (False, True):
        model = model_of("full", torch.bfloat16)
        own = ZeRO(model, AdamW, blocks=blocks_of(model), stage=3, lr=0.01)
        for step in range(2):
            with own.whole() if inside else contextlib.nullcontext():
                with own.whole() if inside else contextlib.nullcontext():
                    with torch.inference_mode():
                        model(batches_of(0, 1)[0][0])
                micro_step(model, own, step, 1, 4, rank, world)
                own.step()
        with own.whole():
            results.append(trained(model))
    return results


@dataclasses.dataclass
class Answer:
    hidden: torch.Tensor


class Returns(nn.Module):
    """A block that gives its result back as people's blocks do."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(6, 6), how

    def forward(self, x, notes):
        x = self.linear(torch.tanh(x))
        if self.how == "view":
            return x.view(-1, 2, 3)
        if self.how == "None":
            notes["x"] = x
            return None
        if self.how == "in place":
            notes["in place"].add_(x)
            return None
        if self.how == "checkpoint inside":  # only a part of the block, whose parameter no module reads
            return checkpoint(lambda y: nn.functional.linear(y, self.linear.weight).sin(), x, use_reentrant=False)
        if self.how == "checkpoint inside, reentrant":
            return checkpoint(lambda y: nn.functional.linear(y, self.linear.weight).sin(), x, use_reentrant=True)
        return {"dict": {"x": x}, "list": [x], "dataclass": Answer(x), "nested": [{"x": (None, x)}]}[self.how]


class Chain(nn.Module):
    """Blocks whose results are taken apart, and changed in place where they can be."""

    def __init__(self, how):
        super().__init__()
        self.blocks, self.how = nn.ModuleList(Returns(how) for _ in range(3)), how
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        for block in self.blocks:
            notes = {"in place": x.clone()}
            y = block(x, notes)
            if self.how == "view":
                y += 1  # a residual
                y = y.view(-1, 6)
            if self.how in ("None", "in place"):
                y = notes["x" if self.how == "None" else "in place"]
            while not isinstance(y, torch.Tensor):
                y = y.hidden if isinstance(y, Answer) else y["x"] if isinstance(y, dict) else y[-1]
            x = y
        return self.head(x).square()


def chained(how, stage):
    torch.manual_seed(0)
    model, x = Chain(how).double(), torch.linspace(-1, 2, 24, dtype=torch.float64).view(4, 6)
    if stage is None:
        single = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            model(x).sum().div(24).backward()
            single.step()
            single.zero_grad()
        return trained(model)
    own = ZeRO(model, torch.optim.SGD, blocks=model.blocks, stage=stage, lr=0.5)
    for _ in range(3):
        model(x)  # a loss that is looked at
        own.backward(model(x[dist.get_rank() :: dist.get_world_size()]).sum() / 24)
        own.step()
    with own.whole():
        return trained(model)


class Long(nn.Module):
    """One long parameter, whose gradient is what it is multiplied with."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, grad):
        return (self.weight * grad).sum()


def long_norm_of(kind, n):
    """The trainer's own engines: the norm of a drawn gradient of n elements, what it is in fp64, and what SGD with a
    norm clipped to 1 moves by."""
    model, grad = Long(n), torch.randn(n, generator=torch.Generator().manual_seed(0))
    params = {"weight": model.weight}
    if kind == "OneProcess":
        own = engine.OneProcess(model, params, AdamW(params.values(), lr=0.01))
    else:
        args = Namespace(weight_decay=0.0, lora_plus=None)
        own = engine.FSDP(model, [], torch.float32, args, None, lr=0.01, betas=(0.9, 0.999))
    own.backward(model(grad) / dist.get_world_size())
    norm = own.step(1.0, 1.0)
    found = [own.state_dict()]
    dist.broadcast_object_list(found) if dist.is_initialized() else None  # it is on rank 0
    m = found[0]["weight"]["m"].flatten()  # 0.1 · clipped gradient
    return norm, sum(x.double().square().sum() for x in grad.split(1 << 20)).sqrt().item(), grad, m


def by_habit(stage):
    """The errors of what works without an engine."""
    model, x, errors = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(1, 4), []
    engine = ZeRO(model, torch.optim.SGD, blocks=model, stage=stage, lr=1.0)
    for backward in (lambda: None, lambda: engine.backward(model(x).sum()), lambda: model(x).sum().backward()):
        try:
            backward()
            engine.step()
            errors.append(None)
            engine.step()  # a second time
        except Error as error:
            errors.append(str(error))
    return errors


def raised(stage, fails):
    """Parameters after two steps; with `fails` a backward before each raises an error before its first gradient."""
    model, rank, world = model_of("full"), dist.get_rank(), dist.get_world_size()
    engine = ZeRO(model, torch.optim.SGD, blocks=blocks_of(model), stage=stage, lr=1.0)
    for step in range(2):
        if fails:
            logits = model(batches_of(step, 1)[0][0]).logits
            logits.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.backward(logits.sum())
            with torch.no_grad():
                model(batches_of(step, 1)[0][0])
            assert stage < 3 or not any(flat.is_unsharded for flat in engine.flat_params)
        micro_step(model, engine, step, 1, 4, rank, world)
        engine.step()
    with engine.whole():
        return trained(model)


def fail(how):
    """Rank 1 fails while the others wait for it in a collective."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else 1 / 0
    return zero.all_sum(1)


def die():
    """Under torchrun: rank 1 is killed in the middle of the third step."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    model = model_of("full")
    engine = ZeRO(model, AdamW, blocks=blocks_of(model), stage=3, lr=0.01)
    for step in range(10_000):
        if dist.get_rank() == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        micro_step(model, engine, step, 1, 4, dist.get_rank(), dist.get_world_size())
        engine.step()


# ---------------------------------------------------------------------------------------------------------- processes


def serve(sockets, jobs):
    """Forks a worker for each socket: reads (job, arguments, settings, rank, world, store), answers (error, result).
    jobs: the functions by name."""
    faulthandler.enable()
    torch.set_num_threads(1)
    zero.BUCKET = 1000  # so that a block of the small model makes more than one flat
    gc.freeze()  # what is there now needs no look at later
    mine = next((fd for fd in sockets[1:] if os.fork() == 0), sockets[0])
    for fd in set(sockets) - {mine}:  # or the socket of a worker that dies stays open in the others
        os.close(fd)
    file = socket.socket(fileno=mine).makefile("rwb")
    while True:
        try:
            name, arguments, settings, rank, world, path = pickle.load(file)
        except EOFError:
            return
        store = dist.FileStore(path, world)  # a worker that cannot join ends: its names for groups are out of step now
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        try:
            answer = None, jobs[name](*arguments, **settings)
        except Exception:
            answer = f"rank {rank}: {traceback.format_exc()}", None
        if dist.is_initialized():
            dist.destroy_process_group()
        pickle.dump(answer, file)
        file.flush()


class Ranks:
    """Four workers; `job(world, name, ...)` gives the result of each rank of a function in `file`."""

    patience = 3  # seconds that the others get when one has failed: they mostly wait for it

    def __init__(self, file):
        self.file, self.server, self.folder = file, None, tempfile.TemporaryDirectory()

    def start(self):
        self.sockets, theirs = zip(*(socket.socketpair() for _ in range(4)))
        self.files = [own.makefile("rwb") for own in self.sockets]
        fds = [other.fileno() for other in theirs]
        self.server = subprocess.Popen(
            [sys.executable, self.file, "serve", *map(str, fds)], pass_fds=fds, start_new_session=True,
            # The barrier: a rank that fails at once must not leave while another still connects to it
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DIST_INIT_BARRIER": "1"},
        )  # fmt: skip
        for other in theirs:
            other.close()

    def stop(self):
        if self.server:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            self.server = None

    def job(self, world, name, *arguments, **settings):
        if not self.server:
            self.start()
        path = tempfile.mktemp(dir=self.folder.name)
        for rank, file in enumerate(self.files[:world]):
            pickle.dump((name, arguments, settings, rank, world, path), file)
            file.flush()
        deadline, answers, files = time.monotonic() + LIMIT, {}, dict(zip(self.sockets[:world], self.files))
        while len(answers) < world:
            ready, _, _ = select.select([*files], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                break
            for own in ready:
                try:
                    answers[self.sockets.index(own)] = pickle.load(files.pop(own))
                except (EOFError, ConnectionError, pickle.UnpicklingError):
                    answers[self.sockets.index(own)] = f"rank {self.sockets.index(own)} died", None
            if any(error for error, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + self.patience)
        errors = [error for error, _ in answers.values() if error]
        if len(answers) < world or any(error.endswith(" died") for error in errors):
            self.stop()
            errors = errors or [f"{name} on {world} ranks did not end in {LIMIT} s"]
        if errors:
            raise RuntimeError("\n".join(errors))
        return [answers[rank][1] for rank in range(world)]


def worker_pool(file, patience=Ranks.patience):
    """The fixture `ranks` of a file of tests."""

    @pytest.fixture(scope="module")
    def ranks():
        pool = Ranks(file)
        pool.patience = patience
        yield pool
        pool.stop()
        pool.folder.cleanup()

    return ranks


ranks = worker_pool(__file__)


# ------------------------------------------------------------------------------------------------------------ formulas


def test_7b_on_8():
    """7B parameters on 8 ranks take 112, 38.5, 26.25 and 14 GB, and 7.5B on 64 the paper's 120, 31.4, 16.6 and 1.9."""
    assert [sum(zero_bytes(7 * 10**9, 8, s).values()) for s in STAGES] == [112e9, 38.5e9, 26.25e9, 14e9]
    paper = [sum(zero_bytes(75 * 10**8, 64, s).values()) / 1e9 for s in STAGES]
    assert [round(x, 1) for x in paper] == [120, 31.4, 16.6, 1.9]


def test_limits_and_items():
    """For N without end 16, 4, 2 and 0 bytes a parameter remain; offload takes the optimizer's off the device."""
    n = 10**9
    assert [round(sum(zero_bytes(n, 10**9, s).values()) / n, 6) for s in STAGES] == [16, 4, 2, 0]
    assert zero_bytes(n, 8, 2, offload="cpu") == {
        "parameters": 2 * n, "gradients": 2 * n // 8, "optimizer": 0, "offloaded": 12 * n // 8
    }  # fmt: skip
    fp32 = zero_bytes(n, 4, 1, param_bytes=4, grad_bytes=4, k=8)
    assert fp32 == {"parameters": 4 * n, "gradients": 4 * n, "optimizer": 2 * n, "offloaded": 0}
    assert sum(zero_bytes(n, 4, 3, grad_bytes=0, k=0).values()) == 2 * n // 4  # frozen
    assert [sum(zero_traffic(n, 4, s).values()) for s in STAGES] == [3 * n // 2, 3 * n // 2, 3 * n // 2, 9 * n // 4]


def test_what_to_take():
    """64 GB on each of 8 GPUs hold the states of 4.0B, 11.6B, 17.1B and 32B; on fewer than 7 ranks stage 2 + offload
    keeps less than stage 3; 7B on 8 sends 24.5 GB, and 36.75 GB in stage 3."""
    for stage, billions in zip(STAGES, (4.0, 11.6, 17.1, 32.0)):
        most = 64e9 / (sum(zero_bytes(8 * 10**9, 8, stage).values()) / 8e9)
        assert round(most / 1e9, 1) == billions
    n = 7 * 6 * 5 * 4 * 10**6
    for world in range(1, 13):
        offloaded = zero_bytes(n, world, 2, offload="cpu")
        on_device = sum(offloaded.values()) - offloaded["offloaded"]
        assert (on_device < sum(zero_bytes(n, world, 3).values())) == (world < 7)
    sent = [2 * sum(zero_traffic(7 * 10**9, 8, stage).values()) / 1e9 for stage in STAGES]
    assert sent == [24.5, 24.5, 24.5, 36.75]
    seconds_of_a_gather, seconds_of_a_block = 2 * n / 25e9, 2 * n * 16_000 / 400e12
    assert seconds_of_a_gather == pytest.approx(seconds_of_a_block)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_on_one_rank_nothing_is_won(world):
    """One rank keeps 16 bytes in every stage and sends nothing; more ranks never keep more in a higher stage."""
    sizes = [sum(zero_bytes(1001, world, s).values()) for s in STAGES]
    assert sizes == sorted(sizes, reverse=True)
    if world == 1:
        assert sizes == [16 * 1001] * 4 and not any(sum(zero_traffic(1001, 1, s).values()) for s in STAGES)


# ------------------------------------------------------------------------------------------------------------ training


def largest(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# In fp64 one rounding is 1.1e-16 of numbers of about 1. The gradient of a mean over tokens is a sum in another order:
# some ten roundings, divided by √v + ε with ε = 1e-4 where the gradient itself is 0 (the bias of the keys), times
# lr = 0.01: 1e-15 in a step, which 20 steps of a smooth loss may double a few times.
@pytest.mark.parametrize("world, how", [
    (3, dict(steps=5, micro=2, clip=0.3)),
    *(pytest.param(world, how, marks=thorough) for world in (1, 2, 3, 4) for how in ({}, dict(micro=2, clip=0.3))),
], ids=str)  # fmt: skip
def test_equals_one_process(ranks, world, how):
    """After some steps each stage has the parameters and norms of one process on the whole batch, on every rank."""
    expected, norms = alone("full", **how)
    for results in ranks.job(world, "train_all", "full", **how):
        for params, seen in results:
            assert largest(params, expected) < 1e-12
            assert seen == pytest.approx(norms, rel=1e-12)
    assert largest(expected, trained(model_of("full"))) > 0.05
    if how:
        assert min(norms) > 0.3  # clipping had something to do


@pytest.mark.parametrize("kind, world", [
    ("lora", 2), ("top", 3), pytest.param("lora", 3, marks=thorough), pytest.param("top", 2, marks=thorough)
])  # fmt: skip
def test_frozen_parameters(ranks, kind, world):
    """With LoRA, and with the top alone trained, each stage equals one process, and what is frozen does not move."""
    expected, norms = alone(kind, steps=3, clip=0.5)
    for results in ranks.job(world, "train_all", kind, steps=3, clip=0.5):
        for params, seen in results:
            assert largest(params, expected) < 1e-12
            assert seen == pytest.approx(norms, rel=1e-12)


@pytest.mark.parametrize("optimizer", [
    "SGD", *(pytest.param(name, marks=thorough) for name in OPTIMIZERS if name not in ("AdamW", "SGD"))
])  # fmt: skip
def test_any_elementwise_optimizer(ranks, optimizer):
    """torch's own optimizers, with their groups, do on shards what they do on whole parameters."""
    expected, _ = alone("full", steps=3, optimizer=optimizer)
    for params, _ in ranks.job(2, "train_all", "full", steps=3, optimizer=optimizer)[0]:
        assert largest(params, expected) < 1e-12


@pytest.mark.parametrize("offload", ["disk", pytest.param("cpu", marks=thorough)])
def test_offload_equals(ranks, offload):
    """Where the optimizer's state lies changes nothing."""
    expected, _ = alone("full", steps=3, clip=0.5)
    for params, _ in ranks.job(2, "train_all", "full", steps=3, clip=0.5, offload=offload)[0]:
        assert largest(params, expected) < 1e-12


@pytest.mark.parametrize("world, dtype", [
    (3, "bfloat16"), *(pytest.param(world, "float32", marks=thorough) for world in (2, 3, 4))
])  # fmt: skip
def test_same_bits_in_stages_1_to_3(ranks, dtype, world):
    """Stages 1, 2 and 3 give the same bits on the same ranks, and all ranks have the same."""
    results = ranks.job(world, "train_all", "full", (1, 2, 3), dtype=dtype, steps=4)
    first, expected = results[0][0]
    for params, norms in (stage for rank in results for stage in rank):
        assert all(torch.equal(params[name], p) for name, p in first.items())
        assert norms == expected


SHAPES = st.lists(
    st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=4), min_size=1, max_size=4
)


def check_odd(ranks, shapes, world):
    expected = train_odd(shapes, None)
    for result in ranks.job(world, "odd", shapes):
        for params in result:
            assert largest(params, expected) < 1e-12


def test_shapes_that_divide_by_nothing(ranks):
    """Whatever the shapes, scalars among them, each stage equals one process; padding stays zero; a block may recompute
    its forward in backward, and a parameter may have no gradient."""
    check_odd(ranks, [[(5, 3), (), (7,)], [(2, 1, 3), (1,)], [(4,)]], 3)


@thorough
@given(shapes=SHAPES, world=st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_any_shapes(ranks, shapes, world):
    """The same for drawn shapes."""
    check_odd(ranks, shapes, world)


def test_loss_outside_the_model(ranks):
    """Logits, two passes before one backward and evaluation between: stage 3 finds its parameters in all of them."""
    expected = ranks.job(1, "plain_head", 0)[0]
    for stage in (2, 3):
        assert largest(ranks.job(3, "plain_head", stage)[0], expected) < 1e-12


def test_parameters_are_there_before_they_are_read(ranks):
    """Stage 3 equals stage 2 where a late rank's parameters are read without a call of their module, and after a
    forward with gradients that no backward follows."""
    expected = ranks.job(2, "late", 2)[0]
    assert expected[0] != expected[2]  # it learns
    for losses in ranks.job(2, "late", 3):
        assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stage", STAGES)
def test_two_visits_in_one_backward(ranks, stage):
    """A gradient that comes in two parts of one backward is in that step with both."""
    assert ranks.job(2, "visits", stage) == [[2.0, 4.0, 6.0]] * 2


WAYS = ("load_state_dict", "copy_", ".data =", "one element", "transposed", "to and back")
WRITES = [(3, "load_state_dict", "disk"), (2, ".data =", None), (0, "load_state_dict", None)]
MORE = [(stage, how, offload) for stage in STAGES for how in WAYS for offload in (None, "cpu")]


@pytest.mark.parametrize("stage, how, offload", [
    *WRITES, *(pytest.param(*x, marks=thorough) for x in MORE if x not in WRITES)
], ids=str)  # fmt: skip
def test_training_goes_on_from_what_was_written(ranks, stage, how, offload):
    """What is written under whole() is what training goes on from, as in one process, however it is written."""
    expected = written_alone("full", how)
    for _, _, dtypes, _, _, last in ranks.job(3, "written", "full", stage, how, offload=offload):
        assert largest(last, expected) < 1e-12 and dtypes == {torch.float64}


@pytest.mark.parametrize("stage", [3, 1, *(pytest.param(stage, marks=thorough) for stage in (0, 2))])
def test_rank_0_writes_for_all(ranks, stage):
    """Where one rank alone writes, rank 0's values are taken on all, and those of another rank are not."""
    expected = written_alone("full", "copy_")
    for _, _, _, _, _, last in ranks.job(2, "written", "full", stage, "copy_", writers=(0,)):
        assert largest(last, expected) < 1e-12
    for old, new, *_ in ranks.job(2, "written", "full", stage, "copy_", writers=(1,)):
        assert all(torch.equal(new[name], p) for name, p in old.items())


@pytest.mark.parametrize("stage", [3, 0, *(pytest.param(stage, marks=thorough) for stage in (1, 2))])
def test_merged_stays_merged(ranks, stage):
    """A LoRA merged under whole() is merged after it as well, in weights that are frozen, and trains no further."""
    for old, new, *_ in ranks.job(2, "written", "lora", stage, "merge_lora", steps=0):
        model = model_of("lora")
        model.load_state_dict(old, strict=False)
        lora.merge_lora(model)
        assert largest(new, trained(model)) < 1e-15
        assert largest(new, old) > 0.01


SIXTEEN = [(3, "bfloat16", None), (1, "float16", "cpu")]
ALL_16 = [(s, d, o) for s in STAGES for d in ("bfloat16", "float16") for o in (None, "cpu", "disk")]


@pytest.mark.parametrize("stage, dtype, offload", [
    *SIXTEEN, *(pytest.param(*x, marks=thorough) for x in ALL_16 if x not in SIXTEEN)
], ids=str)  # fmt: skip
def test_masters_follow(ranks, stage, dtype, offload):
    """In 16 bits the fp32 master of an element that was written is its value, the others keep every bit, and so do the
    optimizer's moments."""
    for how in ("nothing", "one element", "load_state_dict"):
        for old, new, _, before, after, _ in ranks.job(2, "written", "full", stage, how, dtype=dtype, offload=offload):
            assert (how == "nothing") == all(torch.equal(new[name], p) for name, p in old.items())
            for name, state in after.items():
                changed = new[name] != old[name]
                assert torch.equal(state["master"][changed], new[name][changed].float())
                assert torch.equal(state["master"][~changed], before[name]["master"][~changed])
                assert all(torch.equal(state[key], before[name][key]) for key in ("m", "v"))
                assert how != "nothing" or not torch.equal(state["master"], new[name].float())  # they do hold more


REPLACED = "inside whole() write into parameters, do not replace them (assign=True): "
SHARDED = "the parameters are sharded: save and load inside engine.whole(), on all ranks"
MISUSES = [
    ("assign", 3, "float32", REPLACED + "transformer.wte.weight"),
    ("untie", 0, "float32", REPLACED + "lm_head.weight"),
    ("shape", 1, "float32", REPLACED + "transformer.ln_f.bias"),
    ("load outside", 3, "float32", SHARDED),
    ("save outside", 3, "float32", SHARDED),
]


@pytest.mark.parametrize("what, stage, dtype, message", [
    *MISUSES, pytest.param("assign", 0, "bfloat16", MISUSES[0][3], marks=thorough),
], ids=str)  # fmt: skip
def test_refuses_writes_that_would_be_lost(ranks, what, stage, dtype, message):
    """Parameters that are replaced, and values written or saved where the engine cannot follow, are one clear line."""
    for error in ranks.job(2, "misused", what, stage, dtype):
        assert error and error.startswith(message) and "\n" not in error


def test_an_exception_inside_whole_comes_out(ranks):
    """What went wrong inside whole() is what the caller sees, whatever else was wrong, and all is sharded again."""
    assert ranks.job(2, "failed_inside") == [("OSError('the disk is full')", False)] * 2


@pytest.mark.parametrize("what, stage", [("load outside", 1), ("save outside", 2)])
def test_writes_in_fp32_outside_whole(ranks, what, stage):
    """In stages 0 to 2 fp32 parameters are their own masters: to load and to save them needs no whole()."""
    assert ranks.job(2, "misused", what, stage) == [None] * 2


def test_a_step_inside_whole(ranks):
    """A step inside whole(), and whole() inside whole(), change no bit of what training computes."""
    for outside, inside in ranks.job(2, "nested"):
        assert all(torch.equal(inside[name], p) for name, p in outside.items())


OUTPUTS = ("view", "dict", "list", "dataclass", "nested", "None", "in place", "checkpoint inside",
           "checkpoint inside, reentrant")  # fmt: skip


@pytest.mark.parametrize("how", OUTPUTS)
def test_whatever_a_block_returns(ranks, how):
    """Stage 3 equals one process where a block's output is a view that is changed in place, a container, an object, or
    None, and where a part of a block is recomputed in backward."""
    expected = chained(how, None)
    for params in ranks.job(2, "chained", how, 3):
        assert largest(params, expected) < 1e-12


@pytest.mark.parametrize("users", [(), (0,)], ids=str)
def test_parameters_without_a_gradient(ranks, users):
    """What no rank uses stays, what one rank uses learns, and each stage equals stage 0, on every rank."""
    for before, (expected, *others) in ranks.job(2, "gaps", users):
        for params in others:
            assert largest(params, expected) < 1e-12
        for name, p in before.items():
            assert torch.equal(p, expected[name]) == ("vector" in name and not users)


@pytest.mark.parametrize("stage", STAGES)
def test_by_habit(ranks, stage):
    """loss.backward() in place of engine.backward(loss), no backward, and step() twice are refused in one line."""
    for nothing, once, twice, plain in ranks.job(2, "by_habit", stage):
        assert once is None
        assert all("call engine.backward(loss), not loss.backward()" in x for x in (nothing, twice, plain))


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=thorough) for stage in (0, 1, 2))])
def test_a_backward_that_raises(ranks, stage):
    """After a backward that raises, the next forward frees its units, and training is as if it had not been called."""
    for fails, expected in zip(ranks.job(2, "raised", stage, True), ranks.job(2, "raised", stage, False)):
        assert all(torch.equal(fails[name], p) for name, p in expected.items())


@pytest.mark.parametrize("n, dtype", [
    (4_000_000, "float32"), (100_000, "bfloat16"), pytest.param(38_597_376, "float32", marks=thorough)
])  # fmt: skip
def test_norm_of_a_long_gradient(ranks, n, dtype):
    """The norm is within 1e-6 of fp64 at any length and dtype; one sum in fp32 may err by 1e-4 at 4M elements."""
    norm, exact = ranks.job(1, "long_norm", n, dtype)[0]
    assert norm == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("kind, world", [("OneProcess", 1), ("FSDP", 2)])
def test_norm_of_the_trainers_engines(ranks, kind, world):
    """Without ZeRO, and with FSDP, the norm is within 1e-6 of fp64, and the gradient is divided by it to clip it."""
    for norm, exact, grad, m in ranks.job(world, "long_norm_of", kind, 4_000_000):
        assert norm == pytest.approx(exact, rel=1e-6)
        torch.testing.assert_close(m, 0.1 * grad / exact, rtol=2e-6, atol=0)  # 1e-6 of it, and fp32's roundings


# ----------------------------------------------------------------------------------------------------- bytes, traffic


BYTES = [(3, "bfloat16", None, KINDS), (2, "float32", "disk", ("lora",))]
BYTES += [pytest.param(n, "bfloat16", None, KINDS, marks=thorough) for n in (1, 2, 4)]
BYTES += [pytest.param(*x, KINDS, marks=thorough) for x in ((3, "float32", None), (2, "bfloat16", "cpu"))]
BYTES += [pytest.param(3, "float32", "disk", KINDS, marks=thorough)]


@pytest.mark.parametrize("world, dtype, offload, kinds", BYTES, ids=str)
def test_bytes_are_the_formulas(ranks, world, dtype, offload, kinds):
    """All tensors alive at the end of backward take the formula's bytes exactly, in each stage, whatever is trained."""
    for results in ranks.job(world, "everything", "measure", kinds, dtype, offload):
        for (kind, stage), (kept, sizes, n) in results.items():
            expected = 0
            for size, width in sizes["trained"]:
                k = 8 if width == 4 and offload is None else 12  # fp32 is its own master copy, unless that is elsewhere
                parts = zero_bytes(size, world, stage, param_bytes=width, grad_bytes=width, k=k, offload=offload)
                expected += sum(parts.values()) - (parts["gradients"] if stage < 2 else 0)
            if stage < 2:  # whole gradients are the parameters' own, without padding
                expected += zero_bytes(n, world, stage, grad_bytes=sizes["trained"][0][1])["gradients"]
            for size, width in sizes["frozen"]:
                expected += sum(zero_bytes(size, world, stage, param_bytes=width, grad_bytes=0, k=0).values())
            assert kept == expected, (kind, stage)


@pytest.mark.parametrize("world, micro, kinds", [
    (3, 1, KINDS), (2, 3, ("full",)),
    *(pytest.param(world, micro, KINDS, marks=thorough) for world, micro in ((1, 1), (2, 1), (4, 1), (3, 3)))
], ids=str)  # fmt: skip
def test_traffic_is_the_formulas(ranks, world, micro, kinds):
    """The elements sent in a step are the formula's exactly: 2Ψ, 2Ψ, 2Ψ, 3Ψ times (N - 1)/N without accumulation."""
    for results in ranks.job(world, "everything", "traffic", kinds, micro):
        for (kind, stage), (sent, (frozen, size), n, flats) in results.items():
            if stage == 0:  # without padding; each bucket's share is rounded here
                assert sent["all_reduce"] == pytest.approx(2 * n * (world - 1) / world, abs=flats)
                continue
            formula = zero_traffic(size, world, stage, micro_batches=micro, frozen=frozen)
            if kind == "top" and stage == 3:  # below what is trained there is no backward to gather for
                assert formula["all_gather"] / 2 <= sent["all_gather"] <= formula["all_gather"]
                formula["all_gather"] = sent["all_gather"]
            assert {name: x for name, x in sent.items() if x} == {name: x for name, x in formula.items() if x}
            if micro == 1 and kind == "full":
                psi = n * (world - 1) / world
                assert 0 <= sum(sent.values()) - (3 if stage == 3 else 2) * psi <= 3 * world * flats


@pytest.mark.parametrize("world, stage", [
    (2, 2), *(pytest.param(world, stage, marks=thorough) for world, stage in ((1, 2), (3, 2), (1, 3), (2, 3), (3, 3)))
])  # fmt: skip
def test_live_gradients(ranks, world, stage):
    """In backward never more than the shards and three buckets of gradients are alive, and buckets leave on the way."""
    # The bucket under way is there as sent and as received, and the gradients of the next one gather. Biases and norms
    # of a block (156), whose gradients wait for their last one, come on top. With a vocabulary of 400 one bucket is
    # much larger than the others (of up to 600 elements): it alone is there twice.
    # Gloo's thread may let go of a bucket a moment late, more so on a busy machine: one run in forty must show it
    for vocabulary, factor, extra in ((53, 3, 4 * 156), (400, 2, 4 * (600 + 156))):
        for _ in range(40):
            peak, _, bucket, overlap, total = ranks.job(world, "live_gradients", stage, vocabulary)[0]
            assert bucket < peak
            if peak <= factor * bucket + extra:
                break
        assert peak <= factor * bucket + extra
    # a bucket is under way while half of the gradients are still to come
    assert any(under_way and left > total / 2 for left, under_way in overlap)
    assert sum(1 for left, _ in overlap if 0 < left < total) > 10


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=thorough), pytest.param(3, marks=thorough)])
def test_blocks_are_there_when_needed(ranks, world):
    """Stage 3 holds the root, the block at work and the next one, and nothing between passes. Parameters have no
    elements before their all-gather has ended."""
    for held, at_loss, between, at_end, in_flight, waited in ranks.job(world, "blocks_held"):
        assert held[:3] == [[0, 1, 2], [0, 2, 3], [0, 3]]
        assert at_loss == []
        assert held[3:6] == [[0, 2, 3], [0, 1, 2], [0, 1]]
        assert held[6:] == held[:3] and not any(between) and at_end == []
        assert not any(in_flight) and waited


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_disk_takes_no_anonymous_memory(ranks):
    """With offload to disk the anonymous resident memory is smaller by the 12 bytes of each parameter of the shard."""
    for plain, disk in zip(ranks.job(2, "anonymous", None), ranks.job(2, "anonymous", "disk")):
        # 8 layers' m, v and master: 48 MB. The allocator keeps a few MB that it may use again, this way or that.
        assert plain[0] - disk[0] == pytest.approx(12 * plain[1], rel=0.1)


# -------------------------------------------------------------------------------------------------------------- 16 bits


def test_overflow_is_agreed_on(ranks):
    """A gradient that overflows on one rank alone skips the step on all: no move, no count, and a norm that says so."""
    for results in ranks.job(3, "overflow", STAGES):
        for (first, *fine), (spoilt, moved, counted), (_, *again) in results:
            assert math.isfinite(first) and fine == again == [True, True]
            assert not math.isfinite(spoilt) and not moved and not counted


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=thorough) for stage in (0, 1, 2))])
def test_loss_scale(ranks, stage):
    """With a scaled loss the norm returned is the true gradient's, clipping is by it, and the update is the same."""
    (params, norms), *_ = ranks.job(2, "scaled", stage, 2.0**8)
    (expected, unscaled), *_ = ranks.job(2, "scaled", stage, 1.0)
    assert norms == unscaled and min(norms) > 0.5
    assert largest(params, expected) < 1e-5  # the factor 0.5 / norm / scale is rounded apart from 0.5 / norm


MASTERS = [(2, "float16", "cpu"), (3, "bfloat16", None), (1, "bfloat16", "disk")]
ALL = [(s, *x) for s in STAGES for x in (("bfloat16", None), ("float16", "cpu"), ("bfloat16", "disk"))]


@pytest.mark.parametrize("stage, dtype, offload", [
    *MASTERS, *(pytest.param(*x, marks=thorough) for x in ALL if x not in MASTERS)
], ids=str)  # fmt: skip
def test_master_copy(ranks, stage, dtype, offload):
    """In 16 bits the parameters are the fp32 masters rounded, and 30 steps of about 1e-6 are not lost."""
    answers = ranks.job(2, "narrow", stage, dtype, offload)
    assert all(equal for equal, _ in answers)
    assert answers[0][1] > 2e-5


# ---------------------------------------------------------------------------------------------------------- checkpoints


FORMS = [
    ("float32", (2, "disk")), ("bfloat16", (3, "cpu")), pytest.param("float32", (0, None), marks=thorough),
    pytest.param("bfloat16", (1, None), marks=thorough), pytest.param("float32", (3, None), marks=thorough),
]  # fmt: skip


@pytest.mark.parametrize("dtype, form", FORMS, ids=str)
def test_resume_is_exact(ranks, tmp_path, dtype, form):
    """Stopped and resumed on the same ranks, a run gives the bits that it gives without a stop."""
    path = str(tmp_path / "state.pt")
    whole = ranks.job(3, "interrupted", "full", form, form, dtype, steps=6, path=path)[0][0]
    ranks.job(3, "interrupted", "full", form, form, dtype, path=path)
    for params, _ in ranks.job(3, "interrupted", "full", form, form, dtype, path=path, load=True):
        assert all(torch.equal(params[name], p) for name, p in whole.items())


@pytest.mark.parametrize("optimizer, stage", [("AdamW", 0), pytest.param("torch AdamW", 3, marks=thorough)])
def test_a_checkpoint_before_the_first_step(ranks, optimizer, stage):
    """A state without moments loads over one that has some, and training gives the same bits."""
    for one, other in ranks.job(2, "fresh", optimizer, stage):
        assert all(torch.equal(other[name], p) for name, p in one.items())


MOVES = [(3, (3, None), 2, (1, "disk")), (2, (2, "cpu"), 4, (3, None)), (4, (1, None), 1, (0, None))]


@pytest.mark.parametrize("kind, n, first, m, second", [
    ("full", *MOVES[0]), ("lora", *MOVES[1]),
    *(pytest.param(kind, *move, marks=thorough) for kind in ("full", "lora") for move in MOVES),
])  # fmt: skip
def test_checkpoint_of_n_ranks_loads_on_m(ranks, tmp_path, kind, n, first, m, second):
    """A run stopped on N ranks goes on on M in another stage as if nothing had been; the checkpoint has no padding."""
    path = str(tmp_path / "state.pt")
    whole, expected = ranks.job(1, "interrupted", kind, (0, None), None, steps=6, path=path)[0]
    ranks.job(n, "interrupted", kind, first, second, path=path)
    shapes = {name: p.shape for name, p in model_of(kind).named_parameters() if p.requires_grad}
    for name, state in torch.load(path, weights_only=True).items():
        assert {key: getattr(x, "shape", x) for key, x in state.items()} == {
            "master": shapes[name], "step": 3.0, "exp_avg": shapes[name], "exp_avg_sq": shapes[name]
        }  # fmt: skip
    (params, state), *others = ranks.job(m, "interrupted", kind, first, second, path=path, load=True)
    assert largest(params, whole) < 1e-12 and not any(state for _, state in others)
    for key in ("master", "exp_avg", "exp_avg_sq"):
        assert largest({n: s[key] for n, s in state.items()}, {n: s[key] for n, s in expected.items()}) < 1e-12


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=thorough) for stage in (0, 1, 2))])
def test_saves_in_the_models_own_format(ranks, tmp_path, stage):
    """Inside whole() rank 0 saves a model that from_pretrained opens, or an adapter that loads: same logits."""
    ids = batches_of(0, 1)[0][0]
    out = ranks.job(3, "saved", "full", stage, str(tmp_path))
    model = load_gpt(tmp_path)
    torch.testing.assert_close(model(ids).logits, out[1], rtol=1e-5, atol=1e-6)  # fp32, products in another order
    out = ranks.job(3, "saved", "lora", stage, str(tmp_path))
    model = lora.add_lora(load_gpt(tmp_path), r=3)
    model.load_state_dict(model_of("lora", torch.float32).state_dict())
    lora.load_lora_state_dict(model, torch.load(tmp_path / "adapter.pt"))
    torch.testing.assert_close(model(ids).logits, out[1], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("what, message", [
    ("params", "params must be all parameters of the model that require a gradient"),
    ("frozen", "params must be all parameters of the model that require a gradient"),
    ("left over", "the checkpoint is of another model, or trains other parameters: another does not fit"),
    ("shape", "the checkpoint is of another model, or trains other parameters: transformer.wte.weight does not fit"),
])  # fmt: skip
def test_refuses(ranks, what, message):
    """Parameters left out, nothing to train, and a checkpoint of another model are refused in one line."""
    with pytest.raises(RuntimeError, match=f"zero.Error: {message}"):
        ranks.job(2, "wrong", what)


def test_refuses_before_anything_starts():
    """An unknown stage or offload, and a run without a process group, are refused in one line."""
    model = nn.Linear(2, 2)
    with pytest.raises(Error, match="^stage must be 0, 1, 2 or 3, not 4$"):
        ZeRO(model, AdamW, blocks=[], stage=4)
    with pytest.raises(Error, match="^offload must be None, 'cpu' or 'disk', not 'tape'$"):
        zero_bytes(10, 2, 1, offload="tape")
    with pytest.raises(Error, match="^no process group: start with torchrun --nproc_per_node N, [^\n]*$"):
        ZeRO(model, AdamW, blocks=[], stage=1)


@pytest.mark.parametrize("how, message", [
    ("raises", "rank 1: (.|\n)*ZeroDivisionError"), pytest.param("killed", "rank 1 died", marks=thorough)
])  # fmt: skip
def test_a_failing_rank_ends_its_test(ranks, how, message):
    """A rank that fails while the others wait for it ends the job within seconds, and the next job runs."""
    ranks.job(3, "visits", 0)  # the processes have started
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        ranks.job(3, "fail", how)
    assert time.monotonic() - began < 10
    assert ranks.job(2, "visits", 0) == [[2.0, 4.0, 6.0]] * 2


@thorough
def test_a_rank_that_dies_ends_all():
    """Under torchrun a killed rank ends all of them within 30 seconds, and the error names it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", __file__, "die"]
    began = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert time.monotonic() - began < 30  # the start of three processes included
    assert "local_rank: 1" in done.stderr and "SIGKILL" in done.stderr


def test_demonstration():
    """Run as a program the file prints the table of its docstring, and how many parameters fit in 64 GB."""
    done = subprocess.run(
        [sys.executable, zero.__file__], capture_output=True, text=True, timeout=LIMIT, start_new_session=True
    )
    assert done.returncode == 0, done.stderr
    for claim in (
        "stage 1:  38.5;",
        "stage 2: 26.25;",
        "stage 3:    14;",
        "sends 36.75 GB",
        *(f"{billions}B in 64 GB" for billions in ("4.0", "11.6", "17.1", "32.0")),
    ):
        assert claim in done.stdout


if __name__ == "__main__":
    die() if sys.argv[1:] == ["die"] else serve(list(map(int, sys.argv[2:])), globals())
