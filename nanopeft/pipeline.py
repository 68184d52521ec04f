# SPDX-License-Identifier: MIT
"""Pipeline parallelism: each rank holds some of the layers, a stage, and micro-batches pass through the stages.

A model is cut by depth. Stage s computes its layers and sends their output, B·T·d numbers, to stage s + 1. In backward
it receives the gradient of that output and sends the gradient of its input to stage s - 1. With the batch in one piece,
one stage would work and p - 1 would wait. So it is cut into m micro-batches, and stage 0 goes on with the second while
stage 1 has the first. Each stage adds up the gradients of all m and then updates its own parameters. This is gradient
accumulation, so the result is that of one process.

A step of p = 4 stages and m = 8 micro-batches. a to h: their forward, A to H: their backward, twice as long, . waiting.
Alive: the most micro-batches whose activations a stage keeps at once.

    GPipe: all forwards, then all backwards      alive    1F1B: one forward, one backward              alive
    stage 0  abcdefgh.........AABBCCDDEEFFGGHH   8        stage 0  abcd......AAeBBfCCgDDhEE.FF.GG.HH   4
    stage 1  .abcdefgh......AABBCCDDEEFFGGHH..   8        stage 1  .abc....AAdBBeCCfDDgEEhFF.GG.HH..   3
    stage 2  ..abcdefgh...AABBCCDDEEFFGGHH....   8        stage 2  ..ab..AAcBBdCCeDDfEEgFFhGG.HH....   2
    stage 3  ...abcdefghAABBCCDDEEFFGGHH......   8        stage 3  ...aAAbBBcCCdDDeEEfFFgGGhHH......   1

Bubble: the waiting while the pipeline fills and drains. Of m + p - 1 turns a stage works in m and waits in p - 1. That
is (p - 1) / (m + p - 1) of the time: 27 % here, 9 % with m = 32. Megatron's (p - 1) / m is the same bubble as a share
of the work. More micro-batches make it smaller (GPipe: 4p or more), if each still uses the hardware well.

1F1B saves memory, not time. A micro-batch's activations are alive from its forward to its backward. GPipe keeps those
of all m. In 1F1B a stage first does a forward for each stage after it. From then on it does one forward, then one
backward, which frees the oldest. So at most min(m, p - s) are alive. The dots are as many as in GPipe.
Two schedules have a smaller bubble. Interleaving gives a rank v separate pieces of the model: turns are v times
shorter, the bubble is (p - 1) / (v·m) of the work, and messages are v times as many. Zero bubble cuts backward into dx,
which the stage before needs, and dW, which can fill the waiting. (In LoRA, over frozen weights, dW is hardly any work.)

Balance: the slowest stage sets the pace. GPT-2's head has V·d = 38.6M weights, 5.45 times a block's 12·d². With 3
blocks on each of 4 stages, the last one works as for 8.45, and stages wait for 54 % of the time (m = 8). partition()
finds 4, 4, 4 blocks and the head alone, and they wait for 37 %. Only tensor parallelism cuts the head itself.

What is sent: B·T·d numbers down and up, for each micro-batch and border. GPT-2 in fp32, with p = 4, m = 8 and 256
tokens in a micro-batch: 48 messages of 786 kB, 37.7 MB a step. A tied table is on the first and the last stage, and its
two gradients must be added up. These are V·d numbers, 154 MB, four times all else. (In LoRA the table is frozen, and
nothing is added up.) Tensor parallelism all-reduces B·T·d numbers four times in each layer, and ZeRO sends all
parameters 2 or 3 times. A pipeline sends least.

Deadlock: with gloo a send ends when the other side receives. In 1F1B stage s sends an activation while s + 1 sends it a
gradient. If both waited for their send to end, they would wait forever. So a stage only starts a send (isend), and goes
on. It waits for the end before its next send in the same direction. By then the neighbour has received it, or comes to
that without waiting for this stage again.

When to use it: the model does not fit one device, links are slow (between nodes), and there are micro-batches enough.
If only optimizer state or gradients do not fit, ZeRO is simpler and has no bubble. Recomputation goes with both.

3D parallelism is all three on a grid of n · p · t ranks, rank = (copy · p + stage) · t + part. What sends most is
innermost. Tensor parallelism stays inside a node, since each layer waits for its all-reduces. The pipeline crosses
nodes: each of the t ranks of a stage sends to the rank of the next stage that has the same part. Data parallelism is
outermost: n copies of all this add up their gradients once a step. ZeRO stage 1 goes with it. Stage 2 would send
gradients after each micro-batch, and stage 3 would gather parameters for each, so their traffic would grow with m.

Pitfalls
* The loss is divided by the labelled tokens of all m: a mean of means is another loss. backward() does it.
* Clip with step(clip=1.0): the norm is over all stages, a tied table counted once. clip_grad_norm_ sees one stage.
* Our GPT's loss makes the head's gradient already in forward. In GPipe the last stage keeps m of them, in 1F1B one. And
  the last stage is slow in forward and fast in backward. In GPipe the others first wait for it, and then it waits for
  them. In 1F1B its forwards and backwards alternate: with p = 2 and m = 8 GPipe waits 32 % of the time, 1F1B 15 %.
* Each rank needs the same batches: masks and labels are not sent. Dropout draws other numbers than one process does.

Papers: GPipe, arXiv 1811.06965, section 2.3; PipeDream, 1806.03377 (1F1B); Megatron, 2104.04473, sections 2.2 (1F1B
with a flush, interleaving) and 3 (3D); zero bubble, 2401.10241. The whole family in one table: nanopeft/__init__.py
"""

import functools
import inspect
import itertools
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn


class Error(ValueError):
    """Wrong use of the pipeline; the message says what would be right."""


def actions(stage, p, m, schedule):
    """What a stage does in a step, in order. ("F", i): forward of micro-batch i; ("B", i): its backward."""
    forwards, backwards = [("F", i) for i in range(m)], [("B", i) for i in range(m)]
    if schedule == "gpipe":
        return forwards + backwards
    # 1F1B: a forward for each later stage, until the first gradient can be back; then a forward, a backward, in turn
    warmup = min(m, p - 1 - stage)
    pairs = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
    return forwards[:warmup] + pairs + backwards[m - warmup :]


def bubble(p, m):
    """The share of the time in which a stage waits, if all stages take the same time: p - 1 of m + p - 1 turns."""
    return (p - 1) / (m + p - 1)


def partition(costs, p):
    """How many of the items each of p stages takes, in order, so that the slowest stage takes the least time."""

    @functools.cache
    def best(n, p):  # of the first n items: (costs of the stages, the highest first; how many each takes)
        if p == 1:
            return [sum(costs[:n])], [n]
        splits = [(*best(k, p - 1), k) for k in range(p - 1, n)]  # items k, ..., n - 1 are the last stage's
        return min((sorted([*c, sum(costs[k:n])], reverse=True), [*sizes, n - k]) for c, sizes, k in splits)

    return best(len(costs), p)[1]


class Skip(nn.Module):
    """In the place of a layer of another stage: hands on its input. In the place of position embeddings: adds 0."""

    def forward(self, x, *args, **kwargs):
        return x if x.is_floating_point() else torch.zeros((), device=x.device)


class Pipeline:
    """Splits a model over all ranks: rank s is stage s. Rank 0's parameters are taken.

        pipeline = Pipeline(model, torch.optim.AdamW(model.parameters(), lr=1e-3), schedule="1f1b")
        loss = pipeline.backward([{"input_ids": ids, "labels": labels}, ...])  # all micro-batches, on every rank
        norm = pipeline.step(clip=1.0)
    """

    def __init__(self, model, optimizer, *, schedule="1f1b"):
        if schedule not in ("gpipe", "1f1b"):
            raise Error(f"schedule must be 'gpipe' or '1f1b', not {schedule!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise Error("no process group: start with torchrun --nproc_per_node N, and call init_process_group first")
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.stage, self.p = dist.get_rank(), dist.get_world_size()
        self.names = {p: name for name, p in model.named_parameters()}  # a tied parameter comes once
        stages, self.others, self.stages_of = split(model, self.p), {}, {}  # {name: layer}, {tensor: its stages}
        for s, stage in enumerate(stages):
            self.others |= stage if s != self.stage else {}
            for t in dict.fromkeys(t for layer in stage.values() for t in (*layer.parameters(), *layer.buffers())):
                self.stages_of.setdefault(t, []).append(s)
        for p, name in self.names.items():
            if (found := self.stages_of.get(p, [])) != [0, self.p - 1] and len(found) != 1:
                raise Error(f"{name} is in stages {found}: it must be in one, or in the first and the last")
        self.trained = [p for p in self.names if p.requires_grad and self.stage in self.stages_of[p]]
        self.table = next(iter(stages[0].values())).weight  # (V, d)
        # NCCL carries out the messages of a group one by one, both ways; so each way has a group of its own
        self.down, self.up, self.ends = dist.new_group(), dist.new_group(), dist.new_group(sorted({0, self.p - 1}))
        for t in self.stages_of:
            dist.broadcast(t.data, 0)
        self.events, self.may_call, self.may_step = [], False, False
        model.register_forward_pre_hook(self.check_call)
        self.take_away()

    def backward(self, batches, loss_scale=1.0):
        """Forward and backward of a step. Returns the loss, the mean over all labelled tokens, on every rank."""
        if not batches or any("labels" not in batch for batch in batches):
            raise Error("give one or more micro-batches, each a dict of the model's arguments, labels among them")
        counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in batches]
        shares = [n / max(1, sum(counts)) for n in counts]  # of the labelled tokens: 1/m if all have as many
        total, alive, sent, s = 0.0, {}, {}, self.stage
        self.events, self.may_call = [], True
        for what, i in actions(s, self.p, len(batches), self.schedule):
            source, to, group = (s - 1, s + 1, self.down) if what == "F" else (s + 1, s - 1, self.up)
            received = self.receive(source, group, batches[i])  # (B, T, d); None at the ends of the pipeline
            start = time.time()
            if what == "F":
                x, y = received, self.forward(received, **batches[i])  # (B, T, d); on the last stage the loss
                if to == self.p:
                    total += y.item() * shares[i] if counts[i] else 0.0  # without labels the mean may be NaN
                    y = y * (shares[i] * loss_scale)
                alive[i], out = (x, y), y.detach()
            else:
                x, y = alive.pop(i)
                if y.requires_grad:  # a frozen first stage has nothing to do
                    torch.autograd.backward(y, received)
                out = None if x is None else x.grad  # (B, T, d)
            self.events.append((what, i, start, time.time()))
            self.wait(sent.get(what))  # at most one message is on its way down, and one up
            sent[what] = self.send(out, to, group)
        for message in sent.values():
            self.wait(message)
        self.may_call, self.may_step = False, True
        total = torch.tensor(total, dtype=torch.float64, device=self.table.device)
        dist.broadcast(total, self.p - 1)
        return total.item()

    def forward(self, x, input_ids, labels, **inputs):
        """The model's own forward, in which the layers of other stages are skipped."""
        inputs |= {"input_ids": input_ids} if x is None else {"inputs_embeds": x.requires_grad_()}
        out = self.model(**inputs, use_cache=False, labels=labels if self.stage == self.p - 1 else None)
        return out.logits if out.loss is None else out.loss  # without the head, logits are what the last block gave

    @torch.no_grad()
    def step(self, clip=None, loss_scale=1.0):
        """One update; returns the norm of the gradient over all stages. If that is not finite, no stage updates.
        clip: the largest norm. loss_scale: as in backward()."""
        if not self.may_step:
            raise Error("step() without gradients: call pipeline.backward(batches) before each step")
        trained = [p for p in self.trained if p.grad is not None]
        for p in trained:
            if len(self.stages_of[p]) == 2:  # tied: gradient as embedding + gradient as head
                dist.all_reduce(p.grad, group=self.ends)
        # ‖g‖² = Σ over stages, a tied table on the first alone. In fp64, and in pieces: a whole copy takes memory
        mine = [p.grad.flatten() for p in trained if self.stages_of[p][0] == self.stage]
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for g in mine for x in g.split(1 << 18)]
        square = sum((x**2 for x in norms), torch.zeros((), dtype=torch.float64, device=self.table.device))
        dist.all_reduce(square)
        norm = square.sqrt().item() / loss_scale
        factor = (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / loss_scale
        if square.isfinite():
            if self.has_masters:  # it scales in fp32 itself
                self.optimizer.step(grad_scale=factor)
            else:
                for p in trained:
                    p.grad.mul_(factor)
                self.optimizer.step()
        self.optimizer.zero_grad()
        self.may_step = False
        return norm

    @contextmanager
    def whole(self):
        """Inside this `with`, which all ranks enter, each has the whole model: to evaluate, generate or save it."""
        for t, stages in self.stages_of.items():
            if self.stage not in stages:
                t.data = t.new_empty(t.shape)
            dist.broadcast(t.data, stages[0])
        for name, layer in self.others.items():
            replace(self.model, name, layer.train(self.model.training))
        self.may_call = True
        try:
            yield self.model
        finally:
            self.may_call = False
            self.take_away()

    def take_away(self):
        """Keeps this stage's layers. Those of others are skipped, and each of their tensors shrinks to one number.
        Names and shapes stay. These parameters never get a gradient, so the optimizer passes over them."""
        for name in self.others:
            replace(self.model, name, Skip())
        for t, stages in self.stages_of.items():
            if self.stage not in stages:
                t.data = t.new_zeros(()).expand(t.shape)

    @torch.no_grad()
    def state_dict(self):
        """{parameter's name: {"master": values, and what the optimizer keeps}}: to resume with any p or engine.
        All ranks call this; rank 0 gets it in host memory, the others {}."""
        mine, parts = {}, [None] * self.p if self.stage == 0 else None
        for p in self.trained:
            kept = {"master": p.detach(), **self.optimizer.state.get(p, {})}
            tensors = {key: x.cpu() if x.dim() else x.item() for key, x in kept.items() if torch.is_tensor(x)}
            mine[self.names[p]] = kept | tensors
        dist.gather_object(mine, parts)
        found = {name: kept for part in parts or () for name, kept in part.items()}
        return {name: found[name] for name in self.names.values() if name in found}  # in the model's order

    @torch.no_grad()
    def load_state_dict(self, found):
        """The reverse, with the same on every rank. Error, with nothing loaded, if it is of another model."""
        shapes = {name: p.shape for p, name in self.names.items() if p.requires_grad}
        if wrong := [x for x in {**shapes, **found} if x not in found or found[x]["master"].shape != shapes.get(x)]:
            raise Error(f"the checkpoint is of another model, or trains other parameters: {wrong[0]} does not fit")
        for p in self.trained:
            kept = {key: torch.tensor(x) if type(x) is float else x for key, x in found[self.names[p]].items()}
            p.copy_(kept["master"])
            if p.dtype.itemsize >= 4 or len(kept) == 1 or not self.has_masters:  # p is its own master copy
                del kept["master"]
            kept |= {key: x.to(p.device, copy=True) for key, x in kept.items() if torch.is_tensor(x) and x.dim()}
            self.optimizer.state[p] = kept

    @functools.cached_property
    def has_masters(self):
        """Whether the optimizer is adamw.py's, which keeps fp32 master copies and scales gradients in fp32."""
        return "grad_scale" in inspect.signature(self.optimizer.step).parameters

    def send(self, tensor, to, group):
        """Starts to send, and returns what wait() takes. Until then the tensor must stay as it is."""
        if 0 <= to < self.p:
            tensor = tensor.contiguous()
            return dist.isend(tensor, to, group), tensor, to

    def receive(self, source, group, batch):
        if 0 <= source < self.p:
            x = self.table.new_empty(*batch["labels"].shape, self.table.size(1))
            self.wait((dist.irecv(x, source, group), x, source))
            return x

    def wait(self, message):
        if message is not None:
            try:
                message[0].wait()
            except RuntimeError as e:
                raise RuntimeError(f"rank {self.stage} waits for rank {message[2]}, which died or hangs: {e}") from None

    def timeline(self):
        """[[(what, i, start, end), ...] of each stage] of the last step, by its own clock; on rank 0."""
        stages = [None] * self.p if self.stage == 0 else None
        dist.gather_object(self.events, stages)
        return stages

    def check_call(self, *_):
        if not self.may_call:
            raise Error("the model is split: call pipeline.backward(batches), or the model inside pipeline.whole()")


# ------------------------------------------------------------------------------------------------------------ timeline


def simulate(m, schedule, forward, backward):
    """The timeline if stage s takes forward[s] and backward[s] for a micro-batch, and messages take no time."""
    p, ends, timeline = len(forward), {}, [[] for _ in forward]
    todo = [actions(s, p, m, schedule) for s in range(p)]
    while any(todo):
        for s in (s for s in range(p) if todo[s]):
            what, i = todo[s][0]
            source, seconds = (s - 1, forward[s]) if what == "F" else (s + 1, backward[s])
            if (what, i, source) in ends or not 0 <= source < p:  # its input is there
                start = max(ends.get((what, i, source), 0), timeline[s][-1][3] if timeline[s] else 0)
                ends[what, i, s] = start + seconds
                timeline[s].append((*todo[s].pop(0), start, start + seconds))
    return timeline


def scaled(timeline, width):
    """[(stage, what, i, start, end)], with times from 0 to width."""
    events = [(s, *event) for s, stage in enumerate(timeline) for event in stage]
    first, last = min(event[3] for event in events), max(event[4] for event in events)
    return [(*event[:3], *((t - first) / (last - first) * width for t in event[3:])) for event in events]


def waiting(timeline):
    """The bubble as measured: the share of the time in which a stage does not compute, the mean over stages."""
    return 1 - sum(end - start for *_, start, end in scaled(timeline, 1)) / len(timeline)


def draw(timeline, width):
    """A line for each stage, a character for each slot of time: a, b, ... forward, A, B, ... backward, . waiting."""
    rows = [["."] * width for _ in timeline]
    for stage, what, i, start, end in scaled(timeline, width):
        start, end = round(start), round(end)
        rows[stage][start:end] = chr(ord("a" if what == "F" else "A") + i % 26) * (end - start)
    return "\n".join(map("".join, rows))


# ------------------------------------------------------------------------------------------------------------ plumbing

PARTS = {  # by config.model_type: layers before the blocks, the embedding first; blocks; layers after them
    "gpt2": ("transformer.wte transformer.wpe transformer.drop", "transformer.h", "transformer.ln_f lm_head"),
    "llama": ("model.embed_tokens", "model.layers", "model.norm lm_head"),
}


def split(model, p):
    """[{name: module} of each stage]."""
    modules = dict(model.named_modules(remove_duplicate=False))
    before, blocks, after = PARTS.get(getattr(getattr(model, "config", None), "model_type", None), ("", None, ""))
    if blocks not in modules:
        raise Error(f"a pipeline takes models of the type {' or '.join(PARTS)}, not a {type(model).__name__}")
    blocks = [f"{blocks}.{i}" for i in range(len(modules[blocks]))]
    if p > len(blocks) + 1:
        raise Error(f"{len(blocks)} blocks and the head make at most {len(blocks) + 1} stages, not {p}")
    before, after = before.split(), after.split()
    sizes = partition([cost(modules[name]) for name in blocks] + [sum(cost(modules[name]) for name in after)], p)
    stages = [blocks[sum(sizes[:s]) : sum(sizes[: s + 1])] for s in range(p)]
    stages[0] = before + stages[0]
    stages[-1] = stages[-1] + after
    return [{name: modules[name] for name in stage if name in modules} for stage in stages]


def cost(module):
    """The weights of its matrices, as the time is proportional to them."""
    quantized = [m.in_features * m.out_features for m in module.modules() if hasattr(type(m), "dequantize")]
    return sum(quantized) + sum(p.numel() for p in module.parameters() if p.dim() > 1)


def replace(model, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


if __name__ == "__main__":
    p, m = 4, 8
    for schedule in ("gpipe", "1f1b"):
        timeline = simulate(m, schedule, [1] * p, [2] * p)
        alive = [max(itertools.accumulate(1 if what == "F" else -1 for what, *_ in stage)) for stage in timeline]
        print(f"{schedule}: waiting {waiting(timeline):.3f}, formula {bubble(p, m):.3f}; alive {alive}")
        print(draw(timeline, 33))
