# SPDX-License-Identifier: MIT
"""QLoRA: LoRA over a base whose linear weights are kept in 4 bits.

    y = x Ŵᵀ + b + s · dropout(x) Aᵀ Bᵀ          Ŵ = decode(q, scales): NF4 or int8, see quant.py
    dx = dy Ŵ + s · dy B A                       Ŵ is decoded a second time, and never kept

Dimensions: x (..., in), y (..., out); A (r, in) and B (out, r) trained, in fp32; q and its scales stand for W (out, in)
and are frozen like b and the whole rest. Embeddings, norms, biases and the head keep their type.

Is that "just training in higher precision"? No: a storage type and a compute type are two things. W is stored in 4 bits
and what was rounded off is gone; for the time of one product it is decoded into the type of x, bf16 as a rule, because
no processor multiplies NF4. A and B learn on top of Ŵ, and can make up for part of what is missing.

What it costs: 4.127 bits for each quantized weight instead of 16, and two decodings in each step. Activations,
gradients and Adam's state are LoRA's, and the embeddings stay. So a small model gains less: a step of GPT-2 124M on
128 tokens needs 192 MB, with LoRA 318, and 79 of each are the embeddings. 65 billion weights shrink from 130 GB to 34.

Why not merge into 4 bits: an update is far smaller than the gaps between the codes. On weights of deviation 0.02, an
update of rank 16 and RMS 0.001 merged and quantized again is missed by an RMS of 0.00102: 1.02 times the update, so
that nothing is left of it (0.37 times for an RMS of 0.005). merge_qlora gives a 16- or 32-bit model instead. It is Ŵ
that A and B were trained on: merged into the original W they are a little off.

Paged optimizers, also in the paper, keep Adam's state in CUDA's unified memory, from where the driver moves it out to
the host while a long batch needs the room. That rides out a peak and does not lower the steady need; without CUDA there
is nothing to page. They are not here: beside LoRA the state is small, 8 bytes for each trained number.

Beside its sisters: lora.py is the same over a base in 16 or 32 bits, and its verbs, lora_state_dict,
load_lora_state_dict, lora_config, lora_disabled and remove_lora, work here unchanged; the files are the same too.

Paper: QLoRA, arXiv 2305.14314, eq. 5 and 6.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from . import lora, quant
except ImportError:  # the three files pasted side by side, or this one run
    import lora
    import quant


class Error(ValueError):
    """Wrong use of QLoRA; the message says what would be right."""


# --------------------------------------------------------------------------------------------------------------- layer


class DecodedLinear(torch.autograd.Function):
    """x Ŵᵀ + b. Autograd's own F.linear would hold on to Ŵ until backward; here the layer is what is remembered."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return F.linear(x, layer.decode(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        # dx = dy Ŵ,  db = the sum of dy over all rows
        dx = dy @ ctx.layer.decode(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.size(-1)).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None


class QuantizedLinear(nn.Linear):
    """Stands in for an nn.Linear or a Hugging Face Conv1D. `weight` is what is stored: bytes, and no parameter."""

    def __init__(self, layer, kind, double_quant):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        is_conv1d = type(layer).__name__ == "Conv1D"
        weight = layer.weight.detach().t() if is_conv1d else layer.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.kind, self.double_quant, self.came_in = kind, double_quant, weight.dtype
        self.bias = layer.bias
        if kind == "int8":
            stored, scale = quant.quantize_int8(weight)
        else:
            stored, scale = quant.quantize_nf4(weight)
        self.register_buffer("weight", stored)
        if kind == "nf4" and double_quant:
            scale, scale2, mean = quant.quantize_scales(scale)
            self.register_buffer("scale2", scale2)
            self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        # The layer itself waits for merge_qlora, without its weight: hidden from Module, which would list it
        layer.weight = None
        self.__dict__["emptied"] = layer

    def decode(self, dtype):
        """Ŵ (out, in)."""
        if self.kind == "int8":
            return quant.dequantize_int8(self.weight, self.scale, dtype=dtype)
        scale = self.scale
        if self.double_quant:
            scale = quant.dequantize_scales(scale, self.scale2, self.mean)
        return quant.dequantize_nf4(self.weight, scale, (self.out_features, self.in_features), dtype)

    def forward(self, x):
        return DecodedLinear.apply(x, self.bias, self)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.kind}"


# --------------------------------------------------------------------------------------------------------------- verbs


def add_qlora(model, targets="all-linear", *, quant="nf4", double_quant=True, **arguments):
    """add_lora, and the linear layers that it wraps are quantized. Returns the model.

    quant: "nf4", in blocks of 64, or "int8", a scale per row. double_quant: NF4's scales in 8 bits as well.
    targets and the other arguments are add_lora's. An embedding or the head, if named, has LoRA and is not quantized.
    One layer after the other: at its peak the memory holds the model and one layer more.
    Cast and move the model before: model.to(torch.bfloat16) afterwards would cast A, B and the scales.
    Raises Error (or lora.Error), with the model untouched, if there is nothing to quantize or LoRA is there already.
    """
    if quant not in ("nf4", "int8"):
        raise Error(f"quant must be nf4 or int8, not {quant!r}")
    if lora.lora_layers(model):
        raise Error("the model has LoRA already: lora.remove_lora(model) first")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = lora.find_targets(model, targets)
    layers = {name: layer for name, layer in found.items() if lora.is_linear(layer) and layer is not head}
    if not layers:
        raise Error(f"nothing to quantize: {lora.names(found)} is no linear layer, or the head; lora.add_lora fits")
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLinear):
            raise Error(f"{name} is quantized already: lora.add_lora(model) gives it an update")
        if layer.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise Error(f"{name} has a weight in {layer.weight.dtype}; fp32, fp16 or bf16 can be quantized")
        if not torch.stack(layer.weight.aminmax()).isfinite().all():  # isfinite on all of it would copy it twice
            raise Error(f"{name} has inf or NaN in its weight, which cannot be quantized")
    lora.add_lora(model, targets, **arguments)
    for name, wrapper in lora.lora_layers(model).items():
        if name in layers:
            wrapper.base_layer = QuantizedLinear(layers[name], quant, double_quant)
    return model


@torch.no_grad()
def merge_qlora(model, dtype=None):
    """Puts the layers back with decoded weights, in the type that they came in or in `dtype`, and merges the update.

    What is left is a model with LoRA merged into 16 or 32 bits: lora.remove_lora(model) then gives the plain one. If
    lora.merge_lora refuses (LoRA on a tied head, or inside lora_disabled), all is decoded and nothing merged.
    """
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
        weight, original = layer.decode(dtype or layer.came_in), layer.emptied
        is_conv1d = type(original).__name__ == "Conv1D"
        original.weight = nn.Parameter(weight.t().contiguous() if is_conv1d else weight, requires_grad=False)
        lora.replace(model, name, original)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, lora.LoRALinear):
            parent.is_conv1d = is_conv1d
    return lora.merge_lora(model)


if __name__ == "__main__":
    torch.manual_seed(0)
    d = 256
    model = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d)).to(torch.bfloat16)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.02)
    x = torch.randn(8, d, dtype=torch.bfloat16)
    before = model(x)
    add_qlora(model, r=8)
    stored = [t for layer in (model[0], model[2]) for t in layer.base_layer.buffers()]
    bits = 8 * sum(t.numel() * t.element_size() for t in stored) / (2 * d * d)
    print(f"stored: {bits:.3f} bits per weight; decoded: {model[0].base_layer.decode(x.dtype).dtype}")
    print(f"what 4 bits cost the output: {(model(x) - before).float().norm() / before.float().norm():.3f} of its norm")
    model(x).float().square().sum().backward()
    print(f"trained: {[name for name, p in model.named_parameters() if p.grad is not None]}")
    for size in (1e-4, 1e-3, 5e-3):
        W = model[0].base_layer.decode(torch.float32)
        update = size * torch.randn(d, d)
        again = quant.dequantize_nf4(*quant.quantize_nf4(W + update), W.shape)
        lost = (again - W - update).square().mean().sqrt() / size
        print(f"an update of RMS {size:.0e} merged into 4 bits: the error is {lost:.2f} times the update")
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    y = model(x)
    difference = (merge_qlora(model, torch.bfloat16)(x) - y).float().norm() / y.float().norm()
    print(f"merged into bf16: {difference:.4f} of the output's norm, bf16's rounding")
