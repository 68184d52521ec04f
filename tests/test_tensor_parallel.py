# SPDX-License-Identifier: MIT
"""What nanopeft/tensor_parallel.py claims, on real processes that talk over loopback, held against one process.

The processes are those of test_zero.py: they take jobs, functions of this file, by name.
"""

import functools
import hashlib
import math
import subprocess
import sys
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

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import test_zero

from nanopeft import gpt, lora, qlora
from nanopeft import tensor_parallel as tp
from nanopeft.adamw import AdamW
from nanopeft.tensor_parallel import Error

SHAPE = dict(vocab_size=53, n_positions=9, n_embd=24, n_layer=2, n_head=4)  # 53 tokens divide by no number of ranks
FAMILIES = ("gpt", "untied", "gpt2", "llama", "qwen2")
thorough = pytest.mark.thorough

# ------------------------------------------------------------------------------------------------ jobs, in the workers


def model_of(family="gpt", kind="full", *, seed=0, dtype=torch.float64, dropout=0.0, targets="all-linear", **shape):
    """A small model, the same for the same seed: ours, with the head tied or not, or one of transformers."""
    torch.manual_seed(seed)
    if family in ("gpt", "untied"):
        model = gpt.GPT(**{**SHAPE, **shape})
        if family == "untied":
            model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    elif family == "gpt2":
        import transformers

        config = transformers.GPT2Config(**{**SHAPE, **shape}, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0)
        model = transformers.GPT2LMHeadModel(config)
    else:
        import transformers  # it takes seconds

        sizes = dict(vocab_size=53, hidden_size=32, intermediate_size=45, num_hidden_layers=2, pad_token_id=3)
        heads = dict(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=family == "qwen2")
        config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family](**sizes, **heads)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parent in [*model.modules()]:  # theirs computes in fp32
            for name, norm in [(n, m) for n, m in parent._modules.items() if "RMSNorm" in type(m).__name__]:
                setattr(parent, name, nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))
    for name, p in model.named_parameters():  # otherwise they are 0 or 1, and no mistake with them would show
        if p.dim() == 1:
            nn.init.normal_(p, mean=float("norm" in name or "ln_" in name) and 1.0, std=0.1)
    model = model.to(dtype)
    if kind == "lora":
        lora.add_lora(model, targets, r=3, alpha=3, dropout=dropout)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    return model.train()


def batch_of(step, rows=3, T=9, V=53):
    """ids and labels, some without a loss."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(V, (rows, T), generator=generator)
    return ids, ids.where(torch.rand(rows, T, generator=generator) < 0.8, -100)


def loss_of(model, ids, labels):
    """One process' loss, in fp64: transformers' own is in fp32."""
    if isinstance(model, gpt.GPT):
        return model(ids, labels=labels).loss
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


def train(family="gpt", kind="full", *, alone=False, steps=20, micro=2, clip=0.3, rows=3, T=9, optimizer="AdamW",
          group=None, seed=0, **how):  # fmt: skip
    """Trains, on all ranks or alone. Whole parameters, norms and losses, and a digest of what each rank has whole."""
    model = model_of(family, kind, seed=seed if alone else seed + dist.get_rank(group), **how)  # rank 0's counts
    if not alone:
        tp.shard(model, group)
    params = [p for p in model.parameters() if p.requires_grad]
    cls = {"AdamW": AdamW, "torch": torch.optim.AdamW, "SGD": functools.partial(torch.optim.SGD, momentum=0.9)}
    engine, norms, losses = cls[optimizer](params, lr=0.01, **({} if optimizer == "SGD" else {"eps": 1e-4})), [], []
    for step in range(steps):
        for i in range(micro):
            ids, labels = batch_of(micro * step + i, rows, T, how.get("vocab_size", 53))
            loss = loss_of(model, ids, labels) if alone else model(input_ids=ids, labels=labels).loss
            (loss / micro).backward()
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(params, clip).item() if alone else tp.clip_grad_norm(model, clip))
        engine.step()
        engine.zero_grad()
    if alone:
        return model.state_dict(), norms, losses
    whole = [p.detach() for p in model.parameters() if not hasattr(p, "shard")]
    digest = hashlib.sha256(b"".join(p.double().numpy().tobytes() for p in whole)).hexdigest()
    return tp.whole_state_dict(model), norms, losses, digest


def train_each(cases):
    return [train(*case, **how) for case, how in cases]


class counted:
    """In `with`: numbers that this rank sends in all-reduces, and how many there were; any other collective fails."""

    def __enter__(self):
        self.numbers, self.calls, real, t = 0, 0, dist.all_reduce, dist.get_world_size()

        def all_reduce(x, *args, **how):
            self.numbers, self.calls = self.numbers + 2 * (t - 1) * x.numel() / t, self.calls + 1
            return real(x, *args, **how)

        def refuse(*_, **__):
            raise AssertionError("a collective that is not counted")

        others = "broadcast reduce all_gather all_to_all_single reduce_scatter_tensor send isend".split()
        self.patch = mock.patch.multiple(dist, all_reduce=all_reduce, **dict.fromkeys(others, refuse))
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()


def traffic(family, kind):
    """Numbers and calls of forward and backward, and what decides them."""
    model = tp.shard(model_of(family, kind))
    ids, labels = batch_of(0)
    with counted() as sent:
        loss = model(input_ids=ids, labels=labels).loss
        forward = sent.calls
        loss.backward()
    factors = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and not hasattr(p, "shard"))
    width = model.get_input_embeddings().weight.size(1)
    return sent.numbers, forward, sent.calls, (labels[:, 1:] != -100).sum().item(), factors, width


class Widths(TorchDispatchMode):
    """The largest dimension of any tensor that an operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, *x.shape, 0)
        return out


def widths(family, kind):
    model, (ids, labels) = tp.shard(model_of(family, kind, vocab_size=401)), batch_of(0)
    with Widths() as seen:
        model(input_ids=ids, labels=labels).loss.backward()
    with Widths() as seen_logits:
        model(input_ids=ids)
    return seen.largest, seen_logits.largest


def cross_entropy(scale, V, seed=0):
    """Loss and gradient of logits of which each rank has a part, some ranks only padding."""
    torch.manual_seed(seed)
    t, rank, z, labels = dist.get_world_size(), dist.get_rank(), torch.randn(7, V) * scale, torch.randint(V, (7,))
    size = -(-V // t)
    mine = nn.functional.pad(z.double(), (0, size * t - V), value=-math.inf).split(size, 1)[rank].requires_grad_()
    loss = tp.VocabParallelCrossEntropy.apply(mine, labels, rank * size, dist.group.WORLD)
    loss.sum().backward()
    whole = z.double().requires_grad_()
    expected = nn.functional.cross_entropy(whole, labels, reduction="none")
    expected.sum().backward()
    grad = nn.functional.pad(whole.grad, (0, size * t - V)).split(size, 1)[rank]
    return (loss - expected).abs().max().item(), (mine.grad - grad).abs().max().item()


def logits(family, kind, n=5):
    """Logits without labels, a loss made of them and its gradients, and what the model generates."""
    model = tp.shard(model_of(family, kind))
    ids, labels = batch_of(0)
    out = model(input_ids=ids).logits
    nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    grads = {n: tp.gather(p, p.grad) for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    return out.detach(), grads, loss, model.eval().generate(ids[:, :4], max_new_tokens=n, **GREEDY.get(family, {}))


GREEDY = dict.fromkeys(("gpt2", "llama", "qwen2"), dict(do_sample=False, pad_token_id=0, eos_token_id=None))


def interrupted(path, load, kind="lora"):
    """Half of a run; its state, each parameter and its moments whole, is what an engine keeps."""
    model = tp.shard(model_of("gpt", kind, seed=7 if load else 0))
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engine = AdamW(params.values(), lr=0.01, eps=1e-4)
    if load:
        whole, state = torch.load(path)
        tp.load_whole_state_dict(model, whole)
        for name, p in params.items():
            engine.state[p] = {k: tp.part(p, x) if torch.is_tensor(x) else x for k, x in state[name].items()}
    for step in range(3 * load, 3 * load + 3):
        ids, labels = batch_of(step)
        model(input_ids=ids, labels=labels).loss.backward()
        tp.clip_grad_norm(model, 0.3)
        engine.step()
        engine.zero_grad()
    gathered = {
        name: {k: tp.gather(p, x) if torch.is_tensor(x) else x for k, x in engine.state[p].items()}
        for name, p in params.items()
    }
    whole = tp.whole_state_dict(model)
    if not load and dist.get_rank() == 0:
        torch.save((whole, gathered), path)
    return whole, gathered


def misfits():
    """What load_whole_state_dict says to three states that do not fit, and whether it has loaded anything of them."""
    model, errors = tp.shard(model_of()), []
    before, name = tp.whole_state_dict(model), "transformer.h.0.attn.c_attn.weight"
    other = {k: x + 1 for k, x in before.items()}
    wrong_vocabulary = {**other, "transformer.wte.weight": torch.zeros(54, 24)}  # as many rows on each of two ranks
    for state in ({k: x for k, x in other.items() if k != name}, {**other, "more": torch.zeros(1)}, wrong_vocabulary):
        with pytest.raises(Error) as error:
            tp.load_whole_state_dict(model, state)
        errors.append(str(error.value))
    return errors, all(torch.equal(x, before[k]) for k, x in tp.whole_state_dict(model).items())


def merged(family):
    """Base weights after a merge on each rank alone."""
    model = tp.shard(model_of(family, "lora"))
    with counted() as sent, torch.no_grad():
        lora.merge_lora(model)
    assert sent.calls == 0
    ids, _ = batch_of(0)
    return {n: tp.gather(m.weight) for n, m in lora.lora_layers(model).items()}, model(input_ids=ids).logits.detach()


def recomputed(kind):
    """Gradients with the blocks recomputed in backward, and without."""
    found = []
    for again in (False, True):
        model = tp.shard(model_of("gpt", kind))
        for block in model.transformer.h if again else ():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        ids, labels = batch_of(0)
        with counted() as sent:
            model(ids, labels=labels).loss.backward()
        found.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sent.calls))
    return found


def beside_torch():
    """Loss and MLP gradients of a model whose MLPs torch splits, and of ours, with the all-reduces of each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ours, theirs, (ids, labels) = tp.shard(model_of()), model_of(), batch_of(0)
    plan = {"transformer.h.*.mlp.c_fc": ColwiseParallel(), "transformer.h.*.mlp.c_proj": RowwiseParallel()}
    parallelize_module(theirs, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    losses = [model(ids, labels=labels).loss for model in (ours, theirs)]
    [loss.backward() for loss in losses]
    p, q = (dict(model.named_parameters()) for model in (ours, theirs))
    away = [(p[n].grad - q[n].grad.to_local()).abs().max().item() for n in p if "mlp" in n and "c_proj.bias" not in n]
    return abs(losses[0] - losses[1]).item(), max(away)


def groups(**how):
    """Two groups of two ranks each train a model of their own."""
    pairs, number = [dist.new_group([0, 1]), dist.new_group([2, 3])], dist.get_rank() // 2
    return train("gpt", "lora", group=pairs[number], seed=10 * number, **how)


def held():
    """Trained elements on this rank of each of LoRA's layers, and of the model."""
    model = tp.shard(model_of("gpt", "lora"))
    counts = {n: (m.lora_A.numel(), m.lora_B.numel()) for n, m in lora.lora_layers(model).items()}
    split = [p for p in model.parameters() if hasattr(p, "shard")]
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in split)  # the whole is freed
    return counts, sum(p.numel() for p in model.parameters())


def refused(what):
    """The error; and the model is as it was."""
    model = model_of("llama" if what == "kv" else "gpt", seed=dist.get_rank())
    if what == "twice":
        tp.shard(model)
    if what in ("embedding", "head"):
        lora.add_lora(model, [{"embedding": "wte", "head": "lm_head"}[what], "c_fc"])
    if what == "qlora":
        qlora.add_qlora(model.float())
    if what == "family":
        model.config.model_type = "opt"
    if what == "kv":
        model.config.num_key_value_heads = 2
    before = {k: x.clone() for k, x in model.state_dict().items()}
    with pytest.raises(Error) as error:
        tp.shard(model)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    return str(error.value)


def fits(t, n_head, h, V, T, L, rows, kind, targets):
    """A few steps of any shape, or the refusal."""
    shape = dict(n_embd=n_head * h, n_head=n_head, vocab_size=V, n_positions=T, n_layer=L)
    how = dict(steps=3, micro=1, rows=rows, T=T, targets=targets, **shape)
    try:
        return train("gpt", kind, **how)
    except Error as error:
        return str(error)


# --------------------------------------------------------------------------------------------------------- processes


ranks = test_zero.worker_pool(__file__)


def largest(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@functools.cache
def alone(*case, **how):
    return train(*case, alone=True, **how)


def holds(results, expected, tolerance=1e-12):
    for params, norms, losses, _ in results:
        assert largest(params, expected[0]) < tolerance
        assert max(abs(a - b) for a, b in zip(norms + losses, expected[1] + expected[2], strict=True)) < tolerance
    assert len({digest for *_, digest in results}) == 1  # replicated parameters: the same bits on all ranks


# ----------------------------------------------------------------------------------------------------------- training

# In fp64 one rounding is 1.1e-16. A product is summed in another order: some ten roundings, divided by √v + ε where the
# gradient is 0 (ε = 1e-4), times lr = 0.01: 1e-15 in a step, which 20 steps may double a few times.


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_one_process(ranks, world):
    """20 steps of AdamW with clipping and accumulation: parameters, norms and losses are those of one process, with
    tied embeddings, and with LoRA; replicated parameters have the same bits on all ranks."""
    cases = [(("gpt", kind), {}) for kind in ("full", "lora")]
    for results, (case, how) in zip(zip(*ranks.job(world, "train_each", cases)), cases):
        holds(results, alone(*case, **how))


@pytest.mark.parametrize("world, family, kind, how", [
    (2, "gpt2", "full", dict(steps=3)), (4, "llama", "full", dict(steps=3)), (2, "qwen2", "lora", dict(steps=3)),
    *(pytest.param(world, family, kind, how, marks=thorough) for world in (2, 4) for family in FAMILIES
      for kind in ("full", "lora") for how in ({}, dict(optimizer="SGD", clip=math.inf), dict(optimizer="torch"))),
], ids=str)  # fmt: skip
def test_each_family(ranks, world, family, kind, how):
    """The same for an untied head, transformers' GPT-2 (Conv1D), Llama (grouped heads, a padding token) and Qwen 2
    (biases of q, k and v), and for other optimizers."""
    holds(ranks.job(world, "train", family, kind, **how), alone(family, kind, **how))


@pytest.mark.parametrize("world, family", [(4, "gpt"), (2, "gpt2"), pytest.param(4, "llama", marks=thorough)])
def test_dropout_is_that_of_one_process(ranks, world, family):
    """LoRA's dropout, and transformers' on the residual stream, draw the masks that one process draws."""
    how = dict(dropout=0.3, steps=3)
    holds(ranks.job(world, "train", family, "lora", **how), alone(family, "lora", **how))
    assert largest(alone(family, "lora", **how)[0], alone(family, "lora", steps=3)[0]) > 1e-3  # there is dropout


SHAPES = st.fixed_dictionaries(dict(
    t=st.integers(1, 4), n_head=st.integers(1, 8), h=st.integers(1, 5), V=st.integers(1, 23), T=st.integers(2, 7),
    L=st.integers(1, 3), rows=st.integers(1, 3), kind=st.sampled_from(["full", "lora"]),
    targets=st.sampled_from(["all-linear", ("c_attn",), ("c_proj",), ("c_fc", "attn.c_proj")]),
)).filter(lambda shape: shape["n_head"] * shape["h"] >= 4)  # fmt: skip
# (a norm divides by the deviation of its row, and of two or three numbers that are nearly alike it is nearly 0)


def any_shape(ranks, t, **shape):
    found = ranks.job(t, "fits", t, **shape)
    if shape["n_head"] % t:
        assert all(error.startswith(f"{t} ranks cannot share n_head = {shape['n_head']}: ") for error in found)
    else:
        n_head, rows, T, kind = (shape[key] for key in ("n_head", "rows", "T", "kind"))
        how = dict(steps=3, micro=1, rows=rows, T=T, targets=shape["targets"], n_positions=T)
        sizes = dict(n_embd=n_head * shape["h"], n_head=n_head, vocab_size=shape["V"], n_layer=shape["L"])
        holds(found, train("gpt", kind, alone=True, **how, **sizes))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(shape=SHAPES)
def test_any_shape(ranks, shape):
    """Any sizes, vocabularies smaller than the number of ranks too, equal one process; heads that t does not divide
    are refused."""
    any_shape(ranks, **shape)


@thorough
@settings(max_examples=200, deadline=None)
@given(shape=SHAPES)
def test_any_shape_long(ranks, shape):
    """The same for many more."""
    any_shape(ranks, **shape)


def test_groups(ranks):
    """A group need not be all ranks: two groups train two models."""
    found = ranks.job(4, "groups", steps=3)
    for number in (0, 1):
        holds(found[2 * number : 2 * number + 2], alone("gpt", "lora", steps=3, seed=10 * number))


def test_bf16(ranks):
    """In bf16 a run stays near one process, and replicated parameters equal on all ranks."""
    how = dict(dtype=torch.bfloat16, steps=5)
    holds(ranks.job(2, "train", "gpt", "full", **how), alone("gpt", "full", **how), 0.1)  # a few roundings of 2^-8


# ------------------------------------------------------------------------------------------------------ what is sent


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_traffic(ranks, world, family):
    """A layer sends 4 all-reduces of n d numbers, whether q, k and v are one matrix or three; the embedding and the
    head one each, the loss 3 for each label. LoRA adds its whole factors, r d each, and saves the first f."""
    n, layers = 27, 2
    for kind in ("full", "lora"):
        for numbers, forward, calls, labels, factors, width in ranks.job(world, "traffic", family, kind):
            lora = kind == "lora"
            blocks, ends = 4 * layers * n * width, 2 * n * width
            expected = blocks + ends + 3 * labels + lora * (factors - n * width)
            assert numbers == pytest.approx(2 * (world - 1) / world * expected, abs=1e-6)
            targets = {"gpt": 4, "llama": 7}[family] * layers
            assert (forward, calls) == (2 * layers + 1 + 2, 4 * layers + 4 + lora * (targets - 1))
            assert factors == lora * 3 * layers * {"gpt": 4 * width, "llama": 7 * width}[family]


def test_numbers_of_the_docstring():
    """GPT-2 sends 50 all-reduces of 196,608 numbers; 7B on 8 ranks sends 7.6 GB and computes for 51 ms."""
    assert 256 * 768 == 196_608 and 4 * 12 + 2 == 50 and round(50 * 196_608 * 4 / 1e6, 1) == 39.3
    sent = 2 * 7 / 8 * ((4 * 32 + 2) * 4096 * 4096 + 3 * 4096) * 2
    assert round(sent / 1e9, 1) == 7.6 and round(sent / 450e9 * 1e3) == 17 and round(sent / 25e9, 2) == 0.31
    assert round(6 * 6.7e9 * 4096 / 8 / 400e12 * 1e3) == 51
    assert 50257 == 29 * 1733


def test_no_rank_holds_all_logits(ranks):
    """With labels no tensor is as wide as the vocabulary, in forward and backward; without, the logits are whole."""
    for loss, whole in ranks.job(2, "widths", "gpt", "full") + ranks.job(2, "widths", "gpt2", "lora"):
        assert loss == 201 and whole >= 401  # 401 tokens: 201 on each rank, one of them padding


@pytest.mark.parametrize("scale, V", [(1, 11), (1000, 8), (1, 2)])
def test_cross_entropy(ranks, scale, V):
    """Loss and gradient are torch's, with logits of 1000, which exp does not take, and ranks without any token."""
    for loss, grad in ranks.job(4, "cross_entropy", scale, V):
        assert loss < 1e-15 * max(10, 10 * scale) and grad < 1e-15


def test_what_a_rank_holds(ranks):
    """LoRA trains r (in + out/t) numbers of a column-parallel layer and r (in/t + out) of a row-parallel one; the
    matrices are split, and the whole ones are freed."""
    d, t, r = 24, 4, 3
    sizes = {"c_attn": (r * d, r * 3 * d // t), "attn.c_proj": (r * d // t, r * d), "c_fc": (r * d, r * 4 * d // t),
             "mlp.c_proj": (r * 4 * d // t, r * d)}  # fmt: skip
    whole = 9 * d + 2 * d + 2 * (4 * d + 2 * d)  # positions, the last norm, and each block's norms and row biases
    split = 2 * (12 * d * d + 7 * d) // t + -(-53 // t) * d
    for counts, total in ranks.job(t, "held"):
        assert all(count == next(s for end, s in sizes.items() if name.endswith(end)) for name, count in counts.items())
        assert total == whole + split + sum(map(sum, counts.values()))


# ------------------------------------------------------------------------------------------------- in and out again


@pytest.mark.parametrize("world, family, kind", [
    (2, "gpt", "lora"), (2, "llama", "full"),
    *(pytest.param(4, family, kind, marks=thorough) for family in FAMILIES for kind in ("full", "lora")),
])  # fmt: skip
def test_logits_and_generation(ranks, world, family, kind):
    """Without labels all logits come out, as differentiable as in one process; a loss without gradients is the same;
    generation with a cache gives the same tokens."""
    model, (ids, labels) = model_of(family, kind), batch_of(0)
    out = model(input_ids=ids).logits
    loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    tokens = model.eval().generate(ids[:, :4], max_new_tokens=5, **GREEDY.get(family, {}))
    for got, grads, got_loss, got_tokens in ranks.job(world, "logits", family, kind):
        torch.testing.assert_close(got, out.detach(), rtol=0, atol=1e-13)
        assert largest(grads, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}) < 1e-13
        assert abs(got_loss - loss.item()) < 1e-13 and torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("first, second", [(2, 4), (4, 1)])
def test_resumes_with_another_number_of_ranks(ranks, tmp_path, first, second):
    """Parameters, m and v gathered from t ranks go on on another number of ranks, and end where one process ends."""
    ranks.job(first, "interrupted", str(tmp_path / "state"), False)
    expected, _, _ = alone("gpt", "lora", steps=6, micro=1)
    for params, _ in ranks.job(second, "interrupted", str(tmp_path / "state"), True):
        assert largest(params, expected) < 1e-12


@pytest.mark.parametrize("family", ["gpt", "gpt2"])
def test_checkpoints_are_one_process(ranks, tmp_path, family):
    """The gathered state dict loads into an ordinary model, which then has the same loss."""
    state, _, losses, _ = ranks.job(2, "train", family, "full", steps=1, micro=1)[0]
    model = model_of(family, seed=5)
    model.load_state_dict(state)
    ids, labels = batch_of(1)
    again = ranks.job(1, "train", family, "full", steps=2, micro=1)[0][2]
    assert loss_of(model, ids, labels).item() == pytest.approx(again[1], abs=1e-13)


def test_refuses_other_checkpoints(ranks):
    """A state with a parameter missing, one left over, or another vocabulary is refused, and nothing is loaded."""
    for errors, unchanged in ranks.job(2, "misfits"):
        names = ("transformer.h.0.attn.c_attn.weight", "more", "transformer.wte.weight")
        assert errors == [f"the checkpoint is of another model: {name} does not fit" for name in names]
        assert unchanged


@pytest.mark.parametrize("family", ["gpt", pytest.param("llama", marks=thorough)])
def test_merge_is_local(ranks, family):
    """merge_lora on each rank sends nothing and gives the parts of W + s B A."""
    model, ids = lora.merge_lora(model_of(family, "lora")), batch_of(0)[0]
    expected = {n: m.weight.detach() for n, m in lora.lora_layers(model).items()}
    for weights, out in ranks.job(2, "merged", family):
        assert largest(weights, expected) < 1e-14
        torch.testing.assert_close(out, model(input_ids=ids).logits, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_with_recomputation(ranks, kind):
    """Recomputed blocks give the same gradients to the bit, and send forward's all-reduces a second time."""
    for (grads, calls), (again, more) in ranks.job(2, "recomputed", kind):
        assert grads.keys() == again.keys() and all(torch.equal(g, again[n]) for n, g in grads.items())
        assert calls < more <= calls + 2 * 2


def test_beside_torch(ranks):
    """Loss and gradients of the MLPs are those of torch.distributed.tensor.parallel."""
    for loss, grads in ranks.job(2, "beside_torch"):
        assert loss < 1e-14 and grads < 1e-14


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("world, what, message", [
    (3, "heads", "3 ranks cannot share n_head = 4: take a number of ranks that divides it, no head is cut"),
    (4, "kv", "4 ranks cannot share num_key_value_heads = 2: take a number of ranks that divides it, no head is cut"),
    (2, "family", "shard() splits causal language models of the families gpt2, llama, mistral, qwen2, not this model"),
    (2, "embedding", "transformer.wte is a LoRAEmbedding over Embedding: shard() splits Linear, "),
    (2, "head", "lm_head is a LoRALinear over Linear: shard() splits Linear, "),
    (2, "qlora", "transformer.h.0.attn.c_attn is a LoRALinear over QuantizedLinear: shard() splits Linear, "),
    (2, "twice", "lm_head is a VocabParallelHead: shard() splits Linear, "),
])  # fmt: skip
def test_refuses(ranks, world, what, message):
    """What cannot be split is refused in one line that says why, before anything is changed."""
    for error in ranks.job(world, "refused", what):
        assert error.startswith(message) and "\n" not in error


def test_refuses_without_a_process_group():
    """shard() says how to start."""
    with pytest.raises(Error, match="^no process group: start with torchrun --nproc_per_node N, [^\n]*$"):
        tp.shard(model_of())


def test_demonstration():
    """Run as a program the file shows that column, then row needs one sum, and that gelu(a + b) is no sum of two."""
    done = subprocess.run([sys.executable, tp.__file__], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    off = [float(line.split()[-2]) for line in done.stdout.splitlines()]
    assert off[0] < 1e-13 and off[1] > 0.1


if __name__ == "__main__":
    import transformers

    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM"):  # imported once, before the forks
        getattr(transformers, name)
    test_zero.serve(list(map(int, sys.argv[2:])), globals())
