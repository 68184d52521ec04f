# SPDX-License-Identifier: MIT
"""The pretrained model that a run starts from, a folder: our GPT-2, or any causal LM that transformers opens.

    load_base, load_shapes, load_tokenizer, save_base       of a base of either kind
    blocks, positions, width, packs                         what differs in name from model to model
    load_gpt, save_gpt                                      GPT-2's config.json and model.safetensors

The tokenizers are in tokenizer.py and huggingface.py, where transformers' models are opened as well.
"""

import inspect
import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanopeft import gpt
from nanopeft.trainer import Error, huggingface, tokenizer
from nanopeft.trainer.checkpoint import bits, checksum_of, read_json, write

HUB = {
    "gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}  # fmt: skip
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
TOKENIZER = (  # names, not patterns: what a new base replaces is deleted, and may stand beside a user's files
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ any base


def load_base(name, dtype=torch.float32):
    """Our GPT if it is a GPT-2, else transformers' model. Its attribute checksum is of what is stored, in any dtype."""
    folder = find_checkpoint(name)
    if is_gpt2(folder):
        return load_gpt(name, dtype)
    if not find_files(folder, WEIGHTS):
        where = f"{folder} has no {WEIGHTS[0]}, and weights in other formats may run code when they are opened"
        raise Error(f"{where}: open it in transformers, and save_pretrained writes one")
    with huggingface.damaged(f"the model of {folder} does not work"):
        model = huggingface.load(folder, dtype)
        if leaks(model, slice(4, 8), slice(0, 4)):
            raise Error(f"{folder} is no causal LM: a token's logits depend on later tokens")
    model.checksum = checksum_of(find_files(folder, ("config.json", *WEIGHTS, *TOKENIZER)))
    return model


def load_shapes(name):
    """The same model without numbers: what fits it is tried out before it takes memory."""
    folder = find_checkpoint(name)
    if not is_gpt2(folder):
        return huggingface.load_shapes(folder)
    with torch.device("meta"):
        return gpt.GPT(**read_config(folder / "config.json"))


def load_tokenizer(name):
    folder = find_checkpoint(name)
    return tokenizer.load_tokenizer(folder) if is_gpt2(folder) else huggingface.Tokenizer(folder)


def save_base(model, encoding, folder):
    """Writes a whole model that transformers opens, and returns the names of its files."""
    folder, new = Path(folder), Path(folder, ".new")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    try:
        if isinstance(model, gpt.GPT):
            save_gpt(model, new)
            tokenizer.save_tokenizer(encoding, new)
        else:
            model.save_pretrained(new)
            encoding.inner.save_pretrained(new)
        # Without config.json a folder is no base. It goes first and comes last, so that a base is there whole or not at
        # all. Other files of the one before must not stay: transformers would read some in the place of new ones
        (folder / "config.json").unlink(missing_ok=True)
        for path in find_files(folder, ("generation_config.json", *WEIGHTS, *TOKENIZER)):
            path.unlink()
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)  # os.replace puts no folder over one
        names = sorted(os.listdir(new), key=lambda name: (name == "config.json", name))
        for name in names:
            os.replace(new / name, folder / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return names


def find_files(folder, patterns):
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def is_gpt2(folder):
    return read_json(folder / "config.json").get("model_type") == "gpt2"


def blocks(model):
    """The decoder blocks: the list of modules that has the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def text_config(model):
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def positions(model):
    """How many tokens the model can read at once; 2^30 if it sets no limit."""
    names = ("n_positions", "max_position_embeddings", "max_seq_len")
    return next(filter(None, (getattr(text_config(model), name, None) for name in names)), 1 << 30)


def width(model):
    """d, the size of what passes from block to block."""
    return getattr(text_config(model), "hidden_size", None) or model.config.n_embd


def packs(model):
    """Whether texts can stand in one row, each with positions from 0 on: then none sees the one before it."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    position_ids = torch.arange(4, device=model.device).repeat(2)[None]  # (1, 8)
    return not leaks(model, slice(0, 4), slice(4, 8), position_ids=position_ids)


@torch.no_grad()
def leaks(model, changed, seen, **options):
    """Whether the logits in the places `seen` depend on the tokens in the places `changed`, of eight."""
    ids = torch.arange(2, 10, device=model.device)[None] % model.get_input_embeddings().weight.size(0)  # (1, 8)
    other = ids.clone()
    other[:, changed] = ids.flip(1)[:, changed]
    a, b = (model(input_ids=x, use_cache=False, **options).logits[:, seen].float() for x in (ids, other))
    # Up to rounding: a mixture of experts groups rows differently
    return ((a - b).abs().max() > 8 * torch.finfo(model.get_input_embeddings().weight.dtype).eps * a.abs().max()).item()


# --------------------------------------------------------------------------------------------------------------- GPT-2


def load_gpt(name_or_dir="nano", dtype=torch.float32):
    """The embedded base ("nano"), a folder in Hugging Face's GPT-2 format, or one of HUB by name.

    Its attribute checksum is of the numbers as they are stored, whatever dtype they are loaded in.
    """
    folder = find_checkpoint(name_or_dir)
    config = read_config(folder / "config.json")
    with torch.device("meta"):  # shapes without memory, until the file's tensors are put in their place
        model = gpt.GPT(**config)
    state, total = {}, zlib.crc32(json.dumps(config).encode())
    try:
        stored = find_tensors(folder)
        for key, p in model.named_parameters():
            path, name = stored.pop(key.removeprefix("transformer."), (folder, None))
            if name is None:
                raise Error(f"{folder} has no tensor {key}")
            # Opened for each tensor: closing unmaps the file's pages, so that memory never holds the model twice
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
                fits = tensor.is_floating_point() and tensor.element_size() > 1  # 8 bits would need a scale
                if tensor.shape != (p.shape[::-1] if is_conv1d(key) else p.shape) or not fits:
                    found = f"{name} {list(tensor.shape)} of {tensor.dtype}"
                    raise Error(f"{path} has {found}, which does not fit config.json")
                total = zlib.crc32(bits(tensor), total)
                tensor = tensor.t() if is_conv1d(key) else tensor
                state[key] = torch.empty(p.shape, dtype=dtype).copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise Error(f"{folder}: model.safetensors, or a shard of it, cannot be read: {error}") from None
    # Older checkpoints carry the causal mask, and some the tied head; anything else, say a layer more, is a mistake
    known = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
    left = [name for _, name in stored.values() if not name.endswith(known)]
    if left:
        raise Error(f"{folder} has tensors that config.json has no place for: {', '.join(left[:3])}")
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.checksum = f"{total:08x}"
    return model


def find_tensors(folder):
    """{name without "transformer.": (file, name there)} of model.safetensors, or else of shards."""
    paths, found = [folder / "model.safetensors"], {}
    if not os.path.isfile(paths[0]):  # shards' index is not read: each says itself which tensors it has
        paths = sorted(folder.glob("model-*-of-*.safetensors")) or paths
    for path in paths:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise Error(f"{path}: no such file")
        with safe_open(path, "pt") as file:
            for name in file.keys():
                key = name.removeprefix("transformer.")
                if key in found:
                    raise Error(f"{path} has {name}, and {found[key][0].name} has it as well")
                found[key] = path, name
    return found


def save_gpt(model, folder):
    """Writes config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_inner": None,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
        "dtype": str(model.transformer.wte.weight.dtype).removeprefix("torch."), **vars(model.config),
    }  # fmt: skip
    state = model.state_dict()
    del state["lm_head.weight"]  # it is wte's
    state = {key: (t.t() if is_conv1d(key) else t).contiguous() for key, t in state.items()}
    write(folder / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def is_conv1d(key):
    """Whether GPT-2's checkpoints hold this weight as a Conv1D, that is (in, out)."""
    return key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def find_checkpoint(name_or_dir):
    """The folder of a base: config.json, model.safetensors and, mostly, vocab.json and merges.txt."""
    if name_or_dir == "nano":
        return Path(gpt.__file__).parent / "base"
    on_hub = HUB.get(name_or_dir, name_or_dir if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name_or_dir)) else None)
    if on_hub and not os.path.isdir(name_or_dir):
        name_or_dir = download(name_or_dir, on_hub)
    folder = Path(name_or_dir)
    if not os.path.isfile(folder / "config.json"):  # Path.is_file raises if the name is too long
        if os.path.isfile(folder / "adapter_config.json"):
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            ways = f"--from {folder} goes on with it, and --merge {folder} makes a base of it, if it merges"
            raise Error(f"{folder} is an adapter of the base {base!r} and no base itself: {ways}")
        known = ", ".join(HUB)
        forms = f"a folder with config.json and model.safetensors, {known}, or OWNER/MODEL on the Hugging Face hub"
        raise Error(f"no base {str(folder)!r}: give nano, {forms}")
    if is_gpt2(folder):
        read_config(folder / "config.json")  # before its tokenizer
    return folder


def download(name, on_hub):
    """The folder of a model of the Hugging Face hub, which is downloaded unless it has been."""
    files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    if name not in HUB:  # shards, other tokenizers and templates; nothing that is pickled
        files = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is

        return snapshot_download(on_hub, allow_patterns=files)
    except ImportError:
        failed = "would come from the Hugging Face hub: pip install \"nanopeft[hub]\""
    except (OSError, ValueError, HTTPError) as error:
        why = "check the name, go online, or log in with `hf auth login` if its owner wants that"
        failed = f"cannot be fetched from the Hugging Face hub ({type(error).__name__}): {why}"
    here = "" if name in HUB else "is no folder here, and "
    raise Error(f"{name} {here}{failed}, or give a folder that holds {', '.join(files)}")


def read_config(path):
    """The arguments of GPT from a config.json; what this GPT does not do is refused."""
    config = read_json(path)
    if (kind := config.get("model_type")) != "gpt2":
        raise Error(f"{path} is of a model of type {kind!r}, and a base is a GPT-2: its model_type is 'gpt2'")

    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    for key, default in sizes.items():
        sizes[key] = config.get(key, default)
        most = 1000 if key == "n_layer" else 1 << 20  # the layers are built before the tensors are read
        if type(sizes[key]) is not int or not 0 < sizes[key] <= most:
            raise Error(f"{path}: {key} must be an integer from 1 to {most}, not {sizes[key]!r}")
    required = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None, 4 * sizes["n_embd"]),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
    }  # fmt: skip
    for key, allowed in required.items():
        if config.get(key, allowed[0]) not in allowed:
            raise Error(f"{path}: {key} must be {' or '.join(map(repr, allowed))}, not {config[key]!r}")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) is not float or not 0 < epsilon < math.inf:
        raise Error(f"{path}: layer_norm_epsilon must be a positive float, not {epsilon!r}")
    tokens = {key: config.get(key, sizes["vocab_size"] - 1) for key in ("bos_token_id", "eos_token_id")}
    for key, token in tokens.items():
        if type(token) is not int or token < 0:
            raise Error(f"{path}: {key} must be the number of a token, not {token!r}")
    return {**sizes, "layer_norm_epsilon": epsilon, **tokens}
