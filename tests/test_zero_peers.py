# SPDX-License-Identifier: MIT
"""nanopeft/zero.py beside torch's DDP and FSDP2 (fully_shard), on transformers' Llama and GPT-2 in fp64.

The same batches, optimizer and clipping give the same weights after 20 steps. The workers are test_zero.py's.
"""

import math
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).parent))

import test_zero
from test_zero import SHAPE, batches_of, count, largest, trained

from nanopeft.zero import ZeRO

test_zero.LIMIT = 180  # seconds for a job: the first one waits until transformers is imported
OPTIMIZER = dict(lr=0.01, eps=1e-4, weight_decay=0.1)
thorough = pytest.mark.thorough

# ------------------------------------------------------------------------------------------------ jobs, in the workers


def model_of(name, *, tied=False, frozen=False, checkpointing=None, shared=False, late=False):
    """A model of three blocks. frozen: a block and parts of another. checkpointing: "reentrant" or "non-reentrant".
    shared: the first block is called once more, in place of the last. late: rank r sleeps r · 5 ms before a block."""
    torch.manual_seed(0)
    ids = dict(vocab_size=SHAPE["vocab_size"], bos_token_id=None, eos_token_id=None)
    common = dict(tie_word_embeddings=tied, attn_implementation="sdpa", use_cache=False, **ids)
    if name == "llama":
        common |= dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_key_value_heads=1)
        config = LlamaConfig(num_attention_heads=3, max_position_embeddings=9, **common)
        # transformers' own norm rounds to fp32 on the way, whatever the model's dtype
        with mock.patch.object(modeling_llama, "LlamaRMSNorm", torch.nn.RMSNorm):
            model = LlamaForCausalLM(config).double()
        blocks = model.model.layers
    else:
        common |= dict(n_embd=12, n_layer=3, n_head=3, n_positions=9, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(GPT2Config(**common)).double()
        blocks = model.transformer.h
    if frozen:
        blocks[1].requires_grad_(False)
        (blocks[0].self_attn.q_proj if name == "llama" else blocks[0].attn.c_attn).requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if shared:
        blocks[2] = blocks[0]
    if late:
        blocks[1].register_forward_pre_hook(lambda *_: time.sleep(0.005 * dist.get_rank()))
    return model.train(), list(dict.fromkeys(blocks))


class Peer:
    """DDP or FSDP2 as zero.py's engine. Both take the mean over ranks, and the losses here are parts of a sum."""

    def __init__(self, model, blocks, kind):
        self.module, self.model = model, torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
        for module in (*blocks, model) if kind == "fsdp" else ():
            fully_shard(module)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, **OPTIMIZER)

    def backward(self, loss):
        (loss * dist.get_world_size()).backward()

    def step(self, clip):
        norm = torch.nn.utils.clip_grad_norm_(self.params, math.inf if clip is None else clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.full(norm).item()

    def full(self, x):
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    def weights(self):
        return {name: self.full(p.detach()).clone() for name, p in self.module.named_parameters()}


def train(kind, name, *, clip=None, micro=1, steps=20, **how):
    """Weights and norms under "ddp", "fsdp", or a stage of ZeRO."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, blocks = model_of(name, **how)
    if kind in ("ddp", "fsdp"):
        engine = Peer(model, blocks, kind)
        model = engine.model
    else:
        engine = ZeRO(model, torch.optim.AdamW, blocks=blocks, stage=kind, **OPTIMIZER)
    norms = []
    for step in range(steps):
        batches = batches_of(step, micro, 6)
        total = sum(count(labels) for _, labels in batches)
        for ids, labels in batches:
            logits, labels = model(ids[rank::world]).logits[:, :-1], labels[rank::world, 1:]
            engine.backward(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total)
        norms.append(engine.step(clip))
    if isinstance(engine, Peer):
        return engine.weights(), norms
    with engine.whole():
        return trained(model), norms


# -------------------------------------------------------------------------------------------------------------- tests


ranks = test_zero.worker_pool(__file__)


ALL = dict(clip=0.3, micro=2, late=True)
DEFAULT = [
    ("llama", 2, ("fsdp", 3), dict(ALL, steps=5, frozen=True, shared=True, checkpointing="reentrant")),
    ("gpt2", 2, ("ddp", 1, 2), dict(ALL, steps=5, tied=True, shared=True, checkpointing="non-reentrant")),
]
HOWS = [
    dict(ALL), dict(tied=True), dict(frozen=True, tied=True, clip=0.3), dict(shared=True, frozen=True, micro=2),
    *(dict(checkpointing=kind, **how) for kind in ("reentrant", "non-reentrant")
      for how in ({}, dict(shared=True), dict(ALL, frozen=True, tied=True), dict(ALL, shared=True, tied=True))),
]  # fmt: skip


def kinds_of(how):
    # DDP refuses a layer that is called twice under reentrant checkpointing: each backward of the layer would mark its
    # parameters as ready. There FSDP2 is the oracle of all stages.
    return ("fsdp", 0, 1, 2, 3) if how.get("shared") and how.get("checkpointing") == "reentrant" else EVERY


EVERY = ("ddp", "fsdp", 0, 1, 2, 3)
THOROUGH = [(name, world, kinds_of(how), how) for name in ("llama", "gpt2") for world in (2, 3) for how in HOWS]


# In fp64 two orders of a sum differ by some 1e-16, which AdamW divides by √v + 1e-4 at worst and 20 steps of lr = 0.01
# add up. (With the tests' sdpa the softmax is in fp64 as well.)
@pytest.mark.parametrize("name, world, kinds, how", [
    *DEFAULT, *(pytest.param(*case, marks=thorough) for case in THOROUGH)
], ids=str)  # fmt: skip
def test_equals_ddp_and_fsdp(ranks, name, world, kinds, how):
    """DDP, FSDP2 and all stages of ZeRO give the same weights and norms, on every rank."""
    (expected, norms), *_ = ranks.job(world, "train", kinds[0], name, **how)
    assert how.get("clip") is None or max(norms) > how["clip"]
    for kind in kinds[1:]:
        for weights, seen in ranks.job(world, "train", kind, name, **how):
            assert largest(weights, expected) < 1e-12
            assert seen == pytest.approx(norms, rel=1e-11)


if __name__ == "__main__":
    test_zero.serve(list(map(int, sys.argv[2:])), globals())
