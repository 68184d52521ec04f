# SPDX-License-Identifier: MIT
"""nanopeft/ia3.py against peft's IA3, numbers worked out apart, and plain formulas in fp64."""

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

from nanopeft import ia3, lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set to False")
often = settings(deadline=None, max_examples=30)


def randomize(model):
    for p in lora.lora_parameters(model).values():
        nn.init.uniform_(p, 0.3, 1.7)
    return model


def conv1d():
    layer = transformers.pytorch_utils.Conv1D(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 6).view(3, 2))
        layer.bias.copy_(torch.tensor([0.5, -0.25]))
    return layer


@pytest.mark.parametrize(
    "at_input, factors, y, grad, W, b",
    [
        (False, [2, -0.5], [1.8, -1.275], [0.9, 2.55], [[-2, 0.3], [-0.4, -0.1], [1.2, -0.5]], [1, 0.125]),
        (True, [0.5, 1, -1], [-2.2, -3.15], [-1.6, 0, 4.8], [[-0.5, -0.3], [-0.2, 0.2], [-0.6, -1]], [0.5, -0.25]),
    ],
)
def test_numbers_of_a_small_layer(at_input, factors, y, grad, W, b):
    """Output, gradient and merged weight of a Conv1D from 3 to 2, at its output and its input, worked out by hand."""
    model = nn.ModuleDict({"one": conv1d(), "other": nn.Linear(2, 2)})
    ia3.add_ia3(model, ["other"] if at_input else ["one"], ["one"] if at_input else [])
    layer = model["one"]
    layer.ia3_l.data = torch.tensor(factors, dtype=torch.float32).view(layer.ia3_l.shape)
    found = layer(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([y]))
    found.sum().backward()
    torch.testing.assert_close(layer.ia3_l.grad.flatten(), torch.tensor(grad), atol=1e-6, rtol=1e-6, check_dtype=False)
    lora.merge_lora(model)
    torch.testing.assert_close(layer.base_layer.weight, torch.tensor(W, dtype=torch.float32))
    torch.testing.assert_close(layer.base_layer.bias, torch.tensor(b, dtype=torch.float32))


@often
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), at_input=st.booleans(), bias=st.booleans(), zero=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_merged_and_unmerged_compute_the_same(n_in, n_out, at_input, bias, zero, seed):
    """Merged and unmerged are l ∘ (x Wᵀ + b) or (l ∘ x) Wᵀ + b in fp64; after unmerging the bits are the base's.

    Also where a factor is 0, by which no division could bring a row back.
    """
    torch.manual_seed(seed)
    layer, x = nn.Linear(n_in, n_out, bias=bias).double(), torch.randn(4, n_in, dtype=torch.float64)
    W, before = layer.weight.detach().clone(), copy.deepcopy(layer.state_dict())
    model = nn.ModuleDict({"one": layer, "other": nn.Linear(2, 2)})
    ia3.add_ia3(model, ["other"] if at_input else ["one"], ["one"] if at_input else [])
    randomize(model)
    if zero:
        model["one"].ia3_l.data.view(-1)[0] = 0
    factors, b = model["one"].ia3_l.detach().flatten(), 0 if layer.bias is None else layer.bias.detach().clone()
    expected = (factors * x) @ W.t() + b if at_input else factors * (x @ W.t() + b)
    torch.testing.assert_close(model["one"](x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora.merge_lora(model)["one"](x), expected, rtol=1e-12, atol=1e-12)
    bare = lora.remove_lora(lora.unmerge_lora(model))["one"]
    assert bare is layer and all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
def test_the_start_changes_nothing(make, dtype):
    """With l = 1 the model is the base to the bit, and every factor gets a gradient."""
    torch.manual_seed(0)
    base = make().to(dtype)
    expected = base(IDS).logits
    model = ia3.add_ia3(base)
    assert torch.equal(model(IDS).logits, expected)
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in lora.lora_parameters(model).values()]
    assert len(grads) == (4 if make is hf_gpt2 else 6)
    assert all(grad.any() and grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
def test_logits_gradients_files_and_merge_are_pefts(make, tmp_path):
    """With the same numbers logits, gradients and merged logits are peft's to 1e-6, and so are files, both ways."""
    torch.manual_seed(0)
    base = make()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.IA3Config(task_type="CAUSAL_LM"))  # its own targets
    ours = randomize(ia3.add_ia3(copy.deepcopy(base)))
    assert not peft.set_peft_model_state_dict(theirs, lora.lora_state_dict(ours)).unexpected_keys

    def near(a, b, bound=1e-6):
        assert a.shape == b.shape and (a - b).abs().max() <= bound * b.abs().max()

    found, expected = ours(IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    near(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    grads = {key.replace(".default", ""): p.grad for key, p in theirs.named_parameters()}
    for key, p in lora.lora_parameters(ours).items():
        near(p.grad, grads[key], 2e-6)  # two layers, summed in another order
    theirs.save_pretrained(tmp_path / "theirs")
    again = ia3.add_ia3(copy.deepcopy(base))
    lora.load_lora_state_dict(again, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    near(again(IDS).logits, expected.logits)
    (tmp_path / "ours").mkdir()
    save_file(lora.lora_state_dict(ours), tmp_path / "ours" / "adapter_model.safetensors")
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(lora.lora_config(ours)))
    near(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")(IDS).logits, expected.logits)
    near(lora.merge_lora(ours)(IDS).logits, theirs.merge_and_unload()(IDS).logits)


@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
def test_in_bf16_the_factors_are_not_rounded(make):
    """On a base in bf16 the factors multiply in fp32: the logits are peft's to the bit."""
    torch.manual_seed(0)
    base = make().bfloat16()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.IA3Config(task_type="CAUSAL_LM"))
    ours = randomize(ia3.add_ia3(copy.deepcopy(base)))
    peft.set_peft_model_state_dict(theirs, lora.lora_state_dict(ours))
    assert torch.equal(ours(IDS).logits, theirs(input_ids=IDS).logits)


def test_counts_on_gpt2():
    """On GPT-2's shape IA3 trains 64,512 numbers and BitFit 102,144."""
    for add, n in ((ia3.add_ia3, 64_512), (ia3.add_bitfit, 102_144)):
        with torch.device("meta"):
            model = add(transformers.GPT2LMHeadModel(transformers.GPT2Config()))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == n


def test_bitfit():
    """BitFit moves biases alone, those of peft's bias="all"; its file restores them; another model's is refused."""
    torch.manual_seed(0)
    model, fresh = hf_gpt2(), hf_gpt2()
    fresh.load_state_dict(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    ia3.add_bitfit(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    config = peft.LoraConfig(target_modules=["c_attn"], bias="all")
    theirs = peft.get_peft_model(copy.deepcopy(fresh), config)
    named = {key.removeprefix("base_model.model.").replace(".base_layer", "")
             for key, p in theirs.named_parameters() if p.requires_grad and "lora_" not in key}  # fmt: skip
    assert moved == named == ia3.bitfit_state_dict(model).keys()
    ia3.load_bitfit_state_dict(fresh, {key: t.clone() for key, t in ia3.bitfit_state_dict(model).items()})
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    with pytest.raises(ia3.Error, match="another model"):
        ia3.load_bitfit_state_dict(fresh, {})


def test_a_classifier_s_new_head_is_trained_and_saved():
    """Its weights are drawn at random: IA3 saves them under peft's name, BitFit beside the biases."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = ia3.add_ia3(transformers.LlamaForSequenceClassification(config))
    assert model.score.weight.requires_grad and "base_model.model.score.weight" in lora.lora_state_dict(model)
    assert lora.lora_config(model)["modules_to_save"] == ["score"]
    other = ia3.add_ia3(transformers.LlamaForSequenceClassification(config))
    lora.load_lora_state_dict(other, lora.lora_state_dict(model))
    assert torch.equal(other.score.weight, model.score.weight)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    assert [*ia3.bitfit_state_dict(ia3.add_bitfit(model))] == ["a.bias", "classifier.weight", "classifier.bias"]
    assert model.classifier.weight.requires_grad and not model.a.weight.requires_grad


def test_what_cannot_be(tmp_path):
    """No biases, an embedding, nothing to scale, and IA3 a second time are Errors of one line; nothing has changed."""
    model = hf_llama()
    for error, call, says in (
        (ia3.Error, lambda: ia3.add_bitfit(model), "no biases"),
        (ia3.Error, lambda: ia3.add_ia3(model, ["embed_tokens"]), "is an embedding"),
        (lora.Error, lambda: ia3.add_ia3(model, ["nothing"]), "no layer fits"),
    ):
        with pytest.raises(error, match=says):
            call()
        assert all(p.requires_grad for p in model.parameters()) and not lora.lora_layers(model)
    with pytest.raises(ia3.Error, match="already"):
        ia3.add_ia3(ia3.add_ia3(model))
