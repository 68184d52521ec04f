# SPDX-License-Identifier: MIT
"""What nanopeft/qlora.py claims, without another library."""

import copy
import gc
import importlib
import math
import runpy
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from nanopeft import dora, gpt, lora, qlora, quant


class Conv1D(nn.Module):
    """The shape of Hugging Face's: a linear layer with the weight as (in, out). tests/parity has the real one."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def tiny_gpt(**options):
    sizes = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return gpt.GPT(**{**sizes, **options})


def randomize(model):
    """Draws A and B: at B = 0, whatever is claimed of the update would hold."""
    for p in lora.lora_parameters(model).values():
        nn.init.normal_(p, std=0.3)
    return model


def assert_noticeable(model, *inputs):
    """The update is at least a tenth of the output."""
    with torch.no_grad():
        y = model(*inputs)
        with lora.lora_disabled(model):
            base = model(*inputs)
    y, base = getattr(y, "logits", y), getattr(base, "logits", base)
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


def quantized(model):
    """{name: layer} of the quantized layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, qlora.QuantizedLinear)}


IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63, 0], [1, 1, 62, 17, 9, 30, 2, 8]])
THOROUGH = pytest.mark.thorough
KINDS = [("nf4", True), pytest.param(("nf4", False), marks=THOROUGH), ("int8", True)]  # quant_type, double_quant


# ---------------------------------------------------------------------------------------------------------- the formula


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([("nf4", True), ("nf4", False), ("int8", True)]), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_forward_and_gradients_are_the_equations(kind, n_in, n_out, leading, conv1d, bias):
    """y = x Ŵᵀ + b + s x Aᵀ Bᵀ and dx = dy Ŵ + s dy B A, with Ŵ what quant.py makes of W; A and B have LoRA's."""
    torch.manual_seed(0)
    layer = Conv1D(n_out, n_in) if conv1d else nn.Linear(n_in, n_out, bias=bias)
    W = (layer.weight.t() if conv1d else layer.weight).detach().clone()
    model = nn.Sequential(layer)
    randomize(qlora.add_qlora(model, ("0",), quant_type=kind[0], double_quant=kind[1], r=3))
    if kind[0] == "int8":
        W_hat = quant.dequantize_int8(*quant.quantize_int8(W))
    else:
        packed, scale = quant.quantize_nf4(W)
        if kind[1]:
            scale = quant.dequantize_scales(*quant.quantize_scales(scale))
        W_hat = quant.dequantize_nf4(packed, scale, W.shape)
    A, B, s = model[0].lora_A.detach(), model[0].lora_B.detach(), 16 / 3
    x = torch.randn(*leading, n_in, requires_grad=True)
    dy = torch.randn(*leading, n_out)
    y = model(x)
    y.backward(dy)
    whole = (W_hat + s * B @ A).double()
    b = 0 if model[0].bias is None else model[0].bias.detach()
    expected = {"y": (x.detach().double() @ whole.t() + b, y), "dx": (dy.double() @ whole, x.grad)}
    rows, drows = x.detach().view(-1, n_in), dy.view(-1, n_out)
    expected["dA"] = (s * (B.t() @ drows.t() @ rows).double(), model[0].lora_A.grad)
    expected["dB"] = (s * (drows.t() @ (rows @ A.t())).double(), model[0].lora_B.grad)
    # fp32 sums of at most 40 · 3 products, with terms of either sign that may cancel to a tenth
    scale = s * (1 + whole.abs().max()) * (1 + x.detach().abs().max()) * (1 + dy.abs().max())
    for right, found in expected.values():
        assert found.shape == right.shape and (found - right).abs().max() <= 120 * 2**-23 * scale * 40
    assert model[0].base_layer.bias is None or model[0].base_layer.bias.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_and_compute_are_two_types(kind, dtype):
    """Stored in bytes, shown, dequantized and multiplied as floats of the input's type; A, B and gradients in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).to(dtype)
    randomize(qlora.add_qlora(model, quant_type=kind[0], double_quant=kind[1], r=4))
    base = model[0].base_layer
    assert base.q.dtype == (torch.int8 if kind[0] == "int8" else torch.uint8)
    assert base.weight.dtype == model[0].weight.dtype == dtype
    assert base.dequantize(dtype).dtype == dtype and base.bias.dtype == dtype
    x = torch.randn(5, 64).to(dtype).requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert {p.dtype for p in (model[0].lora_A, model[0].lora_B, model[0].lora_A.grad)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.float().detach()).dtype == torch.bfloat16 if dtype != torch.float16 else True


def test_training_moves_the_factors_and_nothing_else():
    """After a few steps all buffers and frozen tensors are the same bits, A and B moved, and the loss fell by half."""
    torch.manual_seed(0)
    model = qlora.add_qlora(tiny_gpt().to(torch.bfloat16), ("c_attn", "c_proj", "c_fc", "lm_head"), r=4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in lora.lora_parameters(model).values()}
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(40):
        loss = model(IDS[:1], labels=IDS[:1]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and losses[0] > 3
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) != ("lora_" in name), name


def test_a_trained_bias_has_its_gradient():
    """An unfrozen bias gets the gradient that it has beside an ordinary weight, with the update or without."""
    torch.manual_seed(0)
    model = randomize(qlora.add_qlora(nn.Sequential(nn.Linear(8, 6)), r=2))
    model[0].bias.requires_grad_()
    dy = torch.randn(2, 5, 6)
    model(torch.randn(2, 5, 8)).backward(dy)
    torch.testing.assert_close(model[0].bias.grad, dy.sum((0, 1)), rtol=1e-6, atol=1e-6)  # fp32 sums of 10
    model[0].bias.grad = None
    model[0].base_layer(torch.randn(8)).backward(dy[0, 0])
    assert torch.equal(model[0].bias.grad, dy[0, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_a_model_that_reads_the_weight_finds_floats(kind, conv1d):
    """F.linear(x, layer.weight) and x.to(layer.weight.dtype) are right: Ŵ + ΔW as (out, in), in the original dtype."""
    torch.manual_seed(0)
    layer = Conv1D(48, 32) if conv1d else nn.Linear(32, 48)
    model = qlora.add_qlora(nn.Sequential(layer), ("0",), quant_type=kind[0], double_quant=kind[1])
    x, read = torch.randn(5, 32), model[0].weight
    assert x.to(read.dtype) is x
    assert torch.equal(read, model[0].base_layer.dequantize(torch.float32))  # B = 0
    randomize(model)
    # fp32 sums of 32 products
    torch.testing.assert_close(F.linear(x, model[0].weight, model[0].bias), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Under checkpointing the gradients are the same bits."""
    torch.manual_seed(0)
    model = randomize(qlora.add_qlora(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), r=4))
    x, gradients = torch.randn(5, 64, requires_grad=True), []
    inputs = [x, *lora.lora_parameters(model).values()]
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        for p in inputs:
            p.grad = None
        call(x).square().sum().backward()
        gradients.append([p.grad for p in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# --------------------------------------------------------------------------------------------------------------- memory


def live_storages():
    """{address: bytes} of all tensors that Python can reach."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):  # not the fake ones that torch.compile leaves behind
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


class Bytes(TorchDispatchMode):
    """The bytes of a model's tensors and of all that operations make, while they are alive, and the most there were."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        for t in (*model.parameters(), *model.buffers()):
            self.count(t)

    def count(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.count(t)
        return result


@pytest.mark.parametrize("kind", [*KINDS[:2], pytest.param(("int8", True), marks=THOROUGH)])
def test_no_dequantized_weight_lives_between_forward_and_backward(kind):
    """Between forward and backward nobody holds a tensor of the weight's size; F.linear alone would."""
    torch.manual_seed(0)
    d, dtype = 512, torch.bfloat16
    x = torch.randn(4, d, dtype=dtype, requires_grad=True)
    model = nn.Sequential(nn.Linear(d, d)).to(dtype)
    randomize(qlora.add_qlora(model, quant_type=kind[0], double_quant=kind[1], r=4))
    size, saved = 2 * d * d, []  # bytes of W in bf16

    def note(t):
        saved.append(t.untyped_storage().nbytes())
        return t

    before = live_storages()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    alive = {address: size for address, size in live_storages().items() if address not in before}
    # x, the rank-4 product, A and B: the largest is A in fp32, less than the 4-bit weight even
    assert 0 < max(saved) <= 4 * 4 * d and y.untyped_storage().data_ptr() in alive
    assert max(alive.values()) < size / 8
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        F.linear(x, model[0].base_layer.dequantize(dtype))  # what it would be without the autograd function
    assert max(saved) == size
    y.sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    "kind, ratio", [(("nf4", True), 0.25794), (("nf4", False), 0.28125), (("int8", True), 0.50195)]
)
def test_bytes_of_gpt2s_linear_layers(kind, ratio):
    """One layer of GPT-2's shape keeps 4.127 of 16 bits per weight (4.5 without double quantization, int8 8.03)."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=64, n_positions=8, n_embd=768, n_layer=1, n_head=12).to(torch.bfloat16)
    dense = {n: m.weight.nbytes for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    qlora.add_qlora(model, quant_type=kind[0], double_quant=kind[1])
    layers = quantized(model)
    assert {n.removesuffix(".base_layer") for n in layers} == dense.keys() and len(dense) == 4
    stored = sum(b.untyped_storage().nbytes() for layer in layers.values() for b in layer.buffers())
    assert stored / sum(dense.values()) == pytest.approx(ratio, abs=1e-4)
    # nothing else is held: no parameter but the bias, and the original layer's weight is gone
    for layer in layers.values():
        assert [n for n, _ in layer.named_parameters()] == ["bias"] and layer.original_layer.weight is None


def test_the_examples_bytes():
    """The docstring's weights: 7 and 65 billion at 4.127 bits, and GPT-2 with 84.9 of its 124.4 million quantized."""
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    with torch.device("meta"):
        model = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    total = sum(p.numel() for p in model.parameters())
    chosen = sum(layer.weight.numel() for layer in lora.find_targets(model, "all-linear").values())
    rest = 2 * (total - chosen)
    text = " ".join(qlora.__doc__.split())
    for shown in (
        f"{bits:.3f} bits", f"{7 * bits / 8:.1f} GB instead of 14", f"{65 * bits / 8:.1f} GB instead of 130",
        f"from {2 * total / 1e6:.0f} to {(chosen * bits / 8 + rest) / 1e6:.0f} MB, {rest / 1e6:.0f} MB of which",
        f"{7 * 16} GB and {65 * 16:,} GB",
    ):  # fmt: skip
        assert shown in text, shown


def test_the_rest_keeps_its_type():
    """Embeddings, norms, biases and the head stay the very tensors that they were, the head tied."""
    model = tiny_gpt().to(torch.bfloat16)
    before = {n: p for n, p in model.named_parameters() if not (n.endswith("weight") and (".c_" in n))}
    qlora.add_qlora(model)
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_converting_needs_one_layer_more(kind):
    """While it is converted, memory never holds more than the model, one layer and the adapters."""
    d, n = 2048, 2
    model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(n))).to(torch.bfloat16)
    layer, adapters = 2 * d * d, n * 4 * 2 * d
    memory = Bytes(model)
    with memory:
        qlora.add_qlora(model, quant_type=kind, r=1)
    assert n * layer <= memory.peak <= (n + 1.01) * layer + adapters  # and the scales
    # what is left: 4.127 or 8 bits and a scale per row, of 16
    assert memory.now <= n * layer * (0.259 if kind == "nf4" else 0.502) + adapters


# ---------------------------------------------------------------------------------------------------------------- verbs


@pytest.mark.parametrize("kind", KINDS)
def test_loras_functions_work_unchanged(kind):
    """Loaded into another QLoRA model the output is the same; disabled or removed it is the quantized base's."""
    torch.manual_seed(0)
    base = tiny_gpt().eval()
    options = dict(quant_type=kind[0], double_quant=kind[1], r=4)
    model = randomize(qlora.add_qlora(copy.deepcopy(base), ("c_attn", "mlp.c_proj"), **options))
    assert_noticeable(model, IDS)
    y, state, config = model(IDS).logits, lora.lora_state_dict(model), lora.lora_config(model)
    fresh = qlora.add_qlora(copy.deepcopy(base), config["target_modules"], **options)
    lora.load_lora_state_dict(fresh, state)
    assert torch.equal(fresh(IDS).logits, y)
    # the same file as LoRA's: names, shapes and configuration
    plain = lora.add_lora(copy.deepcopy(base), ("c_attn", "mlp.c_proj"), r=4)
    assert {n: t.shape for n, t in lora.lora_state_dict(plain).items()} == {n: t.shape for n, t in state.items()}
    assert lora.lora_config(plain) == config
    with lora.lora_disabled(model):
        disabled = model(IDS).logits
    assert torch.equal(model(IDS).logits, y) and not torch.equal(disabled, y)
    lora.remove_lora(model)
    assert len(quantized(model)) == 4 and torch.equal(model(IDS).logits, disabled)
    again = randomize(lora.add_lora(model, ("c_attn",)))  # and LoRA goes onto the quantized base
    assert_noticeable(again, IDS)


def test_a_copied_or_reloaded_model_is_the_same(tmp_path):
    """deepcopy, torch.save and state_dict carry the codes and scales: the copies' outputs are the same bits."""
    torch.manual_seed(0)
    model = randomize(qlora.add_qlora(tiny_gpt(), r=2))
    y = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, y)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(IDS).logits, y)
    other = qlora.add_qlora(tiny_gpt(), r=2)
    assert not torch.equal(other(IDS).logits, y)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, y)


def test_modules_to_save_keep_16_bits():
    """A head in modules_to_save is trained in full and not quantized; merged and removed, it stays as trained."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Linear(32, 4))
    model, x = layers.to(torch.bfloat16), torch.randn(7, 32, dtype=torch.bfloat16)
    randomize(qlora.add_qlora(model, modules_to_save=["3"], r=2))
    assert len(quantized(model)) == 2 and type(model[3]) is nn.Linear
    assert {key.split(".")[2] for key in lora.lora_state_dict(model)} == {"0", "2", "3"}
    y = model(x).float()
    y.sum().backward()
    assert model[3].weight.grad is not None
    lora.remove_lora(qlora.merge_qlora(model, torch.float32))
    assert not quantized(model) and not any(p.requires_grad for p in model.parameters())
    # bf16's 8 bits in the activations of three layers, against fp32: some roundings of 2^-9 each
    merged = model.float()(x.float())
    assert (merged - y).norm() <= 0.02 * y.norm()


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_dense_model_back(kind, conv1d):
    """merge_qlora puts the original layers back, with Ŵ + s B A; twice is once, and unmerging gives Ŵ."""
    torch.manual_seed(0)
    layers = [Conv1D(48, 32) if conv1d else nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)]
    model = nn.Sequential(*layers)
    randomize(qlora.add_qlora(model, ("0", "2"), quant_type=kind[0], double_quant=kind[1], r=4))
    x = torch.randn(7, 32)
    y = model(x)
    assert_noticeable(model, x)
    with pytest.raises(lora.Error, match="quantized weight"):
        lora.merge_lora(model)
    with lora.lora_disabled(model):
        base = model(x)
    qlora.merge_qlora(model)
    assert not quantized(model) and model[0].weight.dtype == torch.float32
    # two layers of fp32 sums of up to 48 terms
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    merged = model(x)
    assert torch.equal(qlora.merge_qlora(model)(x), merged)
    torch.testing.assert_close(lora.unmerge_lora(model)(x), y, rtol=1e-4, atol=1e-4)
    with lora.lora_disabled(model):
        torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-4)
    lora.remove_lora(lora.merge_lora(model))
    assert all(now is before for now, before in zip(model, layers)) and torch.equal(model(x), merged)


def test_a_quantized_base_comes_back_without_an_update():
    """With LoRA removed, or another added, merge_qlora gives the Conv1D and nn.Linear that there were."""
    torch.manual_seed(0)
    layers, x = [Conv1D(48, 32), nn.Linear(48, 16)], torch.randn(7, 32)
    model = lora.remove_lora(qlora.add_qlora(nn.Sequential(*layers), ("0", "1")))
    lora.add_lora(model, ("0",), r=2)
    randomize(model)
    y = model(x)
    assert_noticeable(model, x)
    assert len(quantized(model)) == 2
    lora.remove_lora(qlora.merge_qlora(model))
    assert all(now is before for now, before in zip(model, layers))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)  # fp32 sums of up to 48 terms


def test_merging_into_another_type():
    """A model quantized from bf16 merges into bf16 by itself, and into fp32 when asked."""
    for dtype in (None, torch.float32):
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
        randomize(qlora.add_qlora(model, r=4))
        W = model[0].base_layer.dequantize(dtype or torch.bfloat16).float() + model[0].delta()
        lora.remove_lora(qlora.merge_qlora(model, dtype))
        assert model[0].weight.dtype == (dtype or torch.bfloat16) and type(model[0]) is nn.Linear
        assert torch.equal(model[0].weight, W.to(dtype or torch.bfloat16))  # summed in fp32, rounded once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merged_model_has_one_type(dtype):
    """Merged into a type, the whole model is of it, norms and embeddings too, and computes."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    model = gpt.GPT(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2).to(other)
    lora.remove_lora(qlora.merge_qlora(qlora.add_qlora(model, r=4), dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.dtype == dtype


def test_a_merge_into_a_type_rounds_no_magnitude():
    """A, B and DoRA's m stay in fp32: what is merged is made of them, and unmerging needs them."""
    model = dora.add_dora(nn.Sequential(nn.Linear(64, 64)), add=qlora.add_qlora, r=4)
    qlora.merge_qlora(model, torch.bfloat16)
    assert {p.dtype for p in lora.lora_parameters(model).values()} == {torch.float32}
    assert model[0].base_layer.weight.dtype == model[0].base_layer.bias.dtype == torch.bfloat16


def replace_the_bias(model, bias):
    model[0].base_layer.bias = nn.Parameter(bias, requires_grad=False)


def assign_the_bias(model, bias):
    model.load_state_dict({**model.state_dict(), "0.base_layer.bias": bias}, assign=True)


def train_the_bias(model, bias):
    with torch.no_grad():
        model[0].bias.requires_grad_().copy_(bias)


def load_as_another_parameter(model, bias):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float32)  # gives each layer new parameters
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    train_the_bias(model, bias)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("change", [assign_the_bias, replace_the_bias, train_the_bias, load_as_another_parameter])
def test_merging_keeps_the_bias_of_the_moment(change, conv1d):
    """A bias that was loaded, replaced, trained or converted after add_qlora is the merged layer's bias."""
    torch.manual_seed(0)
    model = randomize(qlora.add_qlora(nn.Sequential(Conv1D(48, 32) if conv1d else nn.Linear(32, 48)), ("0",), r=4))
    bias, x = torch.randn(48), torch.randn(7, 32)
    change(model, bias)
    y = model(x)
    lora.remove_lora(qlora.merge_qlora(model))
    assert torch.equal(model[0].bias, bias)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)  # fp32 sums of 32 products, and of 4


@pytest.mark.parametrize(
    "size, error, left, cosine", [(1e-4, 1.08, 0.016, 0.04), (1e-3, 1.03, 0.28, 0.35), (5e-3, 0.37, 0.99, 0.94)]
)
def test_why_not_merge_into_4_bits(size, error, left, cosine):
    """A rank-16 update merged and quantized again: its error, what arrives (the projection on it), and the cosine.

    An error of 1.0 times the update is what dropping it gives, so that a small update is better dropped.
    """
    torch.manual_seed(0)
    W = quant.dequantize_nf4(*quant.quantize_nf4(0.02 * torch.randn(1024, 1024)), (1024, 1024))
    update = torch.randn(1024, 16) @ torch.randn(16, 1024)
    update *= size / update.square().mean().sqrt()
    change = quant.dequantize_nf4(*quant.quantize_nf4(W + update), W.shape) - W
    assert ((change - update).norm() / update.norm()).item() == pytest.approx(error, abs=0.01)
    assert ((change * update).sum() / update.square().sum()).item() == pytest.approx(left, abs=0.01)
    assert F.cosine_similarity(change.flatten(), update.flatten(), 0).item() == pytest.approx(cosine, abs=0.01)


def test_an_embedding_or_head_that_is_named_keeps_16_bits():
    """Named beside linear layers, wte and lm_head get LoRA over the tensors they had; c_attn is quantized."""
    model = tiny_gpt().to(torch.bfloat16)
    table = model.transformer.wte.weight
    qlora.add_qlora(model, ("wte", "lm_head", "c_attn"), r=2)
    assert len(lora.lora_layers(model)) == 4
    assert [n.split(".")[-2] for n in quantized(model)] == ["c_attn", "c_attn"]
    assert model.lm_head.base_layer.weight is model.transformer.wte.base_layer.weight is table


# --------------------------------------------------------------------------------------------------------------- misuse


def with_nan():
    model = tiny_gpt()
    model.transformer.h[1].mlp.c_proj.weight.data[3, 4] = math.nan
    return model


@pytest.mark.parametrize(
    "model, options, message",
    [
        (tiny_gpt, dict(quant_type="nf8"), "nf4 or int8, not 'nf8'"),
        (tiny_gpt, dict(targets=("c_atn",)), "no layer fits"),
        (tiny_gpt, dict(targets=("wte",)), "nothing to quantize"),
        (tiny_gpt, dict(targets=("lm_head",)), "nothing to quantize"),
        (tiny_gpt, dict(r=0), "at least 1"),
        (lambda: tiny_gpt().double(), {}, "float64"),
        (with_nan, {}, r"h\.1\.mlp\.c_proj has inf or NaN"),
        (lambda: lora.add_lora(tiny_gpt()), {}, "has LoRA already"),
        (lambda: qlora.add_qlora(tiny_gpt()), {}, "quantized already.*after lora.remove_lora"),
        (lambda: lora.remove_lora(qlora.add_qlora(tiny_gpt())), {}, "quantized already"),
    ],
)
def test_wrong_use_leaves_the_model_untouched(model, options, message):
    """Wrong name, targets, rank, type, a NaN or a second time: one clear line, and the model is as it was."""
    model = model()
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises((qlora.Error, lora.Error), match=message) as caught:
        qlora.add_qlora(model, **options)
    assert "\n" not in str(caught.value)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before


def test_casting_afterwards_is_refused():
    """model.to(bfloat16) after add_qlora would cast the scales: the next forward says so."""
    model = qlora.add_qlora(nn.Sequential(nn.Linear(64, 64)))
    model.to(torch.bfloat16)
    with pytest.raises(quant.Error, match="before it is quantized"):
        model(torch.randn(2, 64, dtype=torch.bfloat16))
    model = qlora.add_qlora(nn.Sequential(nn.Linear(64, 64)), quant_type="int8").to(torch.bfloat16)
    with pytest.raises(quant.Error, match="before it is quantized"):
        model(torch.randn(2, 64, dtype=torch.bfloat16))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    """Under torch.compile a layer, and a model that reads its weight, give the same number as without."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            return self.down(self.up(x).tanh().to(self.down.weight.dtype)) + F.linear(x, self.up.weight)[..., :32]

    torch.manual_seed(0)
    model, x = randomize(qlora.add_qlora(Reader(), quant_type=kind[0], double_quant=kind[1], r=2)), torch.randn(5, 32)
    expected = torch.autograd.grad(model(x).square().sum(), list(lora.lora_parameters(model).values()))
    compiled = torch.compile(model, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), list(lora.lora_parameters(model).values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # fp32 sums of 64 products


@pytest.fixture
def pasted(tmp_path, monkeypatch):
    """The three files in an empty folder, from where they are imported, with nanopeft out of reach."""
    for module in (lora, quant, qlora):
        shutil.copy(module.__file__, tmp_path)
    monkeypatch.setitem(sys.modules, "nanopeft", None)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("lora", "quant", "qlora"):
        sys.modules.pop(name, None)


def test_demonstration(pasted, capsys):
    """The demonstration of the three files side by side prints the figures that the docstring claims."""
    runpy.run_path(str(pasted / "qlora.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "4.127 bits" in shown and "compute: torch.bfloat16" in shown
    assert "RMS 1e-03 merged into 4 bits: error 1.0" in shown


@pytest.mark.parametrize("installed", [True, False])
def test_the_three_files_work_side_by_side(pasted, monkeypatch, installed):
    """Pasted into an empty folder, the three files work with one another, also where nanopeft is installed."""
    if installed:
        monkeypatch.undo()
        monkeypatch.syspath_prepend(pasted)
    here = importlib.import_module("qlora")
    assert Path(here.__file__).parent == Path(here.lora.__file__).parent == Path(here.quant.__file__).parent == pasted
    model = here.add_qlora(nn.Sequential(nn.Linear(64, 64)))
    model(torch.randn(2, 64)).square().sum().backward()
    assert len(here.lora.lora_state_dict(model)) == 2 and model[0].lora_B.grad.norm() > 0
    assert type(here.merge_qlora(model)[0].base_layer) is nn.Linear
