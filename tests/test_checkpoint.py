# SPDX-License-Identifier: MIT
"""All that is read from the disk: bases, and adapters' configs, as they are meant to be, damaged, or hostile."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nanopeft import adapter, gpt, lora, prefix, prompt, ptuning
from nanopeft.trainer import Error, Failure, bases, checkpoint, methods, peft_config, tokenizer
from nanopeft.trainer.bases import load_gpt, save_gpt


def tiny(seed=0, dtype=torch.float64, **shape):
    """No claim may rest on a bias of 0 or a norm's weight of 1."""
    torch.manual_seed(seed)
    model = gpt.GPT(**dict(vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2) | shape)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.to(dtype)


# --------------------------------------------------------------------------------------------------------------- bases


@pytest.fixture
def folder(tmp_path):
    save_gpt(tiny(dtype=torch.float32), tmp_path / "base")
    return tmp_path / "base"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refuse(folder, match=""):
    """Error, in one line that names what is wrong."""
    with pytest.raises((Error, gpt.Error), match=match) as caught:
        load_gpt(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


@settings(deadline=None, max_examples=20)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3), size=st.integers(1, 5), V=st.integers(2, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_saved_and_loaded_is_the_same_to_the_bit(dtype, n_layer, n_head, size, V, seed):
    """What was saved is what loads, bit for bit in every dtype, with its config, and the head tied again."""
    model = tiny(seed, dtype, n_layer=n_layer, n_head=n_head, n_embd=n_head * size, vocab_size=V, bos_token_id=1)
    with tempfile.TemporaryDirectory() as name:
        save_gpt(model, Path(name) / "new" / "folder")
        assert sorted(os.listdir(f"{name}/new/folder")) == ["config.json", "model.safetensors"]
        loaded = load_gpt(f"{name}/new/folder", dtype)
    assert vars(loaded.config) == vars(model.config)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, V - 1)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for key, t in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == dtype and torch.equal(loaded.state_dict()[key], t), key
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype(folder, dtype):
    """dtype is the type that all weights are in, rounded once from what is stored."""
    model, stored = load_gpt(folder, dtype), load_gpt(folder)
    for (name, p), q in zip(model.named_parameters(), stored.parameters(), strict=True):
        assert q.dtype == torch.float32 and p.dtype == dtype and torch.equal(p, q.to(dtype)), name


def test_checksum_of_a_base(folder):
    """A base's checksum is of what is stored: equal in every dtype it is loaded in, another if one number differs."""
    whole = load_gpt(folder).checksum
    assert {load_gpt(folder, dtype).checksum for dtype in (torch.float64, torch.bfloat16, torch.float16)} == {whole}
    state, found = load_file(folder / "model.safetensors"), {whole}
    save_file({f"{key.removeprefix('transformer.')}": t for key, t in state.items()}, folder / "model.safetensors")
    assert load_gpt(folder).checksum == whole  # the hub's other form of names
    for key in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.weight"):
        t = state[key].clone()
        t[-1] += 2**-20
        save_file(state | {key: t}, folder / "model.safetensors")
        found.add(load_gpt(folder).checksum)
    save_file(state, folder / "model.safetensors")
    for change in ({"n_head": 4}, {"layer_norm_epsilon": 1e-6}):  # the same weights, and other results
        edit(folder, **change)
        found.add(load_gpt(folder).checksum)
    assert len(found) == 6


@pytest.mark.filterwarnings("error:.*base_checksum|.*unexpected|.*ignored")
def test_peft_opens_an_adapter_with_its_bases_checksum(folder, tmp_path):
    """The checksum is in the tensors' file, where peft passes over it: no key of the config is unknown to peft."""
    model = load_gpt(folder)
    lora.add_lora(model, ["c_attn"], r=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad * 0.1)
    config = lora.lora_config(model) | {"base_model_name_or_path": str(folder)}
    checkpoint.save_adapter(tmp_path, lora.lora_state_dict(model), config, "0123abcd")
    assert "0123abcd" not in (tmp_path / "adapter_config.json").read_text()
    assert checkpoint.read_adapter(tmp_path)[2] == "0123abcd"
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    for _ in range(8):  # safetensors itself writes metadata in any order
        checkpoint.save_adapter(tmp_path, lora.lora_state_dict(model), config, "0123abcd")
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == content
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folder), tmp_path).eval()
    ids = torch.arange(8)[None]
    # Two implementations in fp32: sums of some 64 products in another order differ by some 64 roundings
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_a_kill_leaves_no_config_beside_another_run_s_numbers(tmp_path, monkeypatch, n):
    """Killed at its n-th file, a save over another run's adapter leaves nothing that is opened."""
    alpha, replace, calls = [{"lora_alpha": 8}, {"lora_alpha": 16}], os.replace, []
    checkpoint.save_adapter(tmp_path, {"A": torch.zeros(2, 2)}, alpha[0], "0")

    def killed(*paths):
        calls.append(paths)
        if len(calls) == n:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_adapter(tmp_path, {"A": torch.ones(2, 2)}, alpha[1], "0")
    with pytest.raises(Error, match="no file adapter_model.safetensors"):
        checkpoint.read_adapter(tmp_path)
    monkeypatch.undo()
    checkpoint.save_adapter(tmp_path, {"A": torch.ones(2, 2)}, alpha[1], "0")
    config, state, _ = checkpoint.read_adapter(tmp_path)
    assert config == alpha[1] and state["A"].sum() == 4


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_hub_forms(folder, prefix):
    """Both forms found on the hub load: names with "transformer." or without it, causal masks, and the tied head."""
    expected = load_gpt(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    state = {prefix + key.removeprefix("transformer."): t for key, t in state.items()}
    for layer in range(2):
        state[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_file(state, folder / "model.safetensors")
    loaded = load_gpt(folder).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in loaded.items())


def test_weights_are_stored_transposed(folder):
    """The file holds each linear weight as GPT-2's Conv1D does, (in, out), and no second copy of the tied head."""
    model, state = load_gpt(folder), load_file(folder / "model.safetensors")
    assert state["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert torch.equal(state["transformer.h.1.attn.c_proj.weight"], model.transformer.h[1].attn.c_proj.weight.T)
    assert "lm_head.weight" not in state and len(state) == 2 * 12 + 4


def resident():
    """(now, at most), in bytes; the second since it was last set back."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="tells memory as Linux does")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_holds_the_model_once(tmp_path, dtype):
    """Loading takes the memory of the model and of one tensor of its file, and leaves no part of the file mapped."""
    model = gpt.GPT(vocab_size=4096, n_embd=512, n_layer=4, n_head=8)
    save_gpt(model, tmp_path)
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize  # 60 MB in fp32
    del model
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident()
    model = load_gpt(tmp_path, dtype)
    _, most = resident()
    # One tensor of the file is 8 MB at most; 8 MB more for the allocator. A mapped file or a second copy adds 60.
    assert most - before < size + 16e6
    assert str(tmp_path) not in Path("/proc/self/maps").read_text() and model.device.type == "cpu"


def test_saving_replaces_files_whole(folder):
    """A save that fails leaves the old checkpoint as it was; one that works may go where the model came from."""
    model, old = load_gpt(folder), (folder / "model.safetensors").read_bytes()
    torch.nn.init.normal_(model.lm_head.weight)
    with mock.patch.object(bases, "save_file", side_effect=OSError("disk full")), pytest.raises(Failure):
        save_gpt(model, folder)
    assert (folder / "model.safetensors").read_bytes() == old
    save_gpt(model, folder)
    again = load_gpt(folder)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
@pytest.mark.parametrize("value", [0, -1, 16.0, True, "16", None, [16], 1 << 21, 10**400, math.nan, math.inf])
def test_sizes(folder, key, value):
    """A size that is not a whole number, or is out of all proportion, is refused by name before anything is built."""
    edit(folder, **{key: value})
    refuse(folder, key)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"model_type": "llama"}, "gpt2"), ({"model_type": None}, "gpt2"), ({"model_type": ["gpt2"]}, "gpt2"),
        ({"n_head": 3}, "divide"), ({"activation_function": "gelu"}, "gelu_new"), ({"n_inner": 65}, "n_inner"),
        ({"activation_function": ["gelu_new"]}, "activation_function"), ({"tie_word_embeddings": False}, "tie_word"),
        ({"scale_attn_weights": False}, "scale_attn"), ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
        ({"n_layer": 1}, "no place for: transformer.h.1"), ({"n_layer": 3}, "no tensor transformer.h.2"),
        ({"vocab_size": 62}, "wte.weight"), ({"n_positions": 25}, "wpe.weight"), ({"n_embd": 32}, "wte.weight"),
        *(({"layer_norm_epsilon": e}, "layer_norm_epsilon") for e in (0.0, -1e-5, 1, True, "1e-5", None, math.inf)),
        *(({"layer_norm_epsilon": e}, "layer_norm_epsilon") for e in (math.nan, [1e-5])),
        *(({"bos_token_id": t}, "bos_token_id") for t in (1.0, "60", None, [60], True, -1)),
        *(({"eos_token_id": t}, "eos_token_id") for t in (60.0, "60", None, [60], False, -1)),
    ],
)  # fmt: skip
def test_configs(folder, changes, match):
    """A config that this GPT cannot follow is refused, and the message names the key."""
    edit(folder, **changes)
    refuse(folder, match)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"1", b"null", b'"gpt2"', b"\xff\xfe{}", b"[" * 100_000, b"1" * 5000, b"{'n_embd': 16}"]
)
def test_config_that_is_no_json(folder, text):
    """A config.json that is no JSON object is refused."""
    (folder / "config.json").write_bytes(text)
    refuse(folder, "config.json")


whole = st.integers(-(10**30), 3) | st.integers(1001, 10**30)  # hundreds of layers would only take long
json_values = st.recursive(
    st.none() | st.booleans() | whole | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_config_loads_or_is_refused(data):
    """Whatever stands in one place of config.json, the answer is a model or an Error of one line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_gpt(tiny(dtype=torch.float32), folder)
        keys = sorted(json.loads((folder / "config.json").read_text()))
        edit(folder, **{data.draw(st.sampled_from(keys)): data.draw(json_values)})
        try:
            model = load_gpt(folder)
        except (Error, gpt.Error) as error:
            assert "\n" not in str(error)
        else:
            assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 61)


def test_missing_files(tmp_path, folder):
    """A folder that is not there, or lacks one of the two files, is refused and says what a base consists of."""
    refuse(tmp_path / "nowhere", "config.json and model.safetensors")
    refuse(tmp_path, "config.json and model.safetensors")
    refuse("no-such-model", "nano, .*gpt2-xl")
    refuse("", "config.json and model.safetensors")
    (folder / "model.safetensors").unlink()
    refuse(folder, "model.safetensors")
    (folder / "model.safetensors").mkdir()
    refuse(folder, "model.safetensors")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_damaged_files(data):
    """A model.safetensors cut short anywhere is refused; with a byte changed in its header, it is too or loads."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_gpt(tiny(dtype=torch.float32, n_layer=1), folder)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        if data.draw(st.booleans()):
            file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
            refuse(folder, "model.safetensors")
            return
        header = 8 + int.from_bytes(content[:8], "little")
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        try:
            load_gpt(folder)
        except (Error, gpt.Error) as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s.pop("transformer.h.1.ln_2.bias"), "no tensor transformer.h.1.ln_2.bias"),
        (lambda s: s.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}), "no place for: transformer.h.2.ln_1.bias"),
        (lambda s: s.update({"transformer.ln_f.bias": torch.zeros(15)}), r"ln_f.bias \[15\]"),
        (lambda s: s.update({"transformer.ln_f.bias": torch.zeros(16, 1)}), r"ln_f.bias \[16, 1\]"),
        # (out, in), as nn.Linear has it: a checkpoint that nobody transposed
        (lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(48, 16)}), r"c_attn.weight \[48, 16\]"),
        (lambda s: s.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(16, 64, dtype=torch.int8)}), "int8"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, match):
    """A missing, additional, misshapen or quantized tensor is refused by its name."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    refuse(folder, match)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """What transformers leaves of the embedded base: shards with an index, and tokenizer.json alone."""
    folder, nano = tmp_path_factory.mktemp("shards"), bases.find_checkpoint("nano")
    GPT2LMHeadModel.from_pretrained(nano).save_pretrained(folder, max_shard_size="4MB")
    AutoTokenizer.from_pretrained(nano).save_pretrained(folder)
    assert not {"model.safetensors", "vocab.json", "merges.txt"} & set(os.listdir(folder))
    return folder


def test_shards(shards):
    """A base in shards that transformers saved is, bit for bit, the one it was saved from, and so is its tokenizer."""
    for p, q in zip(load_gpt(shards).parameters(), load_gpt("nano").parameters(), strict=True):
        assert torch.equal(p, q)
    ours, theirs = methods.load_tokenizer(str(shards)), AutoTokenizer.from_pretrained(shards)
    for text in ("def f(x):\n    return x  # été", "中文 🏳️‍🌈\t 12345", "don't\n\n\n  I'll"):
        ids = theirs(text)["input_ids"]
        assert ours.encode_ordinary(text) == ids and ours.decode(ids) == text


def test_merged_by_peft(tmp_path):
    """A LoRA that peft merged and saved opens as a base with the merged model's logits, within rounding of fp32."""
    nano = bases.find_checkpoint("nano")
    model = peft.get_peft_model(
        GPT2LMHeadModel.from_pretrained(nano, dtype=torch.float32), peft.LoraConfig(init_lora_weights=False)
    )
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path, max_shard_size="8MB")
    AutoTokenizer.from_pretrained(nano).save_pretrained(tmp_path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = merged(ids).logits, load_gpt(tmp_path)(ids).logits
    assert methods.load_tokenizer(str(tmp_path)).n_vocab == 3072
    # 256-long sums in another order: some sqrt(256) roundings of 2^-24 in each of 6 layers, of the largest logit
    assert (found - expected).abs().max() <= 6 * 16 * 2**-24 * expected.abs().max()


@pytest.mark.parametrize("name", ["../other/model-00001-of-00003.safetensors", "/etc/passwd", "C:\\x", None, ["x"], 7])
def test_hostile_index(shards, tmp_path, name):
    """The index of shards is not read: whatever file it names, if any, only the shards of the folder are opened."""
    folder = tmp_path / "base"
    shutil.copytree(shards, folder)
    weight_map = dict.fromkeys(json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"], name)
    for content in (json.dumps({"weight_map": weight_map}), "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(content)
        with mock.patch.object(bases, "safe_open", side_effect=safe_open) as spy:
            load_gpt(folder)
        opened = {call.args[0] for call in spy.call_args_list}
        assert len(opened) == 3 and {path.parent for path in opened} == {folder}


def test_missing_shard(shards, tmp_path):
    """Without one of its shards, or without any, a base is refused, and the message names what is missing."""
    folder = tmp_path / "base"
    shutil.copytree(shards, folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, "has no tensor transformer.h")
    for path in folder.glob("model-*"):
        path.unlink()
    refuse(folder, "model.safetensors: no such file")


def test_repeated_names_in_shards(shards, tmp_path):
    """A tensor that two shards hold is refused: which one is meant?"""
    folder = tmp_path / "base"
    shutil.copytree(shards, folder)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    refuse(folder, "and model-00001-of-00003.safetensors has it as well")
    (folder / "model-00002-of-00003.safetensors").unlink()
    os.mkfifo(folder / "model-00002-of-00003.safetensors")
    refuse(folder, "no such file")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "Unigram"}}, {"model": {"type": "BPE"}}, {"model": None}, {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, {"normalizer": {"type": "NFC"}},
        {"added_tokens": None}, {"added_tokens": [{"id": 9, "content": "!"}]}, {"added_tokens": [{"content": "x"}]},
        {"added_tokens": [{"id": 9999, "content": "<pad>"}]}, {"model": {"type": "BPE", "vocab": [], "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}},
    ],
)  # fmt: skip
def test_another_tokenizer_json(shards, tmp_path, changes):
    """A tokenizer.json that is no GPT-2's, or is damaged, is refused in one line that names the file."""
    stored = json.loads((shards / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored | changes))
    with pytest.raises(Error, match="tokenizer.json") as error:
        tokenizer.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", ["nano", "out/full", None])
def test_an_adapter_is_no_base(tmp_path, base):
    """The folder of an adapter in place of a base's says whose adapter it is, and what can be done."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    refuse(tmp_path, f"is an adapter of the base {base!r} and no base itself: --from {tmp_path} goes on")
    (tmp_path / "adapter_config.json").write_text("[1]")
    refuse(tmp_path, "adapter_config.json must hold an object")


# ----------------------------------------------------------------------------------------------------------------- hub


class Timeout(Exception):
    """As an HTTP client has it: no OSError."""


def fake_hub(download):
    hub, errors = types.SimpleNamespace(snapshot_download=download), types.SimpleNamespace(HTTPError=Timeout)
    return mock.patch.dict(sys.modules, {"huggingface_hub": hub, "huggingface_hub.errors": errors})


@pytest.mark.parametrize("name", bases.HUB)
def test_hub(folder, name):
    """A hub name fetches the two files and the tokenizer's two from the model's own repository, and nothing else."""
    asked = []
    with fake_hub(lambda repo, allow_patterns: asked.append((repo, sorted(allow_patterns))) or str(folder)):
        assert bases.find_checkpoint(name) == folder
    owner = "distilbert" if name == "distilgpt2" else "openai-community"
    assert asked == [(f"{owner}/{name}", ["config.json", "merges.txt", "model.safetensors", "vocab.json"])]


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), FileNotFoundError("offline"), Timeout("no\nanswer")])
def test_hub_without_network(error):
    """Without a network, a hub name gives one sentence that says what happened and what to do."""
    with fake_hub(mock.Mock(side_effect=error)):
        refuse("gpt2", rf"^gpt2 cannot be fetched .*{type(error).__name__}.* give a folder that holds config.json")


def test_hub_without_its_library():
    """Without huggingface_hub, a hub name says how to install it."""
    with mock.patch.dict(sys.modules, huggingface_hub=None):
        refuse("gpt2-medium", r'^gpt2-medium .*pip install "nanopeft\[hub\]", or give a folder')


def test_folder_goes_before_hub(folder, monkeypatch):
    """A folder here of a hub model's name is that folder."""
    folder.rename(folder.parent / "gpt2")
    monkeypatch.chdir(folder.parent)
    with fake_hub(mock.Mock(side_effect=AssertionError)):
        assert load_gpt("gpt2").config.n_embd == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "relu"}, {"n_inner": 8}, {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": False},
    ],
)  # fmt: skip
def test_other_models_are_refused(tmp_path, changes):
    """A GPT-2 of transformers that would give other logits here is refused by the key that makes it another."""
    sizes = dict(vocab_size=61, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(GPT2Config(**sizes | changes)).save_pretrained(tmp_path)
    with pytest.raises(Error, match=[*changes][0]):
        load_gpt(tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("offline", ["1", "0"])
def test_hub_out_of_reach(tmp_path, offline):
    """Told to stay offline, or with the hub out of reach, huggingface_hub's error comes as one sentence of ours."""
    code = "from nanopeft.trainer import Error, bases\n"
    code += "try: bases.load_gpt('gpt2')\nexcept Error as error: print(error)"
    # Port 9 of this machine answers nobody
    env = os.environ | {"HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env = env | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(gpt.__file__).parents[1], capture_output=True, text=True
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("gpt2 cannot be fetched from the Hugging Face hub") and "give a folder" in line


# ------------------------------------------------------------------------------------------------- adapters' configs

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up"]}


@settings(deadline=None, max_examples=50)
@given(
    st.one_of(st.just("all-linear"), st.just(r"h\.\d\..*"), st.just(("up", "h.0.up"))),
    st.integers(1, 9),
    st.floats(0.5, 64),
    st.floats(0, 0.9),
    st.booleans(),
    st.dictionaries(st.sampled_from(["up", "h.0.up"]), st.integers(1, 9)),
    st.sampled_from([(), ("head",)]),
)
def test_config_gives_back_the_arguments(targets, r, alpha, dropout, rslora, ranks, modules_to_save):
    """lora_arguments of lora_config, through JSON, are the arguments that add_lora was called with."""
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(2))
    model = nn.ModuleDict({"h": blocks, "head": nn.Linear(2, 2)})
    arguments = dict(targets=targets, r=r, alpha=alpha, dropout=dropout, rslora=rslora, ranks=ranks)
    arguments["modules_to_save"] = modules_to_save
    lora.add_lora(model, **arguments)
    found = peft_config.lora_arguments(json.loads(json.dumps(lora.lora_config(model))))
    assert {**found, "targets": tuple(found["targets"])} == {**arguments, "targets": tuple(targets)}


@pytest.mark.parametrize(
    "change",
    [
        {"use_qalora": True}, {"use_bdlora": {"nblocks": 2}}, {"alpha_pattern": {"up": 4}},
        {"modules_to_save": "score"}, {"modules_to_save": [1]}, {"modules_to_save": [""]},
        {"layers_to_transform": [1]}, {"layer_replication": [[0, 2]]},
        {"exclude_modules": ["h.0.up"]}, {"target_parameters": ["experts.up"]}, {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [1]}, {"lora_bias": True}, {"bias": "all"}, {"bias": None},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"r": "4"}, {"r": True}, {"r": 4.0},
        {"r": None}, {"lora_alpha": "8"}, {"lora_alpha": True}, {"lora_dropout": None}, {"rank_pattern": ["up"]},
        {"use_rslora": 1}, {"target_modules": None}, {"target_modules": [None]}, {"target_modules": {"up": 1}},
    ],
)  # fmt: skip
def test_configs_that_lora_cannot_follow_are_refused(change):
    """A config that asks for what lora.py does not do, or has a field of a wrong type, is refused by name."""
    assert peft_config.lora_arguments(GOOD)["r"] == 4
    with pytest.raises(Error, match=f"adapter_config.json.*{next(iter(change))}") as caught:
        peft_config.lora_arguments({**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_defaults_of_a_config_are_pefts():
    """Fields that a config leaves out have peft's defaults: r 8, alpha 8, no dropout, no rsLoRA."""
    assert peft_config.lora_arguments({"peft_type": "LORA", "target_modules": ["up"]}) == {
        "targets": ["up"], "r": 8, "alpha": 8, "dropout": 0.0, "ranks": {}, "rslora": False,
        "modules_to_save": (),
    }  # fmt: skip


PROMPTS = {
    "prompt": (peft_config.prompt_arguments, lambda: prompt.prompt_config(prompt.PromptTuning(tiny(), 3))),
    "prefix": (peft_config.prefix_arguments, lambda: prefix.prefix_config(prefix.PrefixTuning(tiny(), 3))),
    "ptuning": (peft_config.ptuning_arguments, lambda: ptuning.ptuning_config(ptuning.PTuning(tiny(), 3))),
    "template": (
        peft_config.ptuning_arguments,
        lambda: ptuning.ptuning_config(ptuning.PTuning(tiny(), template="[P]a{source}[P]")),
    ),
}


@pytest.mark.parametrize(
    "kind, change",
    [
        *((kind, change) for kind in PROMPTS for change in (
            {"num_virtual_tokens": 2.0}, {"num_virtual_tokens": "5"}, {"num_virtual_tokens": True},
            {"num_virtual_tokens": None}, {"task_type": "SEQ_CLS"}, {"num_transformer_submodules": 2},
            {"modules_to_save": ["score"]},
        )),
        ("prompt", {"prompt_tuning_init": "WORDS"}), ("prefix", {"prefix_projection": 3}),
        ("prefix", {"init_weights": "one"}),
        *(("ptuning", {"encoder_reparameterization_type": x}) for x in ("GRU", None, 3, "lstm")),
        ("template", {"template": 3}), ("template", {"template": ["[P]"]}),
        *(("template", {"pseudo_id": x}) for x in ("64", None, 1.0)),
    ],
)  # fmt: skip
def test_configs_that_prompts_cannot_follow_are_refused(kind, change):
    """Every field of a config that is read is checked, and the message names it."""
    read, config = PROMPTS[kind][0], PROMPTS[kind][1]()
    assert read(config)["n_tokens"] in (2, 3)
    with pytest.raises(Error, match=next(iter(change))):
        read(config | change)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": None}, {"target_modules": [3]}, {"placement": 1}, {"reduction": "16"}, {"reduction": True},
        {"bottleneck": 2.0}, {"activation": None}, {"activation": ["relu"]},
    ],
)  # fmt: skip
def test_configs_that_adapters_cannot_follow_are_refused(change):
    """Every field of a bottleneck adapter's config is checked, alone and inside a fusion's."""
    config = adapter.adapter_config(adapter.add_adapter(tiny(), placement="pfeiffer", reduction=4))
    peft_config.adapter_arguments(config)
    for read, bad in (
        (peft_config.adapter_arguments, config | change),
        (peft_config.fusion_arguments, {"adapters": [config, config | change]}),
    ):
        with pytest.raises(Error, match=next(iter(change))):
            read(bad)
    for adapters in (None, [], {}, "adapters", [None]):
        with pytest.raises(Error, match="adapters must be"):
            peft_config.fusion_arguments({"adapters": adapters})


@pytest.mark.parametrize("config", [[], None, 3, "LORA", {}, {"peft_type": "VERA"}, {"peft_type": ["LORA"]}])
def test_a_config_of_no_method_is_refused(tmp_path, config):
    """A config that is no object, or of a method that is not here, is refused in one line."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Error, match="must hold an object|peft_type") as caught:
        methods.load(tmp_path, torch.float32, torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"},
        {"alpha_pattern": {"c_attn": 3}}, {"layers_to_transform": [1]},
        {"trainable_token_indices": [1, 2]}, {"lora_bias": True},
    ],
)  # fmt: skip
def test_what_peft_saves_and_lora_cannot_do_is_refused(options, tmp_path):
    """A real peft adapter with more to it than LoRA is refused by its config, and not opened wrongly."""
    sizes = dict(vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes)), config).save_pretrained(tmp_path)
    with pytest.raises(Error, match=next(iter(options))):
        peft_config.lora_arguments(checkpoint.read_adapter(tmp_path)[0])


COMMON = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
COMMON |= {"inference_mode"}
PROMPT = {"num_virtual_tokens", "num_transformer_submodules", "modules_to_save"}
PROMPT |= {"token_dim", "num_attention_heads", "num_layers"}  # these are seen from the model and the tensor
KNOWN = {
    peft.LoraConfig: {
        "target_modules", "r", "lora_alpha", "lora_dropout", "rank_pattern", "use_rslora", "use_dora", "bias",
        "init_lora_weights", "modules_to_save", *peft_config.UNSUPPORTED,
        "fan_in_fan_out",  # seen from the layer
        "layers_pattern", "qalora_group_size", "megatron_config", "megatron_core",  # of what is refused, or unused
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of an init, which is refused where it matters
        "velora_config",  # how activations are kept in training
        "runtime_config", "ensure_weight_tying",  # not saved; two adapters that happen to be equal
    },
    peft.PromptTuningConfig: PROMPT | {"prompt_tuning_init"} | {
        "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",  # of the start alone
    },
    peft.PromptEncoderConfig: PROMPT | {
        "encoder_reparameterization_type",
        "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",  # of the encoder, which no file has
    },
    peft.PrefixTuningConfig: PROMPT | {"prefix_projection", "init_weights", "encoder_hidden_size"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_every_field_of_pefts_config_is_known(kind):
    """Each field of this peft's config is used, refused, or known not to change what the adapter computes."""
    assert {field.name for field in dataclasses.fields(kind)} - COMMON == KNOWN[kind] - COMMON


def test_an_evaluation_that_is_nan_is_not_the_best():
    """A loss of NaN on the way is no better than another, and neither is any later one worse than it."""
    progress = checkpoint.Progress({})
    better = []
    for progress.step, loss in enumerate((3.0, math.nan, 2.0, 2.5, 1.0)):
        better.append(progress.note(loss))
    assert better == [False, False, True, False, True] and progress.best_step == 4
