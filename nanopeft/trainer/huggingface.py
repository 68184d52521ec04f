# SPDX-License-Identifier: MIT
"""Any causal LM that transformers opens, and its tokenizer, behind the calls of gpt.GPT and of a tiktoken.Encoding.

A model gets two things. Its dropout is off, as our recipe has none. And its loss goes through gpt.chunked_loss, which
never holds all logits, if the head is a plain linear layer: if the logits are what the head returns and the loss is
their mean cross-entropy. Whether it is so is tried once on a few tokens, and otherwise the loss stays the model's own.
transformers takes seconds to import, so it is imported where it is needed.
"""

import functools
import inspect
import itertools
import os
import re
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError

from nanopeft import gpt
from nanopeft.trainer import Error
from nanopeft.trainer.checkpoint import read_json
from nanopeft.trainer.tokenizer import byte_alphabet

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
TOKENIZER = ("*token*.json", "vocab.*", "merges.txt", "*.model", "chat_template.*")
# What transformers raises for a file that is damaged, is missing, or is of a model that it does not know
REFUSALS = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError)


def library(folder):
    """The module transformers."""
    try:
        import transformers
    except ImportError:
        raise Error(f"{folder} is no GPT-2, and others are transformers': pip install \"nanopeft[hub]\"") from None
    transformers.logging.disable_progress_bar()
    return transformers


def refusal(folder, error):
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return Error(f"transformers does not open {folder}: {type(error).__name__}: {lines[0].strip()}")


# --------------------------------------------------------------------------------------------------------------- model


def read_config(folder):
    """The model's config, without dropout; Error if it is of no causal LM."""
    transformers, stored = library(folder), read_json(folder / "config.json")
    if "quantization_config" in stored:
        raise Error(f"{folder} is stored quantized: give the model that it was made from, in 16 or 32 bits")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except REFUSALS as error:
        raise refusal(folder, error) from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Error(f"{folder} is a model of type {config.model_type!r}, which transformers has no causal LM for")
    parts = [config]
    for part in parts:  # a config may hold others, of its text model, say
        parts += [value for value in vars(part).values() if isinstance(value, transformers.PreTrainedConfig)]
        for key, value in vars(part).items():
            if "drop" in key and type(value) is float:
                setattr(part, key, 0.0)
    return config


def load(folder, dtype):
    """The model in evaluation mode. Its attribute checksum is of the files' bytes: weights, config and tokenizer."""
    config = read_config(folder)
    paths = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    if not paths:
        where = f"{folder} has no {WEIGHTS[0]}: weights of other formats may run code when they are opened"
        raise Error(f"{where}; save_pretrained of the opened model writes it")
    options = dict(config=config, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    try:
        auto = library(folder).AutoModelForCausalLM
        model, found = auto.from_pretrained(folder, output_loading_info=True, **options)
    except (*REFUSALS, SafetensorError) as error:
        raise refusal(folder, error) from None
    if found["missing_keys"]:  # transformers draws them at random
        raise Error(f"{folder} has no tensors {', '.join(sorted(found['missing_keys'])[:3])}")
    model.checksum = checksum([*paths, *(path for name in ("config.json", *TOKENIZER) for path in folder.glob(name))])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if leaks(model, slice(4, 8), slice(0, 4)):
        raise Error(f"{folder} is no causal LM: a token's logits depend on later tokens")
    return with_loss(model)


def load_shapes(folder):
    """The same model without numbers."""
    config = read_config(folder)
    with torch.device("meta"):
        return library(folder).AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def checksum(paths):
    total = 0
    for path in sorted(paths):
        total = zlib.crc32(path.name.encode(), total)
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                total = zlib.crc32(part, total)
    return f"{total:08x}"


@torch.no_grad()
def leaks(model, changed, seen, **options):
    """Whether the logits in the places `seen` change with the tokens in the places `changed`, of 8 tokens."""
    size = len(model.get_input_embeddings().weight)
    ids = torch.arange(2, 10, device=model.device)[None] % size
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 8) % size
    a, b = (model(input_ids=x, use_cache=False, **options).logits[:, seen].float() for x in (ids, other))
    # Not exactly 0: a mixture of experts multiplies with other shapes, which round otherwise
    return ((a - b).abs().max() > 8 * torch.finfo(model.dtype).eps * a.abs().max()).item()


def with_loss(model):
    """The model as an instance of a subclass of the same name, whose loss is in chunks if the probe finds it equal."""
    kind = type(model)
    has_cache = "past_key_values" in inspect.signature(kind.forward).parameters

    @functools.wraps(kind.forward)
    def forward(self, *args, labels=None, **options):
        if labels is None:
            again = options.get("use_cache") and not has_cache and options.get("cache_params") is None
            return (read_again if again else kind.forward)(self, *args, **options)
        options.setdefault("use_cache", False)  # a cache would be kept for nothing, and would keep rows from packing
        if not self.has_plain_head:
            return kind.forward(self, *args, labels=labels, **options)
        head, seen = self.get_output_embeddings(), []

        def keep(head, inputs):
            seen.append(inputs[0])  # (B, T, d)
            return inputs[0][:, :0]  # and of no position the logits

        with head.register_forward_pre_hook(keep):
            out = kind.forward(self, *args, **options)
        x, labels = seen[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # x[t] is scored on labels[t + 1]
        rows = max(256, (1 << 21) // self.config.get_text_config().vocab_size)
        loss = gpt.chunked_loss(head, x, labels, rows)
        return type(out)(**{**out, "loss": loss, "logits": None})

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}  # save_pretrained writes the name
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "has_plain_head": False, **names})
    model.has_plain_head = has_plain_head(model)
    return model


class EmbeddingCache:
    """For a model with a state in place of keys and values, such as Mamba: the text so far, which is read again."""

    x = None  # (B, S, d)

    def get_seq_length(self):
        return 0 if self.x is None else self.x.size(1)


def read_again(model, input_ids=None, *, inputs_embeds=None, past_key_values=None, **options):
    cache = EmbeddingCache() if past_key_values is None else past_key_values
    x = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, d)
    cache.x = x if cache.x is None else torch.cat((cache.x, x), 1)  # (B, S, d)
    out = model(inputs_embeds=cache.x, **options | {"use_cache": False})
    out.past_key_values = cache
    return out


@torch.no_grad()
def has_plain_head(model):
    """Whether the logits are the head's output as it is, and the loss is their mean cross-entropy and nothing more."""
    head, seen = model.get_output_embeddings(), []
    if head is None:
        return False
    ids = torch.arange(2, 10, device=model.device)[None] % len(model.get_input_embeddings().weight)
    model.train()  # some models add a loss of their own in training
    with head.register_forward_hook(lambda head, inputs, output: seen.append(output)):
        out = model(input_ids=ids, labels=ids)
    model.eval()
    if len(seen) != 1 or not torch.equal(seen[0].float(), out.logits.float()):
        return False
    loss = gpt.plain_loss(nn.Identity(), out.logits[0, :-1], ids[0, 1:])
    return torch.isclose(loss, out.loss.to(loss.dtype), rtol=1e-5, atol=0).item()


def save(model, tokenizer, folder):
    """Writes what transformers opens; the names of the files. A folder without config.json is no model: it goes first
    and comes last, so that no model is there rather than half of one."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new") as new:
        model.save_pretrained(new)
        tokenizer.inner.save_pretrained(new)
        (folder / "config.json").unlink(missing_ok=True)
        for pattern in (*WEIGHTS, "model.safetensors.index.json"):
            for old in folder.glob(pattern):  # other shards than these would be read instead
                old.unlink()
        names = sorted(os.listdir(new), key=lambda name: (name == "config.json", name))
        for name in names:
            os.replace(Path(new, name), folder / name)
    return names


# ----------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """The calls of a tiktoken.Encoding, answered by transformers' tokenizer, and those that a chat needs."""

    def __init__(self, folder):
        try:
            options = dict(local_files_only=True, trust_remote_code=False)
            self.inner = library(folder).AutoTokenizer.from_pretrained(folder, **options)
        except REFUSALS as error:
            raise refusal(folder, error) from None
        self.name, self.eot_token = str(folder), self.inner.eos_token_id
        if self.eot_token is None:
            raise Error(f"{folder} has a tokenizer without eos_token, the token that ends a text")
        self.n_vocab = max(self.inner.get_vocab().values()) + 1
        self.added = self.inner.added_tokens_decoder  # {id: token} beside those that were learned
        with_start, without = self.inner("a").input_ids[:1], self.encode_ordinary("a")[:1]
        self.bos_token = None if with_start == without else with_start[0]
        self.end_of_turn = {self.eot_token}
        for name in ("config.json", "generation_config.json"):
            found = read_json(folder / name).get("eos_token_id") if os.path.isfile(folder / name) else None
            self.end_of_turn |= {*found} if isinstance(found, list) else {found} - {None}
        if self.inner.chat_template is None:
            self.chat = self.chat_prompt = None
        else:
            with suppress(Error):
                roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
                last = [ids[-1] for ids, scored in self.chat(roles) if scored][-1]
                self.end_of_turn |= {last} & {*self.added}

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        options = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
        return self.inner([*texts], **options).input_ids if texts else []

    # ------ and back

    @functools.cached_property
    def pieces(self):
        """The bytes of each token; of special tokens none."""
        tokens = self.inner.convert_ids_to_tokens([*range(self.n_vocab)])
        byte_of, text = {char: byte for byte, char in byte_alphabet().items()}, "é ñ"
        found = "".join(tokens[i] for i in self.encode_ordinary(text))
        if bytes(byte_of.get(char, 0) for char in found).strip() == text.encode():  # byte-level BPE
            pieces = [bytes(byte_of.get(char, 63) for char in token or "") for token in tokens]
        else:  # SentencePiece
            in_hex = [re.fullmatch("<0x([0-9A-F]{2})>", token or "") for token in tokens]
            pieces = [
                bytes.fromhex(hex[1]) if hex else (token or "").replace("▁", " ").encode()
                for token, hex in zip(tokens, in_hex)
            ]
        for i, token in self.added.items():
            pieces[i] = b"" if token.special else token.content.encode()
        return pieces

    @functools.cached_property
    def adds_space(self):
        """Whether it puts a space in front of a text that has none, as SentencePiece does."""
        return self.pieces[self.encode_ordinary("a")[0]].startswith(b" ")

    def decode_tokens_bytes(self, ids):
        parts = [self.pieces[i] for i in ids]
        if self.adds_space:
            starts = [k for k, i in enumerate(ids) if k == 0 or ids[k - 1] in self.added]
            for k in starts:
                parts[k] = parts[k].removeprefix(b" ")
        return parts

    def decode_bytes(self, ids):
        return b"".join(self.decode_tokens_bytes(ids))

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # ------ chat

    def chat_prompt(self, messages):
        """Token ids that end where the assistant's next turn begins."""
        return self.inner(self.render(messages, add_generation_prompt=True), add_special_tokens=False).input_ids

    def chat(self, messages):
        """[(ids, scored)]: the whole conversation in parts. Scored are the assistant's turns, with their end tokens.

        A template may render a turn otherwise when others follow: Qwen3's drops its thoughts. Then it is not scored,
        for it is not what the model would generate; the last turn always is.
        """
        text, spans = self.render(messages), []  # spans: characters from and to
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:i], add_generation_prompt=True)
                after = self.render(messages[: i + 1])
                if text.startswith(after) and after.startswith(before):
                    spans.append((len(before), len(after)))
        if not spans:
            raise Error(f"the chat template of {self.name} shows no assistant's turn here the way it is generated")
        found = self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, scored = found.input_ids, [False] * len(found.input_ids)
        for start, end in spans:
            inside = [k for k, (first, _) in enumerate(found.offset_mapping) if start <= first < end]
            ends = [k for k in inside if ids[k] in self.added and self.added[ids[k]].special]
            for k in inside:
                scored[k] = not ends or k <= ends[-1]  # what follows the end token, a newline, belongs to no turn
        return [([i for i, _ in part], key) for key, part in itertools.groupby(zip(ids, scored), key=lambda x: x[1])]

    def render(self, messages, **options):
        from jinja2 import TemplateError  # transformers runs templates by it, in a sandbox

        try:
            return self.inner.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise Error(f"the chat template of {self.name} does not take these messages: {error}") from None

