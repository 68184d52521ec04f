# SPDX-License-Identifier: MIT
"""What nanopeft/pipeline.py claims, held against one process on the whole batch.

Messages are tested twice: on real gloo processes, and for every (p, m, schedule) on threads with a network that knows
when all of them wait. Four processes are started once and take jobs, functions of this file. Every wait has an end.
"""

import copy
import itertools
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import test_zero

from nanopeft import gpt, lora, pipeline, prefix, prompt, qlora
from nanopeft.adamw import AdamW
from nanopeft.pipeline import Error, Pipeline, actions, bubble, partition
from nanopeft.trainer.engine import OneProcess

SHAPE = dict(vocab_size=23, n_positions=9, n_embd=8, n_layer=3, n_head=2)
SCHEDULES = ("gpipe", "1f1b")
LIMIT = 60  # seconds for a job
EVERY = [(p, m, schedule) for p in (1, 2, 3, 4) for m in range(1, 9) for schedule in SCHEDULES]
thorough = pytest.mark.thorough

# ------------------------------------------------------------------------------------------------ jobs, in the workers


def model_of(kind, dtype=torch.float64, seed=0):
    """A small model, the same for the same seed."""
    torch.manual_seed(seed)
    if kind in ("hf gpt2", "hf llama", "hf llama tied"):
        import transformers

        if kind == "hf gpt2":
            off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, **off))
        else:
            sizes = dict(vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2)
            sizes |= dict(num_key_value_heads=1, tie_word_embeddings=kind.endswith("tied"))
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        return model.to(dtype)
    model = gpt.GPT(**SHAPE).to(dtype)
    if kind == "untied":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 0.9)
    if kind == "lora":
        lora.add_lora(model, r=3)
    if kind == "lora top":
        lora.add_lora(model, ["h.2.mlp.c_fc"], r=3)
    if kind == "qlora":  # it quantizes fp32, fp16 and bf16
        model = qlora.add_qlora(model.float(), r=3)
        for p in model.parameters():  # not the scales, which are buffers
            p.data = p.data.to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def batches_of(step, m, seed=0):
    """Micro-batches of another number of rows, of tokens and of labels each; one row is padded on the left."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    draw = lambda low, high: torch.randint(low, high, (1,), generator=generator).item()  # noqa: E731
    batches = []
    for _ in range(m):
        B, T = draw(1, 3), draw(4, 10)
        ids = torch.randint(SHAPE["vocab_size"], (B, T), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[0, draw(2, T) :] = -100
        mask[0, 0], labels[0, 0] = 0, -100
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches


def count(batch):
    return (batch["labels"][:, 1:] != -100).sum().item()


def optimizer_of(model, cls=torch.optim.AdamW):
    return cls([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-4, weight_decay=0.1)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(kind, m, schedule, steps=20, clip=None, dtype="float64", cls="torch", start=None, first=0):
    """Trains on this job's ranks: losses, norms, parameters after it, and the state."""
    model = model_of(kind, getattr(torch, dtype), seed=100 * dist.get_rank())  # rank 0's parameters must be taken
    optimizer = optimizer_of(model, AdamW if cls == "ours" else torch.optim.AdamW)
    pipe, losses, norms = Pipeline(model, optimizer, schedule=schedule), [], []
    if start is not None:
        pipe.load_state_dict(start)
        before = pickle.dumps(start)
    for step in range(first, first + steps):
        losses.append(pipe.backward(batches_of(step, m)))
        norms.append(pipe.step(clip))
    state = pipe.state_dict()
    assert start is None or before == pickle.dumps(start)  # what was loaded was copied
    with pipe.whole():
        return losses, norms, trained(model), state


def unlabelled():
    """The losses and norms of a step of transformers' Llama with one micro-batch, and with another without labels."""
    found, (first, second) = [], batches_of(0, 2)
    for batches in ([first], [first, second | {"labels": torch.full_like(second["labels"], -100)}]):
        pipe = Pipeline(model := model_of("hf llama"), optimizer_of(model))
        found.append((pipe.backward(batches), pipe.step()))
    return found


def alone(kind, m, steps=20, clip=None, dtype="float64", cls="torch"):
    """The same in one process, with torch's own clipping."""
    model = model_of(kind, getattr(torch, dtype))
    optimizer = optimizer_of(model, AdamW if cls == "ours" else torch.optim.AdamW)
    losses, norms = [], []
    for step in range(steps):
        batches = batches_of(step, m)
        total, loss = sum(map(count, batches)), 0.0
        for batch in batches:
            part = model(**batch).loss
            (part * (count(batch) / total)).backward()
            loss += part.item() * (count(batch) / total)
        losses.append(loss)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, trained(model)


class Box:
    """A tensor that autograd has saved, and the bytes of all of them."""

    live = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        Box.live += tensor.nbytes

    def __del__(self):
        Box.live -= self.tensor.nbytes


def activations(ms, schedule):
    """For each number m the most bytes that autograd keeps for backward, and outputs of the stage, after a forward."""
    model, peaks = model_of("full"), []
    pipe = Pipeline(model, optimizer_of(model), schedule=schedule)
    real = pipe.forward
    for m in ms:
        seen, outputs, n_outputs = [], [], []

        def forward(*args, seen=seen, outputs=outputs, n_outputs=n_outputs, **how):
            with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
                y = real(*args, **how)
            seen.append(Box.live)
            outputs.append(weakref.ref(y))
            n_outputs.append(sum(output() is not None for output in outputs))
            return y

        pipe.forward = forward
        pipe.backward([batches_of(0, 1)[0]] * m)
        peaks.append((max(seen), max(n_outputs)))
        assert Box.live == 0
    return peaks


def messages(kind, m, rows):
    """[(from, to, elements)] of what this rank sends in a step, and the elements of its all-reduces."""
    model, sent, reduced = model_of(kind), [], []
    pipe, real, rank = Pipeline(model, optimizer_of(model)), (dist.isend, dist.all_reduce), dist.get_rank()
    ids = torch.arange(6 * rows).view(rows, 6) % 23
    dist.isend = lambda x, to, group: sent.append((rank, to, x.numel())) or real[0](x, to, group)
    dist.all_reduce = lambda x, **how: reduced.append(x.numel()) or real[1](x, **how)
    try:
        pipe.backward([{"input_ids": ids, "labels": ids}] * m)
        pipe.step()
    finally:
        dist.isend, dist.all_reduce = real
    return sent, reduced


def elements():
    """Numbers in this rank's memory for the model: when split, inside whole(), and after it."""
    model = model_of("full")
    pipe, counts = Pipeline(model, optimizer_of(model)), []

    def count_them():
        counts.append(sum(t.untyped_storage().size() // 8 for t in {*model.parameters(), *kept}))

    kept = [t for m in pipe.others.values() for t in m.parameters()]
    count_them()
    with pipe.whole():
        count_them()
    count_them()
    return counts


def evaluated():
    """Inside whole(), after a step: the logits, and whether the layers are as model.eval() before it has set them."""
    model = model_of("lora")
    pipe = Pipeline(model, optimizer_of(model))
    pipe.backward(batches_of(0, 2))
    pipe.step()
    model.eval()
    with pipe.whole():
        modes = {module.training for module in model.modules()}
        logits, adapter = model(torch.arange(5)[None]).logits.detach(), lora.lora_state_dict(model)
    model.train()
    pipe.backward(batches_of(1, 2))  # and it goes on
    return logits, modes, {key: t.clone() for key, t in adapter.items()}, pipe.step()


def habits():
    """The errors of what works without a pipeline, and of batches that it does not take."""
    model, errors = model_of("full"), []
    pipe, ids = Pipeline(model, optimizer_of(model)), torch.arange(5)[None]
    pipe.backward(batches_of(0, 1))
    pipe.step()
    for wrong in (
        lambda: pipe.step(), lambda: model(ids, labels=ids), lambda: pipe.backward([]),
        lambda: pipe.backward([{"input_ids": ids}]), lambda: pipe.load_state_dict({"x": {"master": ids}}),
    ):  # fmt: skip
        try:
            errors.append(wrong())
        except Error as error:
            errors.append(str(error))
    return errors


def overflow(scale):
    """Norms and whether parameters move: in the second step the last stage's gradient is infinite; fp32, scaled."""
    model = model_of("full", torch.float32)
    pipe, seen = Pipeline(model, optimizer_of(model)), []
    for step in range(3):
        before = {name: p.clone() for name, p in trained(model).items()}
        pipe.backward(batches_of(step, 2), scale)
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            pipe.trained[-1].grad.view(-1)[0] = math.inf
        norm = pipe.step(0.2, scale)
        seen.append((norm, any(not torch.equal(p, before[name]) for name, p in trained(model).items())))
    return seen


class Sleeper(nn.Module):
    """Four blocks that sleep in place of computing, so that four ranks need no four cores."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.config, self.model = seconds, SimpleNamespace(model_type="llama"), nn.Module()
        self.model.embed_tokens, self.model.norm, self.lm_head = nn.Embedding(8, 8), nn.Identity(), nn.Identity()
        self.model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, use_cache=False):
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.model.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                time.sleep(self.seconds)
                x.register_hook(lambda dx: time.sleep(2 * self.seconds))
        return SimpleNamespace(logits=x, loss=None if labels is None else x.square().mean())


def sleeping(schedule, m, seconds):
    """The timeline of a step of blocks that sleep."""
    model = Sleeper(seconds)
    pipe, ids = Pipeline(model, None, schedule=schedule), torch.arange(6)[None]
    for n in (1, m):
        pipe.backward([{"input_ids": ids, "labels": ids}] * n)
    return pipe.timeline()


def fail():
    """Rank 1 dies while the others wait for it."""
    model = model_of("full")
    pipe = Pipeline(model, optimizer_of(model))
    for step in range(10_000):
        if dist.get_rank() == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.backward(batches_of(step, 4))
        pipe.step()


# ------------------------------------------------------------------------------- threads on a network that is watched


class Deadlock(Exception):
    pass


class Network:
    """In the place of torch.distributed, for threads. A message is there once both sides have posted it, as in gloo:
    a send is a rendezvous. in_order, as in NCCL: in a group, a rank's messages with another start one after the other,
    whatever their direction. When all ranks wait and nothing moves, each gets a Deadlock.
    """

    def __init__(self, p, *, blocking=False, in_order=False, one_group=False):
        self.p, self.blocking, self.in_order, self.one_group = p, blocking, in_order, one_group
        self.local, self.lock, self.running = threading.local(), threading.Condition(), p
        self.posted, self.waiting, self.failed = [], [], []

    is_available = is_initialized = lambda self: True
    get_rank = lambda self: self.local.rank  # noqa: E731
    get_world_size = lambda self: self.p  # noqa: E731
    broadcast = all_reduce = lambda self, *args, **how: None  # noqa: E731

    def new_group(self, ranks=None):
        self.local.groups = getattr(self.local, "groups", 0) + (not self.one_group)
        return self.local.groups

    def isend(self, x, to, group):
        work = self.post(("send", self.local.rank, to, group, x))
        if self.blocking:
            work.wait()
        return work

    def irecv(self, x, source, group):
        return self.post(("receive", source, self.local.rank, group, x))

    def post(self, message):
        work = SimpleNamespace(done=False, by=self.local.rank, message=message, wait=lambda: self.wait(work))
        with self.lock:
            assert all(w.message[:4] != message[:4] for w in self.posted), "two messages are on their way at once"
            self.posted.append(work)
            while pair := self.meeting():
                pair[1].message[4].copy_(pair[0].message[4].detach())
                for w in pair:
                    w.done = True
                    self.posted.remove(w)
            self.lock.notify_all()
        return work

    def meeting(self):
        """A send and the receive of the same message, each the first of its kind in its rank's order."""
        firsts = {}
        for w in self.posted:
            what, source, to, group, _ = w.message
            queue = (w.by, group, frozenset((source, to))) if self.in_order else (w.by, group, what, source, to)
            firsts.setdefault(queue, w)
        firsts = {(*w.message[:4],): w for w in firsts.values()}
        for (what, *rest), w in firsts.items():
            if what == "send" and (other := firsts.get(("receive", *rest))):
                return w, other

    def wait(self, work):
        with self.lock:
            self.waiting.append(work)
            while not work.done:
                if self.failed or sum(not w.done for w in self.waiting) == self.running:
                    self.lock.notify_all()
                    raise Deadlock("all ranks wait")
                self.lock.wait(timeout=10)
            self.waiting.remove(work)

    def run(self, job):
        """job(rank) on each rank; raises Deadlock if there was one."""

        def thread(rank):
            self.local.rank = rank
            try:
                job(rank)
            except BaseException as error:
                self.failed.append(error)
            with self.lock:
                self.running -= 1
                self.lock.notify_all()

        real, pipeline.dist = pipeline.dist, self
        try:
            threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(self.p)]
            [t.start() for t in threads]
            [t.join() for t in threads]
        finally:
            pipeline.dist = real
        if self.failed:
            raise self.failed[0]


def gradients(model, p, m, schedule, **network):
    """The stages' gradients of one step on p threads, those of a tied parameter added up, and the last stage's loss."""
    models, grads, losses = [copy.deepcopy(model) for _ in range(p)], [], {}

    def job(rank):
        pipe = Pipeline(models[rank], None, schedule=schedule)
        losses[rank] = pipe.backward(batches_of(0, m))
        grads.extend((pipe.names[q], q.grad) for q in pipe.trained)

    Network(p, **network).run(job)
    return {name: sum(g for other, g in grads if other == name) for name, _ in grads}, losses[p - 1]


# ---------------------------------------------------------------------------------------------------------- processes


ranks = test_zero.worker_pool(__file__, patience=10)  # for each to say which rank it waited for


# ----------------------------------------------------------------------------------------------------------- schedules


MEGATRON = """
F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7
F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7
F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7
F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7
"""


def test_schedules():
    """Each stage does every F and B once and in order, and keeps at most m micro-batches alive in GPipe, min(m, p - s)
    in 1F1B. For p = 4 and m = 8 1F1B is Megatron's."""
    for p, m, schedule in itertools.product(range(1, 7), range(1, 11), SCHEDULES):
        for s in range(p):
            todo = actions(s, p, m, schedule)
            assert [[i for what, i in todo if what == kind] for kind in "FB"] == [list(range(m))] * 2
            live = list(itertools.accumulate(1 if what == "F" else -1 for what, _ in todo))
            assert max(live) == (m if schedule == "gpipe" else min(m, p - s)) and min(live) == live[-1] == 0
    lines = [" ".join(f"{what}{i}" for what, i in actions(s, 4, 8, "1f1b")) for s in range(4)]
    assert lines == MEGATRON.split("\n")[1:-1]


def test_bubble():
    """With equal stages both schedules wait for exactly (p - 1) / (m + p - 1) of the time, whatever forward and
    backward take; the docstring's diagrams and its numbers for GPT-2 are those of a machine without messages."""
    for p, m, schedule in EVERY:
        for backward in (1, 2, 3):
            timeline = pipeline.simulate(m, schedule, [1] * p, [backward] * p)
            assert pipeline.waiting(timeline) == pytest.approx(bubble(p, m), abs=1e-12)
    assert [f"{bubble(4, m):.0%}" for m in (8, 32)] == ["27%", "9%"]
    for schedule in SCHEDULES:
        for line in pipeline.draw(pipeline.simulate(8, schedule, [1] * 4, [2] * 4), 33).split("\n"):
            assert line in pipeline.__doc__
        head = 50257 * 768 / (12 * 768**2)  # of a block's weights
        assert round(head, 2) == 5.45
        for stages, said in (([3, 3, 3, 3 + head], 0.54), ([4, 4, 4, head], 0.37)):
            timeline = pipeline.simulate(8, schedule, stages, [2 * t for t in stages])
            assert round(pipeline.waiting(timeline), 2) == said and f"{said:.0%}".replace("%", " %") in pipeline.__doc__


def test_balance_of_gpt2():
    """The head of GPT-2 weighs 5.45 blocks, also under LoRA and over a quantized base, and its four stages are
    4, 4, 4 blocks and the head alone."""
    with torch.device("meta"):
        model = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    for p, blocks in ((1, [12]), (2, [9, 3]), (4, [4, 4, 4, 0])):
        assert [sum(".h." in name for name in stage) for stage in pipeline.split(model, p)] == blocks
    assert list(pipeline.split(model, 4)[3]) == ["transformer.ln_f", "lm_head"]
    block = pipeline.cost(model.transformer.h[0])
    assert round(pipeline.cost(model.lm_head) / block, 2) == 5.45
    small, quantized = (model_of(kind, torch.float32).transformer.h[0] for kind in ("full", "qlora"))
    added = sum(p.numel() for name, p in quantized.named_parameters() if "lora_" in name)
    assert pipeline.cost(quantized) == pipeline.cost(small) + added
    lora.add_lora(model, r=8)
    assert 1 < pipeline.cost(model.transformer.h[0]) / block < 1.02


@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=8), p=st.integers(1, 8))
@settings(deadline=None, max_examples=50)
def test_partition(costs, p):
    """No other cut makes the slowest stage faster; of those that make it as fast, the next slowest is the fastest."""
    p = min(p, len(costs))

    def stages(cuts):
        return sorted((sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)))), reverse=True)

    best = min(stages(cuts) for cuts in itertools.combinations(range(1, len(costs)), p - 1))
    sizes = partition(costs, p)
    assert sum(sizes) == len(costs) and min(sizes) > 0 and len(sizes) == p
    assert stages(list(itertools.accumulate(sizes))[:-1]) == best


# ------------------------------------------------------------------------------------------------------------ deadlocks


def gradients_alone(kind, m):
    """(gradients, loss) of one process."""
    model, batches, loss = model_of(kind), batches_of(0, m), 0.0
    for batch in batches:
        part = model(**batch).loss
        (part * (count(batch) / sum(map(count, batches)))).backward()
        loss += part.item() * count(batch) / sum(map(count, batches))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss


@pytest.mark.parametrize("in_order, every", [
    (False, EVERY), (True, [(2, 2, "1f1b"), (4, 6, "1f1b")]), pytest.param(True, EVERY, marks=thorough)
], ids=["gloo", "nccl", "nccl, all"])  # fmt: skip
def test_no_schedule_deadlocks(in_order, every):
    """Every schedule with p up to 4 and m up to 8 runs to its end where a send waits for its receive, and where a
    rank's messages start one after the other; its gradients are those of one process."""
    model, expected = model_of("full"), {m: gradients_alone("full", m) for _, m, _ in every}
    for p, m, schedule in every:
        grads, loss = gradients(model, p, m, schedule, in_order=in_order)
        assert loss == pytest.approx(expected[m][1], rel=1e-12) and largest(grads, expected[m][0]) < 1e-13


@pytest.mark.parametrize("kind", ["hf llama tied", "hf gpt2", "untied", "lora top"])
def test_gradients_of_other_models(kind):
    """So are those of transformers' Llama and GPT-2, of an untied head, and with nothing trained in the first stage."""
    grads, loss = gradients(model_of(kind), 3, 2, "1f1b")
    expected, said = gradients_alone(kind, 2)
    grads = {name: g for name, g in grads.items() if g is not None}
    assert loss == pytest.approx(said, rel=1e-12) and largest(grads, expected) < 1e-12


@pytest.mark.parametrize("network", [dict(blocking=True), dict(in_order=True, one_group=True)], ids=str)
def test_deadlocks_are_found(network):
    """The network above finds the two that are avoided: with sends that block, and with one group for both ways in
    NCCL, 1F1B of every p > 1 and m > 1 stands still."""
    model = model_of("full")
    for p, m in ((2, 2), (2, 8), (3, 4), (4, 8)):
        with pytest.raises(Deadlock):
            gradients(model, p, m, "1f1b", **network)


# ------------------------------------------------------------------------------------------------------------ training


def largest(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def assert_equal(results, expected):
    (losses, norms, params), tolerance = expected, 1e-12
    for found in results:
        assert found[0] == pytest.approx(losses, rel=tolerance)
        assert found[1] == pytest.approx(norms, rel=tolerance)
        assert largest(found[2], params) < tolerance


SOME = [(3, 5, "gpipe"), (4, 8, "1f1b"), (2, 1, "1f1b"), (1, 2, "gpipe")]
SOME += [pytest.param(*x, marks=thorough) for x in EVERY if x not in SOME]


@pytest.mark.parametrize("p, m, schedule", SOME)
def test_equals_one_process(ranks, p, m, schedule):
    """After 20 steps of m micro-batches, clipped, losses, norms and parameters are those of one process, to 1e-12."""
    expected = alone("full", m, clip=0.2)
    assert_equal(ranks.job(p, "train", "full", m, schedule, clip=0.2), expected)
    assert min(expected[1]) > 0.2  # clipping had something to do
    assert largest(expected[2], trained(model_of("full"))) > 0.05


KINDS = [("lora", 3), *(pytest.param(kind, p, marks=thorough) for kind, p in (
    ("lora", 2), ("lora", 4), ("lora top", 3), ("untied", 3), ("qlora", 2), ("hf gpt2", 3), ("hf llama", 4)
))]  # fmt: skip


@pytest.mark.parametrize("kind, p", KINDS, ids=str)
def test_kinds_of_models(ranks, kind, p):
    """The same with LoRA, a frozen first stage, an untied head, a 4-bit base, and transformers' GPT-2 and Llama."""
    assert_equal(ranks.job(p, "train", kind, 3, "1f1b", clip=0.1), alone(kind, 3, clip=0.1))


@thorough
@pytest.mark.parametrize("dtype, cls, tolerance", [("float32", "torch", 1e-4), ("bfloat16", "ours", 0.05)])
def test_other_dtypes(ranks, dtype, cls, tolerance):
    """fp32 and bf16, the latter with an fp32 master copy, follow one process as closely as their rounding lets them."""
    for losses, norms, *_ in ranks.job(3, "train", "full", 3, "1f1b", dtype=dtype, cls=cls):
        expected, expected_norms, _ = alone("full", 3, dtype=dtype, cls=cls)
        assert losses == pytest.approx(expected, rel=tolerance)
        assert norms == pytest.approx(expected_norms, rel=tolerance)


def test_a_micro_batch_without_labels_adds_nothing(ranks):
    """Its mean loss is 0 / 0, but it has no share in the step's."""
    for alone, together in ranks.job(2, "unlabelled"):
        assert together == pytest.approx(alone, rel=1e-12) and alone[1] > 0


def test_overflow_and_loss_scale(ranks):
    """A gradient that is infinite on one stage skips the step on all. The norm is the true one whatever the scale."""
    scaled, plain = (ranks.job(3, "overflow", scale) for scale in (2.0**8, 1.0))
    for seen, unscaled in zip(scaled, plain):
        assert [moved for _, moved in seen] == [True, False, True]
        assert [math.isfinite(norm) for norm, _ in seen] == [True, False, True]
        assert [norm for norm, _ in seen[::2]] == pytest.approx([norm for norm, _ in unscaled[::2]], rel=1e-5)


# ------------------------------------------------------------------------------------------------- memory and messages


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_live_activations(ranks, schedule):
    """Stage s keeps the activations of at most min(m, p - s) micro-batches in 1F1B and of m in GPipe, in bytes."""
    ms = [1, 2, 6]
    for s, found in enumerate(ranks.job(4, "activations", ms, schedule)):
        alive, (peaks, outputs) = [m if schedule == "gpipe" else min(m, 4 - s) for m in ms], map(list, zip(*found))
        assert peaks == [peaks[0] * n for n in alive]
        assert all(n <= most + 1 for n, most in zip(outputs, alive))  # one more is in a variable, not yet overwritten
    assert peaks[0] > 8 * SHAPE["vocab_size"] * SHAPE["n_embd"]  # on the last stage the head's gradient is among them


def test_messages(ranks):
    """Each of the p - 1 borders carries m activations down and m gradients up, of B·T·d numbers; the table's gradient
    is added up between the first and the last stage if it is tied and trained, and not with LoRA."""
    p, m, rows = 3, 4, 2
    size, table = rows * 6 * SHAPE["n_embd"], SHAPE["vocab_size"] * SHAPE["n_embd"]
    for kind, ends in (("full", [table]), ("lora", []), ("untied", [])):
        sent, reduced = zip(*ranks.job(p, "messages", kind, m, rows))
        borders = [(0, 1), (1, 2), (1, 0), (2, 1)]
        assert sorted(sum(sent, [])) == sorted((a, b, size) for a, b in borders for _ in range(m))
        assert list(reduced) == [[*ends, 1], [1], [*ends, 1]]  # and one number, the norm
    message, number, table = 4 * 256 * 768, 2 * (4 - 1) * 8, 4 * 50257 * 768  # GPT-2 in fp32, p = 4, m = 8
    assert (message, number) == (786_432, 48) and round(number * message / 1e6, 1) == 37.7
    assert round(table / 1e6) == 154 and round(table / (number * message)) == 4


def test_each_rank_holds_its_stage(ranks):
    """Between steps a rank holds its own layers and one number of each tensor of the others; inside whole() all."""
    model = model_of("full")
    total = sum(p.numel() for p in model.parameters())
    for s, counts in enumerate(ranks.job(3, "elements")):
        assert counts[1] == total and counts[0] == counts[2]
        own = {p for name, m in pipeline.split(model, 3)[s].items() for p in m.parameters()}
        absent = {p for p in model.parameters()} - own
        assert counts[0] == sum(p.numel() for p in own) + len(absent)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("cls", ["torch", pytest.param("ours", marks=thorough)])
def test_resume_with_another_number_of_stages(ranks, cls):
    """A run stopped on 3 stages goes on on 2 and on one process's engine as if nothing had been, and one of ours from
    there; the checkpoint names whole parameters, in the model's order, and is on rank 0 alone."""
    expected = alone("full", 2, steps=6, cls=cls)[2]
    first = ranks.job(3, "train", "full", 2, "1f1b", steps=3, cls=cls)
    state, nothing = first[0][3], [found[3] for found in first[1:]]
    moments = ("exp_avg", "exp_avg_sq") if cls == "torch" else ("m", "v")
    for name, p in model_of("full").named_parameters():
        shapes = {"master": p.shape, **dict.fromkeys(moments, p.shape)}
        assert {key: x.shape for key, x in state[name].items() if key != "step"} == shapes and state[name]["step"] == 3
    assert list(state) == [name for name, _ in model_of("full").named_parameters()] and nothing == [{}, {}]
    second = ranks.job(2, "train", "full", 2, "gpipe", steps=3, cls=cls, first=3, start=state)
    assert largest(second[0][2], expected) < 1e-12
    assert largest({name: kept["master"] for name, kept in second[0][3].items()}, expected) < 1e-12
    if cls == "ours":
        model = model_of("full")
        params = dict(model.named_parameters())
        engine = OneProcess(model, params, optimizer_of(model, AdamW))
        engine.load_state_dict(state)
        for step in (3, 4, 5):
            for batch in (batches := batches_of(step, 2)):
                engine.backward(model(**batch).loss * (count(batch) / sum(map(count, batches))))
            engine.optimizer.step()  # its own step() takes no fp64
            engine.optimizer.zero_grad()
        assert largest(trained(model), expected) < 1e-12
        again = ranks.job(4, "train", "full", 2, "1f1b", steps=0, cls=cls, start=engine.state_dict())
        assert largest(again[0][2], trained(model)) == 0


@pytest.mark.parametrize("cls", ["torch", "ours"])
def test_a_resumed_runs_checkpoint_has_its_weights(ranks, cls):
    """In bf16 the masters that are saved after a resume are those of the last step, and not what was loaded."""
    how = dict(dtype="bfloat16", cls=cls)
    start = ranks.job(2, "train", "full", 2, "1f1b", steps=1, **how)[0][3]
    _, _, params, state = ranks.job(2, "train", "full", 2, "1f1b", steps=2, first=1, start=start, **how)[0]
    assert all(torch.equal(state[name]["master"].bfloat16(), p) for name, p in params.items())


def test_whole(ranks):
    """Inside whole() each rank has the whole model in the mode that was set: same logits as one process, and an
    adapter to save; afterwards training goes on."""
    model = model_of("lora")
    optimizer = optimizer_of(model)
    norms = []
    for step in (0, 1):
        for batch in (batches := batches_of(step, 2)):
            (model(**batch).loss * (count(batch) / sum(map(count, batches)))).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item())
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
            expected, adapter = model(torch.arange(5)[None]).logits, lora.lora_state_dict(model)
            adapter = {key: t.clone() for key, t in adapter.items()}
    for logits, modes, found, norm in ranks.job(3, "evaluated"):
        assert modes == {False} and (logits - expected).abs().max() < 1e-12 and largest(found, adapter) < 1e-12
        assert norm == pytest.approx(norms[1], rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ timeline


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("gpipe", marks=thorough)])
def test_timeline(ranks, schedule):
    """Every action of the schedule is in the timeline that rank 0 has, in its order, and the ranks' clocks agree: no
    forward starts before that of the stage before has ended."""
    p, m = 4, 8
    timeline, *others = ranks.job(p, "sleeping", schedule, m, 0.01)
    assert others == [None] * 3
    for stage, following in zip(timeline, timeline[1:]):
        ends = {i: end for what, i, _, end in stage if what == "F"}
        assert all(start >= ends[i] for what, i, start, _ in following if what == "F")
    assert [[event[:2] for event in stage] for stage in timeline] == [actions(s, p, m, schedule) for s in range(p)]
    assert 0 < pipeline.waiting(timeline) < 1


def test_the_drawing():
    """The text has a line for each stage, and a character for each slot of time."""
    timeline = pipeline.simulate(2, "1f1b", [1, 1], [2, 2])
    assert pipeline.draw(timeline, 9) == "ab..AA.BB\n.aAAbBB.."


# -------------------------------------------------------------------------------------------------------------- errors


def test_refuses(ranks):
    """Calls by habit and batches without labels are refused on each rank, in a line that says what is right."""
    for errors in ranks.job(2, "habits"):
        assert [error.partition(":")[0] for error in errors] == [
            "step() without gradients", "the model is split",
            *["give one or more micro-batches, each a dict of the model's arguments, labels among them"] * 2,
            "the checkpoint is of another model, or trains other parameters",
        ]  # fmt: skip


def test_refuses_what_cannot_be_divided():
    """Too many stages, another kind of model, a parameter outside of all layers, blocks that share weights, an unknown
    schedule, and no process group."""
    model = model_of("full")
    with pytest.raises(Error, match="^3 blocks and the head make at most 4 stages, not 5$"):
        pipeline.split(model, 5)
    with pytest.raises(Error, match="^a pipeline takes models of the type gpt2 or llama, not a Linear$"):
        pipeline.split(nn.Linear(2, 2), 1)
    for wrapper in (prompt.PromptTuning, prefix.PrefixTuning):
        with pytest.raises(Error, match="^a pipeline takes models of the type gpt2 or llama, not a P[a-zA-Z]*$"):
            pipeline.split(wrapper(model_of("full"), n_tokens=2), 2)
    for change, message in (
        (lambda model: setattr(model, "extra", nn.Linear(2, 2)), r"^extra.weight is in stages \[\]: it must be in one"),
        (lambda model: setattr(model.transformer.h, "1", model.transformer.h[0]), r"in stages \[0, 1\]: it"),
    ):
        changed = model_of("full")
        change(changed)
        with pytest.raises(Error, match=message):
            Network(3).run(lambda rank, changed=changed: Pipeline(copy.deepcopy(changed), None))
    with pytest.raises(Error, match="^schedule must be 'gpipe' or '1f1b', not 'zero bubble'$"):
        Pipeline(model, None, schedule="zero bubble")
    with pytest.raises(Error, match="^no process group: start with torchrun --nproc_per_node N, [^\n]*$"):
        Pipeline(model, None)


def test_a_rank_that_dies_ends_all(ranks):
    """When rank 1 of 3 is killed, the others end within 30 seconds, each with a line that names it."""
    ranks.job(3, "habits")  # the processes have started
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        ranks.job(3, "fail")
    assert time.monotonic() - began < 30
    for rank in (0, 2):
        assert re.search(f"RuntimeError: rank {rank} waits for rank 1, which died or hangs: ", str(caught.value))


def test_demonstration():
    """Run as a program the file prints the bubbles, the micro-batches alive and the timelines of its docstring."""
    done = subprocess.run(
        [sys.executable, pipeline.__file__], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert "alive [8, 8, 8, 8]" in done.stdout and "alive [4, 3, 2, 1]" in done.stdout
    assert done.stdout.count("waiting 0.273, formula 0.273") == 2
    assert all(line in pipeline.__doc__ for line in re.findall("(?m)^[a-hA-H.]{33}$", done.stdout))


if __name__ == "__main__":
    test_zero.serve(list(map(int, sys.argv[2:])), globals())
