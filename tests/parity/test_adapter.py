# SPDX-License-Identifier: MIT
"""nanopeft/adapter.py on transformers' models, and beside peft, which has neither adapters nor fusion."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file

from nanopeft import adapter, gpt
from nanopeft.trainer import peft_config
from nanopeft.trainer.bases import save_gpt

# --------------------------------------------------------------------------------------------------------- small models

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=63, pad_token_id=0,
)  # fmt: skip
MORE = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16, dropout=0),  # its embeddings are narrower than its blocks
    "qwen2": dict(num_key_value_heads=2),
    "mistral": dict(num_key_value_heads=2, sliding_window=4),
    "mixtral": dict(num_key_value_heads=2, num_local_experts=2),
    "gemma3_text": dict(num_key_value_heads=2, head_dim=8),
    "bloom": dict(n_layer=2, n_head=4),
}
# where the two sublayers of a block end
ENDS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3_text": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
}
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 62, 7], [1, 1, 62, 17, 9, 30, 2, 8]])


def tiny(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **MORE.get(kind, {})})
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def randomize(model, std=0.3):
    for layer in adapter.adapter_layers(model).values():
        for p in layer.adapter.parameters():
            nn.init.normal_(p, std=std)
    return model


def saved(model, seed, **options):
    """(config, state) of a random pfeiffer adapter for this bare model, which stays as it is."""
    other = adapter.add_adapter(copy.deepcopy(model), placement="pfeiffer", **options)
    torch.manual_seed(seed)
    randomize(other)
    return adapter.adapter_config(other), adapter.adapter_state_dict(other)


def add(case, model, kind):
    if case == "houlsby":
        return randomize(adapter.add_adapter(model, ENDS[kind], bottleneck=4))
    if case == "pfeiffer":
        return randomize(adapter.add_adapter(model, placement="pfeiffer", bottleneck=4))
    return randomize(adapter.add_fusion(model, [saved(model, 1, bottleneck=3), saved(model, 2)]), std=0.2)


def assert_noticeable(model):
    """The update is at least a tenth of the output, so that an output without it could not pass for one with it."""
    with torch.no_grad(), adapter.adapter_disabled(model):
        base = model(IDS).logits
    with torch.no_grad():
        assert (model(IDS).logits - base).abs().max() >= 0.1 * base.abs().max()


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CASES = [(case, kind) for kind in ENDS for case in ("houlsby", "pfeiffer", "fusion")]
CASES += [(case, "mixtral") for case in ("pfeiffer", "fusion")]


def telling(cases, *shown):
    """The cases, all of them thorough but those shown."""
    return [pytest.param(*one, marks=[] if one in shown else pytest.mark.thorough) for one in cases]


# ------------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    "case, kind",
    telling(CASES, ("houlsby", "llama"), ("pfeiffer", "gpt_neox"), ("pfeiffer", "mixtral"), ("fusion", "opt")),
)
def test_training_and_generation_on_each_architecture(case, kind):
    """In fp32 the base is exact at the start and after training; cached greedy generation is that without a cache."""
    base = tiny(kind).requires_grad_(False)
    start = {name: t.clone() for name, t in base.state_dict().items()}
    fresh = adapter.add_adapter(copy.deepcopy(base), placement="pfeiffer", bottleneck=4)
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, base(IDS).logits)
    model = add(case, copy.deepcopy(base), kind)
    assert len(adapter.adapter_layers(model)) == (4 if case == "houlsby" else 2)
    assert_noticeable(model)
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(IDS))
    cached = model.generate(IDS, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    if not cached.eq(63).any():  # transformers fills a row that has ended with padding, gpt.generate with the end
        assert torch.equal(cached, gpt.generate(model, IDS, 8))

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    after = adapter.remove_adapter(model).state_dict()
    assert after.keys() == start.keys() and all(torch.equal(t, start[name]) for name, t in after.items())


@pytest.mark.parametrize(
    "case, kind",
    telling([one for one in CASES if one[1] not in ("gemma3_text", "bloom", "mixtral")], ("fusion", "llama")),
)
def test_16_bits_on_each_architecture(case, kind):
    """Beside a bf16 base all that is trained is fp32, the logits stay bf16 and near fp32's, and text is generated."""
    model, exact = add(case, tiny(kind, torch.bfloat16), kind), tiny(kind)
    exact.load_state_dict(tiny(kind, torch.bfloat16).state_dict())
    add(case, exact, kind)
    for one in (model, exact):
        torch.manual_seed(3)
        randomize(one, std=0.2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found, expected = model(IDS).logits, exact(IDS).logits
    assert found.dtype == torch.bfloat16
    # some 60 roundings of 2⁻⁹ one after another, which partly cancel: 15 of them, relative to the largest value
    assert (found - expected).abs().max() <= 15 * 2**-9 * expected.abs().max()
    assert gpt.generate(model, IDS, 4).shape == (2, 12)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def z_by_hand(state, name, f, h):
    """Up f(Down h) from the tensors of a file."""
    low = f(h @ state[f"{name}.down.weight"].T + state[f"{name}.down.bias"])
    return low @ state[f"{name}.up.weight"].T + state[f"{name}.up.bias"]


def relu(x):
    return x.clamp(min=0)


def silu(x):
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("case", ["houlsby", "pfeiffer", "fusion"])
def test_a_llama_computes_the_equation(case):
    """In fp64, on transformers' Llama, the logits are those of the residual stream written out, to 1e-12."""
    base = tiny("llama", torch.float64)
    model = add(case, copy.deepcopy(base), "llama")
    assert_noticeable(model)
    state = adapter.fusion_state_dict(model) if case == "fusion" else adapter.adapter_state_dict(model)
    x = base.model.embed_tokens(IDS)
    rotary = base.model.rotary_emb(x, torch.arange(8)[None])
    mask = torch.full((8, 8), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for i, layer in enumerate(base.model.layers):
        name = f"model.layers.{i}"
        a = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)[0]
        x = x + a + (z_by_hand(state, f"{name}.self_attn.o_proj.adapter", silu, a) if case == "houlsby" else 0)
        m = layer.mlp(layer.post_attention_layernorm(x))
        x = x + m
        if case == "houlsby":
            x = x + z_by_hand(state, f"{name}.mlp.down_proj.adapter", silu, m)
        elif case == "pfeiffer":
            x = x + z_by_hand(state, f"{name}.adapter", relu, x)
        else:
            Q, K, V = (state[f"{name}.fusion.{key}.weight"] for key in ("query", "key", "value"))
            z = [z_by_hand(state, f"{name}.fusion.adapters.{n}", relu, x) for n in (0, 1)]
            q = x @ Q.T + state[f"{name}.fusion.query.bias"]
            scores = [(q * (one @ K.T + state[f"{name}.fusion.key.bias"])).sum(-1, keepdim=True) for one in z]
            p = 1 / (1 + torch.exp(scores[1] - scores[0]))  # a softmax over two
            x = x + (p * z[0] + (1 - p) * z[1]) @ V.T
    expected = base.lm_head(base.model.norm(x))
    # fp64 leaves some thousand roundings of 1.1e-16
    assert (model(IDS).logits - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_default_targets_are_gpt2s_in_both_hands(tmp_path):
    """Adapters and a fusion trained on our GPT open on GPT2LMHeadModel, with its Conv1D, and give the same logits."""
    torch.manual_seed(0)
    ours = gpt.GPT(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    save_gpt(ours, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    for placement in ("houlsby", "pfeiffer"):
        randomize(adapter.add_adapter(ours, placement=placement))
        adapter.add_adapter(theirs, placement=placement)
        assert adapter.adapter_config(theirs) == adapter.adapter_config(ours)
        adapter.load_adapter_state_dict(theirs, adapter.adapter_state_dict(ours))
        assert_noticeable(ours)
        expected = ours(IDS).logits
        # two implementations of the model in fp32: a hundred roundings of 6e-8
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        adapter.remove_adapter(ours), adapter.remove_adapter(theirs)
    randomize(adapter.add_fusion(ours, [saved(ours, 1), saved(ours, 2)]), std=0.2)
    adapter.add_fusion(theirs, [(one, None) for one in adapter.fusion_config(ours)["adapters"]])
    adapter.load_fusion_state_dict(theirs, adapter.fusion_state_dict(ours))
    assert_noticeable(ours)
    expected = ours(IDS).logits
    assert (theirs(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# -------------------------------------------------------------------------------------------------- inside transformers


@pytest.mark.parametrize(
    "case, kind",
    telling([one for one in CASES if one[1] in ("gpt2", "llama")], ("houlsby", "gpt2"), ("pfeiffer", "llama")),
)
def test_gradient_checkpointing_of_transformers(case, kind):
    """With transformers' own gradient checkpointing the gradients are those without it; switched off it is off."""
    model = add(case, tiny(kind), kind).train()
    inputs = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(IDS, labels=IDS).loss, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    for one, other in zip(torch.autograd.grad(model(IDS, labels=IDS).loss, inputs), plain, strict=True):
        assert torch.equal(one, other)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("case", ["houlsby", "pfeiffer", "fusion"])
def test_a_wrapped_block_is_still_read_as_a_block(case):
    """What transformers records from its blocks and attentions comes out, and a block's attributes can be read."""
    model = add(case, tiny("qwen2"), "qwen2")
    block = model.model.layers[0]
    assert block.self_attn.layer_idx == 0 and block.hidden_size == 32 and block.gradient_checkpointing is False
    out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.logits, model(IDS).logits)
    # as the docstring says, they are the blocks' own, but for the last: the adapter of the first is yet to come
    h = out.hidden_states[1]
    assert torch.equal(out.hidden_states[2], model.model(IDS).last_hidden_state)
    after = h if case == "houlsby" else h + block.adapter(h)
    if case != "houlsby":  # a hook on the wrapper gets what the next block gets
        hooked = []
        handle = block.register_forward_hook(lambda module, args, output: hooked.append(output))
        model(IDS)
        handle.remove()
        assert torch.equal(hooked[0], after) and not torch.equal(after, h)
    with torch.no_grad():
        again = model.model.layers[0](
            out.hidden_states[0], position_embeddings=model.model.rotary_emb(h, torch.arange(8)[None])
        )
    # the same operations in fp32 but for the mask, which is not given: the first position sees itself alone either way
    assert (again - after)[:, 0].abs().max() <= 1e-5 * after.abs().max()


def test_blocks_that_return_a_list():
    """GPT-1's blocks return a list that begins with x: an adapter is added to x all the same."""
    config = transformers.OpenAIGPTConfig(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    base = transformers.OpenAIGPTLMHeadModel(config).eval()
    model = adapter.add_adapter(copy.deepcopy(base), placement="pfeiffer", bottleneck=4)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert_noticeable(randomize(model))
    block, x = model.transformer.h[0], torch.randn(1, 5, 32)
    y = block.base_layer(x)[0]
    assert torch.equal(block(x)[0], y + block.adapter(y))


def classifier(kind, seed=0):
    """A random model with a new head."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    bert = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    if kind == "gpt2":
        return transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **sizes)
        ).eval()
    if kind == "roberta":  # its head is two layers, one of which has the name of a target
        return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes, **bert)).eval()
    return transformers.BertForTokenClassification(transformers.BertConfig(**sizes, **bert)).eval()


HEADS = {
    "gpt2": (None, ["score.weight"]),
    "bert": (("attention.output.dense", "output.dense"), ["classifier.bias", "classifier.weight"]),
    "roberta": (
        ("output.dense", "classifier.dense"),
        [f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("bias", "weight")],
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_classifiers_head_is_trained_and_stored(kind):
    """The modules that peft trains and stores for a classifier are trained and stored here, and come back."""
    targets, keys = HEADS[kind]
    model = adapter.add_adapter(classifier(kind), targets, bottleneck=4)
    task, linear = "TOKEN_CLS" if kind == "bert" else "SEQ_CLS", "c_attn" if kind == "gpt2" else "query"
    theirs = peft.get_peft_model(classifier(kind), peft.LoraConfig(task_type=task, target_modules=[linear]))
    found = {k.removeprefix("base_model.model.") for k in peft.get_peft_model_state_dict(theirs) if "lora_" not in k}
    state = adapter.adapter_state_dict(model)
    assert sorted(found) == keys == sorted(key for key in state if ".adapter." not in key)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == state.keys()
    assert adapter.adapter_config(model)["modules_to_save"] == [keys[0].split(".")[0]]

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = {key: t.clone() for key, t in state.items()}
    randomize(model)
    model(IDS).logits.square().sum().backward()
    optimizer.step()
    state = {key: t.clone() for key, t in adapter.adapter_state_dict(model).items()}
    assert not any(torch.equal(state[key], before[key]) for key in keys)
    config = peft_config.adapter_arguments(json.loads(json.dumps(adapter.adapter_config(model))))
    other = adapter.add_adapter(classifier(kind), **config)
    adapter.load_adapter_state_dict(other, state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_head_stays_as_trained():
    """Disabled or removed, adapters leave the trained head in the model, frozen; without training it is the base."""
    base = classifier("gpt2")
    model = adapter.add_adapter(copy.deepcopy(base))
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    randomize(model)
    nn.init.normal_(model.score.weight)
    base.score.weight.data.copy_(model.score.weight)
    with adapter.adapter_disabled(model):
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not torch.equal(model(IDS).logits, base(IDS).logits)
    adapter.remove_adapter(model)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not any(p.requires_grad for p in model.parameters())


def test_modules_to_save_are_named():
    """Other modules can be named, or none; a name that the model lacks is refused, with nothing changed."""
    model = adapter.add_adapter(classifier("gpt2"), modules_to_save=())
    assert all(".adapter." in key for key in adapter.adapter_state_dict(model))
    assert not model.score.weight.requires_grad
    model = adapter.add_adapter(classifier("gpt2"), modules_to_save=("ln_f", "score"))
    heads = {"transformer.ln_f.weight", "transformer.ln_f.bias", "score.weight"}
    assert heads < adapter.adapter_state_dict(model).keys()
    base = classifier("gpt2")
    with pytest.raises(adapter.Error, match="modules_to_save=.'scroe',. must be a list of ends of names of modules"):
        adapter.add_adapter(base, modules_to_save=("scroe",))
    with pytest.raises(adapter.Error, match="with weights of their own"):  # a tied head: the embedding would be trained
        adapter.add_adapter(transformers.GPT2LMHeadModel(base.config), modules_to_save=["lm_head"])
    assert all(p.requires_grad for p in base.parameters())


def test_a_fusion_trains_the_heads_own():
    """Adapters leave the heads of their tasks behind; the model's own is trained and stored with the fusion."""
    made = []
    for _ in range(2):
        model = randomize(adapter.add_adapter(classifier("gpt2"), placement="pfeiffer", bottleneck=4))
        nn.init.normal_(model.score.weight)
        made.append((adapter.adapter_config(model), adapter.adapter_state_dict(model)))
    base = classifier("gpt2")
    head = base.score.weight.clone()
    model = adapter.add_fusion(base, made)
    assert torch.equal(model.score.weight, head) and model.score.weight.requires_grad
    state, config = adapter.fusion_state_dict(model), adapter.fusion_config(model)
    trained = {name.replace(".adapter.", ".fusion.") for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in state and trained < state.keys()
    nn.init.normal_(model.score.weight)
    other = adapter.add_fusion(classifier("gpt2"), **peft_config.fusion_arguments(json.loads(json.dumps(config))))
    adapter.load_fusion_state_dict(other, adapter.fusion_state_dict(model))
    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("case", ["pfeiffer", "fusion"])
def test_left_padding_changes_nothing(case):
    """A row padded on the left gives, at its real positions, what it gives alone."""
    model = add(case, tiny("llama"), "llama")
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), IDS[:1]), 1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    expected = model(IDS[:1]).logits
    found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # fp32, other sizes of product


# ---------------------------------------------------------------------------------------------------------------- files


def write(config, state, folder):
    """The two files of an adapter, as train.py writes them."""
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_peft_refuses_our_files(tmp_path):
    """peft has neither method, and does not take the files for one that it has; ours are read back here."""
    base = tiny("llama")
    model = add("fusion", copy.deepcopy(base), "llama")
    write(adapter.fusion_config(model), adapter.fusion_state_dict(model), tmp_path / "fusion")
    write(*saved(base, 1), tmp_path / "adapter")
    for kind in ("adapter", "fusion"):
        assert json.loads((tmp_path / kind / "adapter_config.json").read_text())["peft_type"] not in set(peft.PeftType)
        with pytest.raises((KeyError, ValueError), match="BOTTLENECK_ADAPTER|ADAPTER_FUSION"):
            peft.PeftConfig.from_pretrained(tmp_path / kind)
        with pytest.raises((KeyError, ValueError), match="BOTTLENECK_ADAPTER|ADAPTER_FUSION"):
            peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / kind)
    config = json.loads((tmp_path / "fusion" / "adapter_config.json").read_text())
    other = adapter.add_fusion(base, [(one, None) for one in config["adapters"]])
    adapter.load_fusion_state_dict(other, load_file(tmp_path / "fusion" / "adapter_model.safetensors"))
    assert_noticeable(other)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.thorough
def test_the_file_alone_works_on_transformers_models(tmp_path):
    """Pasted into an empty folder, without nanopeft, adapter.py wraps, trains and fuses a GPT-2 and a Llama."""
    shutil.copy(Path(adapter.__file__), tmp_path / "adapter.py")
    (tmp_path / "use.py").write_text(
        "import sys\n"
        "sys.modules['nanopeft'] = None\n"
        "sys.path.insert(0, '.')\n"
        "import torch, transformers\n"
        "from adapter import *\n"
        "sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48)\n"
        "gpt2 = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)\n"
        "llama = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)\n"
        "ends = ('self_attn.o_proj', 'mlp.down_proj')\n"
        "ids = torch.arange(8)[None]\n"
        "for model, targets in (\n"
        "    (transformers.GPT2LMHeadModel(gpt2).eval(), None), (transformers.LlamaForCausalLM(llama).eval(), ends)\n"
        "):\n"
        "    before = model(ids).logits\n"
        "    for options in (dict(targets=targets), dict(placement='pfeiffer')):\n"
        "        remove_adapter(model)\n"
        "        add_adapter(model, **options)\n"
        "        trained = [p for p in model.parameters() if p.requires_grad]\n"
        "        optimizer = torch.optim.SGD(trained, lr=10)\n"
        "        model(ids, labels=ids).loss.backward()\n"
        "        optimizer.step()\n"
        "        print((model(ids).logits - before).abs().max().item() / before.abs().max().item())\n"
        "    one = adapter_config(model), adapter_state_dict(model)\n"
        "    alone = model(ids).logits\n"
        "    fused = add_fusion(remove_adapter(model), [one, one])(ids).logits\n"
        "    print((fused - alone).abs().max().item() / alone.abs().max().item())\n"
    )
    done = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = list(map(float, done.stdout.split()))
    assert len(figures) == 6
    for houlsby, pfeiffer, fused in (figures[:3], figures[3:]):
        assert houlsby > 0.01 and pfeiffer > 0.01
        assert fused <= 1e-4  # 1e-6 · 31 numbers of z in each of two blocks
