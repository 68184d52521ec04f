# SPDX-License-Identifier: MIT
"""LoRA on one architecture of transformers after the other, with its usual targets: peft's numbers, files and text."""

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file

from nanopeft import lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63, 4], [0, 0, 0, 17, 9, 30, 2, 8]])
MASK = (IDS != 0).long()  # the second row is padded on the left
LABELS = IDS.masked_fill(MASK == 0, -100)

GROUPED, ATTENTION = dict(num_key_value_heads=2), ("q_proj", "k_proj", "v_proj", "o_proj")
DEFAULT = [("gpt2", "fp32"), ("qwen3", "bf16")]  # the others are thorough
# {model_type: (targets, its own sizes)}
MODELS = {
    "gpt2": (("c_attn", "c_proj", "c_fc"), dict(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)),
    "llama": (("q_proj", "v_proj"), GROUPED),
    "mistral": (("q_proj", "v_proj"), GROUPED | dict(sliding_window=16)),
    "qwen2": ((*ATTENTION, "gate_proj", "up_proj", "down_proj"), GROUPED),
    "qwen3": ((*ATTENTION, "gate_proj", "up_proj", "down_proj"), GROUPED | dict(head_dim=16)),
    "gemma2": (ATTENTION, GROUPED | dict(head_dim=16, sliding_window=16)),
    "phi": (("q_proj", "v_proj", "dense", "fc1", "fc2"), {}),
    "gpt_neox": (("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), {}),
    "opt": (("q_proj", "v_proj", "out_proj"), dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0)),
    "bloom": (("query_key_value", "dense"), {}),
    "falcon": (("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), {}),
    "mixtral": (ATTENTION, GROUPED | dict(num_local_experts=3)),
}
CASES = pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(name, dtype, marks=[] if (name, bits) in DEFAULT else pytest.mark.thorough, id=f"{name}-{bits}")
        for name in MODELS
        for bits, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ],
)
# fp32 rounds to 6e-8 and bf16 to 4e-3, in some ten places that count: there peft computes the update in fp32, and this
# file in bf16. A merge rounds each weight once more
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.05}
MERGED = {torch.float32: 3e-6, torch.bfloat16: 0.05}
GRADIENT = {torch.float32: 1e-6, torch.bfloat16: 0.15}  # backward rounds as often again, and on what forward rounded


def tiny(name, dtype=torch.float32):
    """A small random model, with weights wide enough that attention is far from even."""
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=48, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(sizes | MODELS[name][1]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, do_sample=False)
    return model.to(dtype)


def wrapped(base, name):
    model = lora.add_lora(base, MODELS[name][0], r=4, alpha=8)
    for p in lora.lora_parameters(model).values():
        nn.init.normal_(p, std=0.2)
    return model


def in_peft(base, ours, name):
    """(peft's model, what it trains) around a copy of the base, with the adapter of ours."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=list(MODELS[name][0]), r=4, lora_alpha=8, fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    own = {key.replace(".default", ""): p for key, p in theirs.named_parameters() if p.requires_grad}
    state = lora.lora_state_dict(ours)
    assert own.keys() == state.keys()
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(state[key])
    return theirs, own


def close(found, expected, relative):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def assert_noticeable(model):
    """The update is at least a tenth of the output: an output without it could not pass for one with it."""
    with torch.no_grad():
        y = model(IDS, attention_mask=MASK).logits
        with lora.lora_disabled(model):
            base = model(IDS, attention_mask=MASK).logits
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


@CASES
def test_forward_backward_and_training_are_pefts(name, dtype):
    """Logits, loss and the gradients of A and B are peft's, and so are the adapters after three steps of training."""
    base = tiny(name, dtype)
    ours = wrapped(copy.deepcopy(base), name)
    theirs, expected = in_peft(base, ours, name)
    assert_noticeable(ours)
    own, results = lora.lora_parameters(ours), []
    for model in (ours, theirs):
        results.append([model(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK, labels=LABELS).loss])
    for p, other in zip(own.values(), expected.values()):
        results[0] += torch.autograd.grad(results[0][1], p, retain_graph=True)
        results[1] += torch.autograd.grad(results[1][1], other, retain_graph=True)
        assert results[0][-1].abs().max() > 0
    for i, (one, other) in enumerate(zip(*results, strict=True)):
        close(one, other, (TOLERANCE if i < 2 else GRADIENT)[dtype])

    before = {key: p.clone() for key, p in base.state_dict().items()}
    losses = []
    for model, params in ((ours, own), (theirs, expected)):
        optimizer = torch.optim.SGD(params.values(), lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model.train()(IDS, attention_mask=MASK, labels=LABELS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[2] < losses[0]
    for key, p in own.items():
        close(p, expected[key], TOLERANCE[dtype])
    lora.remove_lora(ours)
    assert all(torch.equal(p, before[key]) for key, p in ours.state_dict().items())


@CASES
def test_files_go_to_peft_and_come_back(name, dtype, tmp_path):
    """An adapter saved here opens in peft without a warning, and saved there it opens here, each tensor bit for bit."""
    base = tiny(name, dtype)
    ours = wrapped(copy.deepcopy(base), name)
    assert_noticeable(ours)
    folder, back = tmp_path / "ours", tmp_path / "theirs"
    folder.mkdir()
    save_file(lora.lora_state_dict(ours), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(lora.lora_config(ours)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    theirs.save_pretrained(back)
    config = json.loads((back / "adapter_config.json").read_text())
    again = lora.add_lora(base, config["target_modules"], r=config["r"], alpha=config["lora_alpha"])
    lora.load_lora_state_dict(again, load_file(back / "adapter_model.safetensors"))
    expected = ours(IDS, attention_mask=MASK).logits
    close(theirs(IDS, attention_mask=MASK).logits, expected, TOLERANCE[dtype])
    assert torch.equal(again(IDS, attention_mask=MASK).logits, expected)
    for key, p in lora.lora_state_dict(again).items():
        assert torch.equal(p, lora.lora_state_dict(ours)[key])


@CASES
def test_generation_and_merge(name, dtype):
    """Text from padded prompts is peft's and that of each prompt alone; merged and bare, the model still writes it."""
    base = tiny(name, dtype)
    ours = wrapped(copy.deepcopy(base), name)
    theirs, _ = in_peft(base, ours, name)
    assert_noticeable(ours)
    options = dict(attention_mask=MASK, max_new_tokens=6)
    text, alone = ours.generate(IDS, **options), ours.generate(IDS[1:, 3:], max_new_tokens=6)
    mask = torch.cat((MASK, MASK.new_ones(2, 6)), 1)
    again = dict(input_ids=text, attention_mask=mask)
    if name == "gpt2":  # which counts padding in a plain call, though not in generate
        again["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        before = ours(**again).logits
        chosen = before.gather(2, text[:, 1:, None])[:, 7:, 0]
        # read again at once, without a cache, each token is the likeliest, but for rounding
        assert (before[:, 7:-1].amax(-1) - chosen <= TOLERANCE[dtype] * before.abs().max()).all()
        if dtype == torch.float32:  # in bf16 two tokens may be equally likely
            assert torch.equal(text, theirs.generate(input_ids=IDS, **options))
            assert torch.equal(alone, text[1:, 3:])
            with lora.lora_disabled(ours):
                assert not torch.equal(text, ours.generate(IDS, **options))
        bare = lora.remove_lora(lora.merge_lora(ours))
        assert type(bare) is type(base) and bare.state_dict().keys() == base.state_dict().keys()
        close(bare(**again).logits, before, MERGED[dtype])
        close(bare(**again).logits, theirs.merge_and_unload()(**again).logits, MERGED[dtype])
        if dtype == torch.float32:
            assert torch.equal(bare.generate(IDS, **options), text)
