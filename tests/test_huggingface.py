# SPDX-License-Identifier: MIT
"""Bases that transformers opens: loss, techniques, tokenizer, chat and files, on small random models of many kinds."""

import copy
import json
import os
import runpy
import shutil
import signal
import sys
import time
import tracemalloc
import types
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from unittest import mock

import peft
import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import adamw, adapter, data, gpt, lora, prefix, prompt, ptuning, qlora, zero
from nanopeft.trainer import Error, bases, checkpoint, generation, measure, methods, process

SCRIPT = Path(__file__).parent.parent / "train.py"
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
    in_fp32 = kind in ("gpt_neo", "gptj")  # their attention
    if model.has_plain_head and logits.dtype == torch.float64 and not in_fp32:  # Mamba's logits are fp32
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
    """With a loss in chunks, the head makes 512 rows of logits at a time, and autograd keeps a quarter at most."""
    kept, ids = {}, torch.randint(4096, (4, 256))  # logits of 16.8 MB in fp32; the two blocks' activations are 2 MB
    model = new_model("llama", vocab_size=4096, max_position_embeddings=256)
    for name in ("own", "chunks"):
        if name == "chunks":
            bases.huggingface.with_loss(model)
        rows = []
        hook = model.lm_head.register_forward_hook(lambda head, inputs, y, rows=rows: rows.append(y[..., 0].numel()))
        with hook, measure.saved_bytes([*model.parameters(), *model.buffers()]) as count:
            out = model(ids, labels=ids)
            kept[name] = count()
        assert max(rows) == (1024 if name == "own" else 512)
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
    kind, theirs = type(bases.load_base(folder("llama"))), transformers.LlamaForCausalLM
    assert [kind.__name__, kind.__module__] == [theirs.__name__, theirs.__module__]  # transformers reads both
    load = bases.load_base

    def config(**content):
        (tmp_path / "config.json").write_text(json.dumps(content))

    config(model_type="llama", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    refuse(load, tmp_path, match="has no model.safetensors, and weights in other formats")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    refuse(load, tmp_path, match="model.safetensors cannot be read")
    config(model_type="llama", quantization_config={"quant_method": "gptq"})
    refuse(load, tmp_path, match="is stored quantized")
    config(model_type="t5")
    refuse(load, tmp_path, match="'t5', and transformers has no causal LM")
    config(model_type="no-such-model", auto_map={"AutoConfig": "code.Config"})
    refuse(load, tmp_path, match="AutoConfig of transformers does not open")
    config(model_type="llama", hidden_size="wide")
    refuse(bases.load_shapes, tmp_path, match="AutoConfig of transformers does not open")


def test_an_adapter_beside_a_model(tmp_path):
    """A folder with both is refused: transformers would open the base that the adapter names."""
    new_model("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    refuse(bases.load_base, tmp_path, match="an adapter_config.json beside its model")


def test_missing_tensors(tmp_path):
    """A file that lacks tensors is refused, where transformers would draw them at random."""
    model = new_model("llama")
    state = {key: t for key, t in model.state_dict().items() if "layers.1.mlp" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    refuse(bases.load_base, tmp_path, match="has no tensors model.layers.1.mlp.down_proj.weight, ")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neo"])
@pytest.mark.parametrize("key, n", [("vocab_size", 10**9), ("hidden_size", 1 << 20), ("num_hidden_layers", 10**9),
                                    ("num_layers", 10**9), ("num_experts", 10**9)])  # fmt: skip
def test_sizes_that_the_files_do_not_have(folder, tmp_path, kind, key, n):
    """A config that describes a far larger model than its files hold is refused at once, and takes no memory for it."""
    shutil.copytree(folder(kind), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: n, "layer_types": None}))
    before, began = getrusage(RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refuse(bases.load_base, tmp_path / "base", match="more than 4096|and the files have|does not open|is no model")
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.perf_counter() - began < 20


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


# ----------------------------------------------------------------------------------------------------------- tokenizer

CHAT = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must " \
    "alternate') }}{% endif %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>" \
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"  # fmt: skip
# As Qwen3's: the last answer has a thought, which is left out where another turn follows
THOUGHTS = "{% for m in messages %}<|{{ m.role }}|>\n{% if loop.last and m.role == 'assistant' %}<think></think>" \
    "{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
TEXT = "The naïve café, 你好, costs 12 or\n\n  300 kroner: smørrebrød. " * 20
TALK = [("user", "hi"), ("assistant", " hello \n\n <|end|> you"), ("user", "and?"), ("assistant", "naïve 你 ok")]
TALK = [{"role": role, "content": text} for role, text in TALK]


def new_tokenizer(kind, template=None, start=False):
    """Byte-level BPE as GPT-2's and Llama 3's, or BPE with bytes to fall back on as SentencePiece's for Llama 2."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=kind == "sentencepiece", unk_token="<unk>"))
    if kind == "bytes":
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        tokens, alphabet = SPECIAL, tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        inner.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Strip(" ", 1, 0)])
        tokens, alphabet = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], ["▁"]
    text = TEXT.replace("你好", "") if kind == "sentencepiece" else TEXT  # these fall back on bytes
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, initial_alphabet=alphabet)
    inner.train_from_iterator([text], trainer)
    if kind == "sentencepiece":  # to train them as special tokens was only to have their ids
        stored = json.loads(inner.to_str())
        stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] in SPECIAL]
        inner = tokenizers.Tokenizer.from_str(json.dumps(stored))
    inner.add_tokens(["<think>"])
    if start:
        inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip
    found.chat_template = template
    return found


@pytest.fixture(scope="module")
def encodings(tmp_path_factory):
    """A function that gives (our tokenizer, transformers') of a kind, opened from one folder."""
    made = {}

    def make(kind, template=None, start=False):
        if (kind, template, start) not in made:
            path = tmp_path_factory.mktemp(kind)
            (path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [2, 17]}')
            new_tokenizer(kind, template, start).save_pretrained(path)
            theirs = transformers.AutoTokenizer.from_pretrained(path)
            made[kind, template, start] = bases.load_tokenizer(path), theirs
        return made[kind, template, start]

    return make


BOTH = pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])


@BOTH
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30) | st.lists(st.sampled_from([*SPECIAL, " ", "a", "é", "\n", "你"])).map("".join))
def test_any_text_comes_back(encodings, kind, text):
    """Every text is encoded as transformers does without special tokens, and decoded again, byte for byte."""
    ours, theirs = encodings(kind)
    ids = ours.encode_ordinary(text)
    assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert not ours.special & {*ids}
    expected = text if kind == "bytes" else text.replace("▁", " ").removeprefix("" if text[:1] != " " else " ")
    if kind == "bytes" or not text.startswith((" ", "▁")):
        assert ours.decode(ids) == expected
        assert b"".join(ours.decode_tokens_bytes(ids)) == ours.decode_bytes(ids) == expected.encode()
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@BOTH
def test_a_batch_of_texts(encodings, kind):
    """A batch is each of its texts encoded; after an end of text, another one starts without a space of its own."""
    ours, _ = encodings(kind)
    texts = ["The café", "costs 12", "", "naïve <|end|></s>"]
    batch = ours.encode_ordinary_batch(texts)
    assert batch == [ours.encode_ordinary(text) for text in texts] and ours.encode_ordinary_batch([]) == []
    stream = [i for ids in batch for i in [*ids, ours.eot_token]]
    assert ours.decode(stream) == "".join(texts)
    assert len(ours.decode_tokens_bytes(stream)) == len(stream)
    think = ours.inner.convert_tokens_to_ids("<think>")  # added, and not special
    assert ours.decode([think]) == "<think>" and ours.n_vocab == think + 1 == len(ours.inner)


@BOTH
def test_a_completion_goes_on_with_its_prompt(encodings, kind):
    """Prompt and completion together are the tokens of their text: SentencePiece puts a space in front of it alone."""
    ours, theirs = encodings(kind)
    for asked, answer in (("The café costs", " 12"), ("12 or", "\n300"), ("naïve", "ly")):
        ((first, rest),) = data.CompletionDataset([(asked, answer)], ours, 99).items
        assert ours.decode(first + rest) == asked + answer
        if answer != "ly":  # which would be joined
            assert first + rest[:-1] == theirs(asked + answer, add_special_tokens=False).input_ids


def test_tokens_at_the_edges(encodings):
    """The token in front of a text, if there is one, the end of a text, and what ends a turn, of the model and chat."""
    assert encodings("bytes")[0].bos_token is None and encodings("bytes", None, True)[0].bos_token == 1
    assert encodings("sentencepiece", None, True)[0].bos_token == 1
    assert encodings("bytes")[0].eot_token == 2 and encodings("bytes")[0].end_of_turn == {2, 17}
    assert encodings("bytes", CHAT)[0].end_of_turn == {2, 17, 6}


@BOTH
def test_chat_scores_the_assistant_alone(encodings, kind):
    """A conversation is transformers' own ids, scored where its mask of generated tokens is, end tokens included."""
    ours, theirs = encodings(kind, CHAT)
    parts = ours.chat(TALK)
    expected = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert [i for ids, _ in parts for i in ids] == expected["input_ids"]
    assert [int(scored) for ids, scored in parts for _ in ids] == expected["assistant_masks"]
    answers = [ids for ids, scored in parts if scored]
    assert [ids[-1] for ids in answers] == [6, 6] and ours.decode(answers[1]).strip() == "naïve 你 ok"
    prompt = ours.chat_prompt(TALK[:3])
    assert prompt == [i for ids, _ in parts[:3] for i in ids]  # what is scored follows what generation is given
    assert prompt[-len(parts[2][0]) :] == parts[2][0]


def test_an_answer_that_begins_in_a_token_of_the_template(encodings):
    """Where newlines of template and answer are one token, it cannot be generated, and the next one is scored first."""
    ours, _ = encodings("bytes", CHAT)
    ((before, _), (answer, scored), _) = ours.chat([TALK[0], {"role": "assistant", "content": "\n hello"}])
    assert ours.decode(before[-1:]) == "\n\n" and ours.decode(answer) == " hello" and scored and answer[-1] == 6


def test_a_template_that_leaves_out_thoughts(encodings):
    """Where a template renders a turn otherwise once others follow, the last turn alone is scored."""
    ours, _ = encodings("bytes", THOUGHTS)
    answers = [ours.decode(ids) for ids, scored in ours.chat(TALK) if scored]
    assert answers == ["<think></think>naïve 你 ok"]
    assert [ours.decode(ids) for ids, scored in ours.chat(TALK[:2]) if scored] == ["<think></think> hello \n\n  you"]


def test_a_template_without_an_end(encodings):
    """Where no special token ends a turn, all of it is scored."""
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" \
        "{% if add_generation_prompt %}assistant: {% endif %}"  # fmt: skip
    ours, _ = encodings("bytes", plain)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [ours.decode(ids) for ids, scored in ours.chat(talk) if scored] == ["b\n"]


def test_a_chat_that_the_assistant_begins(encodings):
    """Of the first turn there is nothing that it answers: it is not scored, and the later ones are."""
    ours, _ = encodings("bytes", THOUGHTS)
    talk = [{"role": "assistant", "content": "hello"}, *TALK[:2]]
    assert [ours.decode(ids) for ids, scored in ours.chat(talk) if scored] == ["<think></think> hello \n\n  you"]


def test_special_tokens_that_the_model_has_no_row_for(tmp_path):
    """n_vocab counts what text and chats are made of: Gemma 3's token for a picture lies beyond its model's rows."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = new_tokenizer("bytes", CHAT)
    n = len(theirs)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs.save_pretrained(tmp_path)
    assert len(theirs) == n + 1 and bases.load_tokenizer(tmp_path).n_vocab == n


def test_a_model_reads_something_before_it_writes(folder, encodings, monkeypatch, tmp_path, capsys):
    """Without a start token an empty prompt is end-of-text: in a run's sample, its accuracy, and --generate."""
    base = tmp_path / "base"
    bases.save_base(bases.load_base(folder("llama")), encodings("bytes")[0], base)
    lines = "\n".join(json.dumps({"prompt": "", "completion": f"{i}"}) for i in range(20))
    (tmp_path / "a.jsonl").write_text(lines)
    out = f"--out {tmp_path}/o --steps 1 --batch 2 --length 16"
    run(monkeypatch, f"--base {base} --data {tmp_path}/a.jsonl --accuracy {out}")
    run(monkeypatch, f"--generate {tmp_path}/o --max-new-tokens 2")


def test_chats_that_cannot_be(encodings):
    """Without a template there is no chat; what a template refuses, or shows no answer of, is one line."""
    assert encodings("bytes")[0].chat is None and encodings("bytes")[0].chat_prompt is None
    ours, _ = encodings("bytes", CHAT)
    refuse(ours.chat, TALK[:1] * 2, match="does not take these messages: roles must alternate")
    refuse(ours.chat, TALK[:1], match="shows no turn of the assistant")
    other, _ = encodings("bytes", CHAT + "{% if add_generation_prompt %}<think>{% endif %}")
    refuse(other.chat, TALK, match="shows no turn of the assistant as it is generated")


def test_folders_without_a_tokenizer(tmp_path, encodings):
    """A folder without tokenizer is one line, also where transformers would open an empty one."""
    for kind in ("llama", "qwen2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        refuse(bases.load_tokenizer, tmp_path, match="of transformers does not open|has no tokenizer that knows")
    ours = encodings("bytes")[1]
    ours.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    refuse(bases.load_tokenizer, tmp_path, match="and an eos_token, which ends a text")


# -------------------------------------------------------------------------------------------------------------- saving


def test_a_saved_base_opens_in_transformers(folder, encodings, tmp_path):
    """What save_base writes opens in transformers with equal logits and tokens, and here with a checksum of its own."""
    model, (encoding, _) = bases.load_base(folder("llama")), encodings("bytes", CHAT)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    names = bases.save_base(model, encoding, tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert names[-1] == "config.json" and sorted(names) == sorted(os.listdir(out))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(theirs) is transformers.LlamaForCausalLM and torch.equal(theirs(IDS).logits, model(IDS).logits)
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again(TEXT).input_ids == encoding.encode_ordinary(TEXT) and again.chat_template == CHAT
    assert bases.load_base(out).checksum != model.checksum


def test_nothing_of_an_earlier_base_is_left(folder, encodings, tmp_path):
    """Our GPT over a Llama in shards and the other way round: the folder is the last one's, and other files stay."""
    llama, (encoding, _) = bases.load_base(folder("llama")), encodings("bytes")
    ours, words = bases.load_base("nano"), bases.load_tokenizer("nano")
    llama.save_pretrained(tmp_path, max_shard_size="20kB")
    others = ["result.json", "vocab.jsonl", "best.model"]
    for name in others:
        (tmp_path / name).write_text("{}")
    assert len(os.listdir(tmp_path)) > 5
    names = bases.save_base(ours, words, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *others])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-5, atol=1e-4)  # fp32, logits up to 20
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("The cat").input_ids == words.encode_ordinary("The cat")
    names = bases.save_base(llama, encoding, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *others])


def test_several_chat_templates(folder, encodings, tmp_path):
    """transformers writes them into a folder of their own, and a base can be saved over one that has it."""
    llama, (encoding, _) = bases.load_base(folder("llama")), encodings("bytes")
    inner = encoding.inner
    encoding.inner = copy.deepcopy(inner)
    encoding.inner.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    try:
        for _ in range(2):
            assert "additional_chat_templates" in bases.save_base(llama, encoding, tmp_path)
    finally:
        encoding.inner = inner
    assert (tmp_path / "config.json").exists() and [*(tmp_path / "additional_chat_templates").iterdir()]


@pytest.mark.parametrize("step", range(8))
def test_a_base_is_whole_or_not_there(folder, encodings, tmp_path, step):
    """Whatever step of a save fails, the folder holds the old base, the new one, or none that would open."""
    old, (encoding, _) = bases.load_base(folder("llama")), encodings("bytes")
    bases.save_base(old, encoding, tmp_path)
    before, new = bases.load_base(tmp_path).checksum, copy.deepcopy(old)
    with torch.no_grad():
        new.lm_head.weight.mul_(2)
    calls, real = [], {"replace": os.replace, "save": encoding.inner.save_pretrained}

    def fails(*arguments, call):
        calls.append(call)
        if len(calls) > step:
            raise OSError("no space left")
        return real[call](*arguments)

    with mock.patch.object(os, "replace", lambda *a: fails(*a, call="replace")):
        with mock.patch.object(encoding.inner, "save_pretrained", lambda *a: fails(*a, call="save")):
            try:
                bases.save_base(new, encoding, tmp_path)
                assert step >= 6
            except OSError:
                pass
    if os.path.exists(tmp_path / "config.json"):
        after = bases.load_base(tmp_path)
        assert after.checksum == before if step == 0 else torch.equal(after.lm_head.weight, new.lm_head.weight)
    else:
        assert 0 < step
        refuse(bases.load_base, tmp_path, match="no base")
    assert not os.path.exists(tmp_path / ".new")


# ----------------------------------------------------------------------------------------------- the way of a run


def run(monkeypatch, flags):
    """train.py in this process, which must end well."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def talks(tmp_path, monkeypatch):
    """Conversations in a .jsonl. A run in this process shares its streams."""
    monkeypatch.setattr(process, "outlive_reader", lambda stream: None)
    questions = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ok 你"}] for i in range(30)]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in questions))
    return tmp_path / "talks.jsonl"


@pytest.mark.parametrize("kind", KINDS)
def test_train_open_merge_and_ask(folder, monkeypatch, capsys, tmp_path, talks, kind):
    """LoRA on conversations lowers the loss; peft, and transformers of the merged model, have our logits.

    A run that was stopped goes on to the bits of one that was not. (peft refuses a Mamba's out_proj.)
    """
    base, whole = tmp_path / "base", tmp_path / "whole"
    shutil.copytree(folder(kind), base)
    new_tokenizer("bytes", CHAT).save_pretrained(base)
    flags = f"--base {base} --data {talks} --batch 4 --length 28 --lr 0.01 --save-every 3"
    run(monkeypatch, f"{flags} --steps 6 --out {whole}")
    result = json.loads((whole / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"] and result["asked"] == "chat"
    note, seen = checkpoint.Progress.note, []

    def interrupt(progress, loss):
        seen.append(loss)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGTERM)
        return note(progress, loss)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after step 3"):
        patch.setattr(checkpoint.Progress, "note", interrupt)
        run(patch, f"{flags} --steps 6 --out {tmp_path}/parts")
    run(monkeypatch, f"{flags} --steps 6 --out {tmp_path}/parts --resume")
    file = "adapter_model.safetensors"
    assert (tmp_path / "parts" / file).read_bytes() == (whole / file).read_bytes()

    model, _ = methods.load(str(whole), torch.float32, torch.device("cpu"))
    others = []
    if kind != "mamba":
        others += [peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), whole)]
    run(monkeypatch, f"--merge {whole} --out {tmp_path}/merged")
    others += [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")]
    with torch.no_grad():
        right = model(IDS).logits
        for other in others:  # fp32, in another order: some hundred numbers summed in each of a few products
            assert (other(IDS).logits - right).abs().max() < 1e-5 * right.abs().max()
    capsys.readouterr()
    run(monkeypatch, f"--generate {whole} --prompt 7? --temperature 0 --max-new-tokens 5")
    text = capsys.readouterr().out
    run(monkeypatch, f"--generate {tmp_path}/merged --prompt 7? --temperature 0 --max-new-tokens 5")
    assert text == capsys.readouterr().out


OTHERS = ["full", "qlora", "adapter", "prefix", "prompt", "ptuning", "lora --pack", "lora --recompute"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", OTHERS)
def test_methods_on_a_llama(folder, monkeypatch, tmp_path, talks, method, precision):
    """Each method trains a Llama in each precision, and what it leaves opens with the loss that the run ended with."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(folder("llama"), base)
    new_tokenizer("bytes", CHAT).save_pretrained(base)
    monkeypatch.setattr(process, "slower_than_fp32", lambda dtype: False)
    flags = f"--data {talks} --batch 4 --length 28 --steps 6 --precision {precision}"
    run(monkeypatch, f"{flags} --base {base} --method {method} --lr 0.02 --out {out}")
    result = json.loads((out / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    start = f"--base {out}" if method == "full" else f"--from {out}"
    run(monkeypatch, f"{flags.replace('--steps 6', '--steps 0')} {start} --out {tmp_path}/again")
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["loss_before"] == pytest.approx(result["loss_after"], rel=1e-5)


# ------------------------------------------------------------------------------------------------- files from strangers


def test_a_high_token_number_takes_no_memory(folder, tmp_path):
    """A tokenizer.json may give a token any number: no list as long as that is made of it."""
    shutil.copytree(folder("llama"), base := tmp_path / "base")
    new_tokenizer("bytes", CHAT).save_pretrained(base)
    stored = json.loads((base / "tokenizer.json").read_text("utf-8"))
    stored["model"]["vocab"]["P"] = 10**8
    (base / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    tracemalloc.start()
    encoding = bases.load_tokenizer(str(base))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encoding.decode(encoding.encode_ordinary("aP")) == "aP"
    assert peak < 100e6  # a list of pointers alone would take 800e6
    refuse(methods.load, str(base), torch.float32, torch.device("cpu"), match="tokenizer of 100000001 tokens")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [40, pytest.param(500, marks=pytest.mark.thorough)])
def test_damaged_folders_are_refused_or_load(folder, tmp_path, cases):
    """Whatever is wrong with a Llama's folder: it loads and writes a text, or is refused by Error in one line."""
    spoil, good = runpy.run_path(str(Path(__file__).parent / "test_survives.py"))["spoil"], tmp_path / "good"
    shutil.copytree(folder("llama"), good)
    new_tokenizer("bytes", CHAT).save_pretrained(good)
    outcomes = {"loaded": 0, "refused": 0}

    @settings(deadline=None, max_examples=cases, database=None)
    @given(st.data())
    def one(drawn):
        path = drawn.draw(st.sampled_from(sorted(good.iterdir())), "file")
        whole = path.read_bytes()
        spoil(drawn.draw, path)
        try:
            model, encoding = methods.load(str(good), torch.float32, torch.device("cpu"))
            ids = data.start_token(encoding) + encoding.encode_ordinary("ab")
            generation.sample(model, encoding, ids, torch.device("cpu"), 0)
            if encoding.chat:
                encoding.chat(TALK)
            outcomes["loaded"] += 1
        except process.ERRORS as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        finally:
            path.write_bytes(whole)

    one()
    assert min(outcomes.values()) > cases // 20, outcomes
