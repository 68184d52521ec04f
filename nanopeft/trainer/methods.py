# SPDX-License-Identifier: MIT
"""One table of the methods: what each adds to a model, and how that is saved and opened again."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from nanopeft import adapter, data, gpt, lora, prefix, prompt, ptuning, qlora
from nanopeft.trainer import Error, Failure, bases, checkpoint, peft_config, tokenizer


def nothing(model, *_):
    return model


class Method(NamedTuple):
    """A row of the table. Settings are keyword arguments of `add`; they come from flags or from an adapter's file."""

    defaults: dict  # its flags
    add: Callable = nothing  # (model, **settings): freezes the model, adds what is trained, returns it
    settings: Callable = lambda args, encoding, train, model: {}  # from the flags
    peft_types: tuple = ()  # in adapter_config.json
    read_config: Callable | None = None  # settings from adapter_config.json
    state_dict: Callable | None = None
    config: Callable | None = None
    load: Callable | None = None
    discard: Callable = nothing  # what only made the parameters, before they are evaluated and saved
    penalty: Callable = lambda model: 0.0  # added to the loss


def lora_settings(args, *_):
    return {"targets": args.targets, "r": args.rank, "alpha": args.alpha}


def qlora_config(model):
    stored = next(m for m in model.modules() if isinstance(m, qlora.QuantizedLinear))
    return lora.lora_config(model) | {"base_quantization": stored.quant_type}  # ours alone: peft passes over it


def fusion_settings(args, encoding, train, model):
    adapters = []
    for folder in args.adapters:
        config, state, base_checksum = checkpoint.read_adapter(folder)
        peft_config.adapter_arguments(config)
        check_base(folder, base_checksum, args.base, model, args.force)
        adapters.append((config, state))
    return {"adapters": adapters}


def prompt_settings(args, encoding, train, model):
    init = args.init
    if init == "labels":
        if isinstance(train, data.TokenStream):
            raise Error(f"--init labels needs completions, and {args.data} has none: use modules or a .jsonl file")
        init = [i for text in sorted({tuple(c) for _, c in train.items}) for i in text if i != train.pad]
    elif init not in ("random", "vocabulary"):
        init = encoding.encode_ordinary(init)
    return {"n_tokens": args.tokens, "init": init}


METHODS = {
    "full": Method({"lr": 1e-3}),
    "lora": Method(
        {"lr": 5e-3, "rank": 8, "alpha": 16.0, "targets": "all-linear"},
        lora.add_lora, lora_settings, ("LORA",), peft_config.lora_arguments,
        lora.lora_state_dict, lora.lora_config, lora.load_lora_state_dict,
    ),
    "qlora": Method(
        {"lr": 5e-3, "rank": 8, "alpha": 16.0, "targets": "all-linear", "quant": "nf4"},
        qlora.add_qlora, lambda args, *_: lora_settings(args) | {"quant_type": args.quant}, (), None,
        lora.lora_state_dict, qlora_config, lora.load_lora_state_dict,
    ),
    "adapter": Method(
        {"lr": 5e-3, "placement": "pfeiffer", "reduction": 8},
        adapter.add_adapter, lambda args, *_: {"placement": args.placement, "reduction": args.reduction},
        ("BOTTLENECK_ADAPTER",), peft_config.adapter_arguments,
        adapter.adapter_state_dict, adapter.adapter_config, adapter.load_adapter_state_dict,
    ),
    "fusion": Method(
        {"lr": 1e-3, "adapters": None},
        adapter.add_fusion, fusion_settings, ("ADAPTER_FUSION",), peft_config.fusion_arguments,
        adapter.fusion_state_dict, adapter.fusion_config, adapter.load_fusion_state_dict,
        penalty=adapter.fusion_penalty,
    ),
    "prefix": Method(
        {"lr": 1e-1, "tokens": 20, "hidden": None},
        prefix.PrefixTuning, lambda args, *_: {"n_tokens": args.tokens, "hidden": args.hidden},
        ("PREFIX_TUNING",), peft_config.prefix_arguments,
        prefix.prefix_state_dict, prefix.prefix_config, prefix.load_prefix_state_dict, prefix.fold_prefix,
    ),
    "prompt": Method(
        {"lr": 1e-1, "tokens": 20, "init": "vocabulary"},
        prompt.PromptTuning, prompt_settings, ("PROMPT_TUNING",), peft_config.prompt_arguments,
        prompt.prompt_state_dict, prompt.prompt_config, prompt.load_prompt_state_dict,
    ),
    "ptuning": Method(
        {"lr": 3e-3, "tokens": None, "encoder": "lstm", "template": None},
        ptuning.PTuning, lambda args, *_: {"n_tokens": args.tokens, "encoder": args.encoder, "template": args.template},
        ("P_TUNING", "P_TUNING_TEMPLATE"), peft_config.ptuning_arguments,
        ptuning.ptuning_state_dict, ptuning.ptuning_config, ptuning.load_ptuning_state_dict, ptuning.fold_ptuning,
    ),
}  # fmt: skip


def load_tokenizer(base):
    return tokenizer.load_tokenizer(bases.find_checkpoint("nano" if base == "scratch" else base))


def load_base(base, encoding, dtype, device):
    """The model, with a checksum of what it is stored as, its tokenizer included."""
    if base == "scratch":
        model = gpt.GPT(vocab_size=encoding.n_vocab)
        model.checksum = base
        return model.to(device, dtype)
    model = bases.load_gpt(base, dtype)
    if encoding.n_vocab > model.config.vocab_size:
        raise Error(f"{base} has a tokenizer of {encoding.n_vocab} tokens, and a model of {model.config.vocab_size}")
    model.checksum += f"{zlib.crc32(b' '.join(encoding._mergeable_ranks)):08x}"
    return model.to(device)


def check_base(folder, base_checksum, base, model, force):
    """Error for an adapter of another base than the model: on this one its numbers mean nothing. peft's say of none."""
    if base_checksum not in (None, model.checksum) and not force:
        what = f"{folder} was trained on a base of other weights, shape or tokenizer than {base} has"
        raise Error(f"{what}: give it its own base, or use it all the same with --force")


def checksums(args, base, train, valid):
    """{flag: checksum} of what the flags of a run only name, and somebody may change under that name."""
    found = {"base": base.checksum}
    total = 0
    for split in (train, valid):
        tokens = split.tokens.numpy() if isinstance(split, data.TokenStream) else json.dumps(split.items).encode()
        total = zlib.crc32(tokens, total)
    found["data"] = f"{total:08x}"
    if args.method == "fusion":
        states = [checkpoint.read_adapter(folder)[1] for folder in args.adapters]
        found["adapters"] = " ".join(checkpoint.checksum(state, "") for state in states)
    return found


def remarks(train, valid, encoding):
    """Lines on what the data has that a user may not expect."""
    if n := train.n_truncated + valid.n_truncated:
        yield f"{n:,} examples have more than {train.length} tokens and were cut"
    if isinstance(train, data.TokenStream):
        texts = (encoding.decode(split.tokens[split.tokens != encoding.eot_token].tolist()) for split in (train, valid))
        if n := sum(text.count(tokenizer.ENDOFTEXT) for text in texts):
            yield f"{tokenizer.ENDOFTEXT} stands {n:,} times in the data: it is read as text, and ends no document"


def add(model, args, encoding, train):
    """The model with what the method trains; all else is frozen."""
    method = METHODS[args.method]
    if "rank" in method.defaults and args.rank > model.config.n_embd:
        width = f"the model's width, {model.config.n_embd}"
        raise Error(f"--rank {args.rank} is above {width}: no update has a rank above it")
    model = method.add(model, **method.settings(args, encoding, train, model))
    if not any(p.numel() for p in model.parameters() if p.requires_grad):
        raise Error(f"--template {args.template!r} has no [P], so there is nothing to train")
    return model


def count(method, base_size, model):
    """Numbers of parameters, before an engine shards them. A fusion has frozen adapters too."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = max(base_size + trained * (method != "full"), sum(p.numel() for p in model.parameters()))
    return {"trained_parameters": trained, "total_parameters": total}


def save(model, encoding, args, folder, base_checksum):
    """Writes what was trained, full: a GPT-2 checkpoint. The numbers and bytes on the disk."""
    method = METHODS[args.method]
    if method.state_dict is not None:
        config = method.config(model) | {"base_model_name_or_path": args.base, "task_type": "CAUSAL_LM"}
        state, files = method.state_dict(model), ("adapter_config.json", "adapter_model.safetensors")
        checkpoint.save_adapter(folder, state, config, base_checksum)
        return {"stored_parameters": sum(t.numel() for t in state.values()), "stored_bytes": size_of(folder, files)}
    try:
        bases.save_gpt(model, folder)
        tokenizer.save_tokenizer(encoding, folder)
        (folder / "adapter_config.json").unlink(missing_ok=True)  # of an earlier run: load would open it
    except (OSError, SafetensorError) as error:
        raise Failure(f"{folder} cannot be written: {error}; --resume writes it again") from None
    files = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
    stored = sum(p.numel() for p in model.parameters())
    return {"stored_parameters": stored, "stored_bytes": size_of(folder, files)}


def size_of(folder, files):
    return sum((folder / name).stat().st_size for name in files)


def load(folder, dtype, device, force=False):
    """(model, tokenizer) from what save wrote, or from an adapter of peft's on one of the bases here."""
    folder = Path(folder)
    if not os.path.exists(folder / "adapter_config.json"):
        if not os.path.exists(folder / "config.json"):
            unfinished = os.path.exists(folder / "state.safetensors")
            raise Error(f"{folder} holds nothing trained" + ": --resume finishes the run" * unfinished)
        encoding = load_tokenizer(str(folder))
        return load_base(str(folder), encoding, dtype, device), encoding
    config, state, base_checksum = checkpoint.read_adapter(folder)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    method = next((method for method in METHODS.values() if kind in method.peft_types), None)
    if method is None:
        raise Error(f"{folder / 'adapter_config.json'} has peft_type {kind!r}, which is none of the methods here")
    if not isinstance(base, str):
        raise Error(f"{folder / 'adapter_config.json'} does not say which base it is for: base_model_name_or_path")
    settings = method.read_config(config)
    # First on a base of shapes alone: what does not fit it is refused before it takes any memory
    with torch.device("meta"):
        shapes = gpt.GPT(**bases.read_config(bases.find_checkpoint(base) / "config.json"))
    method.load(method.add(shapes, **settings), state)
    if "base_quantization" in config:
        method, settings = METHODS["qlora"], settings | {"quant_type": config["base_quantization"]}
    encoding = load_tokenizer(base)
    model = load_base(base, encoding, dtype, device)
    check_base(folder, base_checksum, base, model, force)
    model = method.add(model, **settings)
    method.load(model, state)
    return model, encoding


# ------------------------------------------------------------------------------------- virtual tokens beside the text


def apply_template(model, ids, encoding):
    """A prompt's token ids, with the text and the virtual tokens of P-tuning's template around it."""
    if getattr(model, "template", None) is None:
        return ids
    start = ids[:1] if ids[:1] == [encoding.eot_token] else []  # a prompt that was cut has lost it
    return [*start, *model.apply_template(ids[len(start) :], encoding.encode_ordinary)]


def free_positions(model):
    """How many tokens may be given to the model: virtual tokens in front of the input take positions too."""
    in_front = 0 if getattr(model, "template", None) else getattr(model, "n_tokens", 0)
    return model.config.n_positions - in_front


def fit_data(model, args, encoding, *splits):
    """Puts P-tuning's template around the prompts of the data. Error if an example would not fit the model."""
    if getattr(model, "template", None) is not None:
        if isinstance(splits[0], data.TokenStream):
            raise Error(f"--template goes around a prompt, and {args.data} has none: leave it out")
        for split in splits:
            split.items = [(apply_template(model, prompt, encoding), rest) for prompt, rest in split.items]
    left = free_positions(model) - len(apply_template(model, [encoding.eot_token], encoding)) + 1
    if args.length > left:
        positions = f"{model.config.n_positions} positions"
        raise Error(f"--length {args.length} does not fit: of the model's {positions} {left} are left for the text")
