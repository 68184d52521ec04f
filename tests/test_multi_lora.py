# SPDX-License-Identifier: MIT
"""What nanopeft/multi_lora.py claims, against formulas in fp64, peft and transformers."""

import copy
import importlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from nanopeft import gpt, lora, multi_lora, qlora

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:fan_in_fan_out is set to", "ignore:all-linear passes over"
)
THOROUGH = pytest.mark.thorough
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63, 0], [1, 1, 62, 17, 9, 30, 2, 8], [7, 7, 1, 2, 50, 51, 52, 4]])


def own_gpt():
    return gpt.GPT(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)


def hf_gpt2():
    sizes = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=63, eos_token_id=63)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))


def hf_llama():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=None)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))


def hf_t5():
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0)
    special = dict(pad_token_id=0, eos_token_id=None, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **special))


def hf_qwen_moe():
    """Its shared expert gets the tokens of all rows in one dimension."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    config = transformers.Qwen2MoeConfig(**sizes, **experts, num_key_value_heads=2)
    config._experts_implementation = "eager"  # the default has no fp64
    return transformers.Qwen2MoeForCausalLM(config)


def scaled_up(model):
    """Larger weights, so that the logits depend on every part of the model."""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model.double().eval()


def adapter(model, targets="all-linear", **options):
    """(config, state) of a random adapter of this model, which stays as it is."""
    tuned = lora.add_lora(copy.deepcopy(model), targets, **options)
    for p in lora.lora_parameters(tuned).values():
        nn.init.normal_(p, std=0.3)
    return lora.lora_config(tuned), lora.lora_state_dict(tuned)


def alone(model, config, state):
    """A copy of the model with this adapter as the only one, by lora.py."""
    tuned = copy.deepcopy(model)
    options = dict(r=config["r"], alpha=config["lora_alpha"], ranks=config["rank_pattern"], rslora=config["use_rslora"])
    lora.add_lora(tuned, config["target_modules"], **options)
    lora.load_lora_state_dict(tuned, state)
    return tuned


def save(folder, config, state):
    """peft's two files."""
    folder.mkdir()
    save_file({key: t.contiguous() for key, t in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def in_peft(model, adapters, tmp_path):
    """peft's model with all adapters, from files."""
    folders = {name: save(tmp_path / name, *pair) for name, pair in adapters.items()}
    first, *others = folders
    model = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    return model.eval()


def three(model, targets, **options):
    """Three adapters of different ranks, scales and targets."""
    few, many = targets
    return {
        "a": adapter(model, few, r=2, alpha=8, **options),
        "b": adapter(model, many, r=5, alpha=3, rslora=True, **options),
        "c": adapter(model, few[:1], r=3, alpha=16, **options),
    }


TARGETS = {
    own_gpt: (["c_attn", "mlp.c_proj"], "all-linear"),
    hf_gpt2: (["c_attn", "mlp.c_proj"], "all-linear"),
    hf_llama: (["q_proj", "down_proj"], "all-linear"),
    hf_t5: (["q", "wo"], "all-linear"),
    hf_qwen_moe: (["shared_expert.down_proj", "q_proj"], "all-linear"),
}


def assert_close(found, expected, relative=1e-12):
    """fp64 leaves some thousand roundings of 1.1e-16, and cancellation may raise them tenfold."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------- the formula


@st.composite
def draws(draw):
    """A layer's shape, K adapters as (targets, r, alpha, rsLoRA), and the adapter or None of each row."""
    n_in, n_out, K, N = (draw(st.integers(1, n)) for n in (9, 9, 4, 5))
    targets = st.sampled_from([["0"], ["2"], ["0", "2"]])
    kind = st.tuples(targets, st.integers(1, 12), st.sampled_from([0.5, 1, 16]), st.booleans())
    adapters = [draw(kind) for _ in range(K)]
    rows = draw(st.lists(st.sampled_from([*range(K), None]), min_size=N, max_size=N))
    leading = draw(st.sampled_from([(), (3,), (2, 3)]))
    return n_in, n_out, adapters, rows, leading, draw(st.booleans()), draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(draws())
def test_each_row_is_the_equation_with_its_own_adapter(drawn):
    """y_i = f(x_i) with W + s_i B_i A_i in each layer that adapter i has, W in the others; exactly W for None."""
    n_in, n_out, kinds, rows, leading, conv1d, bias = drawn
    torch.manual_seed(0)
    first = Conv1D(n_out, n_in) if conv1d else nn.Linear(n_in, n_out, bias=bias)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(n_out, 4)).double()
    W = [(first.weight.t() if conv1d else first.weight).detach(), model[2].weight.detach()]
    b = [0 if first.bias is None else first.bias.detach(), model[2].bias.detach()]
    adapters = {k: adapter(model, t, r=r, alpha=a, rslora=rs) for k, (t, r, a, rs) in enumerate(kinds)}
    x = torch.randn(len(rows), *leading, n_in, dtype=torch.float64)
    plain = model(x)
    multi_lora.use_loras(multi_lora.add_loras(model, adapters), rows)
    y = model(x)
    for i, k in enumerate(rows):
        whole = list(W)
        if k is not None:
            targets, r, alpha, rslora = kinds[k]
            for n, name in enumerate(("0", "2")):
                if name in targets:
                    A, B = (adapters[k][1][f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
                    whole[n] = W[n] + alpha / (r**0.5 if rslora else r) * B @ A
        expected = (x[i] @ whole[0].t() + b[0]).tanh() @ whole[1].t() + b[1]
        # at most 9 · 12 products, with roundings of 1.1e-16 each, of numbers below 16 · 12 · 2 and 10
        assert (y[i] - expected).abs().max() <= 108 * 2**-53 * 16 * 12 * 2 * 10
        assert k is not None or torch.equal(y[i], plain[i])
    for k, pair in adapters.items():
        one = alone(lora.remove_lora(copy.deepcopy(model)), *pair)
        assert_close(multi_lora.use_loras(model, k)(x), one(x))
        for name, layer in lora.lora_layers(one).items():
            assert_close(lora.lora_layers(model)[name].weight, layer.weight)
    assert torch.equal(multi_lora.use_loras(model, None)(x), plain)


def test_the_base_product_is_computed_once():
    """A mixed batch costs the base's FLOPs once, and 2 r (in + out) a token for the largest rank r; None adds none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24))
    adapters = {k: adapter(model, r=r) for k, r in enumerate((1, 3, 5))}
    multi_lora.add_loras(model, adapters)
    base, more = 6 * 7 * 2 * 40 * 24, 6 * 7 * 2 * 5 * (40 + 24)
    for names, flops in (([0, 2, 1, 2, None, 0], base + more), (1, base + more), (None, base)):
        with FlopCounterMode(display=False) as counter:
            multi_lora.use_loras(model, names)(torch.randn(6, 7, 40))
        assert counter.get_total_flops() == flops


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("base", [hf_llama, pytest.param(hf_gpt2, marks=THOROUGH), pytest.param(hf_t5, marks=THOROUGH)])
def test_a_mixed_batch_and_a_switch_are_pefts(base, tmp_path):
    """The same files in peft, with adapter_names of each row, with set_adapter and without: equal logits in fp64."""
    torch.manual_seed(0)
    model = scaled_up(base())
    adapters = three(model, TARGETS[base])
    theirs = in_peft(model, adapters, tmp_path)
    ours = multi_lora.add_loras(model, adapters)
    more = {"decoder_input_ids": IDS[:, :5]} if base is hf_t5 else {}
    with torch.no_grad():
        for names in (["a", "b", "c"], ["c", None, "c"], ["b", "b", "a"]):
            found = multi_lora.use_loras(ours, names)(input_ids=IDS, **more).logits
            expected = theirs(input_ids=IDS, **more, adapter_names=[name or "__base__" for name in names]).logits
            assert_close(found, expected)
        results = []
        for name in adapters:
            theirs.set_adapter(name)
            results.append(multi_lora.use_loras(ours, name)(input_ids=IDS, **more).logits)
            assert_close(results[-1], theirs(input_ids=IDS, **more).logits)
        with theirs.disable_adapter():
            results.append(multi_lora.use_loras(ours, None)(input_ids=IDS, **more).logits)
            assert torch.equal(results[-1], theirs(input_ids=IDS, **more).logits)
    for k, one in enumerate(results):  # so that no adapter could pass for another, or for none
        assert all((one - other).abs().max() > 0.1 * one.abs().max() for other in results[:k])


@pytest.mark.parametrize("base", [own_gpt, hf_qwen_moe])
def test_a_mixed_batch_is_its_rows_apart(base):
    """In our GPT, and where layers get all rows' tokens in one dimension, each row has the logits that it has alone."""
    torch.manual_seed(0)
    model = scaled_up(base())
    adapters = three(model, TARGETS[base])
    apart = [alone(model, *pair)(input_ids=IDS[[i]]).logits for i, pair in enumerate(adapters.values())]
    found = multi_lora.use_loras(multi_lora.add_loras(model, adapters), ["a", "b", "c"])(input_ids=IDS).logits
    assert_close(found, torch.cat(apart))


@pytest.mark.parametrize("base", [own_gpt, hf_llama])
def test_generation_keeps_each_row_to_its_adapter(base):
    """generate() on left-padded prompts writes for each row what its adapter writes for this prompt alone."""
    torch.manual_seed(0)
    model = scaled_up(base())
    adapters = three(model, TARGETS[base])
    lengths, texts = (8, 5, 3, 6), []
    ids = torch.cat((IDS, IDS[:1]))
    mask = torch.stack([(torch.arange(8) >= 8 - n).long() for n in lengths])
    names = ["a", "b", None, "c"]
    for row, n, name in zip(ids, lengths, names, strict=True):
        one = alone(model, *adapters[name]) if name else model
        texts.append(one.generate(row[None, 8 - n :], attention_mask=torch.ones(1, n).long(), max_new_tokens=12)[0, n:])
    multi_lora.use_loras(multi_lora.add_loras(model, adapters), names)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=12)[:, 8:]
    assert [row.tolist() for row in found] == [text.tolist() for text in texts]
    assert len({tuple(row.tolist()) for row in found}) == 4


def test_beams_are_repeated_rows(tmp_path):
    """With each name repeated for its beams, beam search finds what peft's finds with adapter_names."""
    torch.manual_seed(0)
    model = scaled_up(hf_llama())
    adapters = three(model, TARGETS[hf_llama])
    options = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=8, num_beams=3)
    theirs = in_peft(model, adapters, tmp_path).generate(input_ids=IDS, adapter_names=["b", "a", "c"], **options)
    multi_lora.add_loras(model, adapters)
    ours = multi_lora.use_loras(model, [name for name in "bac" for _ in range(3)]).generate(IDS, **options)
    assert torch.equal(ours, theirs)
    with pytest.raises(multi_lora.Error, match="got .9, 8, 32. for 3 names: give one for each row"):
        multi_lora.use_loras(model, ["b", "a", "c"]).generate(IDS, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantized_base(dtype):
    """A quantized base in 16 or 32 bits serves a mixed batch as it serves its rows, within the type's rounding."""
    torch.manual_seed(0)
    model = hf_llama()
    scaled_up(model).to(dtype)
    lora.remove_lora(qlora.add_qlora(model, r=1))  # leaves the quantized layers
    adapters = three(model, TARGETS[hf_llama])
    multi_lora.add_loras(model, adapters)
    apart = [multi_lora.use_loras(model, name)(IDS[[i]]).logits for i, name in enumerate(adapters)]
    mixed = multi_lora.use_loras(model, [*adapters])(IDS).logits
    assert mixed.dtype == dtype
    # some 20 roundings in sequence of 2^-9 or 2^-24, which 2 layers may raise fourfold
    assert (mixed - torch.cat(apart)).abs().max() <= 80 * torch.finfo(dtype).eps / 2 * mixed.abs().max()


def test_a_layer_in_two_places_and_a_compiled_model():
    """What the model calls twice has one set of adapters, and torch.compile follows each change of names."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    adapters = {k: adapter(model, ["0"], r=2 + k) for k in range(2)}
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = {k: alone(model, *pair)(x) for k, pair in adapters.items()} | {None: model(x)}
    multi_lora.add_loras(model, adapters)
    assert model[0] is model[2]
    compiled = torch.compile(model, backend="eager")
    for names in ([0, 1], [1, None], [1, 1]):
        multi_lora.use_loras(model, names)
        assert_close(compiled(x), torch.stack([expected[name][i] for i, name in enumerate(names)]))
    for name in (1, None, 0):
        multi_lora.use_loras(model, name)
        assert_close(compiled(x), expected[name])


# ------------------------------------------------------------------------------------------------- adding and scaling


def deltas(model, config, state):
    """{layer: ΔW}, as a merge by lora.py changes the weight."""
    tuned = alone(model, config, state)
    return {name: layer.delta().detach() for name, layer in lora.lora_layers(tuned).items()}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(
    st.sampled_from([["0"], ["2"], ["0", "2"]]), st.integers(1, 6), st.booleans(),
    st.sampled_from([{}, {"0": 3}]), st.sampled_from([-2.0, -1.0, 0.0, 0.3, 1.0]),
), min_size=1, max_size=4))  # fmt: skip
def test_a_sum_of_adapters_is_one_adapter(kinds):
    """ΔW = Σ λ_k s_k B_k A_k in each layer, as one adapter of rank Σ r_k that add_lora and add_loras load."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    adapters, weights, expected = [], [], {}
    for targets, r, rslora, ranks, weight in kinds:
        ranks = ranks if "0" in targets else {}
        adapters.append(adapter(model, targets, r=r, rslora=rslora, ranks=ranks))
        weights.append(weight)
        for name in targets:
            A, B = (adapters[-1][1][f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
            s = 16 / (len(A) ** 0.5 if rslora else len(A))
            expected[name] = expected.get(name, 0) + weight * s * B @ A
    config, state = multi_lora.combine_loras(adapters, weights)
    total = {name: sum(r for t, r, *_ in kinds if name in t) for name in expected}
    if not any(ranks for *_, ranks, _ in kinds):
        assert config["r"] == max(total.values())
    found = deltas(model, config, state)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert (delta - expected[name]).abs().max() <= 24 * 2**-52 * 4 * 2 * 16 * 2  # 24 products of numbers below 2
    x = torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="shorter"):
        multi_lora.combine_loras(adapters, weights[1:])
    one, parts = alone(model, config, state)(x), [alone(model, *pair)(x) for pair in adapters]
    multi_lora.add_loras(model, dict(enumerate(adapters)))
    for k, part in enumerate(parts):
        assert_close(multi_lora.use_loras(model, k)(x), part)
    lora.remove_lora(model)
    assert_close(multi_lora.use_loras(multi_lora.add_loras(model, {"sum": (config, state)}), "sum")(x), one)


def test_cat_is_the_sum_and_linear_has_cross_terms(tmp_path):
    """peft's "cat" is combine_loras; "linear" adds √(λs) A and √(λs) B apart; the sum's file opens in peft."""
    torch.manual_seed(0)
    model = scaled_up(hf_llama())
    pairs = {"a": adapter(model, ["q_proj", "down_proj"], r=3, alpha=8), "b": adapter(model, ["q_proj"], r=3, alpha=2)}
    theirs = in_peft(model, pairs, tmp_path)
    weights = [0.5, 1.5]
    pairs["sum"] = multi_lora.combine_loras([*pairs.values()], weights)
    for kind in ("cat", "linear"):
        theirs.add_weighted_adapter(["a", "b"], weights, kind, kind)
    theirs.load_adapter(save(tmp_path / "sum", *pairs["sum"]), adapter_name="sum")
    found = deltas(model, *pairs["sum"])
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules()}
    layers = {name: layer for name, layer in layers.items() if hasattr(layer, "get_delta_weight")}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert_close(found[name], layer.get_delta_weight("sum").detach())
        # peft keeps λ in fp64 for "cat", and in fp32 for "linear"
        assert_close(found[name], layer.get_delta_weight("cat").detach())
        factors = [(layer.lora_A[k].weight, layer.lora_B[k].weight, w * layer.scaling[k])
                   for k, w in zip("ab", weights) if k in layer.lora_A]  # fmt: skip
        linear = sum((c * d) ** 0.5 * B @ A for _, B, c in factors for A, _, d in factors).detach()
        assert_close(layer.get_delta_weight("linear").detach(), linear, 1e-6)
        if len(factors) == 2:
            assert (linear - found[name]).abs().max() > 0.1 * found[name].abs().max()
    with torch.no_grad():
        theirs.set_adapter("sum")
        assert_close(alone(model, *pairs["sum"])(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_a_sum_in_bf16_is_scaled_in_fp32():
    """Factors in 16 bits are scaled in fp32, so that nothing is rounded twice; an embedding's are added too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    config, state = adapter(model, ["0", "1"], r=3, alpha=16)
    half = {key: t.bfloat16() for key, t in state.items()}
    found = deltas(model, *multi_lora.combine_loras([(config, half)] * 2, [0.1, 0.2]))
    expected = deltas(model, config, {key: t.float() for key, t in half.items()})
    assert found.keys() == expected.keys() == {"0", "1"}
    for name, delta in expected.items():  # some 10 roundings of fp32; bf16 would be off by 2^-9
        assert_close(found[name], 0.3 * delta, 10 * 2**-23)


# ------------------------------------------------------------------------------------------------------- use and misuse


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, {"a": adapter(model, ["1"]), "b": adapter(model, ["3"], r=2)}


def test_removed_or_disabled_the_base_is_bit_for_bit():
    """lora.remove_lora and lora.lora_disabled give the base's bits; afterwards the adapters are in use again."""
    model, adapters = small()
    ids = torch.tensor([[1, 2], [3, 4]])
    plain = model(ids)
    assert torch.equal(multi_lora.add_loras(model, adapters)(ids), plain)  # none is in use yet
    mixed = multi_lora.use_loras(model, ["a", "b"])(ids)
    assert not torch.equal(mixed[0], plain[0]) and not torch.equal(mixed[1], plain[1])
    with lora.lora_disabled(model):
        assert torch.equal(model(ids), plain)
    assert torch.equal(model(ids), mixed)
    bare = lora.remove_lora(model)
    assert torch.equal(bare(ids), plain) and type(bare[1]) is type(bare[3]) is nn.Linear
    assert not any(p.requires_grad for p in bare.parameters())


def test_what_needs_one_adapter_says_so():
    """Merging, saving, loading and adding LoRA to a model with several adapters is an Error, and changes nothing."""
    model, adapters = small()
    multi_lora.use_loras(multi_lora.add_loras(model, adapters), ["a", "b"])
    ids = torch.tensor([[1, 2], [3, 4]])
    before = model(ids)
    for call in (lora.merge_lora, lora.lora_state_dict, lambda m: lora.load_lora_state_dict(m, adapters["a"][1])):
        with pytest.raises(multi_lora.Error, match="^the model has several adapters, this needs one: lora.remove_lora"):
            call(model)
    for call in (lora.add_lora, lambda m: multi_lora.add_loras(m, adapters)):
        with pytest.raises(lora.Error, match="has LoRA already: remove_lora"):
            call(model)
    assert torch.equal(model(ids), before)


def test_a_model_with_lora_or_merged_is_refused():
    """Several adapters go on a bare base: one with LoRA, merged or not, is an Error."""
    model, adapters = small()
    for step in (lora.add_lora, lora.merge_lora):
        step(model)
        with pytest.raises(lora.Error, match="has LoRA already"):
            multi_lora.add_loras(model, adapters)
        with pytest.raises(multi_lora.Error, match="add_loras gives them"):
            multi_lora.use_loras(model, "a")


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"layers_to_transform": [0]}])
def test_adapters_of_other_kinds_are_refused(change):
    """One whose start changed the base, or that fits some layers alone, is an Error before anything is frozen."""
    model, adapters = small()
    config, state = adapters["a"]
    with pytest.raises(multi_lora.Error, match=next(iter(change))):
        multi_lora.add_loras(model.requires_grad_(True), adapters | {"c": (config | change, state)})
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("names", ["c", [], ["a", "c"], ("a", "b")])
def test_names_that_are_not_there(names):
    """A name that no adapter has is an Error that lists those there are; the names in use stay."""
    model, adapters = small()
    multi_lora.use_loras(multi_lora.add_loras(model, adapters), ["a", "b"])
    before = model(torch.tensor([[1, 2], [3, 4]]))
    with pytest.raises(multi_lora.Error, match=re.escape("must be one of ['a', 'b', None], or a list of these")):
        multi_lora.use_loras(model, names)
    assert torch.equal(model(torch.tensor([[1, 2], [3, 4]])), before)
    with pytest.raises(multi_lora.Error, match="add_loras gives them to the model"):
        multi_lora.use_loras(nn.Linear(2, 2), names)


def test_another_number_of_rows():
    """A batch with more or fewer rows than names is an Error; one adapter for all takes any batch, an empty one too."""
    model, adapters = small()
    multi_lora.use_loras(multi_lora.add_loras(model, adapters), ["a", "b"])
    for ids in (torch.ones(3, 2).long(), torch.ones(1, 2).long(), torch.ones(3).long(), torch.ones(4, 2).long()):
        with pytest.raises(multi_lora.Error, match="^1 got .* for 2 names: give one for each row"):
            model(ids)
    multi_lora.use_loras(model, "a")
    for shape in ((), (3,), (0,), (2, 2), (0, 5), (2, 2, 2)):
        assert model(torch.ones(shape).long()).shape == (*shape, 3)


def test_adapters_that_do_not_fit():
    """Another base's adapter, an embedding's, and peft's variants are Errors, and the model computes as before."""
    model, adapters = small()
    ids = torch.tensor([[1, 2], [3, 4]])
    plain, (config, state) = model(ids), adapters["a"]
    wide = adapter(nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5)), ["1"])
    cases = [
        (lora.Error, "no layer fits", (config | {"target_modules": ["q_proj"]}, state)),
        (lora.Error, "the adapter does not fit", (config, adapters["b"][1])),
        (lora.Error, "the model needs floats", wide),
        (lora.Error, "left over", (config, state | {"base_model.model.3.weight": torch.zeros(3, 4)})),
        (multi_lora.Error, "0 is an embedding", adapter(model, ["0", "1"])),
    ]
    for key, value in {
        "alpha_pattern": {"1": 3}, "use_dora": True, "bias": "all", "modules_to_save": ["3"], "lora_bias": True,
        "alora_invocation_tokens": [1],
    }.items():  # fmt: skip
        cases.append((multi_lora.Error, f"an adapter has {key} = ", (config | {key: value}, state)))
        with pytest.raises(multi_lora.Error, match=f"an adapter has {key} = "):
            multi_lora.combine_loras([(config | {key: value}, state)], [1])
    for error, message, pair in cases:
        with pytest.raises(error, match=message):
            multi_lora.add_loras(model, {"a": adapters["a"], "x": pair})
        assert torch.equal(model(ids), plain) and not lora.lora_layers(model)


def test_a_models_own_head_is_not_overwritten():
    """A model with a classifier of its own keeps it, whatever adapters come and go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    model.score = nn.Linear(4, 2)
    pair = adapter(model, ["0"], modules_to_save=())
    before = copy.deepcopy(model.score.state_dict())
    multi_lora.add_loras(model, {"a": pair})
    assert all(torch.equal(t, before[key]) for key, t in model.score.state_dict().items())


def test_a_model_that_multiplies_by_the_weight():
    """Mamba reads dt_proj's weight and never calls the layer: W + ΔW for one adapter, an error for several."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4)
    model = scaled_up(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)))
    pair, plain = adapter(model, ["dt_proj"]), model(IDS).logits
    expected = lora.merge_lora(alone(model, *pair))(IDS).logits
    multi_lora.use_loras(multi_lora.add_loras(model, {"a": pair}), "a")
    assert_close(model(IDS).logits, expected, 1e-6)  # Mamba rounds its logits to fp32
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(multi_lora.use_loras(model, None)(IDS).logits, plain)
    with pytest.raises(RuntimeError, match="size mismatch"):
        multi_lora.use_loras(model, ["a", None, "a"])(IDS)


# ---------------------------------------------------------------------------------------------------------- as one file


@pytest.fixture
def pasted(tmp_path, monkeypatch):
    """The two files in an empty folder, from where they are imported, with nanopeft out of reach."""
    for module in (lora, multi_lora):
        shutil.copy(module.__file__, tmp_path)
    monkeypatch.setitem(sys.modules, "nanopeft", None)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("lora", "multi_lora"):
        sys.modules.pop(name, None)


def test_demonstration(pasted, capsys):
    """The demonstration of the two files side by side shows rounding alone, and what is read."""
    runpy.run_path(str(pasted / "multi_lora.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert float(re.search(r"row by row: (\S+)", shown)[1]) < 1e-5
    assert "1,343,488 in W and 32 adapters, 33,554,432 in 32 merged weights" in shown


def test_the_two_files_work_side_by_side(pasted):
    """Pasted into an empty folder, the two files work with one another."""
    here = importlib.import_module("multi_lora")
    assert Path(here.__file__).parent == Path(here.lora.__file__).parent == pasted
    model = here.lora.add_lora(nn.Sequential(nn.Linear(8, 8)), r=2)
    pair = here.lora.lora_config(model), here.lora.lora_state_dict(model)
    here.use_loras(here.add_loras(here.lora.remove_lora(model), {"a": pair}), ["a", None])(torch.randn(2, 8))
