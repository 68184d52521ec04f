# SPDX-License-Identifier: MIT
"""Bases that transformers opens: loss, techniques, tokenizer, chat and files, on small random models of many kinds."""

import copy
import json
import os
import sys
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers

from nanopeft import adamw, adapter, gpt, lora, prefix, prompt, ptuning, qlora, zero
from nanopeft.trainer import Error, bases, measure

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GROUPED, SMALL = dict(num_key_value_heads=2), dict(n_embd=32, n_layer=2, n_head=4, n_positions=48)
MODELS = {
    "llama": GROUPED,
    "gemma2": GROUPED | dict(head_dim=16, sliding_window=16),
    "mamba": {},
    "qwen2": GROUPED,
    "qwen3": GROUPED | dict(head_dim=16),
    "qwen3_moe": GROUPED | dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16),
    "mixtral": GROUPED | dict(num_local_experts=3, output_router_logits=True),
    "mistral": GROUPED | dict(sliding_window=16),
    "gemma3_text": GROUPED | dict(head_dim=16, sliding_window=16),
    "granite": GROUPED | dict(logits_scaling=2.0),
    "phi": dict(resid_pdrop=0.1),
    "phi3": GROUPED | dict(resid_pdrop=0.1),
    "gpt_neox": dict(hidden_dropout=0.1),
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], resid_dropout=0.1),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.1),
    "bloom": dict(hidden_dropout=0.1),
    "gptj": SMALL | dict(rotary_dim=4, attn_pdrop=0.1),
    "falcon": dict(hidden_dropout=0.1),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=48),
}
OWN_LOSS = {"gemma2", "granite", "mixtral"}  # soft-capping, scaling, a loss of the router
PACKS = {
    "llama", "gemma2", "qwen2", "qwen3", "qwen3_moe", "mixtral", "mistral", "gemma3_text", "granite", "phi", "phi3",
    "gpt_neox", "gpt_neo", "gptj",
}  # fmt: skip
DEFAULT = ("llama", "gemma2", "mamba")  # the others are thorough
KINDS = [pytest.param(kind, marks=[] if kind in DEFAULT else pytest.mark.thorough) for kind in MODELS]
IDS = torch.tensor([[7, 9, 12, 40, 41, 3, 63, 4, 99], [5, 6, 200, 17, 9, 30, 2, 8, 11]])
LABELS = torch.cat((torch.full((2, 3), -100), IDS[:, 3:]), 1)
TECHNIQUES = {
    "lora": lora.add_lora,
    "qlora": qlora.add_qlora,
    "pfeiffer": lambda model: adapter.add_adapter(model, placement="pfeiffer"),
    "houlsby": lambda model: adapter.add_adapter(model, placement="houlsby"),
    "prefix": lambda model: prefix.PrefixTuning(model, 3),
    "prompt": lambda model: prompt.PromptTuning(model, 3),
    "ptuning": lambda model: ptuning.PTuning(model, 3),
}


def new_model(kind, **changes):
    """With weights wide enough that attention is far from even, and that soft-capping shows."""
    sizes = dict(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes | MODELS.get(kind, {}) | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that makes the folder of a kind of model, once."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            new_model(kind).save_pretrained(folders[kind])
        return str(folders[kind])

    return make


def refuse(call, *arguments, match):
    """An Error of one line."""
    with pytest.raises(Error, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_models_own(folder, kind):
    """In fp64 loss and gradients equal those of transformers' class; it is the plain heads' that go in chunks."""
    dtype = torch.float32 if kind in ("mixtral", "qwen3_moe") else torch.float64  # torch runs no experts in fp64
    model = bases.load_base(folder(kind), dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder(kind), dtype=dtype)
    assert model.has_plain_head == (kind not in OWN_LOSS)
    out, expected = model(IDS, labels=LABELS), theirs(IDS, labels=LABELS)
    assert (out.logits is None) == model.has_plain_head
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0, check_dtype=False)  # theirs sums in fp32
    logits, close = theirs(IDS).logits, dict(rtol=1e-5, atol=1e-6)  # fp32, some hundred numbers summed
    if model.has_plain_head and logits.dtype == torch.float64:  # Mamba's are fp32
        expected.loss, close = F.cross_entropy(logits[:, :-1].mT, LABELS[:, 1:]), dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.loss, expected.loss, check_dtype=False, **close)
    out.loss.backward()
    expected.loss.backward()
    for (key, p), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, msg=key, **close)
    x = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=x, labels=LABELS).loss, out.loss, **close)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs(IDS).logits)  # without labels nothing is changed


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_dropout(folder, kind):
    """Training and evaluation mode give one loss, though the stored config has dropout."""
    config = json.loads(open(f"{folder(kind)}/config.json").read())
    assert kind in ("mamba", "mpt") or any("drop" in key and value for key, value in config.items())
    model = bases.load_base(folder(kind))
    assert not model.training
    loss = model(IDS, labels=LABELS).loss
    assert torch.equal(loss, model.train()(IDS, labels=LABELS).loss)
    assert torch.equal(loss, model(IDS, labels=LABELS).loss)


def test_a_model_that_also_sees(tmp_path):
    """Of a model of text and images: the text's blocks and sizes, and no dropout in either part of its config."""
    text = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=512, max_position_embeddings=48, sliding_window=16, attention_dropout=0.5,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=28, patch_size=14,
        attention_dropout=0.5,
    )  # fmt: skip
    tokens = dict(image_token_index=500, boi_token_index=501, eoi_token_index=502, mm_tokens_per_image=1)
    new_model("gemma3", text_config=text, vision_config=vision, **tokens).save_pretrained(tmp_path)
    model = bases.load_base(tmp_path)
    assert len(bases.blocks(model)) == 2 and (bases.positions(model), bases.width(model)) == (48, 32)
    assert torch.equal(model.train()(IDS, labels=LABELS).loss, model.eval()(IDS, labels=LABELS).loss)
    assert not any("drop" in key and value for key, value in vars(model.config.vision_config).items())


def test_logits_are_never_whole():
    """With a loss in chunks, autograd keeps less than a quarter of what it keeps with the model's own."""
    kept, ids = {}, torch.randint(4096, (4, 256))  # logits of 16.8 MB in fp32; the two blocks' activations are 2 MB
    model = new_model("llama", vocab_size=4096, max_position_embeddings=256)
    for name in ("own", "chunks"):
        if name == "chunks":
            bases.huggingface.with_loss(model)
        with measure.saved_bytes([*model.parameters(), *model.buffers()]) as count:
            out = model(ids, labels=ids)
            kept[name] = count()
        out.loss.backward()
    assert kept["chunks"] < kept["own"] / 4 and kept["own"] > 16e6


@pytest.mark.parametrize("kind", KINDS)
def test_packing(folder, kind):
    """packs() says whether a row of two texts, each with positions from 0, has the loss of two rows, and it does so."""
    model = bases.load_base(folder(kind))
    assert bases.packs(model) == (kind in PACKS)
    position_ids = torch.arange(9).repeat(2)[None]
    if bases.packs(model):
        packed = model.train()(IDS.view(1, 18), labels=LABELS.view(1, 18), position_ids=position_ids).loss
        torch.testing.assert_close(packed, model(IDS, labels=LABELS).loss, rtol=1e-6, atol=0)


def test_our_gpt_has_the_same_interface():
    """blocks, positions and width of our GPT, and of what load_shapes and load_tokenizer give for it."""
    model, shapes = bases.load_base("nano"), bases.load_shapes("nano")
    assert bases.blocks(model) is model.transformer.h and shapes.device.type == "meta"
    assert (bases.positions(model), bases.width(model)) == (512, 256)
    assert model.checksum == bases.load_gpt("nano").checksum
    assert bases.load_tokenizer("nano").n_vocab == 3072


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_sizes(folder, kind):
    """Blocks, positions and width are those of the config; load_shapes has the model's shapes and no memory."""
    model, shapes = bases.load_base(folder(kind)), bases.load_shapes(folder(kind))
    assert len(bases.blocks(model)) == 2 and bases.blocks(model)[0] in [*model.modules()]
    assert all(sum(p.numel() for p in block.parameters()) > 2000 for block in bases.blocks(model))
    assert (bases.positions(model), bases.width(model)) == (48, 32)
    assert {p.device.type for p in shapes.parameters()} == {"meta"}
    assert {k: t.shape for k, t in shapes.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}


def test_a_model_without_a_limit(tmp_path):
    """A model whose config names no largest position has as good as none."""
    config = transformers.AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert bases.positions(bases.load_base(tmp_path)) == 1 << 30


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", KINDS)
def test_techniques_with_their_defaults(folder, kind, technique):
    """Each technique trains, fits the shapes alone, and generates with a cache what it generates without one."""
    add, model = TECHNIQUES[technique], bases.load_base(folder(kind)).train()
    if kind == "mamba" and technique in ("prefix", "houlsby"):
        with pytest.raises((prefix.Error, adapter.Error), match="caches keys and values|names no layer"):
            add(model)
        return
    if technique != "qlora":  # which computes scales
        add(bases.load_shapes(folder(kind)))
    model = add(model)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        nn.init.normal_(p, std=0.2)
    loss = model(IDS, labels=LABELS).loss
    loss.backward()
    for key, p in trained.items():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
    text = gpt.generate(model.eval(), IDS, 3)
    with torch.no_grad():
        logits = model(text[:, :-1]).logits[:, 8:]
    chosen = logits.gather(2, text[:, 9:, None])[..., 0]
    assert (logits.amax(-1) - chosen <= 1e-4 * logits.abs().max()).all()  # fp32, and rarely two are as likely
    assert model.generate(IDS, max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_zero_shards_the_blocks(folder, kind, tmp_path):
    """Under ZeRO stage 3 over the blocks that were found, loss and gradient norm of LoRA are those of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = lora.add_lora(bases.load_base(folder(kind)).train())
        for p in lora.lora_parameters(model).values():
            nn.init.normal_(p, std=0.2)
        sharded = copy.deepcopy(model)
        loss = model(IDS, labels=LABELS).loss
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        engine = zero.ZeRO(sharded, adamw.AdamW, blocks=bases.blocks(sharded), stage=3, lr=0.0)
        assert all(p.numel() == 0 for p in sharded.parameters())
        again = sharded(IDS, labels=LABELS).loss
        engine.backward(again)
        assert torch.equal(again, loss)
        torch.testing.assert_close(torch.tensor(engine.step()), norm, rtol=1e-5, atol=0)  # fp32, summed otherwise
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- files


def test_checksum(folder, tmp_path):
    """It is the same in any dtype and beside other files, and another for other weights, config or tokenizer."""
    model = new_model("llama")
    model.save_pretrained(tmp_path)
    found = {bases.load_base(tmp_path, dtype).checksum for dtype in (torch.float32, torch.bfloat16)}
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "state.safetensors").write_text("")
    found.add(bases.load_base(tmp_path).checksum)
    assert len(found) == 1
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        with open(tmp_path / name, "a") as file:
            file.write(" ")
        found.add(bases.load_base(tmp_path).checksum)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    found.add(bases.load_base(tmp_path).checksum)
    assert len(found) == 5


def test_models_that_are_no_base(tmp_path, folder):
    """What is of no causal LM, or not whole, or stored otherwise, is refused in one line that says what it is."""
    assert type(bases.load_base(folder("llama"))).__name__ == "LlamaForCausalLM"
    load = bases.load_base

    def config(**content):
        (tmp_path / "config.json").write_text(json.dumps(content))

    config(model_type="llama", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    refuse(load, tmp_path, match="has no model.safetensors, and weights in other formats")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    refuse(load, tmp_path, match="AutoModelForCausalLM of transformers does not open")
    config(model_type="llama", quantization_config={"quant_method": "gptq"})
    refuse(load, tmp_path, match="is stored quantized")
    config(model_type="t5")
    refuse(load, tmp_path, match="'t5', and transformers has no causal LM")
    config(model_type="no-such-model", auto_map={"AutoConfig": "code.Config"})
    refuse(load, tmp_path, match="AutoConfig of transformers does not open")
    config(model_type="llama", hidden_size="wide")
    refuse(bases.load_shapes, tmp_path, match="AutoConfig of transformers does not open")


def test_missing_tensors(tmp_path):
    """A file that lacks tensors is refused, where transformers would draw them at random."""
    model = new_model("llama")
    state = {key: t for key, t in model.state_dict().items() if "layers.1.mlp" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    refuse(bases.load_base, tmp_path, match="has no tensors model.layers.1.mlp.down_proj.weight, ")


def test_a_model_that_sees_what_comes_is_no_causal_lm(tmp_path):
    """BERT has a head of a language model in transformers, and each token sees those behind it."""
    new_model("bert").save_pretrained(tmp_path)
    refuse(bases.load_base, tmp_path, match="is no causal LM: a token's logits depend on later tokens")


def test_without_transformers(folder):
    """Without transformers, a base that is no GPT-2 says how to install it; ours needs none."""
    with mock.patch.dict(sys.modules, transformers=None):
        for call in (bases.load_base, bases.load_shapes, bases.load_tokenizer):
            refuse(call, folder("llama"), match=r'is no GPT-2, .*: pip install "nanopeft\[hub\]"')
            call("nano")


class Timeout(Exception):
    """As an HTTP client has it: no OSError."""


def fake_hub(download):
    hub, errors = types.SimpleNamespace(snapshot_download=download), types.SimpleNamespace(HTTPError=Timeout)
    return mock.patch.dict(sys.modules, {"huggingface_hub": hub, "huggingface_hub.errors": errors})


def test_hub(folder, monkeypatch, tmp_path):
    """OWNER/MODEL fetches nothing pickled; out of reach, it is one line; a folder goes before the hub."""
    asked = []

    def download(repo, allow_patterns):
        asked.append(repo)
        assert allow_patterns == ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
        return folder("llama")

    with fake_hub(download):
        assert str(bases.find_checkpoint("HuggingFaceTB/SmolLM2-135M")) == folder("llama")
    assert asked == ["HuggingFaceTB/SmolLM2-135M"]
    with fake_hub(mock.Mock(side_effect=Timeout("no\nanswer"))):
        refuse(bases.load_base, "out/loar", match="^out/loar is no folder here, and cannot be fetched .*Timeout")
    with mock.patch.dict(sys.modules, huggingface_hub=None):
        refuse(bases.load_base, "a/b", match=r'^a/b is no folder here.*pip install "nanopeft\[hub\]"')
    monkeypatch.chdir(tmp_path)
    os.makedirs("owner")
    os.symlink(folder("llama"), "owner/model")
    with fake_hub(mock.Mock(side_effect=AssertionError)):
        assert str(bases.find_checkpoint("owner/model")) == "owner/model"
        for name in ("./model", "../x/y", "/a/b", "a/b/c", "."):
            refuse(bases.find_checkpoint, name, match="nano, a folder .*, or OWNER/MODEL on the Hugging Face hub")
