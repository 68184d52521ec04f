# SPDX-License-Identifier: MIT
"""PiSSA and LoRA+ of nanopeft/lora.py against peft. (DoRA itself: tests/test_dora.py.)"""

import copy
import json

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from small_models import IDS, hf_gpt2, hf_llama

from nanopeft import lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set to False")


def near(found, expected, bound=2e-6):
    """fp32, through two layers: some ten roundings of 6e-8, and twice as many where W_res takes the place of W."""
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("make, alpha, rslora", [(hf_gpt2, 8, False), (hf_gpt2, 12, True), (hf_llama, 2, False)])
def test_pissa_trains_and_is_saved_as_pefts(make, alpha, rslora, tmp_path):
    """With peft's start and the same training, logits and gradients are peft's; files converted to 2r, both ways."""
    torch.manual_seed(0)
    base = make()
    arguments = dict(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments, init_lora_weights="pissa")).eval()
    theirs.save_pretrained(tmp_path / "start")
    ours = lora.add_lora(copy.deepcopy(base), r=4, alpha=alpha, rslora=rslora, init="pissa")
    near(ours(IDS).logits, base(IDS).logits)
    their_layers = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules()}
    pairs = []
    with torch.no_grad():
        for name, layer in lora.lora_layers(ours).items():
            A, B = (getattr(their_layers[name], end)["default"].weight for end in ("lora_A", "lora_B"))
            near(layer.lora_B @ layer.lora_A, B @ A)
            pairs += [(layer.lora_A, A), (layer.lora_B, B)]
            layer.A_0.copy_(A), layer.B_0.copy_(B)  # the signs of singular vectors are the library's affair
        for mine, theirs_ in pairs:
            theirs_ += 0.1 * torch.randn_like(theirs_)  # as after training
            mine.copy_(theirs_)
    found, expected = ours(IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    assert (expected.logits - base(IDS).logits).abs().max() > 0.1 * expected.logits.abs().max()
    near(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    for mine, theirs_ in pairs:
        near(mine.grad, theirs_.grad, 5e-6)  # backward sums over twice as many roundings

    (tmp_path / "ours").mkdir()
    save_file(lora.lora_state_dict(ours), tmp_path / "ours" / "adapter_model.safetensors")
    saved = lora.lora_config(ours)
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(saved | {"task_type": "CAUSAL_LM"}))
    near(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")(IDS).logits, found.logits)

    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert all(converted[key] == saved[key] for key in ("r", "use_rslora"))
    assert converted["lora_alpha"] == pytest.approx(saved["lora_alpha"], rel=1e-12)
    state = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    again = lora.add_lora(copy.deepcopy(base), r=4, alpha=alpha, rslora=rslora, init="pissa")
    plain = lora.add_lora(copy.deepcopy(base), r=8, alpha=saved["lora_alpha"], rslora=rslora)
    for model in (again, plain):
        lora.load_lora_state_dict(model, state)
        near(model(IDS).logits, found.logits)
    near(lora.merge_lora(ours)(IDS).logits, found.logits)


def test_lora_plus_has_pefts_rates():
    """A and B have the learning rates that peft's create_loraplus_optimizer gives them."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    theirs = peft.get_peft_model(hf_gpt2(), config)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {name.replace(".default", ""): rates[id(p)] for name, p in theirs.named_parameters() if p.requires_grad}
    ours = lora.add_lora(hf_gpt2(), r=4)
    rates = {id(p): group["lr"] for group in lora.lora_plus_groups(ours, 1e-3, 16) for p in group["params"]}
    assert {name: rates[id(p)] for name, p in lora.lora_parameters(ours).items()} == expected
