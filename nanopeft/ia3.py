# SPDX-License-Identifier: MIT
"""IA3 and BitFit: the smallest changes to a frozen model, a factor for each number, or its bias.

    IA3, at an output    y = l ∘ (x Wᵀ + b)       l (out,), for keys and values
    IA3, at an input     y = (l ∘ x) Wᵀ + b       l (in,), for the layer that ends the MLP: l scales the hidden numbers
    BitFit               y = x Wᵀ + b             b (out,), the model's own biases, those of norms too

IA3 ("infused adapter by inhibiting and amplifying inner activations") trains l, which starts at 1, so that nothing has
changed. It can make a key, a value or a hidden number louder or silent, for all tokens alike. It cannot mix them.
BitFit trains what is there. It can shift each number by a constant. A Llama has no biases, so it cannot have BitFit.

Merging costs nothing, and is exact but for rounding. diag(l) W scales W's rows, W diag(l) its columns:
    output:  W ← l ∘ W by rows, b ← l ∘ b           input:  W ← W ∘ l by columns

The gradients: dl = Σ dy ∘ (x Wᵀ + b) over all tokens, or Σ x ∘ (dy W), and db = Σ dy. BitFit needs no activation of a
linear layer for that. But the gradient still passes through every layer, so attention and norms keep theirs.

Example: GPT-2 has fused keys, values and queries in c_attn (2,304 outputs), and 3,072 hidden numbers in an MLP. IA3
trains 5,376 numbers in each of 12 layers, 64,512 in all, one in 1,929. (peft scales the queries too there, as here.)
BitFit trains 102,144: 11 d in each layer and d = 768 in the last norm. LoRA with r = 8 on all linear layers: 1,179,648.

How to choose: a larger learning rate than LoRA's, as few numbers have to move far. IA3's authors take 3e-3 (Adafactor)
and 1,000 steps of 8 examples, BitFit's code 1e-3. When: few examples, or many tasks to store. Not: much to learn.

Pitfalls
* Weight decay pulls l to 0, which silences the layer, and not to 1. Leave it out.
* To unmerge by dividing by l fails where l is 0. lora.unmerge_lora puts back copies.
* In bf16 the next number after 1 is 0.8 % larger. l is kept in fp32, and multiplies in fp32.

Compared with related methods: DoRA (dora.py) trains a row's length together with a LoRA. LoRA mixes numbers, at 10 to
20 times the parameters. The whole family in one table: nanopeft/__init__.py.
Papers: IA3, arXiv 2205.05638, section 3.3; BitFit, arXiv 2106.10199.
"""

import torch
import torch.nn as nn

try:
    from . import lora
except ImportError:  # the two files pasted side by side, or this one run
    import lora

# By name, in GPT-2, Llama and others: the layers that make keys and values, and the layer that ends the MLP
KEYS_AND_VALUES = r".*\.(k_proj|v_proj|key|value|c_attn|query_key_value|Wqkv)"
MLP_ENDS = r".*(mlp\.c_proj|down_proj|4h_to_h|fc2|fc_out)"


class Error(ValueError):
    """Wrong use of IA3 or BitFit; the message says what would be right."""


class IA3Linear(lora.LoRALinear):
    """A frozen linear layer and the factors of its outputs, (out, 1), or of its inputs, (1, in), as in peft's file."""

    stored = {"ia3_l": "ia3_l"}
    own = {"base_layer", "ia3_l", "unmerged_weight", "unmerged_bias"}

    def __init__(self, base_layer, name, scales_input):
        nn.Module.__init__(self)  # LoRALinear's own would make A and B
        self.base_layer, self.lora_name, self.enabled, self.scales_input = base_layer, name, True, scales_input
        if isinstance(base_layer, nn.Linear):  # not weight.shape: bitsandbytes packs 4 bits into bytes
            n_out, n_in = base_layer.out_features, base_layer.in_features
        else:
            n_in, n_out = base_layer.weight.shape
        dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        shape = (1, n_in) if scales_input else (n_out, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=dtype, device=base_layer.weight.device))
        self.register_buffer("unmerged_weight", None)
        self.register_buffer("unmerged_bias", None)

    def forward(self, x):
        if not self.is_active():
            return self.base_layer(x)
        factors = self.ia3_l.flatten()  # fp32, as is the product before it is rounded
        y = self.base_layer((factors * x).to(x.dtype) if self.scales_input else x)
        return y if self.scales_input else (factors * y).to(y.dtype)

    def delta(self):
        """What a merge adds to W: l ∘ W - W."""
        W = self.base_layer.weight
        return (self.ia3_l if isinstance(self.base_layer, nn.Linear) else self.ia3_l.t()) * W - W

    def merge(self):
        super().merge()
        if self.bias is not None and not self.scales_input:
            self.unmerged_bias = self.bias.clone()
            self.bias.copy_(self.ia3_l.flatten() * self.bias)

    def unmerge(self):
        super().unmerge()
        if self.unmerged_bias is not None:
            self.bias.copy_(self.unmerged_bias)
            self.unmerged_bias = None


# ----------------------------------------------------------------------------------------------------------------- use


def add_ia3(model, targets=KEYS_AND_VALUES, feedforward=MLP_ENDS, *, modules_to_save=None):
    """Freezes the model, wraps layers in place and returns it. Wrong use: Error or lora.Error, and nothing has changed.

    targets: layers whose outputs are scaled; feedforward: layers whose inputs are. Each is a list of ends of names, or
        a regular expression for whole names; feedforward=[] leaves the MLP out. modules_to_save: as in lora.add_lora.
    lora.py's functions serve IA3 too, with peft's files: lora_state_dict, load_lora_state_dict, lora_config,
    merge_lora, unmerge_lora, remove_lora, lora_disabled.
    """
    if lora.lora_layers(model):
        raise Error("the model has IA3 or LoRA already: lora.remove_lora(model) first")
    saved = lora.find_saved(model, modules_to_save)
    inputs = lora.find_targets(model, feedforward, saved) if feedforward else {}
    found = lora.find_targets(model, targets, saved) | inputs
    if tables := [name for name, layer in found.items() if isinstance(layer, nn.Embedding)]:
        raise Error(f"{tables[0]} is an embedding, and IA3 scales linear layers: leave it out")
    model.requires_grad_(False)
    lora.replace(model, {layer: IA3Linear(layer, name, name in inputs) for name, layer in found.items()})
    for name, module in saved.items():
        module.requires_grad_(True).lora_name = name
    model.lora_config = {
        "peft_type": "IA3", "task_type": None, "target_modules": [*found], "feedforward_modules": [*inputs],
        "fan_in_fan_out": getattr(getattr(model, "config", None), "model_type", None) == "gpt2",  # it has Conv1D
        "modules_to_save": [*saved] or None, "inference_mode": True,
    }  # fmt: skip
    return model


def add_bitfit(model):
    """Freezes all but the biases, and a classifier's new head, and returns the model. Error if it has no bias."""
    found = bitfit_parameters(model)
    if not any(name.endswith("bias") for name in found):
        raise Error("the model has no biases, as a Llama has none: BitFit has nothing to train there")
    model.requires_grad_(False)
    for p in found.values():
        p.requires_grad_(True)
    return model


def bitfit_parameters(model):
    """{name: bias}; of a classifier's new head, which is drawn at random, the weight too."""
    heads = tuple(f"{name}." for name in lora.find_saved(model, None))
    named = {lora.bare(name): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if name.endswith("bias") or name.startswith(heads)}


def bitfit_state_dict(model):
    """The biases. peft has no BitFit, and no form for its file."""
    return {name: p.detach() for name, p in bitfit_parameters(model).items()}


@torch.no_grad()
def load_bitfit_state_dict(model, state):
    """The reverse. If the two do not fit: Error, and nothing is loaded."""
    own = bitfit_parameters(model)
    if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in state.items()}:
        raise Error("these biases are of another model: names and shapes must be the same")
    for name, p in own.items():
        p.copy_(state[name])


if __name__ == "__main__":
    torch.manual_seed(0)
    x, model = torch.randn(4, 64), nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    before = model(x)
    print(f"l = 1, so nothing has changed yet: {torch.equal(add_ia3(model, ['0'], ['2'])(x), before)}")
    for p in lora.lora_parameters(model).values():
        nn.init.uniform_(p)
    print(f"merged against unmerged: a largest difference of {(model(x) - lora.merge_lora(model)(x)).abs().max():.1e}")
    print(f"unmerged and removed, it is the base: {torch.equal(lora.remove_lora(lora.unmerge_lora(model))(x), before)}")
    print(f"BitFit trains {', '.join(bitfit_parameters(add_bitfit(model)))}")
