# SPDX-License-Identifier: MIT
"""nanopeft/dora.py against peft's use_dora, numbers worked out apart, and the plain formula in fp64."""

import copy
import json

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import IDS, hf_gpt2, hf_llama

from nanopeft import dora, lora, qlora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set to False")
often = settings(deadline=None, max_examples=30)


def randomize(model):
    """As after training: B and m away from where they start."""
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.lora_B.normal_(std=0.3)
            layer.magnitude.mul_(1 + 0.3 * torch.randn_like(layer.magnitude))
    return model


def explicit():
    """The layer and the input of the numbers below."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 6).view(2, 3))
        layer.bias.copy_(torch.tensor([0.5, -0.25]))
    model = dora.add_dora(nn.Sequential(layer), r=1, alpha=2)
    with torch.no_grad():
        model[0].lora_A.copy_(torch.tensor([[0.1, -0.2, 0.3]]))
        model[0].lora_B.copy_(torch.tensor([[0.4], [-0.5]]))
        model[0].magnitude.copy_(torch.tensor([1.5, 2.0]))
    return model, torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.5]])


def test_numbers_of_a_small_layer():
    """Lengths, output, gradients (‖V‖ a constant) and merged weight of a 2 x 3 layer are peft's, to six digits."""
    model, x = explicit()
    near = dict(rtol=0, atol=2e-6)
    torch.testing.assert_close(model[0].lengths(), torch.tensor([1.193985, 1.067708]), **near)
    y = model(x)
    torch.testing.assert_close(y, torch.tensor([[-2.414609, 6.868052], [1.680919, 0.218293]]), **near)
    (y * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    near = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(model[0].lora_A.grad, torch.tensor([[1.736268, -5.482611, -10.462704]]), **near)
    torch.testing.assert_close(model[0].lora_B.grad, torch.tensor([[1.884446], [5.244881]]), **near)
    torch.testing.assert_close(model[0].magnitude.grad, torch.tensor([0.418766, 8.054639]), **near)
    W = torch.tensor([[-1.155793, -0.954786, 0.050252], [0.187317, 1.498537, 1.311220]])
    torch.testing.assert_close(lora.merge_lora(model)[0].base_layer.weight, W, rtol=0, atol=2e-6)


@often
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.floats(-4, 4), st.integers(0, 99))
def test_lengths_need_no_large_matrix(n_out, n_in, r, s, seed):
    """The expanded square is the length of each row of W + s B A, in fp64 to 1e-7.

    Where a sum of three terms cancels, its error of some 2^-52 of ‖w‖² is 1e-8 of the length after the root.
    """
    torch.manual_seed(seed)
    W, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((n_out, n_in), (r, n_in), (n_out, r)))
    found = dora.row_lengths(W.square().sum(1), W, s, A, B)
    torch.testing.assert_close(found, dora.plain_row_lengths(W, s, A, B), rtol=1e-10, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
@pytest.mark.parametrize("add", [lora.add_lora, qlora.add_qlora])
def test_the_start_changes_nothing(make, dtype, add):
    """With B = 0 the model is the base, or the base in 4 bits, to the bit, and m and B get a gradient."""
    torch.manual_seed(0)
    base = make().to(dtype)
    expected = (add(copy.deepcopy(base)) if add is qlora.add_qlora else base)(IDS).logits
    model = dora.add_dora(base, add=add)
    assert torch.equal(model(IDS).logits, expected)
    model(IDS, labels=IDS).loss.backward()
    for layer in lora.lora_layers(model).values():
        assert layer.magnitude.dtype == torch.float32
        assert layer.magnitude.grad.any() and layer.lora_B.grad.any() and not layer.lora_A.grad.any()


@often
@given(
    n_in=st.integers(1, 12), n_out=st.integers(1, 12), r=st.integers(1, 4), alpha=st.floats(0.1, 20),
    bias=st.booleans(), conv=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_merged_and_unmerged_compute_the_same(n_in, n_out, r, alpha, bias, conv, seed):
    """Merged and unmerged agree in fp64, an nn.Linear or a Conv1D; unmerged again, the base has its bits."""
    torch.manual_seed(seed)
    layer = nn.Linear(n_in, n_out, bias=bias)
    if conv:
        layer = transformers.pytorch_utils.Conv1D(n_out, n_in)
    layer = layer.double()
    before = layer.weight.clone()
    model = randomize(dora.add_dora(nn.Sequential(layer), r=r, alpha=alpha))
    x = torch.randn(5, n_in, dtype=torch.float64)
    y = model(x)
    V = (before.t() if conv else before) + model[0].scaling * model[0].lora_B @ model[0].lora_A
    plain = x @ (model[0].magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).t()
    plain = plain if layer.bias is None else plain + layer.bias
    close = dict(rtol=1e-7, atol=1e-7 * (1 + plain.abs().max().item()))  # a row that nearly cancels: 1e-8 of its length
    torch.testing.assert_close(y, plain, **close)
    torch.testing.assert_close(lora.merge_lora(model)(x), y, **close)
    assert torch.equal(lora.remove_lora(lora.unmerge_lora(model))[0].weight, before)


@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
def test_logits_gradients_files_and_merge_are_pefts(make, tmp_path):
    """With the same numbers logits, gradients and merged logits are peft's to 1e-6, and so are files, both ways."""
    torch.manual_seed(0)
    base = make()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = randomize(dora.add_dora(copy.deepcopy(base), r=4, alpha=8))
    assert not peft.set_peft_model_state_dict(theirs, lora.lora_state_dict(ours)).unexpected_keys
    found, expected = ours(IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)

    def near(a, b, bound=1e-6):
        assert (a - b).abs().max() <= bound * b.abs().max()

    near(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    grads = {key.replace(".default", ""): p.grad for key, p in theirs.named_parameters()}
    grads = {key.replace("_vector.weight", "_vector"): grad for key, grad in grads.items()}
    for key, p in lora.lora_parameters(ours).items():
        near(p.grad, grads[key], 2e-6)  # two layers, summed in another order
    theirs.save_pretrained(tmp_path / "theirs")
    again = dora.add_dora(copy.deepcopy(base), r=4, alpha=8)
    lora.load_lora_state_dict(again, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    near(again(IDS).logits, expected.logits)
    (tmp_path / "ours").mkdir()
    save_file(lora.lora_state_dict(ours), tmp_path / "ours" / "adapter_model.safetensors")
    saved = json.dumps(lora.lora_config(ours) | {"task_type": "CAUSAL_LM"})
    (tmp_path / "ours" / "adapter_config.json").write_text(saved)
    near(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")(IDS).logits, expected.logits)
    near(lora.merge_lora(ours)(IDS).logits, theirs.merge_and_unload()(IDS).logits)


def test_over_four_bits():
    """Over NF4 the layer is the formula on Ŵ; merge_qlora gives a plain layer that computes the same."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 16)), torch.randn(3, 64)
    randomize(dora.add_dora(model, add=qlora.add_qlora, r=4))
    layer = model[0]
    V = layer.base_layer.dequantize(torch.float32) + layer.scaling * layer.lora_B @ layer.lora_A
    expected = x @ (layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).t() + layer.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    merged = lora.remove_lora(qlora.merge_qlora(model))
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


def test_disabled_and_removed():
    """Inside lora_disabled, and after remove_lora, the model is the base to the bit."""
    torch.manual_seed(0)
    model = hf_llama()
    before = model(IDS).logits
    randomize(dora.add_dora(model))
    changed = model(IDS).logits
    with lora.lora_disabled(model):
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, changed) and not torch.equal(changed, before)
    assert torch.equal(lora.remove_lora(model)(IDS).logits, before) and not hasattr(model, "lora_config")


def test_loading_a_whole_model_brings_the_lengths_of_its_rows():
    """A model that loads another's state_dict, base and all, computes what that one does."""
    torch.manual_seed(0)
    one, other = dora.add_dora(hf_llama()), randomize(dora.add_dora(hf_llama()))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_a_row_of_zeros():
    """A row of zeros, which has no direction, starts as it is, without NaN in outputs or gradients."""
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight[1].data)
    x = torch.randn(2, 4)
    before = layer(x)
    model = dora.add_dora(nn.Sequential(layer), r=2)
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, before) and all(p.grad.isfinite().all() for p in lora.lora_parameters(model).values())


def test_a_base_quantized_by_others_is_refused():
    """Rows of 8-bit codes have other lengths than the weights that they stand for."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(dora.Error, match="is quantized, and its codes have no length"):
        dora.add_dora(model)
    assert type(model[0]) is nn.Linear


def test_embeddings_are_refused():
    """An embedding among the targets is an Error of one line, and nothing has changed."""
    model = hf_llama()
    with pytest.raises(dora.Error, match="embed_tokens is an embedding"):
        dora.add_dora(model, ["q_proj", "embed_tokens"])
    assert not lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_count_on_gpt2():
    """GPT-2's shape with r = 8 trains 322,560 numbers on c_attn, 27,648 of them lengths, and 1,262,592 on all."""
    config = transformers.GPT2Config()
    for targets, n in ((["c_attn"], 322_560), ("all-linear", 1_262_592)):
        with torch.device("meta"):
            model = dora.add_dora(transformers.GPT2LMHeadModel(config), targets, r=8)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == n
