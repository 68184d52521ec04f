# SPDX-License-Identifier: MIT
"""LoRA, low-rank adaptation: W stays frozen, and a low-rank update ΔW = s · B A is trained beside it.

    y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ           s = α / r;  rsLoRA: s = α / √r
    merged:  W ← W + s · B A                       the same function, up to the rounding of W's dtype

    x (..., in) ──┬───────────── W (out, in), b ─────────────(+)── y (..., out)        W and b are frozen
                  └── dropout ── A (r, in) ── s ── B (out, r) ──┘                      A and B are trained

An embedding table E (V, d) has A (r, V) and B (d, r):  y = E[i] + s · Aᵀ[i] Bᵀ  for the token with number i.

Why low rank: large models can be fine-tuned in a random subspace of few dimensions, their "intrinsic dimension" (arXiv
2012.13255). LoRA's hypothesis is that the ΔW of each matrix has a low rank too. It is no theorem: in the paper r = 1 to
8 is enough for q and v of GPT-3, and other tasks may need more. A product B A is cheap, and can be merged.

Why one factor starts at zero, and only one: ΔW must be 0 for training to start from the pretrained model. Here A is
random and B = 0. The gradients are  dB = s · dyᵀ (x Aᵀ)  and  dA = s · Bᵀ dyᵀ x,  so the first step moves B alone. With
A = B = 0 both gradients would be zero for ever. A = 0 and a random B work too, and embeddings start so in the paper's
code. But a random A is reported to stay stable at larger learning rates (arXiv 2406.08447).

What α is for: s scales the update, so it acts like a learning rate. The first step, with dB = s · G Aᵀ and G = dyᵀ x:
                                                                               s = α / r    s = α / √r
    Adam, ΔB = -lr · sign(dB):   the loss falls by lr · |dB|₁ ∝ s r            same         √r
                                 |ΔW| = s |ΔB A| ∝ s √r                        1/√r         same for each r
    SGD, ΔB = -lr · dB:          the loss falls by lr · |dB|² ∝ s² r           1/r          same
|dB|₁ sums out · r numbers ∝ s. An entry of ΔB A sums r terms of random sign, so it grows as √r. This assumes that A's
entries do not depend on r, as with init="kaiming", but not "gaussian" (deviation 1/r). Why rsLoRA: its paper finds that
with α / r the learning of large ranks collapses, while α / √r keeps it stable. Take α / r up to r = 64, α / √r beyond.

What it saves: gradients and Adam's two moments exist for r (in + out) numbers instead of in · out. Of a layer's three
large products (y, dx, dW) the last is left out: about 2/3 of the FLOPs remain. Less time is saved: A's and B's products
are too small to use the hardware well, and attention and norms take their time as before. The activations stay in
memory: dA needs x, and the gradient runs down to the lowest A.

Example: W is 4096 x 4096 and r = 8. W has 16,777,216 numbers, A and B have 8 · (4096 + 4096) = 65,536, one in 256.
Full fine-tuning in bf16 takes 16 bytes a number (weight 2, gradient 2, fp32 copy 4, Adam's moments 8): 268 MB. LoRA
takes 2 for W, and 16 for A and B (fp32 weight 4, gradient 4, moments 8): 34.6 MB. FLOPs: two of three large products
remain, and A and B have three small ones each, 3r (in + out) beside 3 · in · out: 2/3 + 2r/4096 = 67.1 %. GPT-2 with
r = 8 on c_attn trains 294,912 numbers of 124,439,808.

How to choose ([S]: "LoRA Without Regret", Schulman et al., 2025):
  targets  All linear layers. The LoRA paper adapts q and v; the QLoRA paper (section 4) needed all layers to match full
           fine-tuning. In [S] the MLP matters most, and attention alone is worse.
  r, α     r = 8 to 64, more for more data; the targets matter more. α = 16, 32 or 2r; the paper does not tune it.
  lr       About 10 times full fine-tuning's [S], found by experiment. One reason: at in = 4096, r = 8, α = 32, Adam's
           first step moves an entry of W by lr/10, not lr. The paper's GPT-2 runs and QLoRA (7B, 13B) take 2e-4.
When to use it: memory is short, many tasks share one base, or the base's abilities must stay. When not: there is much
new knowledge to learn (continued pre-training), and memory for it. LoRA falls behind full fine-tuning when the data
exceed its capacity, the learning rate is too small, or the batch is very large [S].
Several adapters: keep one W, unmerged. The batch shares the product W x, and each row adds its own B A x. An adapter of
the example takes 131 kB in 16 bits, W 33.6 MB. Forgetting: without the adapter the model is the old one to the bit.
With it, LoRA forgets less than full fine-tuning, and learns less (arXiv 2405.09673).

Pitfalls:
  * Merging rounds W + ΔW to W's dtype, which loses small updates though the sum is in fp32. With bf16 weights of RMS
    0.036 and an update of RMS 1e-4, 52 % of the weights do not change and the error is 50 % of the update.
  * Subtracting s · B A after a merge does not restore W's bits. unmerge_lora puts back a copy: while merged, weights
    take twice the memory, state_dict() has each unmerged_weight, and A and B get no gradient.
  * A tied weight (GPT-2's embedding and head) cannot be merged at one end: the other end would change too.
  * Two adapters merged into one W add up, ΔW₁ + ΔW₂, and may disturb each other.

Starts from W = U S Vᵀ or W's rounding Q; s B₀ A₀ is subtracted from W:
    PiSSA   2404.02948   s B₀ A₀ = U_r S_r V_rᵀ, the largest part of W    init="pissa"
    MiLoRA  2406.09044   the smallest part, the last r: changes little of what the base knows
    OLoRA   2406.01775   W = Q R: B₀ = Q[:, :r], A₀ = R[:r]. peft 0.21 takes s B₀ A₀ off, which for s ≠ 1 is another
                         matrix, and does not transpose a Conv1D (GPT-2): an error, or wrong if it is square
    LoftQ   2310.08659   over 4 bits: B₀ A₀ = the largest part of W - Q. peft 0.21 adds s B₀ A₀: use α = r
Variants, with what each trains of a 768 x 768 layer at r = 8 (LoRA: 12,288):
    LoRA+    2402.12354  B has about 16 times A's learning rate (lora_plus_groups)                    12,288
    DoRA     2402.09353  the length of each row of W, apart from its direction: dora.py               13,056
    AdaLoRA  2303.10512  ΔW = P Λ Q; singular values are pruned under one budget: adalora.py          12,296
    LoRA-FA  2308.03303  A is frozen where it started: of x only x Aᵀ is kept for backward             6,144
    VeRA     2310.11454  ΔW = b ∘ B (d ∘ A): A, B random, frozen, one for all layers                     776
    LoHa     2108.06098  ΔW = (B₁ A₁) ∘ (B₂ A₂), element by element: rank up to r²                    24,576
    LoKr     2309.14859  ΔW = C ⊗ (B A), a Kronecker product; C is 24 x 24, B A 32 x 32                1,088
    GaLore   2403.03507  no ΔW: all of W is trained, and Adam's m and v are those of Pᵀ dW, P (768, r)  589,824
Compared with related methods: QLoRA keeps W in 4 bits. An adapter, prefix or prompt costs time or context at inference,
a merged LoRA nothing. The whole family in one table: nanopeft/__init__.py.
Papers: LoRA, arXiv 2106.09685, eq. 3; rsLoRA, arXiv 2312.03732; QLoRA, arXiv 2305.14314.
"""

import math
import re
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F


class Error(ValueError):
    """Wrong use of LoRA; the message says what would be right."""


def new_factors(layer, r, init):
    """A (r, in) and B (out, r), one random and one 0, in fp32 even if the layer is in 16 bits (in fp64 for fp64)."""
    n_in, n_out = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    A, B = (nn.Parameter(torch.zeros(n, dtype=dtype, device=layer.weight.device)) for n in ((r, n_in), (n_out, r)))
    if isinstance(layer, nn.Embedding):
        nn.init.normal_(B)
    elif init == "kaiming":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # uniform within ±1/√in
    else:
        nn.init.normal_(B if init == "reverse" else A, std=1 / r)
    return A, B


class LoRALinear(nn.Module):
    """A frozen linear layer and its update."""

    stored = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}  # {end of peft's name: ours}
    own = {"base_layer", "lora_A", "lora_B", "dropout", "unmerged_weight"}  # all other names are base_layer's

    def __init__(self, base_layer, name, r, alpha, dropout, rslora, init):
        super().__init__()
        self.base_layer, self.lora_name, self.enabled = base_layer, name, True
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.lora_A, self.lora_B = new_factors(base_layer, r, init)  # (r, in), (out, r)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("unmerged_weight", None)  # a copy of W while the layer is merged

    def forward(self, x):
        y = self.base_layer(x)  # (..., out)
        return y + self.update(x).to(y.dtype) if self.is_active() else y

    def update(self, x):
        # s · B (A dropout(x)).  Only A and B are cast to x's dtype, because they are small.
        A, B = self.factors()
        h = self.scaling * F.linear(self.dropout(x), A.to(x.dtype))  # (..., r)
        return F.linear(h, B.to(h.dtype))  # (..., out)

    def delta(self):
        """ΔW = s · B A, (out, r) @ (r, in) = (out, in), in fp32 or fp64."""
        A, B = self.factors()
        dtype = torch.promote_types(A.dtype, torch.float32)
        delta = self.scaling * (B.to(dtype) @ A.to(dtype))
        return delta if isinstance(self.base_layer, nn.Linear) else delta.t()  # E is (V, d), and Conv1D's W (in, out)

    @property
    def weight(self):
        """W + ΔW, for a model that reads the weight and does not call the layer, as Mamba does with its dt_proj. It is
        computed at each access, without dropout, and what is written into it is lost."""
        W = self.base_layer.weight
        return (W + self.delta()).to(W.dtype) if self.is_active() and not is_packed(W) else W

    def factors(self):
        return self.lora_A, self.lora_B  # (r, in), (out, r)

    def merge(self):
        """W ← W + ΔW, summed in fp32 and rounded to W's dtype."""
        W = self.base_layer.weight
        self.unmerged_weight = W.clone()
        W.copy_(W + self.delta())

    def unmerge(self):
        self.base_layer.weight.copy_(self.unmerged_weight)
        self.unmerged_weight = None

    def is_active(self):
        return self.enabled and self.unmerged_weight is None

    def __getattr__(self, name):  # a model may read bias, in_features and others of its layer
        own = name in type(self).own or name.startswith("__")
        return super().__getattr__(name) if own else getattr(self.base_layer, name)


class LoRAEmbedding(LoRALinear):
    """A frozen embedding, which is a linear layer on one-hot vectors. A starts at 0. There is no dropout."""

    stored = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}

    def update(self, ids):
        h = self.scaling * F.embedding(ids, self.lora_A.t(), self.base_layer.padding_idx)  # (..., r)
        return F.linear(h, self.lora_B) * getattr(self.base_layer, "embed_scale", 1)  # Gemma scales its embeddings


class PiSSALinear(LoRALinear):
    """A and B start as the r largest singular values of W, and what they start as is taken off:

        s · B₀ A₀ = U_r S_r V_rᵀ,  W = U S Vᵀ          y = x W_resᵀ + b + s · x Aᵀ Bᵀ,  W_res = W - s · B₀ A₀

    Both move from the first step. W itself is not changed: s (B A - B₀ A₀) is an update of rank 2r, and is saved so.
    Over 4 bits it is W that is rounded, not W_res, so the start has QLoRA's error and not the paper's smaller one.
    """

    own = LoRALinear.own | {"A_0", "B_0"}

    def __init__(self, *args):
        super().__init__(*args)
        W, r, dtype = self.base_layer.weight.detach(), len(self.lora_A), self.lora_A.dtype
        W = W if isinstance(self.base_layer, nn.Linear) else W.t()
        if is_packed(W):
            raise Error(f"init='pissa' takes singular values, and {self.lora_name} has quantized weights")
        if not 0 < self.scaling or r > min(W.shape):
            raise Error(f"init='pissa' needs alpha > 0, and a rank of at most {min(W.shape)} in {self.lora_name}")
        U, S, Vt = torch.linalg.svd(W.to(dtype), full_matrices=False)
        root = (S[:r] / self.scaling).sqrt()  # (r,)
        self.lora_A.data.copy_(root[:, None] * Vt[:r])
        self.lora_B.data.copy_(U[:, :r] * root)
        self.register_buffer("A_0", self.lora_A.detach().clone())
        self.register_buffer("B_0", self.lora_B.detach().clone())

    def factors(self):  # (2r, in), (out, 2r)
        return torch.cat((self.lora_A, self.A_0)), torch.cat((self.lora_B, -self.B_0), 1)


# ----------------------------------------------------------------------------------------------------------------- use


def add_lora(
    model, targets="all-linear", *, r=8, alpha=16, dropout=0.0, ranks=None, rslora=False, init="kaiming",
    modules_to_save=None,
):  # fmt: skip
    """Freezes the model, wraps its target layers in place and returns it. Wrong use: Error, and nothing has changed.

    targets: a list of ends of layer names, ["c_attn", "mlp.c_proj"]; or one regular expression for whole names; or
        "all-linear", every linear layer but the head. ranks: {regular expression for the end of a name: its own r}.
    init: "kaiming" or "gaussian" draws A and sets B = 0; "reverse" draws B and sets A = 0; "pissa": see PiSSALinear.
        Embeddings have neither a choice of init (A = 0, B normal) nor dropout, and "pissa" refuses them.
    modules_to_save: ends of names of modules that are trained in full and saved too; by default a classifier's
        new head, if it is called "classifier", "score" or "qa_outputs". Without LoRA it stays as trained.
    Cast the model before, not after: model.to(torch.bfloat16) would cast A and B too. Wrap it in DDP or FSDP after.
    """
    ranks = dict(ranks or {})
    if lora_layers(model):
        raise Error("the model has LoRA already: remove_lora(model) first")
    if any(type(n) is not int or not 1 <= n < 1 << 31 for n in (r, *ranks.values())):
        raise Error(f"a rank must be a whole number of at least 1: r={r}, ranks={ranks}")
    if not (0 <= dropout < 1 and abs(alpha) <= 3.4e38 and init in ("kaiming", "gaussian", "reverse", "pissa")):
        got = f"{dropout}, {alpha}, {init!r}"
        raise Error(f"dropout must be in [0, 1), alpha finite, init kaiming, gaussian, reverse or pissa; not {got}")
    saved = find_saved(model, modules_to_save)
    found = find_targets(model, targets, saved)
    rank = dict.fromkeys(found, r)
    for end, n in reversed(ranks.items()):  # the first that matches a name counts, so it is set last
        fitting = matching(rf"(.*\.)?({end})", found)  # peft's rule: the whole name, or all of it after a dot
        if not fitting:
            raise Error(f"ranks: {end!r} matches no target; there are {names(found)}")
        rank |= dict.fromkeys(fitting, n)
    if init == "pissa" and (tables := [name for name, layer in found.items() if isinstance(layer, nn.Embedding)]):
        raise Error(f"init='pissa' is for linear layers, and {tables[0]} is an embedding: leave it out")
    wrapped = {}
    for name, layer in found.items():
        wrapper = LoRAEmbedding if isinstance(layer, nn.Embedding) else PiSSALinear if init == "pissa" else LoRALinear
        wrapped[layer] = wrapper(layer, name, rank[name], alpha, dropout, rslora, init).train(layer.training)
    model.requires_grad_(False)  # A and B are not in the model yet
    replace(model, wrapped)
    for name, module in saved.items():
        module.requires_grad_(True).lora_name = name
    if init == "pissa":  # saved with twice the rank, and the same s
        r, alpha, ranks = 2 * r, alpha * (math.sqrt(2) if rslora else 2), {end: 2 * n for end, n in ranks.items()}
    model.lora_config = {
        "peft_type": "LORA", "task_type": None, "r": r, "lora_alpha": alpha, "lora_dropout": dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets), "rank_pattern": ranks,
        "use_rslora": rslora, "bias": "none", "inference_mode": True, "modules_to_save": [*saved] or None,
        "fan_in_fan_out": getattr(getattr(model, "config", None), "model_type", None) == "gpt2",  # it has Conv1D
    }  # fmt: skip
    return model


def lora_layers(model):
    """{name: layer} of the wrapped layers, by the names in the model that add_lora got: it may be wrapped since."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    found = {layer.lora_name: layer for layer in layers}
    if len(found) < len(layers):
        raise Error("layers have the same name, from another model or another add_lora: call it once, on the model")
    return found


@torch.no_grad()
def merge_lora(model):
    """W ← W + s · B A in each layer. unmerge_lora takes it back."""
    uses = count_uses(model)
    lora_state_dict(model)  # Error if it is sharded
    for name, layer in lora_layers(model).items():
        if not layer.enabled:
            raise Error("inside lora_disabled the model is the base: merge outside of it")
        weight = layer.base_layer.weight
        if is_packed(weight) or hasattr(layer.base_layer, "dequantize"):
            raise Error(f"{name} has a quantized weight: merge into a 16- or 32-bit copy of the model")
        if uses[id(weight)] != 1:
            raise Error(f"{name} shares its weight with another layer, or computes it: a merge needs one of its own")
    for layer in lora_layers(model).values():
        if layer.unmerged_weight is None:
            layer.merge()
    return model


@torch.no_grad()
def unmerge_lora(model):
    """Puts back the base weights, bit for bit."""
    for layer in lora_layers(model).values():
        if layer.unmerged_weight is not None:
            layer.unmerge()
    return model


def remove_lora(model):
    """Puts the bare layers back, frozen, with their weights as they are: merge_lora first to keep what was learned."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False  # torch.compile may have kept the layer
    replace(model, {layer: layer.base_layer for layer in layers})
    model.requires_grad_(False)
    for module in model.modules():
        for name in ("lora_config", "lora_name"):
            module.__dict__.pop(name, None)
    return model


@contextmanager
def lora_disabled(model):
    """Inside the `with` the model is the base, but for modules_to_save; afterwards it is as before, merged or not."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]  # not again inside another
    merged = any(layer.unmerged_weight is not None for layer in layers)
    unmerge_lora(model)
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True
        if merged:
            merge_lora(model)


def lora_parameters(model):
    """{name in peft's checkpoint: parameter}: what is trained."""
    found = {}
    for name, layer in lora_layers(model).items():
        found |= {f"{name}.{ending}": getattr(layer, own) for ending, own in layer.stored.items()}
    for module in model.modules():
        if "lora_name" in vars(module) and not isinstance(module, LoRALinear):  # of modules_to_save
            state = module.state_dict(prefix=f"{module.lora_name}.", keep_vars=True)
            found |= {bare(key): t for key, t in state.items()}
    return {f"base_model.model.{name}": p for name, p in found.items()}


def lora_plus_groups(model, lr, ratio=16):
    """Parameter groups for an optimizer: LoRA+ (arXiv 2402.12354) gives B `ratio` times A's learning rate."""
    B = dict.fromkeys(layer.lora_B for layer in lora_layers(model).values())
    rest = [p for p in lora_parameters(model).values() if p.requires_grad and p not in B]
    return [{"params": rest, "lr": lr}, {"params": [*B], "lr": lr * ratio}]


def lora_state_dict(model):
    """What was trained: the content of adapter_model.safetensors. The tensors are the model's own: they train on. (Not
    those of PiSSA, which are copies.)"""
    state = {key: p.detach() for key, p in lora_parameters(model).items()}
    for key, p in state.items():
        if p.numel() == 0 or hasattr(p, "full_tensor"):
            how = "inside ZeRO's engine.whole(), or, with FSDP2, on a model that has each full_tensor()"
            raise Error(f"{key} is sharded: call this {how}")
    for name, layer in lora_layers(model).items():
        if isinstance(layer, PiSSALinear):
            state |= {f"base_model.model.{name}.{end}": t.detach() for end, t in zip(layer.stored, layer.factors())}
    return state


@torch.no_grad()
def load_lora_state_dict(model, state):
    """The reverse, onto a model that add_lora has prepared. If the two do not fit: Error, and nothing is loaded."""
    own = lora_state_dict(model)  # the parameters' own memory
    base = {bare(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for key in [key for key in state if ".base_layer." in key]:  # peft adds a resized embedding, or trained biases
        p = base.get(key.removeprefix("base_model.model."))
        if p is None or not p.is_meta and not (p.shape == state[key].shape and torch.equal(p, state[key].to(p))):
            raise Error(f"{key} is not this base's: the adapter is of another base, or has more than LoRA in it")
    state = {key: t for key, t in state.items() if ".base_layer." not in key}
    if any(layer.unmerged_weight is not None for layer in lora_layers(model).values()):
        raise Error("the model is merged with another adapter: unmerge_lora(model) first")
    if own.keys() != state.keys():
        missing, left = names(own.keys() - state.keys()), names(state.keys() - own.keys())
        raise Error(f"the adapter does not fit: missing {missing or 'nothing'}, left over {left or 'nothing'}")
    for key, p in own.items():
        t = state[key]
        is_number = not p.is_floating_point() or t.is_floating_point() and t.element_size() > 1  # 8 bits need a scale
        if p.shape != t.shape or not is_number:
            raise Error(f"{key} is {t.dtype} {tuple(t.shape)} in the adapter; the model needs floats {tuple(p.shape)}")
    for key, p in lora_parameters(model).items():
        p.copy_(state[key][tuple(map(slice, p.shape))])  # all of it, but of PiSSA's the half that is trained
    for name, layer in lora_layers(model).items():
        if isinstance(layer, PiSSALinear):
            A, B = (state[f"base_model.model.{name}.{end}"] for end in layer.stored)
            layer.A_0.copy_(A[len(layer.A_0) :])
            layer.B_0.copy_(-B[:, len(layer.A_0) :])


def lora_config(model):
    """The adapter_config.json that goes with lora_state_dict."""
    for module in model.modules():  # the model may be wrapped by now
        if "lora_config" in vars(module):
            return dict(module.lora_config)
    raise Error("the model has no LoRA: add_lora(model) first")


# ------------------------------------------------------------------------------------------------------------ plumbing


def is_linear(layer):
    """Hugging Face's GPT-2 has a Conv1D, a linear layer that keeps W as (in, out)."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def count_uses(model):
    """{id of a parameter: number of modules that have it}."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def is_packed(weight):
    """8 bits or fewer; bitsandbytes may keep its 4 bits in a tensor of a wider type."""
    return weight.element_size() < 2 or hasattr(weight, "quant_state")


def bare(name):
    """A module's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)", "", name).rstrip(".")


def bare_names(model):
    """{bare name: module}; if it is wrapped, its outermost wrapper."""
    found = {}
    for name, module in model.named_modules():
        found.setdefault(bare(name), module)
    return found


def replace(model, layers):
    """For each {old: new} puts new in every place of old, as a model may call one layer in several."""
    for parent in [*model.modules()]:
        for child, module in parent._modules.items():  # named_children would leave out all places but the first
            if module in layers:
                setattr(parent, child, layers[module])


def matching(pattern, modules):
    try:
        return {name: m for name, m in modules.items() if re.fullmatch(pattern, name)}
    except (re.error, OverflowError, RecursionError) as error:
        raise Error(f"{pattern!r} is not a regular expression: {error}") from None


def names(layers):
    """Layer names with the numbers left out, for a message."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in layers}))


def find_saved(model, ends):
    """{name: module} of modules_to_save: by ends of names, or by default a classifier's new head."""
    modules, uses = bare_names(model), count_uses(model)
    if ends is None:  # the model's own, and DistilBERT's pre_classifier
        own, heads = [name for name in modules if "." not in name], ("classifier", "score", "qa_outputs")
        found = {name: modules[name] for name in own if name.endswith(heads)}
    else:
        found = {name: m for name, m in modules.items() if name.endswith(tuple(ends))}
    shared = any(uses[id(p)] > 1 for module in found.values() for p in module.parameters())
    if isinstance(ends, str) or shared or ends and not found:
        raise Error(f"modules_to_save={ends!r} must be a list of ends of names of modules with weights of their own")
    return found


def find_targets(model, targets, saved=()):
    """{name: layer} of what `targets` names, outside of `saved`; Error if that is nothing, or no layer for LoRA."""
    if any(isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)) for m in model.modules()):
        raise Error("add LoRA to the plain model, then wrap it: DDP knows only the parameters that it began with")
    inside = tuple(f"{name}." for name in saved)
    modules = {name: m for name, m in bare_names(model).items() if name and not f"{name}.".startswith(inside)}
    fitting = {n: m for n, m in modules.items() if is_linear(m) or isinstance(m, nn.Embedding)}
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = {n: m for n, m in fitting.items() if is_linear(m) and m is not head}
        matrices = [n for n, p in model.named_parameters() if p.dim() > 1 and not bare(n).startswith(inside)]
        passed = [n for n in matrices if bare(n).rpartition(".")[0] not in fitting]
        if passed:  # a mixture of experts may hold them all in one tensor
            warnings.warn(f"all-linear passes over parameters of no linear layer: {names(passed)}", stacklevel=3)
    else:
        pattern = targets if isinstance(targets, str) else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
        found = matching(pattern, modules)
    if not found:
        rule = "a list holds ends of names; a string is a regular expression for a whole name"
        raise Error(f"no layer fits targets={targets!r} ({rule}); there are {names(fitting) or 'none in the model'}")
    for name, layer in found.items():
        if name not in fitting:
            raise Error(f"{name} is a {type(layer).__name__}; LoRA fits on {names(fitting)}")
        if isinstance(layer, nn.Embedding) and not hasattr(layer, "embed_scale"):
            if type(layer).forward is not nn.Embedding.forward or layer.max_norm is not None:
                raise Error(f"{name} is a {type(layer).__name__}, whose forward is not nn.Embedding's: leave it out")
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    x, model = torch.randn(4, 64), nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    before = model(x)
    print(f"B = 0, so nothing has changed yet: {torch.equal(add_lora(model, r=4)(x), before)}")
    nn.init.normal_(model[0].lora_B)
    print(f"merged against unmerged: a largest difference of {(model(x) - merge_lora(model)(x)).abs().max():.1e}")
    print(f"unmerged and removed, the base is bit for bit: {torch.equal(remove_lora(unmerge_lora(model))(x), before)}")
