# SPDX-License-Identifier: MIT
"""DoRA, weight-decomposed low-rank adaptation: the length of each row of W is trained apart from its direction.

    V = W + s · B A                      LoRA's merged weight, (out, in);  s = α / r
    W' = c ∘ V,  c = m / ‖V‖             ‖V‖ (out,): the length of each row;  m (out,) is trained
    y = x W'ᵀ + b = c ∘ (x Vᵀ) + b       the bias is not scaled

    x (..., in) ──┬── W (out, in) ────────────────────(+)── c ∘ ── + b ── y (..., out)     W and b are frozen
                  └── A (r, in) ── s ── B (out, r) ────┘                                   A, B and m are trained

m starts as ‖W‖ and B as 0, so c = 1 and nothing changes. A row of W belongs to one output: m has a number for each
output. (The paper writes W as d x k and speaks of columns. Its code takes the rows of an nn.Linear's weight, as here.
The paper's V is W alone, and its V + ΔV is V here.)

Why: the authors measure how much training changes the rows in length, and how much in direction. In full fine-tuning
what changes much in one changes little in the other. In LoRA the two grow together, for one B A has to make both. DoRA
has a number for the length, so that B A can turn a row a little and m change its length a lot, or the other way round.

The gradient: ‖V‖ is taken as a constant (the paper, section 4.3), which saves memory and costs little accuracy. Then
    dV = c ∘ (dyᵀ x)      dB = s dV Aᵀ      dA = s Bᵀ dV      dm = Σ dy ∘ (x Vᵀ) / ‖V‖   over all tokens
These are LoRA's with c ∘ dy in the place of dy. The whole gradient has a further term in dV: - v (v · dV) for each row
v of length 1, which takes out the part of dV along the row. dm is the same with it and without.

The row lengths are computed without W + s B A, a matrix as large as W in each forward. For a row w of W and β of B:
    ‖w + s βᵀA‖² = ‖w‖² + 2 s β · (A w) + s² βᵀ (A Aᵀ) β
‖w‖² is kept. A w is r numbers for each row, and A Aᵀ is r x r. For 768 to 3072 and r = 8 this takes 1.4 ms, and the
plain form 2.3 (one CPU core, fp32).

Example: GPT-2 with r = 8 on c_attn trains 294,912 numbers with LoRA, 322,560 with DoRA: 2,304 more in each of 12
layers.
Cost: a product more, A Wᵀ, and x Vᵀ stays in memory for dm: n · out numbers a layer. Merged it costs nothing.
How to choose: LoRA's settings, or half its r and a slightly smaller learning rate (the authors' code: r = 32, α = 64,
2e-4 for 7B). When: r is small. The authors' average of eight tests of LLaMA-7B is 78.4 % at r = 32 and 77.5 % at
r = 16, and LoRA's at r = 32 76.3 %. In peft's own comparison DoRA at r = 32 is a point behind LoRA, at 1.26 times the
time. So try both.

Pitfalls
* Weight decay on m shrinks whole rows of W. Leave it out for m, which is no matrix.
* In bf16 m must be computed in fp32. Rounded to bf16 it is off by 0.4 %, and the start is not the base any more.
* Over a 4-bit base W is dequantized a second time in each forward, for A Wᵀ.
* Dropout reaches B A alone here. peft drops x in c's share of W x too, which takes a second product with W.

Compared with related methods: LoRA is c = 1. IA3 (ia3.py) trains a factor for each output alone. A weight norm
(1602.07868) trains m and all of V. The whole family in one table: nanopeft/__init__.py.
Paper: DoRA, arXiv 2402.09353, eq. 5 and section 4.3.
"""

import torch
import torch.nn as nn

try:
    from . import lora
except ImportError:  # the two files pasted side by side, or this one run
    import lora


class Error(ValueError):
    """Wrong use of DoRA; the message says what would be right."""


def plain_row_lengths(W, s, A, B):
    """‖W + s B A‖ of each row, (out,)."""
    return (W + s * (B @ A)).norm(dim=1)


def row_lengths(squares, W, s, A, B):
    """The same without a matrix of W's size. squares: ‖W‖² of each row, (out,)."""
    WA = (W @ A.to(W.dtype).t()).to(B.dtype)  # (out, r)
    cross, update = (B * WA).sum(1), (B @ (A @ A.t()) * B).sum(1)  # (out,), (out,)
    return (squares + 2 * s * cross + s * s * update).clamp(min=1e-30).sqrt()  # a row of zeros has no direction


class DoRALinear(lora.LoRALinear):
    """A frozen linear layer, its update, and the length of each row."""

    stored = lora.LoRALinear.stored | {"lora_magnitude_vector": "magnitude"}
    own = lora.LoRALinear.own | {"magnitude", "squares"}

    def start(self):
        """m = ‖W + s B A‖, which is ‖W‖ while B is 0."""
        W = self.rows().to(self.lora_B.dtype)
        self.register_buffer("squares", W.square().sum(1))  # (out,); saved with W, whose lengths it has
        self.magnitude = nn.Parameter(self.lengths())  # (out,)

    def forward(self, x):
        y = self.base_layer(x)  # (..., out)
        if not self.is_active():
            return y
        update = self.update(x)
        xV = (y if self.bias is None else y - self.bias) + update  # (..., out)
        # c ∘ xV + b, written so that it is y to the bit while c = 1 and B = 0
        return y + update.to(y.dtype) + (self.scale() - 1).to(y.dtype) * xV

    def scale(self):
        """c = m / ‖V‖, (out,)."""
        return self.magnitude / self.lengths()

    @torch.no_grad()  # ‖V‖ is a constant
    def lengths(self):
        return row_lengths(self.squares, self.rows(), self.scaling, self.lora_A, self.lora_B)

    def rows(self):
        """W as (out, in). A quantized layer dequantizes it; a Conv1D has it as (in, out)."""
        W = self.base_layer.weight.detach()
        return W if isinstance(self.base_layer, nn.Linear) else W.t()

    def delta(self):
        """W' - W, which lora.merge_lora adds to W."""
        W, c = self.base_layer.weight, self.scale()  # (out, in), (out,)
        return (c[:, None] if isinstance(self.base_layer, nn.Linear) else c) * (W + super().delta()) - W


# ----------------------------------------------------------------------------------------------------------------- use


def add_dora(model, targets="all-linear", *, add=lora.add_lora, **arguments):
    """Freezes the model, wraps its target layers in place and returns it. Wrong use: Error or lora.Error.

    targets and the other arguments are add_lora's. add: qlora.add_qlora for a base in 4 bits.
    lora.py's functions serve DoRA too: lora_state_dict, load_lora_state_dict, lora_config, merge_lora (qlora.py's
    merge_qlora over 4 bits), unmerge_lora, remove_lora, lora_disabled. The files are peft's, with use_dora.
    """
    found = lora.find_targets(model, targets, lora.find_saved(model, arguments.get("modules_to_save")))
    if tables := [name for name, layer in found.items() if isinstance(layer, nn.Embedding)]:
        raise Error(f"{tables[0]} is an embedding, and DoRA here is for linear layers: leave it out, or take LoRA")
    if packed := [name for name, layer in found.items() if lora.is_packed(layer.weight)]:
        raise Error(f"{packed[0]} is quantized, and its codes have no length: qlora.add_qlora takes a base in 16 bits")
    if arguments.get("init") == "pissa":
        raise Error("init='pissa' has an update of its own, s (B A - B₀ A₀): take it or DoRA, not both")
    add(model, targets, **arguments)
    for layer in lora.lora_layers(model).values():
        layer.__class__ = DoRALinear  # it has A and B already; m is made of W as add has stored it, in 4 bits perhaps
        layer.start()
    model.lora_config["use_dora"] = True
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    x, W = torch.randn(4, 64), torch.randn(32, 64)
    A, B = torch.randn(8, 64), torch.randn(32, 8)
    off = (row_lengths(W.square().sum(1), W, 2.0, A, B) / plain_row_lengths(W, 2.0, A, B) - 1).abs().max()
    print(f"row lengths by the expanded square, against the plain form: {off:.1e} of them")
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    before = model(x)
    print(f"m = ‖W‖ and B = 0, so nothing has changed yet: {torch.equal(add_dora(model, r=4)(x), before)}")
    nn.init.normal_(model[0].lora_B)
    nn.init.uniform_(model[0].magnitude)
    off = (model(x) - lora.merge_lora(model)(x)).abs().max()
    print(f"merged against unmerged: a largest difference of {off:.1e}")
    print(f"trained: {', '.join(lora.lora_parameters(model))}")
