# SPDX-License-Identifier: MIT
"""LoRA: a frozen weight learns through two thin factors beside it.

    y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ          s = α / r,  or  α / √r  (rsLoRA)
    merged:  W ← W + s · B A                      no cost left at inference

Dimensions: x (..., in), y (..., out); A (r, in) and B (out, r) trained; W (out, in), b and the whole rest frozen.
For an embedding table E (V, d), where x is a row number:  y = E[x] + s · Aᵀ[x] Bᵀ,  A (r, V), B (d, r).

Why it is cheap: r (in + out) numbers are trained instead of in · out. Gradients and Adam's moments exist for these
alone, and the step skips the product that would give dW: 2 of the 3 large ones remain. The activations stay: dA needs
x, and the gradient still has to travel down to the lowest layer.

Why it starts at B = 0: the product must be zero, so that training starts from the pretrained model. Then the gradient
dA = s Bᵀ dyᵀ x is zero as well, while dB = s dyᵀ (x Aᵀ) is not: the first step moves B alone. If A and B were both
zero, both gradients would be, for ever. Which of them is zero is free; for embeddings it is A, as in the paper's code.

Why α / r: so that α and the learning rate need not be tuned anew for each r (the paper, section 4.1). But a step η of
gradient descent on B changes W by -η s dB A = -η s² (dyᵀ x) AᵀA, and AᵀA, a sum over r rows that are drawn alike for
any r (init="kaiming"), grows like r: at s = α / r the change shrinks as r grows, at s = α / √r it keeps its size. Hence
rsLoRA, for large r.

Where to put it: on any linear layer or embedding. The paper adapts attention alone, mostly q and v; QLoRA (section 4)
had to adapt all linear layers to match full fine-tuning, and found that r matters little. `ranks` gives single layers
other ranks.

Beside its sisters: unlike adapters and prompts it can be merged; unlike QLoRA the frozen weight is kept as it came.

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


# ---------------------------------------------------------------------------------------------------------- mathematics


def delta_weight(A, B, scaling):
    """s · B A: (out, r) and (r, in) give (out, in). In fp32 or wider: small updates vanish in a 16-bit sum."""
    wide = torch.promote_types(A.dtype, torch.float32)
    return scaling * (B.to(wide) @ A.to(wide))


# -------------------------------------------------------------------------------------------------------------- layers


class LoRALinear(nn.Module):
    """Holds an nn.Linear, or a Hugging Face Conv1D, and adds the update. A and B are in fp32 even beside 16 bits."""

    def __init__(self, base_layer, r, alpha, dropout, rslora, init):
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        # Hugging Face's Conv1D is a linear layer that keeps its weight as (in, out)
        self.is_conv1d = type(base_layer).__name__ == "Conv1D"
        n_in, n_out = weight.shape if self.is_conv1d else (base_layer.in_features, base_layer.out_features)
        wide = dict(dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32, device=weight.device)
        self.lora_A = nn.Parameter(torch.zeros(r, n_in, **wide))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, **wide))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within ±1/√in
        else:
            nn.init.normal_(self.lora_B if init == "reverse" else self.lora_A, std=1 / r)
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        self.register_buffer("original", None)  # the base weight's own bits, while it is merged

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        if not self.enabled or self.original is not None:
            return self.base_layer(x)
        rows = x.reshape(-1, x.size(-1))  # (n, in)
        y = self.base_layer(rows)  # (n, out)
        low = F.linear(self.dropout(rows), self.lora_A.to(x.dtype)).to(y.dtype)  # (n, r)
        # y += s · low Bᵀ: onto the layer's own output, with no second tensor of its size
        y.addmm_(low, self.lora_B.to(y.dtype).t(), alpha=self.scaling)
        return y.view(*x.shape[:-1], y.size(-1))

    def delta(self):
        delta = delta_weight(self.lora_A, self.lora_B, self.scaling)
        return delta.t() if self.is_conv1d else delta


class LoRAEmbedding(nn.Module):
    """Holds an nn.Embedding and adds the update. A starts at 0. A row number, the branch's input, has no dropout."""

    def __init__(self, base_layer, r, alpha, dropout, rslora, init):
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        wide = dict(dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32, device=weight.device)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, weight.size(0), **wide))
        self.lora_embedding_B = nn.Parameter(torch.randn(weight.size(1), r, **wide))
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.enabled = True
        self.register_buffer("original", None)

    weight = property(lambda self: self.base_layer.weight)

    def forward(self, ids):
        y = self.base_layer(ids)  # (..., d)
        if not self.enabled or self.original is not None:
            return y
        low = F.embedding(ids, self.lora_embedding_A.t(), self.base_layer.padding_idx)  # (..., r)
        update = self.scaling * F.linear(low, self.lora_embedding_B)  # (..., d)
        return y + (update * getattr(self.base_layer, "embed_scale", 1)).to(y.dtype)  # Gemma scales its embeddings

    def delta(self):
        return delta_weight(self.lora_embedding_A, self.lora_embedding_B, self.scaling).t()  # (V, d)


# --------------------------------------------------------------------------------------------------------------- verbs


def add_lora(model, targets="all-linear", *, r=8, alpha=16, dropout=0.0, ranks=None, rslora=False, init="kaiming"):
    """Freezes the model, wraps its target layers in place and returns it.

    targets: ends of layer names, ("c_attn", "mlp.c_proj"); or one regular expression for the whole name; or
        "all-linear", every linear layer but the head. r: rank. alpha: α. dropout: on the input of A alone.
    ranks: {regular expression for the end of a layer's name: its rank}, as peft's rank_pattern; the first match holds.
    init: "kaiming" (peft's default) or "gaussian" draws A and sets B = 0; "reverse" sets A = 0 and draws B. (Embeddings
        always start with A = 0.)
    Cast the model before, not after: model.to(torch.bfloat16) would cast A and B too.
    Raises Error, with the model untouched, if there is nothing to wrap, or LoRA is there already.
    """
    ranks = dict(ranks or {})
    if lora_layers(model):
        raise Error("the model has LoRA already: remove_lora(model) first")
    if any(type(n) is not int or not 1 <= n < 1 << 31 for n in (r, *ranks.values())):
        raise Error(f"a rank must be a whole number of at least 1: r={r}, ranks={ranks}")
    if not 0 <= dropout < 1 or not abs(alpha) <= torch.finfo(torch.float32).max:
        raise Error(f"dropout must be in [0, 1) and alpha finite, not {dropout} and {alpha}")
    if init not in ("kaiming", "gaussian", "reverse"):
        raise Error(f"init must be kaiming, gaussian or reverse, not {init!r}")
    layers = find_targets(model, targets)
    rank_of = {name: next((ranks[key] for key in ranks if name_ends(key, name)), r) for name in layers}
    for key in ranks:
        if not any(name_ends(key, name) for name in layers):
            raise Error(f"ranks: {key!r} matches no target; there are {names(layers)}")
    wrapped = {}
    for name, layer in layers.items():
        wrapper = LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear
        wrapped[name] = wrapper(layer, rank_of[name], alpha, dropout, rslora, init).train(layer.training)
    model.requires_grad_(False)  # A and B are not in it yet
    for name, layer in wrapped.items():
        replace(model, name, layer)
    model.lora_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "lora_dropout": dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets), "rank_pattern": ranks,
        "use_rslora": rslora, "bias": "none", "inference_mode": True,
        # true for GPT-2 as transformers has it, with Conv1D
        "fan_in_fan_out": getattr(getattr(model, "config", None), "model_type", None) == "gpt2",
    }  # fmt: skip
    return model


def replace(model, name, layer):
    """Puts the layer in every place of the one that has this name: a model may call one layer in several."""
    old = model.get_submodule(name)
    for parent in [*model.modules()]:
        for child, module in parent._modules.items():  # named_children would leave out all places but the first
            if module is old:
                setattr(parent, child, layer)


def is_linear(layer):
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def name_is(pattern, name):
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise Error(f"{pattern!r} is not a regular expression: {error}") from None


def name_ends(pattern, name):
    """peft's rule for ranks: the regular expression matches the whole name, or all of it after a dot."""
    return name_is(rf"(.*\.)?({pattern})", name)


def names(layers):
    """Layer names with the numbers left out, for a message."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in layers}))


def find_targets(model, targets):
    """{name: layer} of what `targets` names; Error if that is nothing, or no layer that LoRA fits on."""
    fitting = {n: m for n, m in model.named_modules() if n and (is_linear(m) or isinstance(m, nn.Embedding))}
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = {n: m for n, m in fitting.items() if is_linear(m) and m is not head}
        # a mixture of experts may hold them all in one tensor of three dimensions
        passed = [n for n, p in model.named_parameters() if p.dim() > 1 and n.rpartition(".")[0] not in fitting]
        if passed:
            warnings.warn(f"all-linear passes over parameters of no linear layer: {names(passed)}", stacklevel=3)
    elif isinstance(targets, str):
        found = {n: m for n, m in model.named_modules() if n and name_is(targets, n)}
    else:
        found = {n: m for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)}
    if not found:
        rule = "a list holds ends of names; a string is a regular expression for a whole name"
        raise Error(f"no layer fits targets={targets!r} ({rule}); there are {names(fitting) or 'none in the model'}")
    for name, layer in found.items():
        if name not in fitting:
            raise Error(f"{name} is a {type(layer).__name__}; LoRA fits on {names(fitting)}")
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise Error(f"{name}: nn.MultiheadAttention reads its weight, never calls it; LoRA there would do nothing")
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise Error(f"{name} is only read in eval mode, not called: torch.backends.mha.set_fastpath_enabled(False)")
    return found


def lora_layers(model):
    """{name: layer} of the wrapped layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (LoRALinear, LoRAEmbedding))}


@torch.no_grad()
def merge_lora(model):
    """W ← W + s · B A in every layer, once: the model then runs as fast as the base. unmerge_lora takes it back."""
    # in how many places each weight is used: LoRA is on one of them, a merge would change all
    places = [model, *(child for parent in model.modules() for child in parent.children())]
    uses = Counter(id(p) for module in places for p in module.parameters(recurse=False))
    for name, layer in lora_layers(model).items():
        if not layer.enabled:
            raise Error("inside lora_disabled the model is the base: merge outside of it")
        # 8 bits or fewer; bitsandbytes may keep its 4 in a tensor of a wider type
        if layer.weight.element_size() < 2 or hasattr(layer.weight, "quant_state"):
            raise Error(f"{name} has a quantized weight: merge into a 16- or 32-bit copy of the model")
        if uses[id(layer.weight)] != 1:
            raise Error(f"{name} shares its weight with another layer, or computes it: a merge needs one of its own")
    for layer in lora_layers(model).values():
        if layer.original is None:
            layer.original, delta = layer.weight.clone(), layer.delta()
            layer.weight.copy_(layer.weight.to(delta.dtype) + delta)  # summed in 32 bits, then rounded once
    return model


@torch.no_grad()
def unmerge_lora(model):
    """Puts back the base weights bit for bit; subtracting s · B A again would leave rounding errors."""
    for layer in lora_layers(model).values():
        if layer.original is not None:
            layer.weight.copy_(layer.original)
            layer.original = None
    return model


def remove_lora(model):
    """Puts the bare layers back, with their weights as they are: merge_lora first to keep what was learned.

    They stay frozen: model.requires_grad_(True) to train them.
    """
    for name, layer in lora_layers(model).items():
        replace(model, name, layer.base_layer)
    if hasattr(model, "lora_config"):
        del model.lora_config
    return model


@contextmanager
def lora_disabled(model):
    """The base model as it was, inside the `with`."""
    layers = lora_layers(model).values()
    merged = any(layer.original is not None for layer in layers)
    enabled = all(layer.enabled for layer in layers)  # not so inside another lora_disabled
    unmerge_lora(model)
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = enabled
        if merged:
            merge_lora(model)


# --------------------------------------------------------------------------------------------------------------- files


def lora_parameters(model):
    """{name in peft's checkpoint: parameter}."""
    found = {}
    for name, layer in lora_layers(model).items():
        for key, p in layer.named_parameters(recurse=False):
            found[f"base_model.model.{name}.{key}" + (".weight" if isinstance(layer, LoRALinear) else "")] = p
    return found


def lora_state_dict(model):
    """What was trained, under peft's names: the content of adapter_model.safetensors."""
    return {key: p.detach() for key, p in lora_parameters(model).items()}


@torch.no_grad()
def load_lora_state_dict(model, state):
    """The reverse, onto a model that add_lora has prepared. Error, with nothing loaded, if the two do not fit."""
    own = lora_parameters(model)
    state = {key: t for key, t in state.items() if ".base_layer." not in key}  # peft adds the frozen embedding table
    if any(layer.original is not None for layer in lora_layers(model).values()):
        raise Error("the model is merged with another adapter: unmerge_lora(model) first")
    if own.keys() != state.keys():
        missing, left = names(own.keys() - state.keys()), names(state.keys() - own.keys())
        raise Error(f"the adapter does not fit: missing {missing or 'nothing'}, left over {left or 'nothing'}")
    for key, p in own.items():
        if p.shape != state[key].shape:
            raise Error(f"{key} is {tuple(state[key].shape)} in the adapter and {tuple(p.shape)} in the model")
        if not state[key].is_floating_point() or state[key].element_size() < 2:
            raise Error(f"{key} is {state[key].dtype} in the adapter, which holds no trained numbers")
    for key, p in own.items():
        p.copy_(state[key])


def lora_config(model):
    """The adapter_config.json that goes with lora_state_dict."""
    if not hasattr(model, "lora_config"):
        raise Error("the model has no LoRA: add_lora(model) first")
    return dict(model.lora_config)


# What peft's LoRA can do and this file does not: each must be absent or empty in a config.
UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "kasa_config", "layer_replication",
    "layers_to_transform", "lora_bias", "modules_to_save", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip


def takes_forever(pattern):
    """Whether a regular expression may need years for a name: it tries each way to share the name among its repeats."""
    repeats, choices = re.findall(r"[*+?{]", pattern), re.findall(r"[|(]", pattern)
    return len(repeats) > 4 or len(choices) > 12 or re.search(r"\)[*+{]", pattern) is not None


def lora_arguments(config):
    """add_lora's arguments, from an adapter_config.json of ours or peft's. Error for what this file does not do."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise Error("adapter_config.json is no LoRA's: its peft_type must be LORA")
    for key in UNSUPPORTED:
        if config.get(key):
            raise Error(f"adapter_config.json: {key} = {config[key]!r} is not supported")
    # The other ways to start (pissa, olora, corda, loftq, ...) change the base weights as well.
    for key, allowed in (("bias", ["none"]), ("init_lora_weights", [True, False, "gaussian", "orthogonal", "eva"])):
        if config.get(key, allowed[0]) not in allowed:
            raise Error(f"adapter_config.json: {key} must be one of {allowed}, not {config[key]!r}")
    arguments = {}
    for argument, key, kind, default in (
        ("targets", "target_modules", (str, list), None),
        ("r", "r", (int,), 8),
        ("alpha", "lora_alpha", (int, float), 8),
        ("dropout", "lora_dropout", (int, float), 0.0),
        ("ranks", "rank_pattern", (dict,), {}),
        ("rslora", "use_rslora", (bool,), False),
    ):
        arguments[argument] = config.get(key, default)
        if type(arguments[argument]) not in kind:  # isinstance would take True for a rank of 1
            raise Error(f"adapter_config.json: {key} cannot be {arguments[argument]!r}")
    for pattern in (arguments["targets"], *arguments["ranks"]):
        if isinstance(pattern, str) and takes_forever(pattern):
            message = "has too many repeats or choices, or repeats a group: list the names"
            raise Error(f"adapter_config.json: {pattern!r} {message}")
    return arguments


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    before = model(x)
    add_lora(model, r=4)
    print(f"B = 0, so nothing has changed yet: largest difference {(model(x) - before).abs().max():.1e}")
    model(x).square().sum().backward()
    layer = model[0]
    print(f"first gradients: |dA| = {layer.lora_A.grad.norm():.2f}, |dB| = {layer.lora_B.grad.norm():.2f}")
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    unmerged, original = model(x), layer.weight.clone()
    difference = (merge_lora(model)(x) - unmerged).abs().max() / unmerged.abs().max()
    print(f"merged against unmerged: {difference:.1e} of the largest output")
    print(f"the weight is back after unmerging, bit for bit: {torch.equal(unmerge_lora(model)[2].weight, original)}")
    d, n_layer, r = 768, 12, 8
    trained = n_layer * r * (d + 3 * d)
    print(f"GPT-2's c_attn at r = {r}: {n_layer} layers · r (in + out) = {trained:,} of 124,439,808 parameters")
