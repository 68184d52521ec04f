# SPDX-License-Identifier: MIT
"""What several technique files say or do alike, each in its own lines: these tests hold them together."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import nanopeft
from nanopeft import adapter, gpt, lora, prefix, prompt, ptuning

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


@pytest.mark.parametrize("part", ["layer", "block"])
def test_one_layer_in_several_places(part):
    """What the model calls in three places is wrapped in all of them, is one set of parameters, and comes off again.

    The oracle is the same wrapped layer, called three times.
    """
    torch.manual_seed(0)
    x, layer = torch.randn(2, 4).double(), nn.Linear(4, 4).double()
    block = nn.Sequential(layer, nn.Tanh())
    model = nn.Sequential(*[block] * 3) if part == "block" else nn.Sequential(layer, nn.Tanh(), layer, layer)
    plain = model(x)
    lora.add_lora(model, ("0.0" if part == "block" else "0",), r=2, init="reverse")
    wrapped = next(iter(lora.lora_layers(model).values()))
    nn.init.normal_(wrapped.lora_A)
    f = (lambda x: wrapped(x).tanh()) if part == "block" else wrapped
    expected = f(f(f(x))) if part == "block" else f(f(f(x).tanh()))
    assert torch.equal(model(x), expected) and not torch.equal(expected, plain)
    assert (lora.merge_lora(model)(x) - expected).abs().max() <= 1e-12
    assert torch.equal(lora.remove_lora(lora.unmerge_lora(model))(x), plain)

    model = nn.ModuleList([block] * 3) if part == "block" else nn.ModuleList([layer] * 3)
    run = lambda: model[2](model[1](model[0](x)))  # noqa: E731
    plain = run()
    adapter.add_adapter(model, "0", bottleneck=2, placement="pfeiffer" if part == "block" else "houlsby")
    wrapped = next(iter(adapter.adapter_layers(model).values()))
    for p in wrapped.adapter.parameters():
        nn.init.normal_(p)
    assert model[0] is model[1] is model[2] is wrapped
    assert torch.equal(run(), wrapped(wrapped(wrapped(x)))) and not torch.equal(run(), plain)
    adapter.remove_adapter(model)
    assert torch.equal(run(), plain)


def test_the_family_table_counts_as_the_code_does():
    """The numbers of trained and stored parameters in the family's tables are those of the files, on GPT-2's shape."""

    def gpt2():
        return gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)

    def trained(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    with torch.device("meta"):
        counts = {
            "full": trained(gpt2()),
            "LoRA": trained(lora.add_lora(gpt2(), r=8)),
            "Houlsby": trained(adapter.add_adapter(gpt2(), placement="houlsby", bottleneck=48)),
            "Pfeiffer": trained(adapter.add_adapter(gpt2(), placement="pfeiffer", bottleneck=48)),
            "prompt": trained(prompt.PromptTuning(gpt2(), 20)),
            "P-tuning": trained(ptuning.PTuning(gpt2(), 20)),
        }
        config = {"placement": "pfeiffer", "bottleneck": 48, "reduction": None, "activation": "relu"}
        config |= {"target_modules": "blocks"}
        fused = adapter.add_fusion(gpt2(), [(config, None)] * 2)
        counts["fusion"] = trained(fused)
        counts["fusion, stored"] = sum(t.numel() for t in adapter.fusion_state_dict(fused).values())
    for hidden in (None, 512):  # a prefix starts from the keys and values of a model with numbers
        counts[f"prefix, {hidden}"] = trained(prefix.PrefixTuning(gpt2(), 20, hidden=hidden))
    for what, count in counts.items():
        assert f"{count:,}" in nanopeft.__doc__, what
        assert f"{count:,}" in README or what == "fusion, stored", what


def test_prompts_and_prefixes_have_the_same_lines():
    """Storing, generating by a copy and finding the tuned model are the same lines in prompt.py and prefix.py."""
    ours, theirs = prompt.PromptTuning, prefix.PrefixTuning
    pairs = (ours.state_dict, theirs.state_dict), (ours.generate, theirs.generate)
    for pair in (*pairs, (prompt.find_tuned, prefix.find_tuned)):
        lines = [inspect.getsource(f).replace(theirs.__name__, ours.__name__).splitlines() for f in pair]
        # When a cache is used is each file's own matter
        one, other = ([t for t in part if "use_cache" not in t and "generation_config" not in t] for part in lines)
        assert one == other
