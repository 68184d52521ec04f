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
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanopeft import gpt, lora, pipeline, qlora
from nanopeft.adamw import AdamW
from nanopeft.pipeline import Error, Pipeline, actions, bubble, partition

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
    if kind in ("lora", "lora top"):
        lora.add_lora(model, r=3) if kind == "lora" else lora.add_lora(model, ["h.2.mlp.c_fc"], r=3)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    if kind == "qlora":
        qlora.add_qlora(model, r=3)
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


def train(kind, m, schedule, steps=20, clip=None, dtype="float64", cls="torch", start=None):
    """Trains on this job's ranks: losses, norms, parameters after it, and the state."""
    model = model_of(kind, getattr(torch, dtype), seed=100 * dist.get_rank())  # rank 0's parameters must be taken
    optimizer = optimizer_of(model, AdamW if cls == "ours" else torch.optim.AdamW)
    pipe, losses, norms = Pipeline(model, optimizer, schedule=schedule), [], []
    if start is not None:
        pipe.load_state_dict(start)
    for step in range(steps):
        losses.append(pipe.backward(batches_of(step, m)))
        norms.append(pipe.step(clip))
    state = pipe.state_dict()
    with pipe.whole():
        return losses, norms, trained(model), state


def alone(kind, m, steps=20, clip=None, dtype="float64", cls="torch", start=0):
    """The same in one process, with torch's own clipping."""
    model = model_of(kind, getattr(torch, dtype))
    optimizer = optimizer_of(model, AdamW if cls == "ours" else torch.optim.AdamW)
    losses, norms = [], []
    for step in range(start, start + steps):
        batches = batches_of(step, m)
        total, loss = sum(map(count, batches)), 0.0
        for batch in batches:
            part = model(**batch).loss * (count(batch) / total)
            part.backward()
            loss += part.item()
        losses.append(loss)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, trained(model)


# ---------------------------------------------------------------------------------------------------------- processes


def serve(sockets):
    """Forks a worker for each socket: reads (job, arguments, settings, rank, world, store), answers (error, result)."""
    torch.set_num_threads(1)
    mine = next((fd for fd in sockets[1:] if os.fork() == 0), sockets[0])
    for fd in set(sockets) - {mine}:  # or the socket of a worker that dies stays open in the others
        os.close(fd)
    file = socket.socket(fileno=mine).makefile("rwb")
    while True:
        try:
            name, arguments, how, rank, world, path = pickle.load(file)
        except EOFError:
            return
        store = dist.FileStore(path, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT))
        try:
            answer = None, globals()[name](*arguments, **how)
        except Exception:
            answer = f"rank {rank}: {traceback.format_exc()}", None
        if dist.is_initialized():
            dist.destroy_process_group()
        pickle.dump(answer, file)
        file.flush()


class Ranks:
    """Four workers; `job(world, name, ...)` gives the result of each rank."""

    def __init__(self):
        self.server, self.folder = None, tempfile.TemporaryDirectory()

    def start(self):
        self.sockets, theirs = zip(*(socket.socketpair() for _ in range(4)))
        self.files = [own.makefile("rwb") for own in self.sockets]
        fds = [other.fileno() for other in theirs]
        self.server = subprocess.Popen(
            [sys.executable, __file__, "serve", *map(str, fds)], pass_fds=fds, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DIST_INIT_BARRIER": "1"},
        )  # fmt: skip
        for other in theirs:
            other.close()

    def stop(self):
        if self.server:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            self.server = None

    def job(self, world, name, *arguments, **how):
        if not self.server:
            self.start()
        path = tempfile.mktemp(dir=self.folder.name)
        for rank, file in enumerate(self.files[:world]):
            pickle.dump((name, arguments, how, rank, world, path), file)
            file.flush()
        deadline, answers, files = time.monotonic() + LIMIT, {}, dict(zip(self.sockets[:world], self.files))
        while len(answers) < world and (ready := select.select([*files], [], [], max(0, deadline - time.monotonic()))[0]):
            for own in ready:
                rank = self.sockets.index(own)
                try:
                    answers[rank] = pickle.load(files.pop(own))
                except (EOFError, ConnectionError, pickle.UnpicklingError):
                    answers[rank] = f"rank {rank} died", None
            if any(error for error, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 10)  # the others wait for the one that failed: not for long
        errors = [error for error, _ in answers.values() if error]
        if len(answers) < world or any(error.endswith(" died") for error in errors):
            self.stop()
            errors = errors or [f"{name} on {world} ranks did not end in {LIMIT} s"]
        if errors:
            raise RuntimeError("\n".join(errors))
        return [answers[rank][1] for rank in range(world)]


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.stop()
    pool.folder.cleanup()


# ------------------------------------------------------------------------------------------------------------ training


def largest(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def assert_equal(results, expected, tolerance=1e-12):
    losses, norms, params = expected
    for found in results:
        assert found[0] == pytest.approx(losses, rel=tolerance)
        assert found[1] == pytest.approx(norms, rel=tolerance)
        assert largest(found[2], params) < tolerance


SOME = [(2, 3, "1f1b"), (3, 5, "gpipe"), (4, 8, "1f1b"), (4, 2, "1f1b"), (1, 2, "gpipe")]


@pytest.mark.parametrize("p, m, schedule", [*SOME, *(pytest.param(*x, marks=thorough) for x in EVERY if x not in SOME)])
def test_equals_one_process(ranks, p, m, schedule):
    """After 20 steps of m micro-batches, clipped, losses, norms and parameters are those of one process, to 1e-12."""
    expected = alone("full", m, clip=0.5)
    assert_equal(ranks.job(p, "train", "full", m, schedule, clip=0.5), expected)
    assert min(expected[1]) > 0.5  # clipping had something to do
    assert largest(expected[2], trained(model_of("full"))) > 0.05


if __name__ == "__main__":
    serve(list(map(int, sys.argv[2:])))
