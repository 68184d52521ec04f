# SPDX-License-Identifier: MIT
"""What several technique files say or do alike, each in its own lines: these tests hold them together."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import nanopeft
from nanopeft import adalora, adapter, dora, gpt, ia3, lora, prefix, prompt, ptuning

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
            "DoRA": trained(dora.add_dora(gpt2(), r=8)),
            "AdaLoRA": trained(adalora.add_adalora(gpt2(), r=12)),
            "IA3": trained(ia3.add_ia3(gpt2())),
            "BitFit": trained(ia3.add_bitfit(gpt2())),
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


def test_lora_and_adapters_have_the_same_lines():
    """lora.py and adapter.py name modules and put layers in place by the same lines."""
    for name in ("bare", "bare_names", "replace"):
        assert inspect.getsource(getattr(lora, name)) == inspect.getsource(getattr(adapter, name))


def test_parts_that_were_given_apart_are_noticed():
    """Two parts of a model that each got LoRA or adapters have layers of one name: an Error, and nothing left out."""
    for technique, add in ((lora, lora.add_lora), (adapter, partial(adapter.add_adapter, targets=["0"], bottleneck=2))):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
        for part in model:
            add(part)
        name = technique.__name__.rpartition(".")[2]
        for function in (f"{name}_state_dict", f"remove_{name}", f"{name}_layers"):
            with pytest.raises(technique.Error, match="^layers have the same name"):
                getattr(technique, function)(model)


def test_lora_and_adapters_in_one_model():
    """Each has its own layers in its own file, and leaves the other's in place when it is removed."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4)
    plain = model(x)
    lora.add_lora(model, ["0"], r=2)
    adapter.add_adapter(model, ["2"], bottleneck=2)
    assert {key.split(".")[2] for key in lora.lora_state_dict(model)} == {"0"}
    assert {key.split(".")[0] for key in adapter.adapter_state_dict(model)} == {"2"}
    lora.remove_lora(model)
    assert adapter.adapter_layers(model) and not lora.lora_layers(model)
    assert torch.equal(adapter.remove_adapter(model)(x), plain)


def test_what_has_been_compiled_is_removed():
    """A layer with LoRA or an adapter that was compiled by itself computes as the base after its removal."""
    torch.manual_seed(0)
    for technique, add in ((lora, lora.add_lora), (adapter, partial(adapter.add_adapter, bottleneck=2))):
        model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
        plain = model(x)
        add(model, targets=["0"])
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        model[0] = torch.compile(model[0], backend="eager")
        assert not torch.allclose(model(x), plain)
        getattr(technique, f"remove_{technique.__name__.rpartition('.')[2]}")(model)
        assert torch.equal(model(x), plain)


def test_a_head_with_counts_is_saved_and_loaded():
    """A module to save may hold whole numbers too, as BatchNorm's count of batches."""
    for technique, add in ((lora, lora.add_lora), (adapter, partial(adapter.add_adapter, bottleneck=2))):
        models = []
        for _ in range(2):
            model = nn.Sequential(nn.Linear(4, 4))
            model.score = nn.BatchNorm1d(4)
            models.append(add(model, targets=["0"]))
        models[0](torch.randn(8, 4))
        name = technique.__name__.rpartition(".")[2]
        state = getattr(technique, f"{name}_state_dict")(models[0])
        getattr(technique, f"load_{name}_state_dict")(models[1], state)
        assert models[1].score.num_batches_tracked == models[0].score.num_batches_tracked == 1
