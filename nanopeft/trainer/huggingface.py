# SPDX-License-Identifier: MIT
"""Any causal LM that transformers opens, and its tokenizer, behind the calls of gpt.GPT and of a tiktoken.Encoding.

A model gets two things. Its dropout is off, as our recipe has none. And its loss goes through gpt.chunked_loss, which
never holds all logits, if the head is a plain linear layer: if the logits are what the head returns, and the loss is
their mean cross-entropy. Whether it is so is tried once on a few tokens, and otherwise the loss stays the model's own.
transformers takes seconds to import, so it is imported where it is needed.
"""

import functools
import inspect
import itertools
import math
import os
import re
from contextlib import contextmanager, suppress

import torch
import torch.nn as nn
from safetensors import safe_open

from nanopeft import gpt
from nanopeft.trainer import Error
from nanopeft.trainer.checkpoint import read_json
from nanopeft.trainer.tokenizer import token_bytes


def library(folder):
    """The module transformers."""
    try:
        import transformers
    except ImportError:
        raise Error(f"{folder} is no GPT-2, and others are transformers': pip install \"nanopeft[hub]\"") from None
    transformers.logging.disable_progress_bar()
    return transformers


def from_folder(auto, folder, **options):
    """from_pretrained of one of transformers' classes, which runs no code that comes with a model."""
    opened = getattr(library(folder), auto).from_pretrained
    with damaged(f"{auto} of transformers does not open {folder}"):
        return opened(folder, local_files_only=True, trust_remote_code=False, **options)


@contextmanager
def damaged(what):
    """Around what opens a stranger's files and tries them out, which can fail in any way: of that it makes an Error."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        raise one_line(what, error) from None


def one_line(what, error):
    return Error(f"{what}: {(str(error).strip() or repr(error)).splitlines()[0]}")


# --------------------------------------------------------------------------------------------------------------- model


def read_config(folder):
    """The model's config, without dropout; Error if it is of no causal LM."""
    transformers, stored = library(folder), read_json(folder / "config.json")
    if "quantization_config" in stored:
        raise Error(f"{folder} is stored quantized: give the model that it was made from, in 16 or 32 bits")
    configs = [stored]
    for config in configs:
        configs += [value for value in config.values() if isinstance(value, dict)]
        for key, n in config.items():  # of each one transformers makes Python objects
            counts = re.fullmatch("((n|num)_.*|.*coder_)(layer|expert|block)s?", key)
            if counts and isinstance(n, (int, float)) and not n <= 4096:
                raise Error(f"{folder / 'config.json'}: {key} = {n} is more than 4096")
    config = from_folder("AutoConfig", folder)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Error(f"{folder} is of type {config.model_type!r}, and transformers has no causal LM of that type")
    parts = [config]
    for part in parts:  # a config may hold others: a text model's, say
        parts += [value for value in vars(part).values() if isinstance(value, transformers.PreTrainedConfig)]
        for key, value in vars(part).items():
            if "drop" in key and type(value) is float:
                setattr(part, key, 0.0)
    return config


def load(folder, dtype):
    """The model in evaluation mode."""
    if os.path.exists(folder / "adapter_config.json"):  # transformers would open that, and the base it names
        raise Error(f"{folder} has an adapter_config.json beside its model: move one of them elsewhere")
    shapes = load_shapes(folder)
    wanted = sum(t.numel() for t in {*shapes.parameters(), *shapes.buffers()})
    there = 0
    for path in folder.glob("model*.safetensors"):
        with damaged(f"{path} cannot be read"), safe_open(path, "pt") as file:
            there += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    if wanted > 2 * there + (1 << 24):  # small models have tables of rotations and masks, which are in no file
        raise Error(f"{folder}: config.json is of a model of {wanted:,} numbers, and the files have {there:,}")
    options = dict(config=read_config(folder), dtype=dtype, use_safetensors=True, output_loading_info=True)
    model, found = from_folder("AutoModelForCausalLM", folder, **options)
    if found["missing_keys"]:  # transformers would draw them at random
        raise Error(f"{folder} has no tensors {', '.join(sorted(found['missing_keys'])[:3])}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return with_loss(model)


def load_shapes(folder):
    """The same model without numbers."""
    config, auto = read_config(folder), library(folder).AutoModelForCausalLM
    # In bf16, the one dtype in which torch runs a mixture of experts there
    with torch.device("meta"), damaged(f"{folder} is no model"):
        return auto.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)


def with_loss(model):
    """The model as an instance of a subclass of the same name, whose loss is in chunks where that is the same loss."""
    kind = type(model)
    has_cache = "past_key_values" in inspect.signature(kind.forward).parameters

    @functools.wraps(kind.forward)
    def forward(self, *args, labels=None, **options):
        if labels is None:
            again = options.get("use_cache") and not has_cache and options.get("cache_params") is None
            return (read_again if again else kind.forward)(self, *args, **options)
        options.setdefault("use_cache", False)  # it would be for nothing, and models do not pack rows beside a cache
        if not self.has_plain_head:
            return kind.forward(self, *args, labels=labels, **options)
        head, seen = self.get_output_embeddings(), []

        def keep(head, inputs):
            seen.append(inputs[0])  # (B, T, d)
            return inputs[0][:, :0]  # the model itself computes logits of no position

        with head.register_forward_pre_hook(keep):
            out = kind.forward(self, *args, **options)
        x, labels = seen[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # x[t] is scored on labels[t + 1]
        rows = gpt.rows_at_a_time(self.config.get_text_config().vocab_size, x.device)
        return type(out)(**{**out, "loss": gpt.chunked_loss(head, x, labels, rows), "logits": None})

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}  # save_pretrained writes the name
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "has_plain_head": False, **names})
    model.has_plain_head = has_plain_head(model)
    return model


@torch.no_grad()
def has_plain_head(model):
    """Whether the logits are what the head returns, and the loss is their mean cross-entropy and nothing more."""
    head, seen = model.get_output_embeddings(), []
    if head is None:
        return False
    ids = torch.arange(8, device=model.device)[None] % head.weight.size(0)  # (1, 8)
    model.train()  # some models add a loss of their own in training
    with head.register_forward_hook(lambda head, inputs, output: seen.append(output)):
        out = model(input_ids=ids, labels=ids)
    model.eval()
    if len(seen) != 1 or not torch.equal(seen[0].to(out.logits.dtype), out.logits):
        return False
    loss = gpt.plain_loss(nn.Identity(), out.logits[0, :-1], ids[0, 1:])
    return torch.isclose(loss, out.loss.to(loss.dtype), rtol=1e-5, atol=0).item()  # two fp32 sums of seven numbers


class EmbeddingCache:
    """For a model with a state in place of keys and values, such as Mamba: the text so far, to be read again."""

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


# ----------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """The calls of a tiktoken.Encoding, answered by transformers' tokenizer, and those that a chat needs."""

    def __init__(self, folder):
        self.inner, self.name = from_folder("AutoTokenizer", folder), str(folder)
        with damaged(f"the tokenizer of {folder} does not work"):
            self.try_out(folder)

    def try_out(self, folder):
        self.eot_token, first = self.inner.eos_token_id, self.encode_ordinary("a")[:1]
        if not first or self.eot_token is None:  # some kinds open without files, and know no token
            raise Error(f"{folder} has no tokenizer that knows the letter a and an eos_token, which ends a text")
        start = self.inner("a").input_ids[:1]
        self.bos_token = None if start == first else start[0]  # put in front of a text
        self.special = {i for i, token in self.inner.added_tokens_decoder.items() if token.special}
        known, used = {*self.inner.get_vocab().values()}, set()
        self.adds_space = self.pieces[first[0]].startswith(b" ")  # in front of a text, as SentencePiece does
        self.end_of_turn = {self.eot_token}
        for name in ("config.json", "generation_config.json"):
            ends = read_json(folder / name).get("eos_token_id") if os.path.isfile(folder / name) else None
            self.end_of_turn |= {i for i in (ends if isinstance(ends, list) else [ends]) if i in known}
        if self.inner.chat_template is None:
            self.chat = self.chat_prompt = None
        else:
            with suppress(Error):
                turns = self.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
                used = {i for ids, _ in turns for i in ids}
                self.end_of_turn |= {ids[-1] for ids, scored in turns if scored} & self.special
        # Other special tokens may have no row in the model, such as Gemma 3's for pictures
        self.n_vocab = 1 + max(known - self.special | used | self.end_of_turn)

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        options = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
        return self.inner([*texts], **options).input_ids if texts else []

    def encode_continuations(self, texts):
        """Of texts that go on with another one: without the space that SentencePiece puts in front of a text."""
        if not self.adds_space:
            return self.encode_ordinary_batch(texts)
        before, found = self.encode_ordinary("\1"), self.encode_ordinary_batch(["\1" + text for text in texts])
        n = len(before)  # nothing is joined to this character, which is in no text
        return [ids[n:] if ids[:n] == before else self.encode_ordinary(text) for ids, text in zip(found, texts)]

    @functools.cached_property
    def pieces(self):
        """{id: bytes} of each token; special tokens have none."""
        tokens = {i: token for token, i in self.inner.get_vocab().items()}
        has_bytes = "".join(tokens[i] for i in self.encode_ordinary("é")).endswith("Ã©")  # é in byte_alphabet
        pieces = {i: token_bytes(token, has_bytes) for i, token in tokens.items()}
        for i, token in self.inner.added_tokens_decoder.items():
            if token.special or has_bytes:  # SentencePiece's, such as Gemma's runs of spaces, are like its others
                pieces[i] = b"" if token.special else token.content.encode()
        return pieces

    def decode_tokens_bytes(self, ids):
        parts = [self.pieces.get(i, b"") for i in ids]  # a model may have more rows than there are tokens
        for k in range(len(ids)):
            if self.adds_space and (k == 0 or ids[k - 1] in self.special):  # a text starts here
                parts[k] = parts[k].removeprefix(b" ")
        return parts

    def decode_bytes(self, ids):
        return b"".join(self.decode_tokens_bytes(ids))

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def render(self, messages, **options):
        from jinja2 import TemplateError  # of transformers, which runs templates in jinja2's sandbox

        try:
            return self.inner.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise one_line(f"the chat template of {self.name} does not take these messages", error) from None

    def chat_prompt(self, messages):
        """Token ids that end where the assistant's next turn begins."""
        return self.inner(self.render(messages, add_generation_prompt=True), add_special_tokens=False).input_ids

    def chat(self, messages):
        """[(ids, scored)]: the conversation in parts. Scored are the assistant's turns, each with its end token.

        Some templates render a turn otherwise when others follow: Qwen3's leaves out its thoughts. Such a turn is not
        scored, since it is not what the model is to generate. The last turn has none that follow.
        """
        text, spans = self.render(messages), []  # (start, end) in characters
        for i, message in enumerate(messages):
            if i and message.get("role") == "assistant":  # templates refuse an empty conversation
                before = self.render(messages[:i], add_generation_prompt=True)
                after = self.render(messages[: i + 1])
                if text.startswith(after) and after.startswith(before):
                    spans.append((len(before), len(after)))
        if not spans:
            raise Error(f"the chat template of {self.name} shows no turn of the assistant as it is generated")
        found = self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, scored = found.input_ids, set()
        for start, end in spans:
            inside = [k for k, (first, _) in enumerate(found.offset_mapping) if start <= first < end]
            stop = max((k for k in inside if ids[k] in self.special), default=len(ids))
            scored |= {k for k in inside if k <= stop}  # a newline behind the end token belongs to no turn
        parts = itertools.groupby(range(len(ids)), key=lambda k: k in scored)
        return [([ids[k] for k in part], is_scored) for is_scored, part in parts]
