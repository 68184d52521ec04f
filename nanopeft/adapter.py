# SPDX-License-Identifier: MIT
"""Bottleneck adapters: small trained layers inside a frozen model. AdapterFusion: attention over several of them.

An adapter reads u, the output of some layer. It projects u's d features down to m, applies a nonlinearity f, projects
back up, and adds the result to u:

    output = u + A(u)          A(u) = Up f(Down u)          (B, T, d) → Down → (B, T, m) → f → Up → (B, T, d)

B batch, T tokens, d model width, m = d / reduction the bottleneck. Down (m, d) and Up (d, m), each with a bias, are
trained: 2dm + m + d parameters instead of more than d². The model is frozen. Two places, in a pre-LN block (GPT-2):

    x ──┬── LN ── attention ──[H]── + ──┬── LN ── MLP ──[H]── + ──[P]──► x of the next block
        └───────────────────────────┘   └─────────────────────┘
[H] Houlsby: u is the output of each sublayer, before it joins the residual stream: x ← x + u + A(u). Two per block.
[P] Pfeiffer: u is the output of the block, the stream itself: x ← u + A(u). One per block; about as good (2005.00247).
BERT is post-LN: Houlsby's adapter is then before the sublayer's LayerNorm, LN(x + u + A(u)). That paper also trains the
LayerNorms. Here, as in AdapterHub, they stay frozen: few numbers (38,400 in GPT-2), and probably little to gain.

* Why start at Up = 0? Then A(u) = 0: training starts from exactly the pretrained model, which random adapters would
  damage in every block. (The paper starts near zero.) The first step moves Up alone: Down's gradient passes through Up.
* Why a nonlinearity, and why no merging? With f, u + A(u) is not linear in u: no weight before or after can absorb it.
  Without f, Up Down is a matrix of rank m, as in LoRA, and [H] could be merged into the sublayer's last weight W, as
  (I + Up Down) W. [P] could not even then: I + Up Down would act on the whole residual stream, the sum of what all
  sublayers wrote, and no single weight makes that. Which f it is hardly matters.
* Cost at inference: two small products in series per adapter. Few multiplications (Houlsby at reduction 16: 2.1 % of
  the blocks' own), but many small kernels: on a GPU at batch 1 the LoRA paper (table 1) measured 20 to 30 % more
  latency. AdapterDrop (2010.11918) leaves out the adapters of the lowest blocks, which matter least: several tasks can
  share these blocks' results, and training need not backpropagate through them.
* Training memory: only adapters have gradients and optimizer states. Most activations stay: backward passes all blocks.

AdapterFusion combines what was learned on several tasks. Fine-tuned on one after another, a model overwrites what it
knew; on all at once, it needs all the data at once. Two stages: 1, knowledge extraction: train one (Pfeiffer)
adapter per task, each alone, in the same frozen model. 2, knowledge composition: freeze these N adapters too, and train
on the target task, in each block, an attention by which each token weighs what the adapters say about it:
    zᵢ = Aᵢ(u), i = 1 … N      scoreᵢ = (Q u) · (K zᵢ)      p = softmax over the N scores      output = u + Σᵢ pᵢ V zᵢ

Design: Q and K (d, d) have a bias, V (d, d) has none; the scores are not divided by √d. Q and K start at random, from
N(0, 0.02²), with zero biases. V starts as the identity (1e-6 off the diagonal), as a random V would scramble what the
adapters say, and the penalty 0.01 ‖I - V‖² in the loss holds it there.
Consequences: with N = 1, p is always 1, and Q and K get no gradient. K's bias never gets one: it adds the same to all N
scores. Fusion is expensive: 3d² + 2d parameters a block, which itself has 12d², and (N + 2) d² multiplications a token.

Worked example, d = 2, m = 1, f = relu: Down = (1, 1), Up = (0.5, -0.5)ᵀ. u = (1, 2) gives Down u = 3, A = (1.5, -1.5),
output (2.5, 0.5). -u gives f(-3) = 0, and stays (-1, -2): a matrix would give (-2.5, -0.5). Fused with z₂ = (0, 1) and
Q = K = V = I, u has the scores -1.5 and 2, p = (0.029, 0.971), output (1.044, 2.927).
GPT-2 (124M: d = 768, 12 blocks), reduction 16, m = 48: one A has 74,544 parameters. Pfeiffer's 12 have 894,528 (0.72 %
of the model), Houlsby's 24 1,789,056 (1.44 %). Fusion has 21,252,096 (17 %), 24 times the 12 A of one task.

Typical: reduction 2 to 64, mostly 16. Learning rate 1e-4 (AdapterHub) to 3e-4 (Houlsby's code), where all of BERT is
fine-tuned with 2e-5 to 5e-5; fusion 5e-5 (AdapterHub). On GLUE Houlsby's came within 0.4 % of full fine-tuning.
Which to choose? For one task LoRA: it is as small, and merged it costs nothing. An adapter, where many tasks share one
unmerged model and latency at small batches does not matter. Fusion, where adapters of related tasks exist and the
target task has little data: there its paper gained most, and elsewhere little over one adapter.
Pitfalls: cast the model before add_adapter, not after, or the adapters are cast too. Add fusion_penalty to the loss. A
new head of another name than classifier, score or qa_outputs must be in modules_to_save, or it stays frozen and is not
stored. With [P] or fusion, output_hidden_states of most models in transformers lacks A(u), except in the last one: hook
the layers of adapter_layers(model) instead.
A parallel adapter (2110.04366) stands beside its sublayer, x + MLP(LN x) + s A(x), and did better there at equal size.
Prompt tuning, P-tuning and prefix-tuning take up context. The whole family in one table: nanopeft/__init__.py
Papers: adapters, arXiv 1902.00751, section 2.1; AdapterFusion, arXiv 2005.00247, section 3.2.
"""

import re
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

# By name, the linear layer that ends attention, and the one that ends the MLP
SUBLAYER_ENDS = r".*(attn|attention)\.(c_proj|o_proj|out_proj|dense)|.*(mlp\.c_proj|down_proj|4h_to_h|fc2|fc_out)"


class Error(ValueError):
    """Wrong use of adapters; the message says what would be right."""


class CastLinear(nn.Linear):
    """An nn.Linear whose weights stay in fp32 beside a 16-bit model: it computes in the dtype of its input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Adapter(nn.Module):
    """A(u) = Up f(Down u). Down starts as any nn.Linear, uniform in ±1/√d; Up and both biases start at zero."""

    def __init__(self, d, m, activation=F.relu, **factory_kwargs):
        super().__init__()
        self.down = CastLinear(d, m, **factory_kwargs)
        self.up = CastLinear(m, d, **factory_kwargs)
        self.activation = activation
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, u):  # (B, T, d)
        a = self.activation(self.down(u))  # (B, T, m)
        return self.up(a)  # (B, T, d)


class Fusion(nn.Module):
    """Σᵢ pᵢ V zᵢ: attention from each token u to what N frozen adapters say about it, zᵢ = Aᵢ(u)."""

    def __init__(self, adapters):
        super().__init__()
        self.adapters = nn.ModuleList(adapters).requires_grad_(False)
        d, p = adapters[0].up.out_features, adapters[0].up.weight
        self.query = CastLinear(d, d, dtype=p.dtype, device=p.device)
        self.key = CastLinear(d, d, dtype=p.dtype, device=p.device)
        self.value = CastLinear(d, d, bias=False, dtype=p.dtype, device=p.device)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.value.weight, 1e-6).data.fill_diagonal_(1)

    def forward(self, u):  # (B, T, d)
        z = torch.stack([adapter(u) for adapter in self.adapters], -2)  # (B, T, N, d)
        query, keys = self.query(u), self.key(z)  # (B, T, d), (B, T, N, d)
        # scoreᵢ = (Q u) · (K zᵢ)
        scores = torch.einsum("...d, ...nd -> ...n", query, keys)  # (B, T, N)
        p = scores.softmax(-1)  # (B, T, N), rounded from fp32; with fp32 scores too a bf16 step takes 5 to 7 % longer
        # Σᵢ pᵢ V zᵢ = V Σᵢ pᵢ zᵢ saves 7 % (d = 768) to 15 % (d = 256) of a step with N = 3, 4 × 128 tokens, on a CPU
        return self.value(torch.einsum("...n, ...nd -> ...d", p, z))  # (B, T, d)


def fusion_penalty(model):
    """0.01 ‖I - V‖², summed over the blocks. Add it to the loss."""
    values = [m.value.weight for m in model.modules() if isinstance(m, Fusion)]
    if not values:
        raise Error("the model has no fusion: add_fusion(model, adapters) first")
    return 0.01 * sum((V - torch.eye(len(V), dtype=V.dtype, device=V.device)).square().sum() for V in values)


class AdapterLayer(nn.Module):
    """u + A(u) on the output u of the layer that it wraps. A block may return a tuple or list that begins with u."""

    def __init__(self, base_layer, adapter, name=""):
        super().__init__()
        self.base_layer, self.adapter_name, self.enabled = base_layer, name, True
        self.adapter = adapter.train(base_layer.training)  # an Adapter or a Fusion
        self.training = base_layer.training

    def forward(self, *args, **kwargs):
        output = self.base_layer(*args, **kwargs)
        if not self.enabled:
            return output
        u, *rest = output if isinstance(output, (tuple, list)) else (output,)  # u (B, T, d)
        if not torch.is_tensor(u):
            raise Error(f"an adapter needs a layer whose output is a tensor or begins with one, not {type(u).__name__}")
        u, kind = u + self.adapter(u).to(u.dtype), type(output)
        return u if torch.is_tensor(output) else getattr(kind, "_make", kind)((u, *rest))  # _make: of a named tuple

    def __getattr__(self, name):  # models read weight, layer_idx and others of their layers: show the wrapped layer's
        own = name in ("base_layer", "adapter") or name.startswith("__")
        return super().__getattr__(name) if own else getattr(self.base_layer, name)


def add_adapter(
    model, targets=None, *, placement="houlsby", reduction=None, bottleneck=None, activation=None, modules_to_save=None
):
    """Freezes the model, wraps its target layers in place and returns it. Raises Error, with nothing changed, if wrong.

    placement: "houlsby" wraps linear layers, by default those that end the sublayers of GPT-2, Llama and others, by
        name. "pfeiffer" wraps blocks, by default "blocks": all there are.
    targets: ends of names, or one regular expression for the whole name, such as r"transformer\\.h\\.\\d+".
    reduction: m = d // reduction, by default 16; or bottleneck: m itself.
    activation: a name in torch.nn.functional (AdapterHub's silu for houlsby, relu for pfeiffer), or any function.
    modules_to_save: ends of names of modules that are trained in full and saved too; by default a classifier's new
        head, if it is called "classifier", "score" or "qa_outputs". Without adapters it stays as trained.
    """
    defaults = {"houlsby": (SUBLAYER_ENDS, "silu"), "pfeiffer": ("blocks", "relu")}
    if placement not in defaults:
        raise Error(f"placement must be houlsby or pfeiffer, not {placement!r}")
    targets = defaults[placement][0] if targets is None else targets
    activation = defaults[placement][1] if activation is None else activation
    reduction = 16 if reduction is None and bottleneck is None else reduction
    f = find_activation(activation) if isinstance(activation, str) else activation
    if any(isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)) for m in model.modules()):
        raise Error("add adapters to the plain model, then wrap it: DDP knows only the parameters that it began with")
    if adapter_layers(model):
        raise Error("the model has adapters already: remove_adapter(model) first")
    given = [size for size in (reduction, bottleneck) if size is not None]
    if len(given) != 1 or type(given[0]) is not int or given[0] < 1:
        raise Error(f"give reduction or bottleneck, a whole number above 0, not {reduction!r} and {bottleneck!r}")
    if not callable(f):
        raise Error(f"activation must be a function or its name in torch.nn.functional, not {activation!r}")
    heads, layers = find_heads(model, modules_to_save), {}
    for name, layer in find_targets(model, targets, placement, heads).items():
        d, p = width(model, layer), next(iter(layer.state_dict().values()))
        if bottleneck is None and reduction > d:
            raise Error(f"reduction must be at most {d}, the width of {name}, and is {reduction}")
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        adapter = Adapter(d, bottleneck or d // reduction, f, dtype=dtype, device=p.device)
        layers[layer] = AdapterLayer(layer, adapter, name)
    put_in(model, layers, heads)
    sizes = {"placement": placement, "reduction": reduction, "bottleneck": bottleneck, "activation": activation}
    sizes["target_modules"] = targets if isinstance(targets, str) else list(targets)
    model.adapter_config = {"peft_type": "BOTTLENECK_ADAPTER", **sizes, "modules_to_save": [*heads]}
    return model


def add_fusion(model, adapters, *, modules_to_save=None):
    """Freezes the model, wraps its blocks in place with a fusion of frozen adapters, and returns it. `adapters` has the
    (adapter_config, adapter_state_dict) of each, all of placement pfeiffer. Where the state is None, the adapter waits
    for load_fusion_state_dict. Raises Error, with nothing changed, if one does not fit. The adapters' heads belong to
    their tasks and are left out; the model's own is trained with the fusion, as in add_adapter."""
    heads = find_heads(model, modules_to_save)
    adapters, stacks, trained = list(adapters), [], [p for p in model.parameters() if p.requires_grad]
    if not adapters or any(config.get("placement") != "pfeiffer" for config, _ in adapters):
        raise Error("fusion needs one or more adapters, all of placement pfeiffer")
    for config, state in adapters:
        sizes = {key: config.get(key) for key in ("placement", "reduction", "bottleneck", "activation")}
        add_adapter(model, config.get("target_modules"), modules_to_save=(), **sizes)
        stacks.append({name: layer.adapter for name, layer in adapter_layers(model).items()})
        try:
            if state is not None:
                load_adapter_state_dict(model, {key: t for key, t in state.items() if ".adapter." in key})
        finally:  # the model is as it was
            remove_adapter(model)
            nn.ParameterList(trained).requires_grad_(True)
        if stacks[-1].keys() != stacks[0].keys():
            raise Error(f"the adapters are on different blocks: {', '.join(stacks[0])} and {', '.join(stacks[-1])}")
    blocks, configs = bare_names(model), [dict(config) for config, _ in adapters]
    fusions = {blocks[name]: Fusion([stack[name] for stack in stacks]) for name in stacks[0]}
    layers = {block: AdapterLayer(block, fusion, name) for name, (block, fusion) in zip(stacks[0], fusions.items())}
    put_in(model, layers, heads)
    model.adapter_config = {"peft_type": "ADAPTER_FUSION", "adapters": configs, "modules_to_save": [*heads]}
    return model


def remove_adapter(model):
    """Puts the bare layers back in place of adapters or a fusion, and returns the model. It stays frozen."""
    layers = adapter_layers(model).values()
    for layer in layers:
        layer.enabled = False  # torch.compile may have kept the layer
    replace(model, {layer: layer.base_layer for layer in layers})
    for module in model.requires_grad_(False).modules():
        for name in ("adapter_config", "adapter_name"):
            vars(module).pop(name, None)
    return model


@contextmanager
def adapter_disabled(model):
    """Inside the `with` the model is the base, but for modules_to_save, which stay as trained."""
    layers = [layer for layer in adapter_layers(model).values() if layer.enabled]  # none inside another one
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def adapter_layers(model):
    """{name: AdapterLayer} of the wrapped layers, by the names in the model that add_adapter got."""
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    found = {layer.adapter_name: layer for layer in layers}
    if len(found) < len(layers):
        raise Error("layers have the same name, from another model or another add_adapter: call it once, on the model")
    return found


def adapter_state_dict(model):
    """The content of adapter_model.safetensors: the adapters, or a fusion together with the adapters that it fuses, and
    the modules_to_save, by the names that they had when they were added."""
    parts = {f"{name}.{type(m.adapter).__name__.lower()}.": m.adapter for name, m in adapter_layers(model).items()}
    heads = [m for m in model.modules() if "adapter_name" in vars(m) and not isinstance(m, AdapterLayer)]
    parts |= {f"{head.adapter_name}.": head for head in heads}
    state = {bare(key): t for prefix, part in parts.items() for key, t in part.state_dict(prefix=prefix).items()}
    if any(t.numel() == 0 for t in state.values()):
        raise Error("the parameters are sharded, and here have no elements: do this inside `with engine.whole():`")
    return state


def load_adapter_state_dict(model, state):
    """Onto a model that add_adapter or add_fusion has prepared. Raises Error, with nothing loaded, if they differ."""
    own = adapter_state_dict(model)
    for key in sorted(own.keys() | state.keys()):
        found, expected = (tuple(side[key].shape) if key in side else "missing" for side in (state, own))
        if found != expected:
            raise Error(f"the adapter does not fit: {key} is {found} in it and {expected} in the model")
        if own[key].is_floating_point() and not (state[key].is_floating_point() and state[key].element_size() > 1):
            raise Error(f"{key} is {state[key].dtype} in the adapter; the model needs floats of 16 bits or more")
    for key, t in own.items():  # its memory is the model's own
        t.copy_(state[key])


def adapter_config(model):
    """The adapter_config.json that goes with adapter_state_dict. peft has neither method and refuses the file."""
    for module in model.modules():  # the model may be wrapped by now
        if "adapter_config" in vars(module):
            return dict(module.adapter_config)
    raise Error("the model has no adapter: add_adapter(model) or add_fusion(model, adapters) first")


fusion_state_dict, load_fusion_state_dict, fusion_config = adapter_state_dict, load_adapter_state_dict, adapter_config

# ------------------------------------------------------------------------------------------------------------- plumbing


def bare(name):
    """A module's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)", "", name).rstrip(".")


def bare_names(model):
    """{bare name: module}; if it is wrapped, its outermost wrapper."""
    found = {}
    for name, module in model.named_modules():
        found.setdefault(bare(name), module)
    return found


def find_heads(model, ends):
    """{name: module} of modules_to_save: by ends of names, or by default a classifier's new head."""
    modules, uses = bare_names(model), Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    if ends is None:  # the model's own, and DistilBERT's pre_classifier
        heads = ("classifier", "score", "qa_outputs")
        found = {name: m for name, m in modules.items() if "." not in name and name.endswith(heads)}
    else:
        found = {name: m for name, m in modules.items() if name.endswith(tuple(ends))}
    shared = any(uses[id(p)] > 1 for module in found.values() for p in module.parameters())
    if isinstance(ends, str) or shared or ends and not found:
        raise Error(f"modules_to_save={ends!r} must be a list of ends of names of modules with weights of their own")
    return found


def put_in(model, layers, heads):
    """Freezes the model but for the heads, and puts the adapters into it."""
    model.requires_grad_(False)
    replace(model, layers)
    for name, head in heads.items():
        head.requires_grad_(True).adapter_name = name


def find_activation(name):
    """The function of one tensor that torch.nn.functional has under this name, or None."""
    try:
        f = getattr(F, name)
        return f if f(torch.zeros(2, 4)).shape == (2, 4) else None
    except (AttributeError, TypeError, ValueError, RuntimeError):  # as for F.bilinear, which wants two tensors
        return None


def find_targets(model, targets, placement, heads):
    """{name: layer} that `targets` names: linear layers (houlsby), or modules with some inside (pfeiffer)."""
    modules, inside = bare_names(model), tuple(f"{head}." for head in heads)
    layers = {n: m for n, m in modules.items() if n and any(map(is_linear, m.modules()))}
    layers = {n: m for n, m in layers.items() if not f"{n}.".startswith(inside)}
    lists = [n for n, m in layers.items() if isinstance(m, nn.ModuleList)]
    fitting = [n for n, m in layers.items() if n not in lists and is_linear(m) == (placement == "houlsby")]
    pattern = targets if isinstance(targets, str) else rf"(.*\.)?({'|'.join(re.escape(str(end)) for end in targets)})"
    if targets == "blocks":
        lists = [n for n in lists if not any(n.startswith(f"{outer}.") for outer in lists)]
        if len(lists) != 1:
            raise Error(f"blocks are the items of the model's one ModuleList; there are {', '.join(lists) or 'none'}")
        pattern = rf"{re.escape(lists[0])}\.\d+"
    try:
        found = [n for n in fitting if re.fullmatch(pattern, n)]
    except (re.error, OverflowError, RecursionError) as error:
        raise Error(f"targets={targets!r} is no regular expression: {error}") from None
    if not found:
        there = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", n) for n in fitting})
        raise Error(f"targets={targets!r} names no layer for {placement}; there are {', '.join(there) or 'none'}")
    for name in found:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise Error(f"{name} may be read, and not called, by its {type(parent).__name__}: wrap the block")
    return {n: layers[n] for n in found if not any(n.startswith(f"{outer}.") for outer in found)}


def is_linear(layer):  # Conv1D is Hugging Face's linear layer with the weight as (in, out)
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def width(model, layer):
    """d, the size of the output: for a block the config's, or its last linear layer's."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    d = getattr(config, "hidden_size", getattr(config, "n_embd", None))
    last = [m for m in layer.modules() if is_linear(m)][-1]
    return d if d and not is_linear(layer) else getattr(last, "nf", None) or last.out_features


def replace(model, layers):
    """For each {old: new} puts new in every place of old, as a model may call one layer in several."""
    for parent in [*model.modules()]:
        for child, module in parent._modules.items():  # named_children would leave out all places but the first
            if module in layers:
                setattr(parent, child, layers[module])


if __name__ == "__main__":
    u, A, other = torch.tensor([1.0, 2.0]), Adapter(2, 1), Adapter(2, 1)
    A.down.weight.data.fill_(1)
    A.up.weight.data[:, 0], other.up.bias.data[1] = torch.tensor([0.5, -0.5]), 1
    fusion = Fusion([A, other])
    fusion.query = fusion.key = fusion.value = nn.Identity()
    print("u + A(u), -u + A(-u), u + fusion(u):", torch.stack([u + A(u), -u + A(-u), u + fusion(u)]).detach())
