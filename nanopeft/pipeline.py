# SPDX-License-Identifier: MIT
"""Pipeline parallelism. DOCSTRING
"""

import functools
import inspect
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

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
    """Splits a model over all ranks: rank s is stage s. The optimizer is made before, for the whole model.

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
        stages = split(model, self.p)
        self.others = {name: m for s, stage in enumerate(stages) if s != self.stage for name, m in stage.items()}
        self.stages_of = stages_of_tensors(stages, self.names)
        self.trained = [p for p in self.names if p.requires_grad and self.stage in self.stages_of[p]]
        self.table = model.get_input_embeddings().weight  # (V, d)
        # NCCL carries out the messages of a group one by one, both ways; so each way has a group of its own
        self.down, self.up, self.ends = dist.new_group(), dist.new_group(), dist.new_group(sorted({0, self.p - 1}))
        for t in self.stages_of:
            broadcast(t, 0)
        self.events, self.most_alive, self.may_call, self.may_step = [], 0, False, False
        model.register_forward_pre_hook(self.check_call)
        self.take_away()

    def backward(self, batches, loss_scale=1.0):
        """Forward and backward of a step. Returns the loss, the mean over all labelled tokens, on every rank."""
        if not batches or any("labels" not in batch for batch in batches):
            raise Error("give one or more micro-batches, each a dict of the model's arguments, labels among them")
        counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in batches]
        shares = [n / max(1, sum(counts)) for n in counts]  # of the labelled tokens: 1/m if all have as many
        total, alive, sent, s = 0.0, {}, {}, self.stage
        self.events, self.most_alive, self.may_call = [], 0, True
        for what, i in actions(s, self.p, len(batches), self.schedule):
            source, to, group = (s - 1, s + 1, self.down) if what == "F" else (s + 1, s - 1, self.up)
            received = self.receive(source, group, batches[i])  # (B, T, d); None at the pipeline's ends
            start = time.time()
            if what == "F":
                x, y = received, self.forward(received, **batches[i])  # (B, T, d); on the last stage the loss
                if to == self.p:
                    total, y = total + y.item() * shares[i], y * (shares[i] * loss_scale)
                alive[i], out = (x, y), y.detach()
                self.most_alive = max(self.most_alive, len(alive))
            else:
                x, y = alive.pop(i)
                if y.requires_grad:  # a frozen first stage has nothing to do
                    torch.autograd.backward(y, received)
                out = None if x is None else x.grad  # (B, T, d)
            self.events.append((what, i, start, time.time()))
            self.wait(sent.get(what))  # one message is on its way down, and one up
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
        pieces = [torch.linalg.vector_norm(x, dtype=torch.float64) for g in mine for x in g.split(1 << 18)]
        square = sum((x**2 for x in pieces), torch.zeros((), dtype=torch.float64, device=self.table.device))
        dist.all_reduce(square)
        norm = square.sqrt().item() / loss_scale
        factor = (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / loss_scale
        if square.isfinite():
            in_fp32 = "grad_scale" in inspect.signature(self.optimizer.step).parameters  # adamw.py's
            for p in () if in_fp32 else trained:
                p.grad.mul_(factor)
            self.optimizer.step(**({"grad_scale": factor} if in_fp32 else {}))
        self.optimizer.zero_grad()
        self.may_step = False
        return norm

    @contextmanager
    def whole(self):
        """Inside this `with`, which all ranks enter, each has the whole model: to evaluate, generate or save it."""
        for t, stages in self.stages_of.items():
            if self.stage not in stages:
                t.data = t.new_empty(t.shape)
            broadcast(t, stages[0])
        for name, module in self.others.items():
            replace(self.model, name, module.train(self.model.training))
        self.may_call = True
        try:
            yield self.model
        finally:
            self.may_call = False
            self.take_away()

    def take_away(self):
        """Keeps this stage's layers. Those of others are skipped, and each of their tensors shrinks to one number."""
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
            on_host = {key: x.cpu() if x.dim() else x.item() for key, x in kept.items() if torch.is_tensor(x)}
            mine[self.names[p]] = kept | on_host
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
            if p.dtype.itemsize >= 4 or len(kept) == 1:  # a parameter in fp32 is its own master copy
                del kept["master"]
            kept |= {key: x.to(p.device, copy=True) for key, x in kept.items() if torch.is_tensor(x) and x.dim()}
            self.optimizer.state[p] = kept

    def send(self, tensor, to, group):
        """Starts to send. The tensor must stay as it is until wait()."""
        if 0 <= to < self.p:
            tensor = tensor.contiguous()
            return dist.isend(tensor, to, group), tensor, to

    def receive(self, source, group, batch):
        if 0 <= source < self.p:
            x = torch.empty(*batch["labels"].shape, self.table.size(1), dtype=self.table.dtype, device=self.table.device)
            self.wait((dist.irecv(x, source, group), x, source))
            return x

    def wait(self, message):
        try:
            _ = message and message[0].wait()
        except RuntimeError as error:
            raise RuntimeError(f"rank {self.stage} waits for rank {message[2]}, which died or hangs: {error}") from None

    def check_call(self, *_):
        if not self.may_call:
            raise Error("the model is split: call pipeline.backward(batches), or the model inside pipeline.whole()")

    def timeline(self):
        """[[(what, i, start, end), ...] of each stage] of the last step, by each one's own clock; on rank 0."""
        stages = [None] * self.p if self.stage == 0 else None
        dist.gather_object(self.events, stages)
        return stages


# ------------------------------------------------------------------------------------------------------------ timeline


def scaled(timeline, width):
    """[(stage, what, i, start, end)], with times from 0 to width."""
    events = [(s, *event) for s, stage in enumerate(timeline) for event in stage]
    first, last = min(event[3] for event in events), max(event[4] for event in events)
    return [(*event[:3], *((t - first) / (last - first) * width for t in event[3:])) for event in events]


def waiting(timeline):
    """The bubble as measured: the share of the time in which a stage does not compute, the mean over stages."""
    return 1 - sum(end - start for *_, start, end in scaled(timeline, 1)) / len(timeline)


def draw(timeline, width):
    """A line for each stage, a character for each slot of time: a, b, ... forward, A, B, ... backward, . waits."""
    rows = [["."] * width for _ in timeline]
    for stage, what, i, start, end in scaled(timeline, width):
        start, end = round(start), round(end)
        rows[stage][start:end] = chr(ord("a" if what == "F" else "A") + i % 26) * (end - start)
    return "\n".join(map("".join, rows))


def svg(timeline, width=960, height=24):
    """The same as a picture: forward blue, backward green, each with the number of its micro-batch."""
    shapes = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height * len(timeline)}" font-size="12">']
    for stage, what, i, start, end in scaled(timeline, width):
        place, color = f'y="{stage * height}" height="{height - 2}"', "#9ecae1" if what == "F" else "#a1d99b"
        shapes.append(f'<rect x="{start:.1f}" width="{end - start:.1f}" {place} fill="{color}"/>')
        shapes.append(f'<text x="{(start + end) / 2:.1f}" y="{stage * height + 16}" text-anchor="middle">{i}</text>')
    return "\n".join([*shapes, "</svg>"])


# ------------------------------------------------------------------------------------------------------------ plumbing

PARTS = {  # by config.model_type: layers before the blocks, the blocks, layers after them
    "gpt2": (["transformer.wte", "transformer.wpe", "transformer.drop"], "transformer.h", ["transformer.ln_f", "lm_head"]),
    "llama": (["model.embed_tokens"], "model.layers", ["model.norm", "lm_head"]),
}  # fmt: skip


def split(model, p):
    """[{name: module} of each stage]."""
    modules = dict(model.named_modules(remove_duplicate=False))
    before, blocks, after = PARTS.get(getattr(getattr(model, "config", None), "model_type", None), ([], None, []))
    if blocks not in modules:
        raise Error(f"a pipeline takes models of the type {' or '.join(PARTS)}, not a {type(model).__name__}")
    blocks = [f"{blocks}.{i}" for i in range(len(modules[blocks]))]
    if p > len(blocks) + 1:
        raise Error(f"{len(blocks)} blocks and the head make at most {len(blocks) + 1} stages, not {p}")
    sizes = partition([cost(modules[name]) for name in blocks] + [sum(cost(modules[name]) for name in after)], p)
    stages = [blocks[sum(sizes[:s]) : sum(sizes[: s + 1])] for s in range(p)]
    stages[0] = before + stages[0]
    stages[-1] = stages[-1] + after
    return [{name: modules[name] for name in stage if name in modules} for stage in stages]


def cost(module):
    """The weights of its matrices. Its time is proportional to them, and in units of the head the factor drops out."""
    total = 0
    for m in module.modules():
        if hasattr(m, "in_features"):  # a quantized weight has another shape
            total += m.in_features * m.out_features
        else:
            total += sum(p.numel() for p in m.parameters(recurse=False) if p.dim() > 1)
    return total


def stages_of_tensors(stages, names):
    """{parameter or buffer: [stages that use it]}."""
    found = {}
    for s, stage in enumerate(stages):
        for t in {t: 0 for m in stage.values() for t in (*m.parameters(), *m.buffers())}:
            found.setdefault(t, []).append(s)
    for t, name in names.items():
        if t not in found:
            raise Error(f"{name} is in no block, embedding or head, and so in no stage")
        if found[t] not in ([found[t][0]], [0, len(stages) - 1]):
            raise Error(f"{name} is used by stages {found[t]}: only the first and the last may share a parameter")
    return found


def replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def broadcast(tensor, source):
    sent = tensor.detach().contiguous()
    dist.broadcast(sent.view(-1).view(torch.uint8), source)  # as bytes: of any dtype
    tensor.data.copy_(sent)


# ------------------------------------------------------------------------------------------------------- demonstration


class Toy(nn.Module):
    """Four blocks that sleep in place of computing, so that four ranks need no four cores."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.config, self.model, self.lm_head = SimpleNamespace(model_type="llama"), nn.Module(), nn.Identity()
        self.model.embed_tokens, self.model.norm = nn.Embedding(8, 8), nn.Identity()
        self.model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, use_cache=False):
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.model.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                time.sleep(self.seconds)
                x.register_hook(lambda dx: time.sleep(2 * self.seconds))
        return SimpleNamespace(logits=x, loss=None if labels is None else x.square().mean())


def demonstrate(rank, path, p=4, m=8):
    dist.init_process_group("gloo", f"file://{path}", timedelta(seconds=30), p, rank)
    ids, most = torch.arange(6).view(1, 6), [None] * p
    for schedule in ("gpipe", "1f1b"):
        pipeline = Pipeline(Toy(seconds=0.008), None, schedule=schedule)  # there is no step()
        for n in (1, m):  # the first time makes the connections
            pipeline.backward([{"input_ids": ids, "labels": ids}] * n)
        timeline = pipeline.timeline()
        dist.all_gather_object(most, pipeline.most_alive)
        if rank == 0:
            print(f"{schedule}: waiting {waiting(timeline):.3f}, formula {bubble(p, m):.3f}; most alive {most}")
            print(draw(timeline, 33))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(demonstrate, (f"{folder}/store",), nprocs=4, start_method="fork")
