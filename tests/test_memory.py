# SPDX-License-Identifier: MIT
"""What nanopeft/memory.py claims, against live tensors, transformers, bitsandbytes and the papers' formulas."""

import inspect
import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nanopeft import adamw, adapter, gpt, lora, memory, prefix, prompt, ptuning, qlora, recompute, zero
from nanopeft.trainer import measure, process
from nanopeft.trainer.bases import find_checkpoint, read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ------------------------------------------------------------------------------------------------------ models to count


def build(sizes, method, precision, how):
    """(model, what is added to its loss): our GPT with the method on it, in the way of train.py."""
    torch.manual_seed(0)
    model, extra = gpt.GPT(**sizes).to(DTYPES[precision]), lambda: 0
    how = dict(how)
    if method in ("lora", "qlora"):
        how["r"] = how.pop("rank", 8)
        how |= {"quant_type": how.pop("quant")} if "quant" in how else {}
        (lora.add_lora if method == "lora" else qlora.add_qlora)(model, **how)
    elif method == "adapter":
        adapter.add_adapter(model, **how)
    elif method == "fusion":
        one = adapter.add_adapter(gpt.GPT(**sizes), placement="pfeiffer", bottleneck=how.get("bottleneck"))
        adapter.add_fusion(model, [(adapter.adapter_config(one), None)] * how.get("adapters", 2))
        extra = lambda: adapter.fusion_penalty(model)  # noqa: E731
    elif method == "prefix":
        model = prefix.PrefixTuning(model, how.get("tokens", 20), hidden=how.get("hidden"))
    elif method == "prompt":
        model = prompt.PromptTuning(model, how.get("tokens", 20))
    elif method == "ptuning":
        how["n_tokens"] = how.pop("tokens", 20)
        if how.pop("template", False):
            how["pseudo_id"] = sizes["vocab_size"]
        model = ptuning.PTuning(model, **how)
    return model, extra


def random_batch(sizes, batch, length, how):
    ids = torch.randint(sizes["vocab_size"], (batch, length))
    if how.get("template"):
        ids[:, : how.get("tokens", 20)] = sizes["vocab_size"]
    return ids


def count_step(sizes, method, precision, batch, length, how):
    """{what predict predicts: bytes counted in a step}, and the model's config."""
    model, extra = build(sizes, method, precision, how)
    optimizer = adamw.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = random_batch(sizes, batch, length, how)
    with measure.saved_bytes([*model.parameters(), *model.buffers()]) as saved:
        loss = model(ids, labels=ids).loss + extra()
    activations = saved()
    loss.backward()
    optimizer.step()
    return {**measure.measured_states(model, optimizer), "activations": activations}, vars(model.config)


def sums(parts):
    return {part: sum(size for _, _, size in items) for part, items in parts.items() if part != "peak"}


def assert_predicted(sizes, method, precision, batch, length, how):
    measured, config = count_step(sizes, method, precision, batch, length, how)
    short = gpt.plain_up_to(DTYPES[precision], torch.device("cpu"))
    assert sums(memory.predict(config, method, precision, batch, length, short=short, **how)) == measured


VARIANTS = [
    ("full", {}), ("lora", {}), ("lora", {"rank": 3, "targets": ["c_attn"]}), ("lora", {"targets": ["c_proj"]}),
    ("lora", {"rank": 1, "targets": ["mlp.c_fc", "attn.c_proj"]}), ("qlora", {}), ("qlora", {"quant": "int8"}),
    ("qlora", {"targets": ["mlp.c_proj"], "rank": 2}), ("adapter", {}), ("adapter", {"bottleneck": 5}),
    ("adapter", {"placement": "pfeiffer"}), ("fusion", {}), ("fusion", {"adapters": 1, "bottleneck": 3}),
    ("prefix", {}), ("prefix", {"tokens": 3, "hidden": 11}), ("prompt", {}), ("prompt", {"tokens": 1}), ("ptuning", {}),
    ("ptuning", {"tokens": 5, "template": True}), ("ptuning", {"encoder": "mlp", "hidden": 9, "tokens": 4}),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ predicted = measured


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("method, how", VARIANTS, ids=str)
def test_predicted_bytes_are_the_measured_ones(method, how, precision):
    """Parameters, gradients, optimizer states and saved activations are predicted to the byte, for every method."""
    sizes = dict(vocab_size=97, n_positions=64, n_embd=128, n_layer=2, n_head=4)
    assert_predicted(sizes, method, precision, 2, 20, how)


LINEARS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
few, small = st.integers(1, 4), st.integers(1, 9)
some = st.sets(st.sampled_from(LINEARS), min_size=1).map(sorted)
RANDOM = {  # the method's settings, drawn
    "full": st.just({}),
    "lora": st.fixed_dictionaries({"rank": small, "targets": some}),
    "qlora": st.fixed_dictionaries({"rank": small, "targets": some, "quant": st.sampled_from(["nf4", "int8"])}),
    "adapter": st.fixed_dictionaries({"bottleneck": small, "placement": st.sampled_from(["houlsby", "pfeiffer"])}),
    "fusion": st.fixed_dictionaries({"bottleneck": small, "adapters": few}),
    "prefix": st.fixed_dictionaries({"tokens": small, "hidden": st.none() | small}),
    "prompt": st.fixed_dictionaries({"tokens": small}),
    "ptuning": st.fixed_dictionaries({"tokens": small, "encoder": st.just("lstm"), "hidden": small, "layers": few})
    | st.fixed_dictionaries({"tokens": small, "encoder": st.just("mlp"), "template": st.booleans()}),
}


@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("method", memory.SETTINGS)
def test_predicted_bytes_over_random_shapes(method, examples):
    """The same over random sizes of model, batch and method."""

    @settings(deadline=None, max_examples=examples)
    @given(
        few, few, small, st.integers(9, 99), st.integers(1, 3), st.integers(2, 24), st.sampled_from([*DTYPES]),
        RANDOM[method],
    )  # fmt: skip
    def check(layers, heads, head_dim, vocabulary, batch, length, precision, how):
        length = max(length, how.get("tokens", 0))  # a template has its slots inside
        sizes = dict(n_layer=layers, n_head=heads, n_embd=heads * head_dim, vocab_size=vocabulary, n_positions=40)
        assert_predicted(sizes, method, precision, batch, length, how)

    check()


def measured_peak(sizes, method, precision, batch, length, how, accumulate=1, every=0):
    model, extra = build(sizes, method, precision, how)
    recompute.recompute(getattr(model, "model", model).transformer.h, every)
    optimizer = adamw.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = random_batch(sizes, batch, length, how)

    def step():
        for _ in range(accumulate):
            (model(ids, labels=ids).loss + extra()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    stored = [*model.parameters(), *model.buffers(), *(t for s in optimizer.state.values() for t in s.values())]
    with measure.peak_bytes(stored, torch.device("cpu")) as peak:
        step()
    return peak(), vars(model.config)


def assert_peak(sizes, method, precision, batch, length, how, accumulate=1, every=0):
    measured, config = measured_peak(sizes, method, precision, batch, length, how, accumulate, every)
    how = {"short": gpt.plain_up_to(DTYPES[precision], torch.device("cpu")), **how}
    predicted = memory.total(memory.predict(config, method, precision, batch, length, accumulate, every, **how)["peak"])
    assert abs(predicted / measured - 1) <= 0.03  # left out are masks, casts of small tensors, indices


def skip_if_slow(precision):
    if precision == "bf16" and process.slower_than_fp32(torch.bfloat16):
        pytest.skip("a CPU without bf16 instructions would take half an hour for all of these")


NANO = dict(vocab_size=3072, n_positions=512, n_embd=256, n_layer=6, n_head=4)
GPT2 = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)


@pytest.mark.parametrize(
    "method, precision, batch, length, accumulate, moment",
    [
        ("lora", "fp32", 8, 128, 1, "in the loss"), ("full", "fp32", 4, 128, 2, "in the loss"),
        ("full", "fp32", 1, 8, 1, "after backward"), ("full", "bf16", 1, 8, 2, ""),
        pytest.param("full", "bf16", 16, 128, 1, "in backward", marks=pytest.mark.thorough),
        pytest.param("lora", "fp32", 16, 128, 1, "in backward", marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_peak_of_a_step(method, precision, batch, length, accumulate, moment):
    """The peak of a step of the base is predicted to 3 %, whichever moment is the fullest.

    Two micro-batches: gradients of the first are there in the loss of the second, and must not count twice after it.
    """
    found = memory.predict(memory.MODELS["nano"], method, precision, batch, length, accumulate)["peak"]
    assert all(what.startswith(moment) for what, _, _ in found)
    assert_peak(NANO, method, precision, batch, length, {}, accumulate)


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method, how", VARIANTS, ids=str)
def test_peak_of_every_method(method, how, precision):
    """The peak of a step of the base is predicted to 3 % for every method."""
    skip_if_slow(precision)
    assert_peak(NANO, method, precision, 16, 128, how)


@pytest.mark.parametrize(
    "method, how",
    [("lora", {}), *(pytest.param(*v, marks=pytest.mark.thorough) for v in VARIANTS if v[0] in ("full", "prefix"))],
    ids=str,
)
@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.thorough), 4])
def test_peak_with_recomputation(method, how, every):
    """The peak is predicted to 3 % where every k-th block is recomputed, and falls with the number of these."""
    assert_peak(NANO, method, "fp32", 16, 128, how, every=every)
    run = memory.MODELS["nano"], method, "fp32", 16, 128, 1
    peaks = [memory.total(memory.predict(*run, k)["peak"]) for k in (0, 4, 2, 1)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.6 * peaks[0]


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prompt"])
def test_peak_of_gpt2(method, precision):
    """The peak is predicted to 3 % where the model is larger than its activations: GPT-2 on one row of 128."""
    skip_if_slow(precision)
    assert_peak(GPT2, method, precision, 1, 128, {})


# ----------------------------------------------------------------------------------------------- the docstring's claims


def gb(items, digits=2):
    return f"{memory.total(items) / 1e9:.{digits}f}"


def states(name, gpus=1):
    """{how: {part: GB}} of training."""
    found = memory.training(memory.find_sizes(name), gpus)
    return {how: {part: size / 1e9 for part, _, size in parts} for how, parts in found.items()}


def step_of_6b(monkeypatch, batch):
    """LoRA with r = 8 on all linear layers of gpt-6b, rows of 512 tokens, bf16, one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return memory.predict(memory.MODELS["gpt-6b"], "lora", "bf16", batch, 512)


def test_every_figure_of_the_docstring(monkeypatch):
    """Each number with decimals in the docstring is what a formula gives, rounded to the digits shown."""
    step, sizes = step_of_6b(monkeypatch, 1), {name: memory.find_sizes(name) for name in memory.MODELS}
    model, activations = 2 * sizes["gpt-6b"].Ψ, 16 * 28 * 512 * 4096 * 2
    trained = memory.total(step["gradients"]) / 4
    table = {how: (sum(parts.values()), sum(states("7B", 8)[how].values())) for how, parts in states("6B", 8).items()}
    full = memory.total(memory.predict(memory.MODELS["gpt2"], "full", "bf16", 4, 256)["activations"])
    rest = memory.total(step["peak"]) - model - 12 * trained - activations
    llama = sizes["llama-7b"]
    d = (128 * 6e9 / 12) ** (1 / 3)  # if Ψ = 12·L·d² and d = 128·L
    small = full - 12 * 16 * 1024 * 768 * 2 - 4 * 50257 * 768
    figures = [
        12e9 / 2**30, (small / 1e9, 3), (12 * 16 * 1024 * 768 * 2 / 1e9, 3), (2 * sizes["gpt2"].Ψ / 1e9, 3),
        (1024 * 50257 * 4 / 1e9, 3), (full / 1e9, 3), (4 * 50257 * 768 / 1e9, 3),
        8 + 4 * 11008 / 4096, 6 + 3 * 11008 / 4096,
        d / 128, (16 * d / 128 * d * 8 / 1e6, 1),
        *(x for how in list(table)[:5] for x in table[how]), *(table[f"ZeRO {stage}"][1] for stage in (1, 2, 3)),
        (eval(memory.NF4), 3), (eval(memory.NF4) * 8, 3),
        2 + 2 * 4 / 256, sizes["gpt-6b"].Ψ / 1e9, (trained / 1e6, 1), (model / 1e9, 3), (12 * trained / 1e9, 3),
        (activations / 1e9, 3), (rest / 1e9, 3),
        (memory.total(step["peak"]) / 1e9, 3), (memory.total(step_of_6b(monkeypatch, 4)["peak"]) / 1e9, 3),
        (memory.total(step["gradients"]) / 1e9, 3), (2 * 32 * 4096 * 2048 * 2 / 1e9, 3), (2 * llama.Ψ / 1e9, 3),
    ]
    figures = {f"{x[0]:.{x[1]}f}" if isinstance(x, tuple) else f"{x:.2f}" for x in figures}
    text = re.sub(r"\d{4}\.\d{5}", "", memory.__doc__)  # arXiv's numbers
    assert set(re.findall(r"\d+\.\d+", text)) == figures
    # The column of LoRA on 6B adds up as it is printed
    column = [float(x) for x in re.findall(r" (\d+\.\d{3}) GB$", text, re.M)][-5:]
    assert round(sum(column[:4]), 3) == column[4]


def block_bytes(method):
    """What one more block keeps, measured, in units of n·d elements, without the statistics of norms and attention."""
    B, T, d, H, e = 2, 48, 64, 4, 4
    kept = []
    for layers in (2, 3):
        sizes = dict(vocab_size=61, n_positions=64, n_embd=d, n_layer=layers, n_head=H)
        how = {"rank": 1} if method == "lora" else {"tokens": 16} if method == "prompt" else {}
        tokens = T - how.get("tokens", 0)
        kept.append(count_step(sizes, method, "fp32", B, tokens, how)[0]["activations"])
    n = B * T
    statistics = 2 * 2 * n * e + 4 * n * H + (4 * n * e if method == "lora" else 0)  # and x Aᵀ of four layers
    return (kept[1] - kept[0] - statistics) / (n * d * e)


def test_the_table_of_a_block():
    """The docstring's columns of one block add up, and are what a block of our GPT keeps for full, LoRA and prompt."""
    lines = memory.__doc__[memory.__doc__.index("kept for backward") :].splitlines()
    rows = [[int(x) for x in re.findall(r" (\d+)\b(?=\s|$)", line)[-3:]] for line in lines[1:9]]
    sums = [int(x) for x in re.findall(r"\d+", lines[9])]
    assert [sum(column) for column in zip(*rows)] == sums == [16, 16, 10]
    assert [block_bytes(method) for method in ("full", "lora", "prompt")] == sums


class UnfusedBlock(torch.nn.Module):
    """A block as in arXiv 2205.05198: attention by matrix products and softmax, with dropout in three places."""

    def __init__(self, d, H):
        super().__init__()
        self.H, self.ln_1, self.ln_2 = H, torch.nn.LayerNorm(d), torch.nn.LayerNorm(d)
        self.qkv, self.proj = torch.nn.Linear(d, 3 * d), torch.nn.Linear(d, d)
        self.fc, self.out = torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)

    def forward(self, x, mask):
        B, T, d = x.shape
        q, k, v = (t.view(B, T, self.H, -1).transpose(1, 2) for t in self.qkv(self.ln_1(x)).split(d, -1))
        p = (q @ k.transpose(-1, -2) * (d // self.H) ** -0.5).masked_fill(mask, -math.inf).softmax(-1)
        dropout = lambda t: torch.native_dropout(t, 0.1, True)[0]  # noqa: E731  (its mask has a byte for an element)
        x = x + dropout(self.proj((dropout(p) @ v).transpose(1, 2).reshape(B, T, d)))
        return x + dropout(self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh")))


@pytest.mark.parametrize("B, T, d, H", [(2, 64, 64, 4), (3, 128, 32, 8)])
def test_the_term_of_unfused_attention(B, T, d, H):
    """Unfused attention keeps n·d·(34 + 5·H·T/d) bytes in 16 bits, statistics of norms aside; fused has no T²."""
    block, mask = UnfusedBlock(d, H).bfloat16(), torch.ones(T, T, dtype=torch.bool).triu(1)
    x = torch.randn(B, T, d, dtype=torch.bfloat16, requires_grad=True)
    with measure.saved_bytes([mask, *block.parameters()]) as saved:
        y = block(x, mask)
    assert saved() == B * T * d * (34 + 5 * H * T / d) + 2 * B * T * (2 + 2)  # mean and deviation of two norms
    assert y.shape == x.shape and 5 * 12 * 1024 / 768 == 80
    once, twice = (memory.predict(memory.MODELS["gpt2"], "full", "bf16", 1, T)["activations"] for T in (256, 512))
    assert all(doubled < 2.1 * size for (_, _, size), (_, _, doubled) in zip(once, twice))


@pytest.mark.parametrize("trained", [True, False])
def test_what_a_llama_block_keeps(trained):
    """A Llama block keeps n·d·e·(6 + 2·w/d + 4·f/d), frozen (4 + 2·w/d + 3·f/d): norms fused."""
    B, T, d, w, f, H = 2, 48, 64, 32, 160, 4
    n, sizes = B * T, dict(hidden_size=d, num_attention_heads=H, num_key_value_heads=w * H // d, intermediate_size=f)
    linear = lambda i, o: torch.randn(o, i, requires_grad=trained)  # noqa: E731
    q, k, v, o = linear(d, d), linear(d, w), linear(d, w), linear(d, d)
    gate, up, down = linear(d, f), linear(d, f), linear(f, d)
    heads = lambda t: t.view(B, T, -1, d // H).transpose(1, 2)  # noqa: E731
    x = torch.randn(B, T, d, requires_grad=True)
    with measure.saved_bytes([q, k, v, o, gate, up, down]) as saved:
        a = F.layer_norm(x, (d,))
        y = F.scaled_dot_product_attention(*(heads(a @ W.T) for W in (q, k, v)), is_causal=True, enable_gqa=True)
        y = x + y.transpose(1, 2).reshape(B, T, d) @ o.T
        b = F.layer_norm(y, (d,))
        y = y + (F.silu(b @ gate.T) * (b @ up.T)) @ down.T
    kept = n * d * 4 * ((6 + 2 * w / d + 4 * f / d) if trained else (4 + 2 * w / d + 3 * f / d))
    assert saved() == kept + 2 * n * 2 * 4 + 4 * n * H  # mean and deviation of two norms, log-sums of attention
    config = dict(model_type="llama", vocab_size=61, max_position_embeddings=64, **sizes)
    run = ("full", "fp32", B, T) if trained else ("prompt", "fp32", B, T - 1)  # and one virtual token
    how = {} if trained else {"tokens": 1}
    once, twice = (
        memory.total(memory.predict(config | {"num_hidden_layers": L}, *run, **how)["activations"]) for L in (2, 3)
    )
    assert twice - once == kept + n * (2 * 4 + 4 * H)  # RMSNorm has no mean


def checkpointed(model, x):
    for block in model.transformer.h:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def plain(model, x):
    for block in model.transformer.h:
        x = block(x)
    return x


@pytest.mark.parametrize("method, price", [("full", 1 / 3), ("lora", 1 / 2)])
def test_gradient_checkpointing(method, price):
    """Checkpointing keeps n·d numbers a block, and costs a third of a full step's products, half of one of LoRA."""
    B, T, d, L = 2, 32, 128, 3
    model, _ = build(dict(vocab_size=61, n_positions=64, n_embd=d, n_layer=L, n_head=4), method, "fp32", {})
    flops = []
    for forward in (plain, checkpointed):
        x = torch.randn(B, T, d, requires_grad=True)
        with FlopCounterMode(display=False) as counter, measure.saved_bytes([*model.parameters()]) as saved:
            y = forward(model, x)
            kept = saved()
            y.sum().backward()
        flops.append(counter.get_total_flops())
    assert kept == L * B * T * d * 4
    assert flops[1] / flops[0] == pytest.approx(1 + price, rel=0.03)


def test_what_other_optimizers_keep():
    """SGD keeps nothing and with momentum 4 bytes for a parameter."""
    model = torch.nn.Linear(64, 64, bias=False)
    for momentum, kept in ((0, 0), (0.9, 4 * 64 * 64)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        assert measure.measured_states(model, optimizer)["optimizer"] == kept


@pytest.mark.thorough
def test_8_bit_adam_keeps_2_03_bytes():
    """The states of bitsandbytes' 8-bit AdamW are 2.03 bytes for a parameter, its two code tables aside."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = torch.nn.Linear(512, 512, bias=False)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    model(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    kept = [t for name, t in optimizer.state[model.weight].items() if torch.is_tensor(t) and "qmap" not in name]
    assert sum(t.nbytes for t in kept) / 512**2 == 2 + 2 * 4 / 256


def test_cache_of_keys_and_values():
    """transformers' cache of a Llama with grouped heads is as large as the formula says."""
    import transformers

    sizes = dict(num_hidden_layers=3, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    config = transformers.LlamaConfig(**sizes, intermediate_size=96, vocab_size=61, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    cache = model(torch.ones(2, 10, dtype=torch.int64), use_cache=True).past_key_values
    run = memory.run_of(memory.sizes_of(config.to_dict()), "full", "bf16", 2, 10)
    expected = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert memory.evaluate(memory.ON_TOP, run)[0][2] == expected == 2 * 3 * (2 * 8) * 10 * 2 * 2


# ------------------------------------------------------------------------------------------------ the article's figures


def test_inference_of_6b():
    """6B parameters take 24 GB in fp32, 12 in 16 bits, 6 in int8, and 4.127 bits each in NF4."""
    found = {what: size / 1e9 for what, _, size in memory.evaluate(memory.INFERENCE, memory.find_sizes("6B"))}
    assert list(found)[:3] == ["fp32", "fp16, bf16", "int8"] and list(found.values())[:3] == [24, 12, 6]
    assert found["NF4"] * 8 / 6 == pytest.approx(4.126953, abs=1e-6)


def test_zero_of_7b_on_8_devices():
    """7B on 8 devices: 112, 38.5, 26.25 and 14 GB in ZeRO's stages; what offload moves is no longer there."""
    found = states("7B", 8)
    kept = {how: sum(parts.values()) - parts.get("offloaded", 0) for how, parts in found.items()}
    assert [kept[f"ZeRO {stage}"] for stage in range(4)] == [112, 38.5, 26.25, 14]
    for stage in range(4):
        moved = found[f"ZeRO {stage} + offload"]["offloaded"]
        assert moved == (84 if stage == 0 else 10.5)
        assert kept[f"ZeRO {stage} + offload"] == kept[f"ZeRO {stage}"] - moved


@pytest.mark.parametrize("gpus", [1, 3, 7, 8])
def test_formulas_of_zero_are_zeros_own(gpus):
    """What ZeRO's stages keep is what zero.py's own formula says, up to the padding of a shard."""
    sizes = memory.find_sizes("gpt2")
    found = memory.training(sizes, gpus)
    for stage in range(4):
        for name, offload in (("", None), (" + offload", "cpu")):
            own = zero.zero_bytes(sizes.Ψ, gpus, stage, offload=offload)
            for part, _, size in found[f"ZeRO {stage}{name}"]:
                assert 0 <= own[part] - size <= 12


def test_three_readings_of_6b_times_4():
    """Training 6B: four copies take 96 GB in fp32 and 48 in 16 bits; mixed precision 96, eight times the model."""
    found = states("6B")
    assert found["all in fp32"] == {"parameters": 24, "gradients": 24, "optimizer": 48}
    assert sum(found["all in 16 bits"].values()) == 48
    assert found["mixed precision"] == {"parameters": 12, "gradients": 12, "optimizer": 72}
    assert sum(found["mixed precision"].values()) == 8 * 12


def test_lora_of_6b_takes_about_14_gb(monkeypatch):
    """LoRA on 6B in bf16 at one row of 512 tokens: 14 GB, of which activations are the most beside the model."""
    step = step_of_6b(monkeypatch, 1)
    assert memory.find_sizes("gpt-6b").Ψ == pytest.approx(6e9, rel=0.03)
    adapters = 28 * 8 * 16 * 4096  # r (in + out) is r · 16 d for the four linear layers
    states = memory.total(step["parameters"] + step["gradients"] + step["optimizer"])
    assert states == 2 * 5_853_470_720 + (4 + 4 + 8) * adapters
    assert memory.total(step["activations"]) == pytest.approx(28 * 512 * 16 * 4096 * 2, rel=0.03)
    assert gb(step["peak"], 0) == "14"


def test_lora_by_size_alone_is_near_the_exact_shape():
    """The share of LoRA that a bare number of parameters is given is within a fifth of Llama-7B's own."""
    exact, guessed = states("llama-7b"), states("6.738B")
    assert guessed["LoRA, r = 8"]["gradients"] == pytest.approx(exact["LoRA, r = 8"]["gradients"], rel=0.2)


# ------------------------------------------------------------------------------------------------------------- counting


def hugging_face_size(name):
    import transformers

    kinds = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig}
    config = kinds[memory.MODELS[name]["model_type"]](**memory.MODELS[name])
    with torch.device("meta"):
        return sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters()), config


SOME = ("gpt2", "llama-7b")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.thorough) for name in memory.MODELS]
)
def test_parameters_are_transformers_own(name, tmp_path):
    """Each model of the table has as many parameters as transformers gives it, and so has its config.json."""
    expected, config = hugging_face_size(name)
    config.save_pretrained(tmp_path)
    for sizes in (memory.find_sizes(name), memory.find_sizes(tmp_path), memory.find_sizes(tmp_path / "config.json")):
        assert sizes.Ψ == expected
    known = {"gpt2": 124_439_808, "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-70b": 68_976_648_192}
    assert known.get(name, expected) == expected


@pytest.mark.parametrize(
    "method, how, expected",
    [
        ("full", {}, 124_439_808), ("lora", {"targets": ["c_attn"]}, 294_912), ("fusion", {}, 21_252_096),
        ("adapter", {}, 1_789_056), ("adapter", {"placement": "pfeiffer"}, 894_528), ("prefix", {}, 368_640),
        ("prefix", {"hidden": 512}, 9_864_704), ("prompt", {}, 15_360), ("ptuning", {"tokens": 6}, 8_275_968),
        ("ptuning", {"encoder": "mlp"}, 1_787_136),
    ],
)  # fmt: skip
def test_trained_parameters_of_gpt2(method, how, expected):
    """What each method trains of GPT-2 is what the papers' code and peft train."""
    step = memory.predict(memory.MODELS["gpt2"], method, "fp32", 2, 8, **how)
    assert sum(size for _, _, size in step["gradients"]) == 4 * expected


def test_defaults_are_those_of_the_techniques():
    """What is not given is what the techniques' own files take."""
    for function, method, names in (
        (lora.add_lora, "lora", {"r": "rank"}), (qlora.add_qlora, "qlora", {"quant_type": "quant"}),
        (adapter.add_adapter, "adapter", {"placement": "placement", "bottleneck": "bottleneck"}),
        (prefix.PrefixTuning, "prefix", {"n_tokens": "tokens", "hidden": "hidden"}),
        (prompt.PromptTuning, "prompt", {"n_tokens": "tokens"}),
        (ptuning.PTuning, "ptuning", {"encoder": "encoder", "hidden": "hidden", "layers": "layers"}),
    ):  # fmt: skip
        given = inspect.signature(function).parameters
        assert {ours: given[name].default for name, ours in names.items()}.items() <= memory.SETTINGS[method].items()


def test_the_constant_is_gpts_own():
    """The logits that go through the softmax at once are those of gpt.py."""
    assert memory.LOSS_CHUNK == gpt.CHUNK and memory.LOGITS == gpt.LOGITS


def test_the_base_is_in_the_table():
    """ "nano" of the table is the embedded base."""
    config = read_config(find_checkpoint("nano") / "config.json")
    sizes = memory.MODELS["nano"].items() - {("model_type", "gpt2")}
    assert sizes <= config.items()


# ------------------------------------------------------------------------------------------------------------ measuring


def test_a_piece_of_memory_counts_once():
    """Views and tied weights count once, with all that they keep alive; what is no tensor does not count."""
    x, y = torch.zeros(10), torch.zeros(3, dtype=torch.bfloat16)
    assert sum(measure.storages([x, x[2:4], y, x.detach(), None, torch.zeros(0), 1]).values()) == 46


def test_saved_tensors_are_counted_while_they_are_alive():
    """Counted is what autograd still holds, not what it has held, and nothing that is stored anyway."""
    W, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(8, 4)
    with measure.saved_bytes([W]) as saved:
        y = (x @ W).exp()  # x for dW, the result of exp
        (x @ W).exp().sum().backward()
    assert saved() == 2 * 8 * 4 * 4
    del y
    assert saved() == 0


def test_peak_counts_what_was_there_and_what_came_and_went():
    """The peak is what was stored before and the most that was alive at once inside."""
    before = torch.zeros(1000)
    with measure.peak_bytes([before], torch.device("cpu")) as peak:
        x = torch.empty(5000)
        del x
        y = torch.empty(3000)
        z = torch.empty(1500)
        del y
        w = torch.empty(2000)
    assert peak() == 4 * 6000
    del z, w


# --------------------------------------------------------------------------------------------------------- command line


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    memory.main()
    return capsys.readouterr().out


def test_command_line_of_the_article(capsys, monkeypatch):
    """The tables show the article's figures, and --json the same in bytes."""
    shown = run(capsys, monkeypatch, "6B")
    assert all(figure in shown for figure in ("24.000 GB", "12.000 GB", "6.000 GB", "3.095 GB"))
    shown = run(capsys, monkeypatch, "7B", "--gpus", "8")
    assert all(f" {figure} " in shown for figure in ("112.00", "38.50", "26.25", "14.00"))
    found = json.loads(run(capsys, monkeypatch, "7B", "--gpus", "8", "--stage", "2", "--json"))
    assert list(found)[-2:] == ["ZeRO 2", "ZeRO 2 + offload"]
    assert [item["bytes"] for item in found["ZeRO 2"]] == [14e9, 14e9 / 8, 84e9 / 8]


@pytest.mark.parametrize("method", memory.SETTINGS)
def test_command_line_of_a_step(method, capsys, monkeypatch):
    """A step's table and its JSON hold what predict says, for every method."""
    arguments = ("gpt2", "--method", method, "--batch", "4", "--length", "256", "--precision", "fp32")
    step = memory.predict(memory.MODELS["gpt2"], method, "fp32", 4, 256)
    shown, found = run(capsys, monkeypatch, *arguments), json.loads(run(capsys, monkeypatch, *arguments, "--json"))
    for part, items in step.items():
        assert [(item["what"], item["formula"], item["bytes"]) for item in found[part]] == items
        assert all(f"{size:,}" in shown for _, _, size in items)
    tokens = 256 + (20 if method in ("prompt", "ptuning") else 0)
    assert [item["bytes"] for item in found["beside it"]] == [2 * 12 * 768 * 4 * tokens * 4, 4 * tokens * 50257 * 4]


@pytest.mark.parametrize("method", memory.SETTINGS)
def test_a_step_of_the_base_by_default(method, capsys, monkeypatch):
    """Without further flags a step fits the base's 512 positions, with every method."""
    found = json.loads(run(capsys, monkeypatch, "nano", "--method", method, "--json"))
    step = memory.predict(memory.MODELS["nano"], method, "bf16", 1, 256)
    for part, items in step.items():
        assert [(item["what"], item["formula"], item["bytes"]) for item in found[part]] == items


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("7X", "7X"), ("-6B", "6B"), ("0B", "0B"), ("9999999T", "9999999T"), ("1e9", "1e9"), ("6", "6"), ("", "''"),
        ("nanB", "nanB"), ("gpt5", "gpt5"), ("pyproject.toml", "config.json"), ("6B --batch 1", "batch"),
        ("a" * 300, "aaa"), ("7B --gpus 8 --precision bf16", "precision"), ("gpt2 --length x", "length"),
        ("7B --gpus 0", "gpus"), ("7B --gpus -1", "gpus"), ("7B --gpus x", "gpus"), ("7B --gpus 8 --stage 4", "stage"),
        ("7B --stage 2", "stage"), ("7B --method lora", "7B"), ("gpt2 --rank 3", "rank"),
        ("gpt2 --gpus 8 --method lora", "method"), ("gpt2 --method lora --stage 2", "stage"),
        ("gpt2 --method lara", "lara"), ("gpt2 --method lora --rank 0", "rank"), ("gpt2 --precision fp8", "fp8"),
        ("gpt2 --method lora --tokens 3", "tokens"), ("gpt2 --method prefix --tokens 0", "tokens"),
        ("gpt2 --method lora --batch 0", "batch"), ("gpt2 --method lora --length 9999999999", "length"),
        ("gpt2 --method lora --length 1025", "1024"), ("gpt2 --method prompt --length 1020", "1024"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(arguments, message, capsys, monkeypatch):
    """A size, name or number that cannot be: one line that names it, and exit code 2."""
    with pytest.raises(memory.Error) as error:
        run(capsys, monkeypatch, *(arguments.split(" ")))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_use_on_the_command_line():
    """From the shell that line is on stderr, after the program's name, and the exit code is 2."""
    done = subprocess.run([sys.executable, "-m", "nanopeft.memory", "7X"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("memory.py: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "config",
    [[], {}, {"model_type": "bert"}, {"model_type": "gpt2", "n_layer": 0}, {"model_type": "gpt2", "n_embd": "x"},
     {"model_type": "gpt2", "n_head": 7}, {"model_type": "llama", "hidden_size": 1 << 30},
     {"model_type": "llama", "attention_bias": True}, {"model_type": "llama", "head_dim": 64},
     {"model_type": "gpt2", "tie_word_embeddings": False}],
)  # fmt: skip
def test_a_config_that_cannot_be_counted_is_refused(config, tmp_path):
    """A config.json of another model, or with sizes that cannot be, is refused, not counted."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(memory.Error, match="config.json"):
        memory.find_sizes(tmp_path)
