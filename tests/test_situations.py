# SPDX-License-Identifier: MIT
"""A fuzzer of situations: a model, a technique, what is wrapped around them, a type, and a sequence of uses.

After every use the outputs are compared with the plain model in fp64, whose update is computed here, from the equations.
Training is compared with plain autograd and SGD. The longer form: CASES=5000 pytest -m thorough tests/test_situations.py
"""

import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
import re
import tempfile
import warnings
from collections import Counter

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.utils.stateless import functional_call  # unlike torch.func's, it can leave tied weights untied

from nanopeft import adapter, gpt, lora, prefix, prompt, ptuning, qlora, quant, zero

CASES = int(os.environ.get("CASES", 300))
ERRORS = (lora.Error, qlora.Error, adapter.Error, prefix.Error, prompt.Error, zero.Error, gpt.Error)
V, T, N = 24, 6, 3  # vocabulary, tokens of a row, virtual tokens

# ----------------------------------------------------------------------------------------------------------- situations

# For each model: ends of the layers for LoRA, in groups; the ends of its sublayers; the list of its blocks
TARGETS = {
    "gpt": ([("c_attn",), ("attn.c_proj", "mlp.c_fc"), ("wte",), ("wpe", "c_fc"), ("lm_head",)], None, "transformer.h"),
    "llama": ([("q_proj", "v_proj"), ("down_proj",), ("embed_tokens",)], ("o_proj", "down_proj"), "model.layers"),
    "opt": ([("q_proj", "v_proj"), ("fc1", "out_proj"), ("embed_tokens",)], ("out_proj", "fc2"), "model.decoder.layers"),
    "gpt_neox": (
        [("query_key_value",), ("dense_h_to_4h", "attention.dense"), ("embed_in",)],
        ("attention.dense", "dense_4h_to_h"),
        "gpt_neox.layers",
    ),
    "stack": ([("fc",), ("proj", "embed"), ("head",)], ("proj",), "blocks"),
    "sequential": ([("0",), ("2", "0")], ("0",), None),
}
TARGETS |= {"gpt2": TARGETS["gpt"], "classifier": TARGETS["gpt"], "qwen2": TARGETS["llama"]}
TRANSFORMERS = ("gpt2", "llama", "qwen2", "opt", "gpt_neox", "classifier")
SOFT = ("prefix", "prompt", "ptuning")  # these wrap the model, and change its input
COMPILED = ("compile eager", "compile aot_eager", "compile before", "compile blocks")


@dataclasses.dataclass(frozen=True)
class Situation:
    seed: int
    kind: str
    depth: int
    traits: tuple  # of the model and the batch
    returns: str  # what a block of the stack returns
    dtype: str
    technique: str
    options: dict
    wrapper: str
    actions: tuple

    def __repr__(self):
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        traits = "".join(f", {trait}" for trait in (*self.traits, self.returns) if trait)
        way = " > ".join(self.actions)
        return (
            f"{self.kind}({self.depth}{traits}) | {self.technique}({options}) | {self.wrapper} | "
            f"{self.dtype} | {way} | seed {self.seed}"
        )


@st.composite
def situations(draw):
    def one(*choices):
        return draw(st.sampled_from(choices))

    def some(*choices):
        return tuple(choice for choice in choices if draw(st.booleans()))

    kind = one("sequential", "stack", "gpt", *TRANSFORMERS)
    technique = one("lora", "qlora", "houlsby", "pfeiffer", "fusion", "prefix", "prompt", "ptuning")
    if kind in ("sequential", "classifier") or (kind == "stack" and technique == "prefix"):
        technique = one("lora", "qlora", "houlsby", "pfeiffer") if technique in SOFT else technique
    traits = some("frozen", "unbiased", *(("tied", "padded") if kind != "sequential" else ()))
    traits += some("twice", "aux") if kind == "stack" else some("twice") if kind == "sequential" else ()
    traits = tuple(trait for trait in traits if not (trait == "padded" and "aux" in traits))
    returns = one("tensor", "tuple", "list", "dict", "ModelOutput") if kind == "stack" else ""
    options = draw_options(one, kind, technique)
    gradient = ("gradient checkpointing", "gradient checkpointing, reentrant") if kind in TRANSFORMERS else ()
    blocks = ("checkpoint blocks", "checkpoint blocks after") if TARGETS[kind][2] else ()
    stages = ("zero 0", "zero 1", "zero 2", "zero 3") if TARGETS[kind][2] and "twice" not in traits else ()
    inside = ("dataparallel before",) if technique not in SOFT else ()
    compiled = COMPILED if TARGETS[kind][2] else COMPILED[:3]
    wrappers = *gradient, *blocks, *stages, *inside, "ddp", "dataparallel"
    wrapper = one("none", "none", "none", "none", *wrappers, one(*wrappers, *compiled))
    actions = ["train", "disable", "mode", "remove", "copy", "pickle", "save ours", "save state_dict", "save peft"]
    actions += ["merge", "unmerge", "save merged"] if technique in ("lora", "qlora") else []
    actions += ["fold"] if technique in ("prefix", "ptuning") else []
    actions += ["generate"] if kind not in ("sequential", "stack", "classifier") else []
    if "checkpointing" in wrapper or "before" in wrapper:
        actions.remove("pickle")  # transformers' own hook, and torch's compiled module, cannot be pickled
    if wrapper == "dataparallel before" and "generate" in actions:
        actions.remove("generate")
    if wrapper.startswith("zero"):
        actions = ["train", "disable", "mode", "save"]
    return Situation(
        seed=draw(st.integers(0, 99)),
        kind=kind,
        depth=one(1, 2, 3) if wrapper not in COMPILED else 1,
        traits=traits,
        returns=returns,
        dtype=one("float32", "float64", "bfloat16", "float16") if technique != "qlora" else one("float32", "bfloat16", "float16"),
        technique=technique,
        options=options,
        wrapper=wrapper,
        actions=tuple(one(*actions) for _ in range(one(1, 2, 3, 4, 5))),
    )


def draw_options(one, kind, technique):
    groups, sublayers, _ = TARGETS[kind]
    if technique in ("lora", "qlora"):
        targets = one("all-linear", *groups, rf"(.*\.)?({groups[0][0]})")
        options = dict(targets=targets, r=one(1, 3, 20), alpha=one(1, 6.5), init=one("kaiming", "gaussian", "reverse"))
        options |= dict(rslora=one(False, True), dropout=one(0.0, 0.0, 0.3))
        options["ranks"] = {groups[0][0]: 2} if targets != "all-linear" and groups[0][0] in targets and one(0, 1) else {}
        more = dict(quant_type=one("nf4", "int8"), double_quant=one(True, False)) if technique == "qlora" else {}
        return options | more
    if technique in ("houlsby", "pfeiffer", "fusion"):
        size = one(dict(bottleneck=3), dict(reduction=4))
        return dict(targets=sublayers if technique == "houlsby" else None, activation=one("silu", "relu", "tanh"), **size)
    if technique == "prefix":
        return dict(n_tokens=one(1, N), hidden=one(None, 5), init=one("vocabulary", "random"))
    if technique == "prompt":
        return dict(n_tokens=one(1, N), init=one("vocabulary", "random", [1, 2]))
    template = one(None, "[P][P]{source}[P]")
    return dict(n_tokens=N, encoder=one("lstm", "mlp"), hidden=one(None, 5), template=template)


# --------------------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self, d, bias, returns):
        super().__init__()
        self.fc, self.proj, self.returns = nn.Linear(d, 2 * d, bias=bias), nn.Linear(2 * d, d, bias=bias), returns

    def forward(self, x):
        y = x + self.proj(torch.tanh(self.fc(x)))
        self.aux = y.square().sum() * 1e-3
        as_output = transformers.modeling_outputs.BaseModelOutput
        return {"tensor": y, "tuple": (y, None), "list": [y], "dict": {"x": y}, "ModelOutput": as_output(y)}[self.returns]


class Stack(nn.Module):
    """A language model of one's own: a token sees the mean of those before it, and blocks work on each alone."""

    def __init__(self, s, d=8):
        super().__init__()
        self.s, self.embed, self.head = s, nn.Embedding(V, d), nn.Linear(d, V, bias=False)
        blocks = [Block(d, "unbiased" not in s.traits, s.returns) for _ in range(s.depth)]
        self.blocks = nn.ModuleList(blocks + blocks[:1] if "twice" in s.traits else blocks)
        if "tied" in s.traits:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, labels=None):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        weight = x.new_ones(x.shape[:2] + (1,)) if attention_mask is None else attention_mask[..., None].to(x.dtype)
        x, aux, loss = x + (x * weight).cumsum(1) / weight.cumsum(1).clamp(min=1), 0, None
        for block in self.blocks:
            output = block(x)
            x = output if torch.is_tensor(output) else next(iter(output.values() if isinstance(output, dict) else output))
            aux = aux + block.aux
        logits = self.head(x)
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            loss = loss + aux.to(loss.dtype) if "aux" in self.s.traits else loss
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits, attentions=aux)


def bare_model(s):
    """The same for the same situation, with weights wide enough that every layer matters."""
    torch.manual_seed(s.seed)
    tied, bias = "tied" in s.traits, "unbiased" not in s.traits
    if s.kind == "sequential":
        linears = [nn.Linear(8, 8, bias) for _ in range(s.depth)]
        linears += linears[:1] if "twice" in s.traits else []
        model = nn.Sequential(*[layer for linear in linears for layer in (linear, nn.Tanh())], nn.Linear(8, 5))
    elif s.kind == "stack":
        model = Stack(s)
    elif s.kind == "gpt":
        model = gpt.GPT(vocab_size=V, n_positions=32, n_embd=16, n_layer=s.depth, n_head=2)
        for layer in model.transformer.h.modules():
            if isinstance(layer, nn.Linear) and not bias:
                layer.bias = None
        if not tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    else:
        sizes = dict(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=s.depth, num_attention_heads=2,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=tied,
        )  # fmt: skip
        more = {
            "llama": dict(num_key_value_heads=1, attention_bias=bias), "qwen2": dict(num_key_value_heads=1),
            "opt": dict(ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, enable_bias=bias),
            "gpt_neox": dict(attention_bias=bias),
        }.get(s.kind, dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, num_labels=3))  # fmt: skip
        name = "gpt2" if s.kind == "classifier" else s.kind
        config = transformers.AutoConfig.for_model(name, **sizes, **more)
        config.loss_type = "ForSequenceClassification" if s.kind == "classifier" else "ForCausalLM"
        auto = transformers.AutoModelForCausalLM
        auto = transformers.AutoModelForSequenceClassification if s.kind == "classifier" else auto
        model = auto.from_config(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.dim() > 1 else nn.init.normal_(p, 1, 0.1)
    if "frozen" in s.traits:
        next(model.children()).requires_grad_(False)
    return model.to(getattr(torch, s.dtype)).eval()


def batch(s, seed):
    """(rows, labels of each row): what the oracle reads, one row after the other, without any padding."""
    torch.manual_seed(1000 * s.seed + seed)
    if s.kind == "sequential":
        return list(torch.randn(2, T, 8, dtype=getattr(torch, s.dtype))), list(torch.randn(2, T, 5))
    rows = [torch.randint(1, V, (T,)), torch.randint(1, V, (T - 2 if "padded" in s.traits else T,))]
    if s.options.get("template"):  # V holds the place of a virtual token
        rows = [torch.cat((torch.tensor([V, V]), row, torch.tensor([V]))) for row in rows]
    labels = [row.masked_fill(row == V, -100) for row in rows]
    labels[0][1] = labels[1][0] = -100
    return rows, torch.tensor([2, 0]).split(1) if s.kind == "classifier" else labels


def call(model, s, rows, labels=None):
    """The model's output for the rows together, those that are shorter padded on the left."""
    if s.kind == "sequential":
        return model(torch.stack(rows))
    pads = [len(rows[0]) - len(row) for row in rows]
    arguments = dict(input_ids=torch.stack([F.pad(row, (pad, 0)) for row, pad in zip(rows, pads)]))
    if labels is not None:
        padded = [F.pad(label, (pad, 0), value=-100) for label, pad in zip(labels, pads)]
        arguments["labels"] = torch.cat(labels) if s.kind == "classifier" else torch.stack(padded)
    if any(pads):
        mask = torch.stack([F.pad(torch.ones_like(row), (pad, 0)) for row, pad in zip(rows, pads)])
        arguments["attention_mask"] = mask
        if s.technique not in SOFT:  # those count by the mask
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if s.technique != "prefix" and s.kind in TRANSFORMERS:
        arguments["use_cache"] = False  # a checkpointed block would extend it twice
    return model(**arguments)


def outputs(out, s, rows):
    """What the model says at each token of each row."""
    if s.kind in ("sequential", "classifier"):
        return list(out.logits if s.kind == "classifier" else out)
    return [logits[-len(row) :] for logits, row in zip(out.logits, rows)]


def loss(out, s, labels):
    return (out.float() - torch.stack(labels)).square().mean() if s.kind == "sequential" else out.loss


# ----------------------------------------------------------------------------------------------------------- the oracle

WRAPPED = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|module|base_layer)\.")
OWN = re.compile(r"^(prompt_embeddings|E|mlp|encoder)\b|\blora_[AB]$|\.adapter\.|^score\.weight$")


def own_parameters(model):
    """{name without what wraps it: parameter}: what the technique has added."""
    named = {WRAPPED.sub("", name): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if OWN.search(name)}


class Oracle:
    """The plain model in fp64, and the technique by its equations."""

    def __init__(self, s, base):
        self.s, self.base = s, copy.deepcopy(base).double().eval().requires_grad_(False)
        self.modules, self.on, self.own = dict(self.base.named_modules()), True, {}

    def read(self, model):
        """Takes over the technique's numbers, and for QLoRA at the start the base, dequantized."""
        for name, layer in model.named_modules():
            if isinstance(layer, qlora.QuantizedLinear) and not self.own:
                weight = layer.dequantize(torch.float32)
                target = self.modules[WRAPPED.sub("", f"{name}.")[:-1]].weight
                target.copy_(weight if isinstance(layer.original_layer, nn.Linear) else weight.t())
        self.own = {
            name: p.detach().double().clone().requires_grad_(p.requires_grad) for name, p in own_parameters(model).items()
        }

    def logits(self, row):
        """(1, n + T, V) of one row of ids; n > 0 if there is a prompt in front."""
        x, on = row[None].double() if self.s.kind == "sequential" else row[None], self.on
        if on and self.s.technique in ("lora", "qlora"):
            return functional_call(self.base, self.lora_weights(), (x,), tie_weights=False, strict=False)
        if on and self.s.technique in SOFT:
            return getattr(self, self.s.technique)(x)
        with contextlib.ExitStack() as hooks:
            for name in {name.split(".adapter.")[0] for name in self.own if ".adapter." in name and on}:
                hook = self.modules[name].register_forward_hook(lambda _, __, y, name=name: self.adapted(name, y))
                hooks.callback(hook.remove)
            return self.base(x)

    def lora_weights(self):
        """W + s B A, with s = alpha / r or alpha / sqrt(r)"""
        found = {name: p for name, p in self.own.items() if ".lora_" not in name}
        for name in [name[: -len(".lora_A")] for name in self.own if name.endswith(".lora_A")]:
            A, B, o = self.own[f"{name}.lora_A"], self.own[f"{name}.lora_B"], self.s.options
            r = next((r for end, r in o["ranks"].items() if f".{name}".endswith(f".{end}")), o["r"])
            assert len(A) == r
            delta = o["alpha"] / (r**0.5 if o["rslora"] else r) * B @ A
            W = self.modules[name].weight
            found[f"{name}.weight"] = W + (delta if isinstance(self.modules[name], nn.Linear) else delta.t())
        return found

    def adapted(self, name, output):
        """u + Up f(Down u), or u and the mean of that by attention; u comes first in what a block returns."""
        p = {key[len(name) + 9 :]: t for key, t in self.own.items() if key.startswith(f"{name}.adapter.")}
        u = output if torch.is_tensor(output) else next(iter(output.values() if isinstance(output, dict) else output))
        f = getattr(F, self.s.options["activation"])

        def bottleneck(k):
            return f(u @ p[f"{k}down.weight"].T + p[f"{k}down.bias"]) @ p[f"{k}up.weight"].T + p[f"{k}up.bias"]

        if self.s.technique != "fusion":
            new = u + bottleneck("")
        else:
            z = torch.stack([bottleneck(f"adapters.{i}.") for i in range(2)])  # (2, B, T, d)
            query = u @ p["query.weight"].T + p["query.bias"]
            share = (query * (z @ p["key.weight"].T + p["key.bias"])).sum(-1, keepdim=True).softmax(0)
            new = u + (share * (z @ p["value.weight"].T)).sum(0)
        if isinstance(output, dict):
            return type(output)({key: new if value is u else value for key, value in output.items()})
        return new if torch.is_tensor(output) else type(output)([new, *output[1:]])

    def prefix(self, ids):
        P, config = self.own.get("prompt_embeddings"), self.base.config
        if P is None:
            h = torch.tanh(self.own["E"] @ self.own["mlp.0.weight"].T + self.own["mlp.0.bias"])
            P = h @ self.own["mlp.2.weight"].T + self.own["mlp.2.bias"]
        cache = gpt.KVCache() if self.s.kind == "gpt" else transformers.DynamicCache()
        heads = getattr(config, "num_key_value_heads", None) or 2
        pairs = P.view(len(P), 2 * self.s.depth, heads, -1).permute(1, 2, 0, 3)  # (2 L, H, n, h)
        for layer in range(self.s.depth):
            cache.update(pairs[None, 2 * layer], pairs[None, 2 * layer + 1], layer)
        positions = torch.arange(len(P), len(P) + ids.size(1))[None]
        return self.base(ids, past_key_values=cache, position_ids=positions)

    def prompt(self, ids):
        x = self.base.get_input_embeddings()(ids.clamp(max=V - 1))
        P = self.own["prompt_embeddings"] if "prompt_embeddings" in self.own else self.encoded(x.size(-1))
        if self.s.options.get("template"):
            return self.base(inputs_embeds=torch.cat((P[None, :2], x[:, 2:-1], P[None, 2:]), 1))
        return self.base(inputs_embeds=torch.cat((P[None], x), 1))

    def ptuning(self, ids):
        return self.prompt(ids)

    def encoded(self, d):
        own = {name.removeprefix("encoder."): p for name, p in self.own.items()}
        h, lstm = own["embedding.weight"], {key[10:]: p for key, p in own.items() if key.startswith("lstm_head.")}
        if lstm:
            layer = nn.LSTM(d, self.s.options["hidden"] or d // 2, 2, bidirectional=True, dtype=torch.float64)
            h = functional_call(layer, lstm, (h,))[0]
        for i in (0, 2) if lstm else (0, 2, 4):
            h = (h if i == 0 else h.relu()) @ own[f"mlp_head.{i}.weight"].T + own[f"mlp_head.{i}.bias"]
        return h

    def loss(self, rows, labels):
        outs = [self.logits(row) for row in rows]
        if self.s.kind == "sequential":
            return (torch.cat(outs) - torch.stack(labels)).square().mean()
        if self.s.kind == "classifier":
            return F.cross_entropy(torch.cat([out.logits for out in outs]), torch.cat(labels))
        logits = [out.logits[0] for out in outs]
        shifted = [F.pad(label, (len(z) - len(label), 0), value=-100)[1:] for z, label in zip(logits, labels)]
        value = F.cross_entropy(torch.cat([z[:-1] for z in logits]), torch.cat(shifted))
        return value + sum(out.attentions for out in outs) if "aux" in self.s.traits else value


# ----------------------------------------------------------------------------------------------------------------- uses


class Use:
    """A model in one situation, and what has been done to it."""

    def __init__(self, s):
        self.s, self.base = s, bare_model(s)
        self.oracle, self.merged, self.dequantized, self.done = Oracle(s, self.base), False, False, False
        eps = torch.finfo(getattr(torch, s.dtype)).eps
        # Llama's norms and the loss of transformers compute in fp32 in a model of fp64 too
        self.eps, self.loss_eps = max(eps, 1.2e-7 if s.kind in ("llama", "qwen2") else 0), max(eps, 1.2e-7)
        self.model = self.call = self.prepared()
        self.engine = None
        self.oracle.read(self.model)
        self.check()
        with torch.no_grad():  # numbers with which the technique matters: at the start most change nothing
            for name, p in own_parameters(self.model).items():
                nn.init.normal_(p, std=0.3) if name != "score.weight" else None
        self.take(self.model)
        self.check()

    def tolerance(self, eps):
        """A block rounds some ten times, each error some roundings of the largest value, which a norm may double."""
        return 16 * (1 + self.s.depth) * eps

    def prepared(self):
        """A bare model, wrapped within and given the technique."""
        s, model = self.s, bare_model(self.s)
        before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
        path = TARGETS[s.kind][2]
        if s.wrapper in ("checkpoint blocks", "compile blocks"):
            self.wrap_blocks(model.get_submodule(path))
        if s.wrapper.startswith("gradient checkpointing"):
            model.gradient_checkpointing_enable(dict(use_reentrant="reentrant" in s.wrapper))
            model.enable_input_require_grads()
        if s.wrapper in ("compile before", "dataparallel before"):
            model = torch.compile(model, backend="eager") if "compile" in s.wrapper else nn.DataParallel(model)
        try:
            tuned = add(s, model)
        except ERRORS:
            for name, p in model.named_parameters():
                p0, trained = before[WRAPPED.sub("", name)]
                assert torch.equal(p, p0) and p.requires_grad == trained
            raise
        if s.wrapper == "checkpoint blocks after":
            self.wrap_blocks((tuned.model if s.technique in SOFT else tuned).get_submodule(path))
        return tuned

    def wrap_blocks(self, blocks):
        new = {block: torch.compile(block, backend="eager") if self.s.wrapper.startswith("compile") else
               checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT) for block in blocks}  # fmt: skip
        for i, block in enumerate(blocks):
            blocks[i] = new[block]

    def take(self, model):
        """Goes on with this model, inside of what wraps it."""
        self.model, wrapper, self.engine = model, self.s.wrapper, None
        if wrapper.startswith("zero"):
            inner = model.model if self.s.technique in SOFT else model
            self.engine = zero.ZeRO(model, torch.optim.SGD, lr=0.05, stage=int(wrapper[-1]),
                                    blocks=inner.get_submodule(TARGETS[self.s.kind][2]))  # fmt: skip
        self.call = {
            "ddp": nn.parallel.DistributedDataParallel,
            "dataparallel": nn.DataParallel,
            "compile eager": lambda model: torch.compile(model, backend="eager"),
            "compile aot_eager": lambda model: torch.compile(model, backend="aot_eager"),
        }.get(wrapper, lambda model: model)(model)
        with self.whole():
            self.oracle.read(model)

    def whole(self):
        return self.engine.whole() if self.engine else contextlib.nullcontext()

    @torch.no_grad()
    def check(self):
        """The outputs are the oracle's, in whatever mode the model is; dropout is turned off."""
        rows, _ = batch(self.s, 0)
        with self.still():
            self.equal(outputs(call(self.call, self.s, rows), self.s, rows), self.expected(rows), self.eps)

    @contextlib.contextmanager
    def still(self):
        training = self.call.training
        self.call.train(training and not self.s.options.get("dropout"))
        yield
        self.call.train(training)

    def expected(self, rows):
        outs = [self.oracle.logits(row) for row in rows]
        outs = outs if self.s.kind == "sequential" else [out.logits for out in outs]
        return [out[0] if self.s.kind == "classifier" else out[0, -len(row) :] for out, row in zip(outs, rows)]

    def equal(self, found, expected, eps, more=0.0):
        found, expected = torch.cat([t.flatten() for t in found]).double(), torch.cat([t.flatten() for t in expected])
        limit = self.tolerance(eps) * expected.abs().max() + more
        assert found.isfinite().all() or self.s.dtype == "float16"
        off = (found - expected).abs().max()
        assert not off > limit, f"off by {off:.1e}, of {expected.abs().max():.1e}; the limit is {limit:.1e}"

    def do(self, action):
        getattr(self, action.replace(" ", "_"))()
        if not self.done:
            self.check()

    def train(self):
        """Two steps give the loss and the numbers that plain autograd gives."""
        s = self.s
        if self.merged:
            return
        self.call.train()
        own = [p for p in own_parameters(self.model).values() if p.requires_grad]
        theirs = [p for p in self.oracle.own.values() if p.requires_grad]
        before = [p.detach().clone() for p in theirs]
        optimizer, plain = torch.optim.SGD(own, lr=0.05), torch.optim.SGD(theirs, lr=0.05)
        for seed in (1, 2):
            rows, labels = batch(s, seed)
            value, plain_value = loss(call(self.call, s, rows, labels), s, labels), self.oracle.loss(rows, labels)
            if self.engine:
                self.engine.backward(value)
                self.engine.step()
            else:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            plain.zero_grad()
            plain_value.backward()
            plain.step()
            if not s.options.get("dropout"):
                self.equal([value.detach()], [plain_value.detach()], self.loss_eps)
        expected = [(p - p0).detach() for p, p0 in zip(theirs, before)]
        with self.whole():
            found = [p.detach().double() - p0 for p, p0 in zip(own, before)]
            rounding = max(torch.finfo(own[0].dtype).eps * p.abs().max() for p in theirs)
            if not s.options.get("dropout"):
                self.equal(found, expected, 8 * self.loss_eps, 4 * rounding)
            self.oracle.read(self.model)

    def mode(self):
        self.call.train(not self.call.training)

    @torch.no_grad()
    def disable(self):
        """Inside of it the model is the base."""
        s = self.s
        rows = [row[row < V] if not row.is_floating_point() else row for row in batch(s, 3)[0]]
        if s.technique in SOFT:
            model, within, s = self.model.model, contextlib.nullcontext(), dataclasses.replace(s, technique="none")
        else:
            model, disabled = self.call, lora.lora_disabled if "lora" in s.technique else adapter.adapter_disabled
            within = disabled(self.model)
        self.oracle.on = False
        with self.whole(), self.still(), within:
            self.equal(outputs(call(model, s, rows), s, rows), self.expected(rows), self.eps)
        self.oracle.on = True

    def remove(self):
        """What is left is the base to the bit, or the merged model."""
        s = self.s
        if s.technique in SOFT:
            self.model = self.model.model
        else:
            (lora.remove_lora if "lora" in s.technique else adapter.remove_adapter)(self.model)
        self.call, self.s, self.oracle.on = self.model, dataclasses.replace(s, technique="none"), self.merged
        if "lora" in s.technique:
            self.oracle.s = s
        if not self.merged and s.technique != "qlora":
            named = {WRAPPED.sub("", name): p for name, p in self.model.named_parameters()}
            assert named.keys() == dict(self.base.named_parameters()).keys()
            assert all(torch.equal(p, named[name]) for name, p in self.base.named_parameters())
        rows = [row[row < V] if not row.is_floating_point() else row for row in batch(s, 4)[0]]
        with torch.no_grad(), self.still():
            self.equal(outputs(call(self.model, self.s, rows), self.s, rows), self.expected(rows), self.eps)
        self.done = True

    def copy(self):
        self.take(copy.deepcopy(self.model))

    def pickle(self):
        self.take(pickle.loads(pickle.dumps(self.model)))

    def merge(self):
        """The same outputs. A tied weight is refused."""
        try:
            (qlora.merge_qlora if self.s.technique == "qlora" else lora.merge_lora)(self.model)
            self.merged = True
        except lora.Error as error:
            assert "shares its weight" in str(error) and "tied" in self.s.traits
        self.dequantized = True

    def unmerge(self):
        lora.unmerge_lora(self.model)
        self.merged = False

    def fold(self):
        (prefix.fold_prefix if self.s.technique == "prefix" else ptuning.fold_ptuning)(self.model)
        self.oracle.read(self.model)

    def fresh(self):
        """A model prepared as this one was, and in the same state."""
        model, technique = self.prepared(), self.s.technique
        if technique in SOFT and "prompt_embeddings" in own_parameters(self.model) and technique != "prompt":
            (prefix.fold_prefix if technique == "prefix" else ptuning.fold_ptuning)(model)
        return model

    def save_ours(self):
        """What was trained, through a file, onto a fresh model."""
        technique = self.s.technique
        state_dict, load = FILES[technique]
        with tempfile.TemporaryDirectory() as folder:
            save_file({key: t.contiguous() for key, t in state_dict(self.model).items()}, f"{folder}/a")
            self.s = dataclasses.replace(self.s, wrapper="none")
            model = self.fresh()
            if technique == "prefix":
                prefix.fold_prefix(model)
            load(model, load_file(f"{folder}/a"))
        self.merged = False
        mode = self.call.training
        self.take(model)
        self.call.train(mode)

    def save_state_dict(self):
        """The whole model through torch.save, onto a fresh one."""
        file, model = io.BytesIO(), self.fresh()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        if self.dequantized and self.s.technique in ("lora", "qlora"):
            with contextlib.suppress(lora.Error):
                (qlora.merge_qlora if self.s.technique == "qlora" else lora.merge_lora)(model)
            if not self.merged:
                lora.unmerge_lora(model)
        model.load_state_dict(torch.load(file, weights_only=True))
        self.take(model)

    def save(self):
        """From a sharded model too, what is stored is what was trained."""
        with self.whole():
            own = FILES[self.s.technique][0](self.model)
            assert all(t.numel() and t.isfinite().all() for t in own.values())

    @torch.no_grad()
    def save_peft(self):
        """peft opens the files, finds all keys, and computes the same."""
        s = self.s
        if s.kind not in TRANSFORMERS or s.technique not in CONFIGS or s.options.get("template"):
            return
        base = bare_model(s)
        for name, p in base.named_parameters():
            p.copy_(self.oracle.base.get_parameter(name))
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("error", ".*(missing|unexpected).*")
            state = FILES[s.technique][0](self.model)
            save_file({key: t.contiguous() for key, t in state.items()}, f"{folder}/adapter_model.safetensors")
            with open(f"{folder}/adapter_config.json", "w") as file:
                json.dump(CONFIGS[s.technique](self.model), file)
            theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        rows, _ = batch(s, 5)
        bare = dataclasses.replace(s, technique="none" if s.technique != "prefix" else "prefix")
        found = [outputs(call(theirs, bare, [row]), s, [row])[0] for row in rows]
        self.equal(found, self.expected(rows), self.eps)

    def save_merged(self):
        """Merged and saved by itself, it opens as a plain model."""
        self.merge()
        if not self.merged:
            return
        lora.remove_lora(self.model)
        s, self.s = self.s, dataclasses.replace(self.s, technique="none")
        with tempfile.TemporaryDirectory() as folder:
            if s.kind in TRANSFORMERS and not WRAPPED.search(" ".join(self.model.state_dict())):
                self.model.save_pretrained(folder)
                plain = type(self.model).from_pretrained(folder).eval()
            else:
                torch.save(self.model.state_dict(), f"{folder}/a")
                plain = bare_model(s)
                plain.load_state_dict({WRAPPED.sub("", k): t for k, t in torch.load(f"{folder}/a").items()})
        self.call = plain
        self.check()
        self.done = True

    @torch.no_grad()
    def generate(self):
        """Each token that is generated greedily is the likeliest, but for what rounding decides."""
        s, (rows, _) = self.s, batch(self.s, 6)
        pads = [len(rows[0]) - len(row) for row in rows]
        ids = torch.stack([F.pad(row, (pad, 0)) for row, pad in zip(rows, pads)])
        mask = torch.stack([F.pad(torch.ones_like(row), (pad, 0)) for row, pad in zip(rows, pads)])
        mode = self.model.training
        self.model.eval()
        more = {} if s.kind == "gpt" else dict(do_sample=False)
        found = self.model.generate(ids, max_new_tokens=4, attention_mask=mask if any(pads) else None, **more)
        self.model.train(mode)
        assert found.shape == (2, ids.size(1) + 4) and torch.equal(found[:, : ids.size(1)], ids)
        for row, text, pad in zip(rows, found, pads):
            for end in range(pad + len(row), len(text)):
                z = self.oracle_next(text[pad:end])
                assert z.max() - z[text[end]] <= 2 * self.tolerance(self.eps) * z.abs().max()

    def oracle_next(self, row):
        return self.oracle.logits(row).logits[0, -1]


FILES = {
    "lora": (lora.lora_state_dict, lora.load_lora_state_dict),
    "houlsby": (adapter.adapter_state_dict, adapter.load_adapter_state_dict),
    "prefix": (prefix.prefix_state_dict, prefix.load_prefix_state_dict),
    "prompt": (prompt.prompt_state_dict, prompt.load_prompt_state_dict),
    "ptuning": (ptuning.ptuning_state_dict, ptuning.load_ptuning_state_dict),
}
FILES |= {"qlora": FILES["lora"], "pfeiffer": FILES["houlsby"], "fusion": FILES["houlsby"]}
CONFIGS = {
    "lora": lora.lora_config, "qlora": lora.lora_config, "prefix": prefix.prefix_config,
    "prompt": prompt.prompt_config, "ptuning": ptuning.ptuning_config,
}  # fmt: skip


def add(s, model):
    torch.manual_seed(s.seed)
    if s.technique in ("lora", "qlora"):
        return (qlora.add_qlora if s.technique == "qlora" else lora.add_lora)(model, **s.options)
    if s.technique in ("houlsby", "pfeiffer"):
        return adapter.add_adapter(model, placement=s.technique, **s.options)
    if s.technique == "fusion":
        states = []
        for _ in range(2):
            adapter.add_adapter(model, placement="pfeiffer", **s.options)
            states.append((adapter.adapter_config(model), adapter.adapter_state_dict(model)))
            adapter.remove_adapter(model)
        return adapter.add_fusion(model, states)
    return {"prefix": prefix.PrefixTuning, "prompt": prompt.PromptTuning, "ptuning": ptuning.PTuning}[s.technique](
        model, **s.options
    )


REFUSED = Counter()


LATER = {
    "dict outputs under an adapter",
    "all-linear inside DataParallel",
    "checkpointed blocks under a prefix",
    "files of a model that is wrapped inside",
    "a classifier in peft",
}


def later(s):
    if s.returns in ("dict", "ModelOutput") and s.technique in ("pfeiffer", "fusion"):
        return "dict outputs under an adapter"
    if s.wrapper == "dataparallel before" and s.options.get("targets") == "all-linear":
        return "all-linear inside DataParallel"
    if s.wrapper.startswith("checkpoint") and s.technique == "prefix":
        return "checkpointed blocks under a prefix"
    if s.kind == "classifier" and "save peft" in s.actions:
        return "a classifier in peft"
    if s.wrapper in ("dataparallel before", *COMPILED[2:], "checkpoint blocks", "checkpoint blocks after"):
        if "save peft" in s.actions or "save ours" in s.actions:
            return "files of a model that is wrapped inside"


def run(s):
    if later(s) in LATER:
        return
    torch._dynamo.reset()
    try:
        use = Use(s)
        for action in s.actions:
            if not use.done:
                use.do(action)
    except ERRORS as error:
        REFUSED[str(error)[:90]] += 1


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [25, pytest.param(CASES, marks=pytest.mark.thorough)])
def test_no_situation_gives_a_wrong_answer(cases):
    """Whatever is drawn computes what the equations say, or is refused in one line."""

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(situations())
    def one(s):
        run(s)

    one()
    print(REFUSED)
