# SPDX-License-Identifier: MIT
"""Bottleneck adapters: two thin layers with a skip, put into a frozen model; and AdapterFusion, attention over several.

    A(h) = Up f(Down h)                                        d → m → d, with m = d / reduction
    Houlsby:   x ← x + a + A(a),  then  x ← x + b + A'(b)      a, b: what attention and MLP add to the stream x
    Pfeiffer:  x ← h + A(h)                                    h = x + b, the output of the block
    fusion:    x ← h + V Σₙ pₙ zₙ,  zₙ = Aₙ(h)                 p = softmax over n of (Q h) · (K zₙ), without 1/√d

Dimensions: h (..., d); Down (m, d), Up (d, m), both with a bias; N adapters, z (..., N, d); Q, K (d, d) with a bias,
V (d, d) without. Trained are Down and Up, nothing of the model (the paper trained its LayerNorms too). In fusion Q, K
and V alone are trained; the adapters were before, apart, each on a task of its own, and are frozen now.

Parameters: 2dm + m + d for each adapter. GPT-2 with m = 48: Houlsby 1,789,056 (1.4 %), Pfeiffer 894,528. Fusion takes
3d² + 2d for each block, whatever N is: 21,252,096, far more than what it fuses.

Both placements are one wrapper, h + A(h), at two places: around the projection that ends a sublayer, whose output is
a, and around the whole block, whose output is x + b.

Why it starts at Up = 0: A is then zero and the model exactly the pretrained one. (The paper draws both from a normal of
deviation 0.01: almost.) As with LoRA's B, the first step moves Up alone: the gradient of Down goes through Up.

Why V starts as the identity (1e-6 off the diagonal): fusion then hands on a mean of what the adapters say. A random V
would undo them; so the loss gets 0.01 · ‖I - V‖², which holds it there. With N = 1, p is 1 and Q and K never learn. Nor
does K's bias with any N: it adds the same to all N scores, and softmax does not see that.

Beside its sisters: the nonlinearity f keeps it from being merged as LoRA is: at inference each adapter costs two small
matrix products, one after the other. Prompt tuning and P-tuning work on the input alone, prefix-tuning on the keys and
values of every layer, and all three take room in what attention looks at; an adapter does not.

Papers: adapters, arXiv 1902.00751, section 2.1; AdapterFusion, arXiv 2005.00247, section 3.2.
"""

import re
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F


class Error(ValueError):
    """Wrong use of adapters; the message says what would be right."""


# ---------------------------------------------------------------------------------------------------------- mathematics


def linear(x, layer):
    """x Wᵀ + b in the type of x: the layers here are in fp32 even in a 16-bit model."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


# -------------------------------------------------------------------------------------------------------------- layers


class Adapter(nn.Module):
    """A(h) = Up f(Down h), without the skip: fusion wants A alone. Down starts as nn.Linear does, uniform in ±1/√d."""

    def __init__(self, d, m, activation, wide):
        super().__init__()
        self.down = nn.Linear(d, m, **wide)
        self.up = nn.Linear(m, d, **wide)
        self.activation = activation
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h):
        low = self.activation(linear(h, self.down))  # (..., m)
        return linear(low, self.up)  # (..., d)


class Fusion(nn.Module):
    """V Σₙ pₙ Aₙ(h) over frozen adapters."""

    def __init__(self, adapters):
        super().__init__()
        self.adapters = nn.ModuleList(adapters).requires_grad_(False)
        weight = adapters[0].up.weight
        d, wide = len(weight), dict(dtype=weight.dtype, device=weight.device)
        self.query = nn.Linear(d, d, **wide)
        self.key = nn.Linear(d, d, **wide)
        self.value = nn.Linear(d, d, bias=False, **wide)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.value.weight, 1e-6)
        with torch.no_grad():
            self.value.weight.fill_diagonal_(1)

    def forward(self, h):
        z = torch.stack([adapter(h) for adapter in self.adapters], -2)  # (..., N, d)
        q = linear(h, self.query)  # (..., d)
        # q · (K zₙ + b) = (Kᵀ q) · zₙ + q · b  and  Σₙ pₙ V zₙ = V Σₙ pₙ zₙ: K and V are applied once, and not N times
        scores = torch.einsum("...d, ...nd -> ...n", q @ self.key.weight.to(q.dtype), z)
        p = (scores + (q @ self.key.bias.to(q.dtype))[..., None]).softmax(-1)  # (..., N)
        return linear(torch.einsum("...n, ...nd -> ...d", p, z), self.value)  # (..., d)


class AdapterLayer(nn.Module):
    """h + A(h) on the output h of a linear layer or a block; a block may return a tuple that begins with h.

    All other attributes are those of what it holds: weight and bias of a linear layer, and what models read from their
    blocks. The hidden states that transformers records are the block's own, before its adapter.
    """

    def __init__(self, base_layer, adapter):
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter.train(base_layer.training)  # an Adapter or a Fusion
        self.training = base_layer.training
        self.enabled = True

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):  # copy and pickle ask before there is a base_layer
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args, **kwargs):
        output = self.base_layer(*args, **kwargs)
        if not self.enabled:
            return output
        h = output[0] if isinstance(output, tuple) else output  # (..., d)
        h = h + self.adapter(h).to(h.dtype)
        return (h, *output[1:]) if isinstance(output, tuple) else h


# --------------------------------------------------------------------------------------------------------------- verbs


def add_adapter(model, targets=None, *, placement="houlsby", reduction=None, bottleneck=None, activation=None):
    """Freezes the model, wraps its target layers in place and returns it.

    placement: "houlsby" wraps linear layers, by default ("attn.c_proj", "mlp.c_proj") as GPT-2 names the two that end
        its sublayers; in a Llama they are ("self_attn.o_proj", "mlp.down_proj"). "pfeiffer" wraps whole blocks, by
        default "blocks", all in the model's list of blocks.
    targets: ends of names, or one regular expression for the whole name, such as r"transformer\\.h\\.\\d+".
    bottleneck: m; or reduction: m = d // reduction; by default a reduction of 16.
    activation: a name in torch.nn.functional or a function; by default silu for houlsby and relu for pfeiffer.
    Cast the model before, not after: model.to(torch.bfloat16) would cast the adapters too.
    Raises Error, with the model untouched, if there is nothing to wrap, or an adapter is there already.
    """
    if targets is None:
        targets = ("attn.c_proj", "mlp.c_proj") if placement == "houlsby" else "blocks"
    if activation is None:
        activation = "silu" if placement == "houlsby" else "relu"
    config = {
        "peft_type": "BOTTLENECK_ADAPTER", "placement": placement, "activation": activation,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "reduction": 16 if reduction is None and bottleneck is None else reduction, "bottleneck": bottleneck,
    }  # fmt: skip
    wrap(model, new_adapters(model, **adapter_arguments(config)))
    model.adapter_config = config
    return model


def add_fusion(model, adapters):
    """Freezes the model, wraps its blocks in place with the adapters and a fusion of them, and returns it.

    adapters: a list of (config, state), each what adapter_config and adapter_state_dict gave. A state of None leaves
    the adapter for load_fusion_state_dict to fill. To train, add fusion_penalty(model) to the loss.
    Raises Error, with the model untouched, if there is none, or one is no pfeiffer adapter, or does not fit.
    """
    adapters, stacks = list(adapters), []
    if not adapters:
        raise Error("fusion needs at least one adapter")
    for config, state in adapters:
        arguments = adapter_arguments(config)
        if arguments["placement"] != "pfeiffer":
            raise Error(f"fusion needs adapters of placement pfeiffer, and one is {arguments['placement']}")
        stack = new_adapters(model, **arguments)
        if stacks and stack.keys() != stacks[0].keys():
            raise Error(f"the adapters are on different blocks: {', '.join(stacks[0])} and {', '.join(stack)}")
        if state is not None:
            load(named_tensors(stack, "adapter"), state)
        stacks.append(stack)
    wrap(model, {name: Fusion([stack[name] for stack in stacks]) for name in stacks[0]})
    model.fusion_config = {"peft_type": "ADAPTER_FUSION", "adapters": [dict(config) for config, _ in adapters]}
    return model


def fusion_penalty(model):
    """0.01 · Σ ‖I - V‖² over the layers."""
    values = [layer.adapter.value.weight for layer in adapter_layers(model, Fusion).values()]
    if not values:
        raise Error("the model has no fusion: add_fusion(model, adapters) first")
    return 0.01 * sum((V - torch.eye(len(V), dtype=V.dtype, device=V.device)).square().sum() for V in values)


def new_adapters(model, targets, placement, reduction, bottleneck, activation):
    """{name: Adapter that fits there} for each target; the model is only looked at."""
    if adapter_layers(model):
        raise Error("the model has adapters already: remove_adapter(model) first")
    adapters = {}
    for name, layer in find_targets(model, targets, placement).items():
        d = width(model, layer)
        if bottleneck is None and reduction > d:
            raise Error(f"reduction must be at most {d}, the width of {name}, and is {reduction}")
        p = next(iter(layer.state_dict().values()))
        wide = dict(dtype=torch.float64 if p.dtype == torch.float64 else torch.float32, device=p.device)
        adapters[name] = Adapter(d, bottleneck or d // reduction, find_activation(activation), wide)
    return adapters


def wrap(model, adapters):
    model.requires_grad_(False)  # the adapters are not in it yet
    for name, adapter in adapters.items():
        replace(model, name, AdapterLayer(model.get_submodule(name), adapter))


def replace(model, name, layer):
    """Puts the layer in every place of the one that has this name: a model may call one layer in several."""
    old = model.get_submodule(name)
    for parent in [*model.modules()]:
        for child, module in parent._modules.items():  # named_children would leave out all places but the first
            if module is old:
                setattr(parent, child, layer)


def is_linear(layer):
    """Also Hugging Face's Conv1D, a linear layer that keeps its weight as (in, out)."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def holds_linear(layer):
    return not is_linear(layer) and any(map(is_linear, layer.modules()))


def width(model, layer):
    """d, the size of what the layer returns."""
    if is_linear(layer):
        return layer.weight.size(1) if type(layer).__name__ == "Conv1D" else layer.out_features
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "hidden_size", getattr(config, "n_embd", None))
    # without a config: a block ends with the MLP's second layer
    return found or width(model, [m for m in layer.modules() if is_linear(m)][-1])


def find_activation(activation):
    function = getattr(F, activation, None) if isinstance(activation, str) else activation
    try:
        fits = function(torch.zeros(2, 4)).shape == (2, 4)
    except Exception:  # whatever a function that is no activation may raise
        fits = False
    if not fits or (isinstance(function, nn.Module) and list(function.parameters())):
        rule = "a name in torch.nn.functional, or a function that keeps the shape and has no parameters"
        raise Error(f"activation must be {rule}, not {activation!r}")
    return function


def names(layers):
    """Layer names with the numbers left out, for a message."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in layers}))


def find_targets(model, targets, placement):
    """{name: layer} of what `targets` names; Error if that is nothing, or no layer that the placement is for."""
    modules = {n: m for n, m in model.named_modules() if n}
    fits = is_linear if placement == "houlsby" else holds_linear
    fitting = {n: m for n, m in modules.items() if fits(m) and not isinstance(m, (nn.ModuleList, nn.ModuleDict))}
    if targets == "blocks":
        lists = [n for n, m in modules.items() if isinstance(m, nn.ModuleList) and holds_linear(m)]
        lists = [n for n in lists if not any(n.startswith(f"{outer}.") for outer in lists)]
        if len(lists) != 1:
            raise Error(f"there must be one list of blocks, and there are {lists}; targets may be {names(fitting)}")
        found = {n: m for n, m in modules.items() if n.rpartition(".")[0] == lists[0]}
    elif isinstance(targets, str):
        try:
            found = {n: m for n, m in modules.items() if re.fullmatch(targets, n)}
        except (re.error, OverflowError, RecursionError) as error:
            raise Error(f"{targets!r} is not a regular expression: {error}") from None
    else:
        found = {n: m for n, m in modules.items() if any(n == t or n.endswith(f".{t}") for t in targets)}
    if not found:
        rule = "a list holds ends of names; a string is a regular expression for a whole name"
        raise Error(f"no layer fits targets={targets!r} ({rule}); there are {names(fitting) or 'none in the model'}")
    for name, layer in found.items():
        if name not in fitting:
            raise Error(f"{name} is a {type(layer).__name__}; {placement} fits on {names(fitting)}")
        inside = [n for n in found if n.startswith(f"{name}.")]
        if inside:
            raise Error(f"both {name} and {inside[0]} in it fit targets={targets!r}: wrap one of them")
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise Error(f"{name} may be read and not called by its {type(parent).__name__}: wrap the block")
    return found


def adapter_layers(model, kind=(Adapter, Fusion)):
    """{name: layer} of the wrapped layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer) and isinstance(m.adapter, kind)}


def remove_adapter(model):
    """Puts the bare layers back, from under adapters or a fusion: the model computes what the base does.

    They stay frozen: model.requires_grad_(True) to train them.
    """
    for name, layer in adapter_layers(model).items():
        replace(model, name, layer.base_layer)
    for config in ("adapter_config", "fusion_config"):
        if hasattr(model, config):
            delattr(model, config)
    return model


@contextmanager
def adapter_disabled(model):
    """The base model as it was, inside the `with`."""
    before = {layer: layer.enabled for layer in adapter_layers(model).values()}  # not all, inside another `with`
    for layer in before:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


# --------------------------------------------------------------------------------------------------------------- files


def named_tensors(adapters, kind):
    return {f"{name}.{kind}.{key}": p for name, adapter in adapters.items() for key, p in adapter.named_parameters()}


def adapter_parameters(model):
    """{name in the file: parameter}."""
    return named_tensors({name: layer.adapter for name, layer in adapter_layers(model, Adapter).items()}, "adapter")


def fusion_parameters(model):
    """{name in the file: parameter}: Q, K and V, and the frozen adapters, so that no other file is needed."""
    return named_tensors({name: layer.adapter for name, layer in adapter_layers(model, Fusion).items()}, "fusion")


def adapter_state_dict(model):
    """What was trained: the content of adapter_model.safetensors."""
    return {key: p.detach() for key, p in adapter_parameters(model).items()}


def fusion_state_dict(model):
    """What was trained, and what it was trained over: the content of adapter_model.safetensors."""
    return {key: p.detach() for key, p in fusion_parameters(model).items()}


def load_adapter_state_dict(model, state):
    """The reverse, onto a model that add_adapter has prepared. Error, with nothing loaded, if the two do not fit."""
    load(adapter_parameters(model), state)


def load_fusion_state_dict(model, state):
    """The reverse, onto a model that add_fusion has prepared."""
    load(fusion_parameters(model), state)


@torch.no_grad()
def load(own, state):
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


def adapter_config(model):
    """The adapter_config.json that goes with adapter_state_dict; peft, which has no such method, refuses it."""
    if not hasattr(model, "adapter_config"):
        raise Error("the model has no adapter: add_adapter(model) first")
    if not isinstance(model.adapter_config["activation"], str):
        raise Error("a file cannot hold a function: give the activation by its name in torch.nn.functional")
    return dict(model.adapter_config)


def fusion_config(model):
    """The adapter_config.json that goes with fusion_state_dict."""
    if not hasattr(model, "fusion_config"):
        raise Error("the model has no fusion: add_fusion(model, adapters) first")
    return dict(model.fusion_config)


def takes_forever(pattern):
    """Whether a regular expression may need years for a name: it tries each way to share the name among its repeats."""
    repeats, choices = re.findall(r"[*+?{]", pattern), re.findall(r"[|(]", pattern)
    return len(repeats) > 4 or len(choices) > 12 or re.search(r"\)[*+{]", pattern) is not None


def adapter_arguments(config):
    """add_adapter's arguments, from an adapter_config.json. Error for what add_adapter cannot have written."""
    if not isinstance(config, dict) or config.get("peft_type") != "BOTTLENECK_ADAPTER":
        raise Error("this is no bottleneck adapter's configuration: its peft_type must be BOTTLENECK_ADAPTER")
    arguments = {key: config.get(key) for key in ("placement", "reduction", "bottleneck", "activation")}
    arguments = {"targets": config.get("target_modules"), **arguments}
    targets, placement, reduction, bottleneck, activation = arguments.values()
    if placement not in ("houlsby", "pfeiffer"):
        raise Error(f"placement must be houlsby or pfeiffer, not {placement!r}")
    if type(targets) not in (str, list) or not all(isinstance(t, str) for t in targets):
        raise Error(f"target_modules must be a string or a list of strings, not {targets!r}")
    if isinstance(targets, str) and takes_forever(targets):
        raise Error(f"target_modules {targets!r} has too many repeats or choices, or repeats a group: list the names")
    if (reduction is None) == (bottleneck is None):
        raise Error(f"give one of reduction and bottleneck, not {reduction!r} and {bottleneck!r}")
    for size in (reduction, bottleneck):
        if size is not None and (type(size) is not int or not 1 <= size < 1 << 31):
            raise Error(f"reduction and bottleneck must be whole numbers above 0, not {size!r}")
    find_activation(activation)
    return arguments


def fusion_arguments(config):
    """add_fusion's arguments, from an adapter_config.json; load_fusion_state_dict then fills the adapters too."""
    if not isinstance(config, dict) or config.get("peft_type") != "ADAPTER_FUSION":
        raise Error("this is no fusion's configuration: its peft_type must be ADAPTER_FUSION")
    adapters = config.get("adapters")
    if not isinstance(adapters, list) or not adapters:
        raise Error(f"adapters must be a list of configurations, not {adapters!r}")
    for one in adapters:
        adapter_arguments(one)
    return {"adapters": [(one, None) for one in adapters]}


if __name__ == "__main__":
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2)]
    model, x = nn.Sequential(*blocks), torch.randn(4, 64)
    before = model(x)
    add_adapter(model, r"\d", placement="pfeiffer", bottleneck=8)
    print(f"Up = 0, so nothing has changed yet: largest difference {(model(x) - before).abs().max():.1e}")
    model(x).square().sum().backward()
    A = model[0].adapter
    print(f"first gradients: |dDown| = {A.down.weight.grad.norm():.2f}, |dUp| = {A.up.weight.grad.norm():.2f}")
    for p in adapter_parameters(model).values():
        nn.init.normal_(p, std=0.3)
    curvature = (A(x) + A(-x) - 2 * A(0 * x)).norm()
    print(f"no matrix does what A does: |A(x) + A(-x) - 2 A(0)| = {curvature:.2f}, and 0 were it linear")
    alone, one = model(x).detach(), (adapter_config(model), adapter_state_dict(model))
    other = one[0], {key: t.flip(0) for key, t in one[1].items()}
    print(f"removed, it leaves the base bit for bit: {torch.equal(remove_adapter(model)(x), before)}")
    for what, adapters in (("one adapter", [one]), ("one three times", [one] * 3), ("two adapters", [one, other])):
        add_fusion(model, adapters)
        off = (model(x) - alone).abs().max() / alone.abs().max()
        (model(x).square().sum() + fusion_penalty(model)).backward()
        Q, V = (layer.weight.grad.norm() for layer in (model[0].adapter.query, model[0].adapter.value))
        print(f"fusion of {what}: {off:.1e} from the first alone; gradients |dQ| = {Q:.1e}, |dV| = {V:.1e}")
        remove_adapter(model)
    d, n_layer, m = 768, 12, 768 // 16
    count = n_layer * (2 * d * m + m + d)
    print(f"GPT-2 at m = {m}: pfeiffer {count:,}, houlsby {2 * count:,}, fusion {n_layer * (3 * d * d + 2 * d):,}")
