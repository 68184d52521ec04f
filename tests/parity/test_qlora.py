# SPDX-License-Identifier: MIT
"""nanopeft/qlora.py against peft over bitsandbytes: the same outputs, gradients and files."""

import copy
import json

import bitsandbytes
import peft
import pytest
import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file

from nanopeft import gpt, lora, qlora
from nanopeft.trainer import bases

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set to False")
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63, 0], [1, 1, 62, 17, 9, 30, 2, 8]])


def hf_gpt2():
    # 64 wide, a multiple of the block: bitsandbytes' kernel for AVX-512 is wrong below it
    sizes = dict(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=63, eos_token_id=63)
    more = dict(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **more)).eval()


def hf_llama():
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, max_position_embeddings=32, pad_token_id=3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)).eval()


def randomize(model):
    for n, p in model.named_parameters():
        if "lora_" in n:
            nn.init.normal_(p, std=0.3)
    return model


def tensors(model):
    """What peft trains, under the names of its file, as the tensors themselves."""
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}


def to_4bit(model, double):
    """A copy of a model of nn.Linear with bitsandbytes' layers in place of all but the head."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
                compress_statistics=double, quant_type="nf4",
            )  # fmt: skip
            weight = layer.weight.detach().clone()
            new.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=new
            )
            new.bias = layer.bias
            lora.replace(model, {layer: new.to("cpu")})
    return model


def assert_close(found, expected, relative):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_what_pefts_does(dtype, double):
    """y, dx, dA and dB are those of peft's LoRA over Linear4bit to 1e-6, in fp32 and in bf16."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(192, 320)).to(dtype)
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8)
    # without autocast A and B are in the type of x where they are multiplied, as here
    theirs = peft.get_peft_model(to_4bit(base, double), config, autocast_adapter_dtype=False)
    randomize(theirs)
    ours = qlora.add_qlora(base, ("0",), double_quant=double, r=4, alpha=8)
    lora.load_lora_state_dict(ours, {n: p.detach() for n, p in tensors(theirs).items()})
    x, dy = torch.randn(50, 192).to(dtype), torch.randn(50, 320).to(dtype)
    results = []
    for model in (ours, theirs):
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.backward(dy)
        A, B = (p for n, p in model.named_parameters() if "lora_" in n)
        results.append((y, inputs.grad, A.grad.to(dtype), B.grad.to(dtype)))
    # the same dequantized weight and the same product, to the last bit
    plain = ours[0].base_layer(x)
    assert torch.equal(plain, theirs.base_model.model[0].base_layer(x))
    assert (results[0][0] - plain).abs().max() > 0.1 * plain.abs().max()
    for one, other in zip(*results):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-2)])
def test_a_llama_computes_what_pefts_does(dtype, tolerance):
    """A whole Llama, 14 quantized layers, has the logits of peft over bitsandbytes; one adapter file serves both."""
    torch.manual_seed(0)
    base = hf_llama().to(dtype)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=8)
    # in eval mode bitsandbytes turns to a kernel that computes in bf16
    theirs = randomize(peft.get_peft_model(to_4bit(base, True), config)).train()
    ours = qlora.add_qlora(base, r=4, alpha=8)
    assert sum(isinstance(m, qlora.QuantizedLinear) for m in ours.modules()) == 14
    lora.load_lora_state_dict(ours, {n: p.detach() for n, p in tensors(theirs).items()})
    found, expected = ours(IDS).logits, theirs(IDS).logits
    # in fp32 the same operations; in bf16 roundings of 2^-9, which two layers with updates of this size enlarge
    assert (found - expected).float().norm() <= tolerance * expected.float().norm()
    with lora.lora_disabled(ours):
        assert (ours(IDS).logits - found).abs().max() > 0.1 * found.abs().max()


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.thorough)])
def test_gpt2_with_conv1d_is_quantized_along_its_inputs(kind):
    """transformers' GPT-2, with Conv1D, and ours with nn.Linear give the same codes, logits and merged logits."""
    torch.manual_seed(0)
    hf = hf_gpt2()
    ours = gpt.GPT(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    state = {n: t.t() if bases.is_conv1d(n) else t for n, t in hf.state_dict().items()}
    ours.load_state_dict(state)
    for model in (hf, ours):
        qlora.add_qlora(model, quant_type=kind, r=4)
    randomize(hf)
    lora.load_lora_state_dict(ours, lora.lora_state_dict(hf))
    for (name, one), (other_name, other) in zip(lora.lora_layers(hf).items(), lora.lora_layers(ours).items()):
        assert name == other_name and torch.equal(one.base_layer.q, other.base_layer.q)
    assert_close(hf(IDS).logits, ours(IDS).logits, 1e-5)  # two layers in fp32, other orders of summation
    y = hf(IDS).logits
    for model in (hf, ours):
        lora.remove_lora(qlora.merge_qlora(model))
    assert {type(m).__name__ for n, m in hf.named_modules() if n.endswith("c_attn")} == {"Conv1D"}
    assert_close(hf(IDS).logits, y, 1e-5)
    assert_close(hf(IDS).logits, ours(IDS).logits, 1e-5)


def t5(dtype=torch.float32):
    sizes = dict(d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32, vocab_size=64, dropout_rate=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval().to(dtype)
    nn.init.normal_(model.encoder.block[0].layer[1].DenseReluDense.wi.weight)
    return model


@pytest.mark.parametrize("kind, tolerance", [("nf4", 0.15), ("int8", 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)])
def test_t5_casts_its_input_to_the_weights_type(kind, tolerance, dtype):
    """T5 casts what goes into wo to the type of its weight: quantized, wo still gives W x but for its own rounding."""
    torch.manual_seed(0)
    model = t5(dtype)
    mlp, x = model.encoder.block[0].layer[1].DenseReluDense, torch.randn(1, 5, 64).to(dtype)
    before, whole = mlp(x), model(input_ids=IDS, decoder_input_ids=IDS).logits
    qlora.add_qlora(model, ("wo",), quant_type=kind)
    # NF4 rounds a normal weight by an RMS of 9.2 % of it, int8 by 0.8 % (quant.py), and a sum of them as much
    assert (mlp(x) - before).float().norm() <= tolerance * before.float().norm()
    after = model(input_ids=IDS, decoder_input_ids=IDS).logits
    assert (after - whole).float().norm() <= tolerance * whole.float().norm()
    assert model.dtype == dtype and mlp.wo.weight.dtype == dtype
    lora.remove_lora(model)
    assert mlp.wo.weight.dtype == dtype and torch.equal(model(input_ids=IDS, decoder_input_ids=IDS).logits, after)


def test_the_adapter_opens_in_peft_and_pefts_here(tmp_path):
    """A QLoRA adapter is a LoRA adapter: peft opens it over the dequantized base, and peft's own opens here."""
    torch.manual_seed(0)
    base = hf_gpt2()
    ours = randomize(qlora.add_qlora(copy.deepcopy(base), ("c_attn", "mlp.c_proj"), r=4, alpha=8))
    expected = ours(IDS).logits
    save_file(lora.lora_state_dict(ours), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora.lora_config(ours)))
    # the base that it was trained on, in 32 bits: Ŵ in place of W
    dequantized = copy.deepcopy(ours)
    for p in lora.lora_parameters(dequantized).values():
        nn.init.zeros_(p)
    lora.remove_lora(qlora.merge_qlora(dequantized))
    assert (dequantized(IDS).logits - expected).abs().max() > 0.1 * expected.abs().max()
    theirs = peft.PeftModel.from_pretrained(dequantized, tmp_path).eval()
    assert_close(theirs(IDS).logits, expected, 1e-5)

    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    again = qlora.add_qlora(copy.deepcopy(base), config["target_modules"], r=config["r"], alpha=config["lora_alpha"])
    lora.load_lora_state_dict(again, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert_close(again(IDS).logits, theirs(IDS).logits, 1e-5)


def test_bitsandbytes_own_layers_are_not_quantized_again():
    """A base that is in bitsandbytes' 4 bits already is refused: lora.add_lora fits on it."""
    model = to_4bit(hf_llama(), True)
    with pytest.raises(qlora.Error, match="uint8"):
        qlora.add_qlora(model)
