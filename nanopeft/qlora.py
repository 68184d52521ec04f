# SPDX-License-Identifier: MIT
"""QLoRA: LoRA over a frozen base whose linear weights are stored in 4 bits.

    y = x Ŵᵀ + b + s · dropout(x) Aᵀ Bᵀ           Ŵ = dequantize(q, scales):  NF4 or int8, see quant.py
    dx = dy Ŵ + s · dropout(dy B A)                Ŵ is computed again in backward, and never kept

    x (..., in) ──┬── dequantize(q, scales) = Ŵ (out, in), b ──(+)── y (..., out)     q: 4 bits a weight, frozen
                  └── dropout ── A (r, in) ── s ── B (out, r) ──┘                     A, B: fp32, trained

The linear layers that LoRA is put on are quantized, by default all but the head. Embeddings, norms, biases and the head
keep their 16 bits. The paper's three parts: NF4, double quantization (the scales in 8 bits too) and paged optimizers.

Does it compute in 4 bits? No: 4 bits are the storage type. For each product Ŵ is dequantized into the compute type, the
type of x, and freed afterwards. NF4 is a table of 16 values that no processor can multiply. Use bf16: fp32 would be
slower and double the activations, and fp16 has a smaller range and can overflow.

Does it just train in a higher precision than it stores? No. What rounding to 4 bits took away is gone: training sees Ŵ,
not W. A and B are trained on top of Ŵ and can make up for part of the error.

Can W itself be trained in 4 bits? No. Rounding has a zero gradient almost everywhere, and a usual step is far smaller
than the gap between two codes. It would need a copy of W in full precision, the memory that QLoRA saves.

What it costs: 4 + 8/64 + 32/(64 · 256) = 4.127 bits per quantized weight instead of 16 (4 + 32/64 = 4.5 without double
quantization), and two dequantizations per layer and step (three with activation checkpointing). The rest is LoRA's.

Example: 7 billion weights take 3.6 GB instead of 14, and 65 billion 33.5 GB instead of 130. Full fine-tuning with Adam
takes 16 bytes each: 112 GB and 1,040 GB. QLoRA trains 65B on one GPU of 48 GB (the paper). A small model gains less:
GPT-2's weights shrink from 249 to 123 MB, 79 MB of which are embeddings, norms and biases.

Typical values (the paper and its code): NF4 with double quantization, bf16, all linear layers, r = 64, α = 16, dropout
0.1 up to 13B and 0.05 above, constant learning rate 2e-4 (1e-4 from 33B on), gradient norm clipped at 0.3.

Pitfalls:
  * Do not merge into 4 bits. A usual update is far smaller than the gap between two codes. On Ŵ of standard deviation
    0.02, merge a rank-16 update of RMS 1e-3 and quantize again: the error's RMS is 1.03 times the update's, so dropping
    the update would be better (1.0). 28 % of it is left, at a cosine of 0.35 to what was meant. Serve Ŵ and
    the adapter unmerged, or let merge_qlora give a 16- or 32-bit model. If LoRA fits your memory in 16 bits, take LoRA:
    it is faster.
  * A and B fit Ŵ. Merged into the original W, which they never saw, they are a little off.
  * Cast and move the model before add_qlora: model.to(torch.bfloat16) afterwards would cast A, B and the scales.

Paged optimizers keep Adam's state in CUDA's unified memory, so that the driver can move it to the host during a peak.
They do not lower the steady need, and are not here: beside LoRA the state is small, 8 bytes for each trained number.

Compared with related methods: LoRA keeps W in 16 or 32 bits; its functions lora_state_dict, load_lora_state_dict,
lora_config, lora_disabled and remove_lora serve QLoRA too, with the same files. GPTQ and AWQ quantize after training
(PTQ), with sample data, for inference; QAT rounds during training. The whole family in one table: nanopeft/__init__.py.

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


class DequantizeLinear(torch.autograd.Function):
    """x Ŵᵀ + b. Autograd would keep Ŵ for backward; this keeps the quantized layer and computes Ŵ again."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype), bias)  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, dy):
        # dx = dy Ŵ,  db = the sum of dy over all rows;  W is frozen: no dW
        dx = dy @ ctx.layer.dequantize(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.size(-1)).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None


class QuantizedLinear(nn.Linear):
    """An nn.Linear, or a Hugging Face Conv1D, with its weight quantized: q holds the stored bytes."""

    def __init__(self, layer, quant_type, double_quant):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t()  # (out, in)
        self.out_features, self.in_features = weight.shape
        self.quant_type, self.double_quant, self.original_dtype = quant_type, double_quant, weight.dtype
        self.bias = layer.bias
        stored, scale = quant.quantize_int8(weight) if quant_type == "int8" else quant.quantize_nf4(weight)
        self.register_buffer("q", stored)
        if quant_type == "nf4" and double_quant:
            scale, scale2, mean = quant.quantize_scales(scale)
            self.register_buffer("scale2", scale2)
            self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        layer.weight = None  # the rest is kept for merge_qlora
        self.__dict__["original_layer"] = layer  # there it is not listed as a submodule

    def dequantize(self, dtype):
        """Ŵ (out, in)."""
        if self.quant_type == "int8":
            return quant.dequantize_int8(self.q, self.scale, dtype=dtype)
        scale = quant.dequantize_scales(self.scale, self.scale2, self.mean) if self.double_quant else self.scale
        return quant.dequantize_nf4(self.q, scale, (self.out_features, self.in_features), dtype=dtype)

    weight = property(lambda self: self.dequantize(self.original_dtype))  # a model may read it: T5 asks for its dtype

    def forward(self, x):
        return DequantizeLinear.apply(x, self.bias, self)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.quant_type}"


# ----------------------------------------------------------------------------------------------------------------- use


def add_qlora(model, targets="all-linear", *, quant_type="nf4", double_quant=True, **lora_arguments):
    """add_lora, with the linear layers that it wraps quantized. Wrong use: Error or lora.Error, and nothing changes.

    quant_type: "nf4", in blocks of 64, or "int8", with a scale per row. double_quant: NF4's scales in 8 bits too.
    targets and the other arguments are add_lora's. An embedding or the head, if named, has LoRA and is not quantized.
    One layer after the other: at its peak the memory holds the model and one layer more.
    """
    layers = quantizable(model, targets, quant_type, lora_arguments.get("modules_to_save"))
    lora.add_lora(model, targets, **lora_arguments)
    for name, wrapper in lora.lora_layers(model).items():
        if name in layers:
            wrapper.base_layer = QuantizedLinear(layers[name], quant_type, double_quant)
    return model


@torch.no_grad()
def merge_qlora(model, dtype=None):
    """Dequantizes the layers and merges the update: lora.remove_lora comes next. dtype: the whole model's from then on.

    If lora.merge_lora refuses (LoRA on a tied head, or inside lora_disabled), all is dequantized and nothing merged.
    """
    for layer in [m for m in model.modules() if isinstance(m, QuantizedLinear)]:
        weight, original = layer.dequantize(dtype or layer.original_dtype), layer.original_layer
        weight = weight if isinstance(original, nn.Linear) else weight.t().contiguous()
        original.weight, original.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        lora.replace(model, {layer: original})
    own = {id(p) for layer in lora.lora_layers(model).values() for p in layer.parameters(recurse=False)}
    for p in model.parameters() if dtype else ():  # norms, biases and embeddings too; A and B stay in fp32
        p.data = p.data if id(p) in own else p.data.to(dtype)
    return lora.merge_lora(model)


# ------------------------------------------------------------------------------------------------------------ plumbing


def quantizable(model, targets, quant_type, modules_to_save):
    """{name: layer} of the target layers that can be quantized; Error if there are none, or one that cannot be."""
    if quant_type not in ("nf4", "int8"):
        raise Error(f"quant_type must be nf4 or int8, not {quant_type!r}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = lora.find_targets(model, targets, lora.find_saved(model, modules_to_save))
    layers = {name: layer for name, layer in found.items() if lora.is_linear(layer) and layer is not head}
    if not layers:
        raise Error(f"nothing to quantize: {lora.names(found)} is no linear layer, or the head; lora.add_lora fits")
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLinear):
            raise Error(f"{name} is quantized already: lora.add_lora gives it an update, after lora.remove_lora")
        if layer.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise Error(f"{name} has a weight in {layer.weight.dtype}; fp32, fp16 or bf16 can be quantized")
        if not torch.stack(layer.weight.aminmax()).isfinite().all():  # isfinite on all of it would copy it twice
            raise Error(f"{name} has inf or NaN in its weight, which cannot be quantized")
    return layers


if __name__ == "__main__":
    torch.manual_seed(0)
    d, x = 256, torch.randn(8, 256, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d)).to(torch.bfloat16)
    nn.init.normal_(model[0].weight, std=0.02)
    base = add_qlora(model, r=8)[0].base_layer
    bits = 8 * sum(t.numel() * t.element_size() for t in base.buffers()) / (d * d)
    print(f"storage: {bits:.3f} bits per weight; compute: {base.dequantize(x.dtype).dtype}")
    model(x).float().square().sum().backward()
    print(f"trained: {[name for name, p in model.named_parameters() if p.grad is not None]}")
    W = base.dequantize(torch.float32)
    for size in (1e-4, 1e-3, 5e-3):
        update = size * torch.randn(d, 16) @ torch.randn(16, d) / 4  # of rank 16
        change = quant.dequantize_nf4(*quant.quantize_nf4(W + update), W.shape) - W
        error, left = (change - update).norm() / update.norm(), (change * update).sum() / update.square().sum()
        print(f"an update of RMS {size:.0e} merged into 4 bits: error {error:.2f} times the update, {left:.0%} left")
    nn.init.normal_(model[2].lora_B)
    y = model(x)
    difference = (merge_qlora(model, torch.bfloat16)(x) - y).float().norm() / y.float().norm()
    print(f"merged into bf16: {difference:.4f} of the output's norm, bf16's rounding")
