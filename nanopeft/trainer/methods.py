# SPDX-License-Identifier: MIT
"""One table of the methods: what each adds to a model, and how that is saved and opened again."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from nanopeft import adalora, adapter, data, dora, gpt, ia3, lora, prefix, prompt, ptuning, qlora
from nanopeft.trainer import Error, Failure, bases, checkpoint, peft_config, pictures, tokenizer


def nothing(model, *_):
    return model


class Method(NamedTuple):
    """A row of the table. Settings are keyword arguments of `add`; they come from flags or from an adapter's file."""

    defaults: dict  # its flags
    add: Callable = nothing  # (model, **settings): freezes the model, adds what is trained, returns it
    settings: Callable = lambda args, encoding, train, model: {}  # from the flags
    peft_types: tuple = ()  # in adapter_config.json
    read_config: Callable | None = None  # settings from adapter_config.json
    state_dict: Callable | None = None  # what is saved
    config: Callable | None = None  # the adapter_config.json that goes with it
    load: Callable | None = None  # (model, state): puts what was saved back
    discard: Callable = nothing  # removes the encoder that only made the parameters, before they are saved
    penalty: Callable = lambda model: 0.0  # added to the loss
    attach: Callable = nothing  # (model, optimizer, args): what acts after each step of the optimizer


def lora_settings(args, *_):
    own = {name: getattr(args, name) for name in ("init", "ranks") if getattr(args, name)}  # some variants lack them
    return {"targets": args.targets, "r": args.rank, "alpha": args.alpha} | own


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
            what = f"--init labels needs completions, and {', '.join(args.data)} has none"
            raise Error(f"{what}: use modules or a .jsonl file")
        init = [i for text in sorted({tuple(c) for _, c, *_ in train.items}) for i in text if i != train.pad]
    elif init not in ("random", "vocabulary"):
        init = encoding.encode_ordinary(init)
    return {"n_tokens": args.tokens, "init": init}


def prune(model, optimizer, args):
    if args.steps:
        adalora.RankBudget(model, optimizer, args.steps, args.target_rank)


LORA = {"lr": 5e-3, "rank": 8, "alpha": 16.0, "targets": "all-linear", "ranks": None, "lora_plus": None}
LORA_FILES = dict(state_dict=lora.lora_state_dict, config=lora.lora_config, load=lora.load_lora_state_dict)
METHODS = {
    "full": Method({"lr": 3e-4}),
    "lora": Method(
        LORA | {"init": "kaiming"}, lora.add_lora, lora_settings,
        peft_types=("LORA",), read_config=peft_config.lora_arguments, **LORA_FILES,
    ),
    "qlora": Method(
        LORA | {"quant": "nf4"}, qlora.add_qlora, lambda args, *_: lora_settings(args) | {"quant_type": args.quant},
        **LORA_FILES,
    ),
    "dora": Method(LORA, dora.add_dora, lora_settings, **LORA_FILES),
    "adalora": Method(
        {"lr": 1.5e-2, "rank": 12, "alpha": 16.0, "targets": "all-linear", "target_rank": 8},
        adalora.add_adalora, lora_settings,
        peft_types=("ADALORA",), read_config=peft_config.adalora_arguments, state_dict=adalora.adalora_state_dict,
        config=adalora.adalora_config, load=adalora.load_adalora_state_dict,
        penalty=adalora.orthogonality, attach=prune,
    ),
    "ia3": Method(
        {"lr": 3e-2}, ia3.add_ia3, peft_types=("IA3",), read_config=peft_config.ia3_arguments, **LORA_FILES,
    ),
    "bitfit": Method(
        {"lr": 1e-2}, ia3.add_bitfit,
        peft_types=("BITFIT",), read_config=lambda config: {}, state_dict=ia3.bitfit_state_dict,
        config=lambda model: {"peft_type": "BITFIT"}, load=ia3.load_bitfit_state_dict,
    ),
    "adapter": Method(
        {"lr": 5e-3, "placement": "pfeiffer", "reduction": 8},
        adapter.add_adapter, lambda args, *_: {"placement": args.placement, "reduction": args.reduction},
        peft_types=("BOTTLENECK_ADAPTER",), read_config=peft_config.adapter_arguments,
        state_dict=adapter.adapter_state_dict, config=adapter.adapter_config, load=adapter.load_adapter_state_dict,
    ),
    "fusion": Method(
        {"lr": 1e-3, "adapters": None}, adapter.add_fusion, fusion_settings,
        peft_types=("ADAPTER_FUSION",), read_config=peft_config.fusion_arguments,
        state_dict=adapter.fusion_state_dict, config=adapter.fusion_config, load=adapter.load_fusion_state_dict,
        penalty=adapter.fusion_penalty,
    ),
    "prefix": Method(
        {"lr": 1e-1, "tokens": 20, "hidden": None},
        prefix.PrefixTuning, lambda args, *_: {"n_tokens": args.tokens, "hidden": args.hidden},
        peft_types=("PREFIX_TUNING",), read_config=peft_config.prefix_arguments,
        state_dict=prefix.prefix_state_dict, config=prefix.prefix_config, load=prefix.load_prefix_state_dict,
        discard=prefix.fold_prefix,
    ),
    "prompt": Method(
        {"lr": 1e-1, "tokens": 20, "init": "vocabulary"}, prompt.PromptTuning, prompt_settings,
        peft_types=("PROMPT_TUNING",), read_config=peft_config.prompt_arguments,
        state_dict=prompt.prompt_state_dict, config=prompt.prompt_config, load=prompt.load_prompt_state_dict,
    ),
    "ptuning": Method(
        {"lr": 3e-3, "tokens": None, "encoder": "mlp", "template": None},
        ptuning.PTuning, lambda args, *_: {"n_tokens": args.tokens, "encoder": args.encoder, "template": args.template},
        peft_types=("P_TUNING", "P_TUNING_TEMPLATE"), read_config=peft_config.ptuning_arguments,
        state_dict=ptuning.ptuning_state_dict, config=ptuning.ptuning_config, load=ptuning.load_ptuning_state_dict,
        discard=ptuning.fold_ptuning,
    ),
}  # fmt: skip


def load_tokenizer(base):
    return bases.load_tokenizer("nano" if base == "scratch" else base)


def load_base(base, encoding, dtype, device):
    """The model, with a checksum of what it is stored as, its tokenizer included."""
    if base == "scratch":
        model = gpt.GPT(vocab_size=encoding.n_vocab).to(dtype)
        model.checksum = base
    else:
        model = bases.load_base(base, dtype)
    size = len(model.get_input_embeddings().weight)
    if encoding.n_vocab > size:
        raise Error(f"{base} has a tokenizer of {encoding.n_vocab} tokens, and a model of {size}")
    if isinstance(model, gpt.GPT):
        model.checksum += f"{zlib.crc32(b' '.join(encoding._mergeable_ranks)):08x}"
    return model.to(device)


def check_base(folder, base_checksum, base, model, force):
    """Error for an adapter of another base: on this one its numbers mean nothing. peft's name no base, and pass."""
    if base_checksum not in (None, model.checksum) and not force:
        what = f"{folder} was trained on a base of other weights, shape or tokenizer than {base} has"
        raise Error(f"{what}: give it its own base, or use it all the same with --force")


def checksums(args, base, valid):
    """{flag: checksum} of what flags name and others may change."""
    found = {"base": base.checksum, "data": valid.checksum}
    if args.adapters:  # a fusion's; with --from its own file has them
        states = [checkpoint.read_adapter(folder)[1] for folder in args.adapters]
        found["adapters"] = " ".join(checkpoint.checksum(state, "") for state in states)
    return found


def remarks(train, valid, encoding, args):
    """Lines on what the data has that a user may not expect."""
    if n := train.n_truncated + valid.n_truncated:
        yield f"{n:,} examples have more than {train.length} tokens and were cut"
    if isinstance(train, data.TokenStream):
        texts = (encoding.decode(split.tokens[split.tokens != encoding.eot_token].tolist()) for split in (train, valid))
        if n := sum(text.count(tokenizer.ENDOFTEXT) for text in texts):
            yield f"{tokenizer.ENDOFTEXT} stands {n:,} times in the data: it is read as text, and ends no document"
    elif len({repr(item[1:]) for item in train.items}) == 1:  # completions, and the answers before them
        yield "all examples have the same answer: there is nothing to tell apart"
    if valid.n_leaked:
        yield f"{valid.n_leaked:,} pieces of the validation data are in training too, and were left out"
    if valid.head(args.valid_tokens) is not valid:
        yield f"validation takes {args.valid_tokens:,} tokens, evenly spread over the data: --valid-tokens"


def add(model, args, encoding, train):
    """The model with what the method trains, all else frozen; with --from it starts from what that run has learned."""
    method = METHODS[args.method]
    if args.start is not None:
        model = Adapter(args.start).put_on(model, args.base, args.force)
    else:
        rank = max([args.rank, *(args.ranks or {}).values()]) if "rank" in method.defaults else 0
        if rank > bases.width(model):
            width = f"the model's width, {bases.width(model)}"
            raise Error(f"a rank of {rank} is above {width}: no update has a rank above it")
        model = method.add(model, **method.settings(args, encoding, train, model))
    if not any(p.numel() for p in model.parameters() if p.requires_grad):
        raise Error(f"--template {args.template!r} has no [P], so there is nothing to train")
    return model


def default_rate(args, base_size):
    """Large models take smaller rates (measured: the embedded base of 5.7 M parameters, SmolLM2-135M). So does PiSSA,
    whose factors are large from the start. Random weights take a larger one: they have nothing to forget."""
    rate = 1e-3 if args.base == "scratch" else METHODS[args.method].defaults["lr"]
    return rate / (5 if base_size > 50e6 else 1) / (5 if args.init == "pissa" else 1)


def count(method, base_size, model):
    """Numbers of parameters, before an engine shards them. A fusion has frozen adapters too."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = max(base_size + trained * (method not in ("full", "bitfit")), sum(p.numel() for p in model.parameters()))
    return {"trained_parameters": trained, "total_parameters": total, "stored_parameters": 0, "stored_bytes": 0}


def save(model, encoding, args, folder, base_checksum):
    """Writes what was trained; with full the whole model. Returns how many numbers and bytes are on the disk."""
    method = METHODS[args.method]
    if method.state_dict is None:
        files = save_whole(model, encoding, folder)
        stored = sum(p.numel() for p in model.parameters())
    else:
        config = method.config(model) | {"base_model_name_or_path": args.base, "task_type": "CAUSAL_LM"}
        state, files = method.state_dict(model), ("adapter_config.json", "adapter_model.safetensors")
        if args.init == "pissa":
            config["started_from"] = args.init  # ours alone: peft passes over it
        if args.method == "qlora":
            quantized = next(m for m in model.modules() if isinstance(m, qlora.QuantizedLinear))
            config["base_quantization"] = quantized.quant_type  # ours alone: peft passes over it
        if args.method == "adalora":
            checkpoint.write(folder / "ranks.svg", lambda path: pictures.plot_ranks(path, adalora.ranks(model)))
        checkpoint.save_adapter(folder, state, config, base_checksum)
        stored = sum(t.numel() for t in state.values())
    return {"stored_parameters": stored, "stored_bytes": sum((folder / name).stat().st_size for name in files)}


def save_whole(model, encoding, folder):
    """Writes a model that transformers opens, with its tokenizer. Returns the names of the files."""
    try:
        files = bases.save_base(model, encoding, folder)
        (folder / "adapter_config.json").unlink(missing_ok=True)  # of an earlier run: load would open it
    except (OSError, SafetensorError) as error:
        raise Failure(f"{folder} cannot be written: {error}; --resume, or the same --merge, writes it") from None
    return files


def checksum_of_kept(folder):
    """Of the files with weights in a folder, an adapter's or a whole model's."""
    return checkpoint.checksum_of(sorted(folder.glob("*model*.safetensors")))


def restore(model, args, folder, progress, ranks):
    """Puts the numbers of the best step, which save wrote, back into the model, if no other run wrote over them."""
    method = METHODS[args.method]
    if not ranks.sum(int(ranks.rank == 0 and checksum_of_kept(folder) == progress.kept)):
        args.keep = "last"
        ranks.say(f"{folder} no longer holds the numbers of step {progress.best_step}, the best: the last are kept")
    elif method.load:
        method.load(model, checkpoint.read_adapter(folder)[1])
    else:
        model.load_state_dict(bases.load_base(str(folder), next(model.parameters()).dtype).state_dict())


class Adapter:
    """An adapter's folder, ours or peft's: the method, its settings, the name of the base, the trained numbers."""

    def __init__(self, folder):
        self.folder, path = folder, Path(folder, "adapter_config.json")
        config, self.state, self.base_checksum = checkpoint.read_adapter(folder)
        kind, self.base = config.get("peft_type"), config.get("base_model_name_or_path")
        self.method = next((name for name, method in METHODS.items() if kind in method.peft_types), None)
        if self.method is None:
            raise Error(f"{path} has peft_type {kind!r}, which is none of the methods here")
        if not isinstance(self.base, str):
            raise Error(f"{path} does not say which base it is for: base_model_name_or_path")
        try:
            bases.find_checkpoint(self.base)
        except Error as error:
            raise Error(f"{path} names this base: {error}; correct base_model_name_or_path there") from None
        self.settings = METHODS[self.method].read_config(config)
        self.init = config.get("started_from")
        if config.get("use_dora"):
            self.method = "dora"
        if "base_quantization" in config:
            self.method, self.settings = "qlora", self.settings | {"quant_type": config["base_quantization"]}

    def put_on(self, model, base, force):
        """The model with the adapter."""
        check_base(self.folder, self.base_checksum, base, model, force)
        method = METHODS[self.method]
        model = method.add(model, **self.settings)
        method.load(model, self.state)
        return model

    def check_shapes(self):
        """Error for what does not fit its base, which here has shapes alone and takes no memory."""
        method = METHODS["lora" if self.method == "qlora" else self.method]
        settings = {name: value for name, value in self.settings.items() if name != "quant_type"}
        method.load(method.add(bases.load_shapes(self.base), **settings), self.state)


def load(folder, dtype, device, force=False):
    """(model, tokenizer) of what a run has left: a whole model, or an adapter, ours or peft's, on its base."""
    if not os.path.exists(Path(folder, "adapter_config.json")):
        if not os.path.exists(Path(folder, "config.json")):
            unfinished = os.path.exists(Path(folder, "state.safetensors"))
            raise Error(f"{folder} holds nothing trained" + ": --resume finishes the run" * unfinished)
        encoding = bases.load_tokenizer(folder)
        return load_base(folder, encoding, dtype, device), encoding
    adapter = Adapter(folder)
    adapter.check_shapes()
    encoding = bases.load_tokenizer(adapter.base)
    return adapter.put_on(load_base(adapter.base, encoding, dtype, device), adapter.base, force), encoding


def merge(folder, out, dtype, device, force):
    """Writes the base with what an adapter has learned in its weights: a whole model, as transformers opens it."""
    kind = Adapter(folder).method
    if kind not in MERGE:
        raise Error(f"--merge {folder}: {kind} cannot be merged: {UNMERGEABLE[kind]}; load it beside its base instead")
    model, encoding = load(folder, dtype, device, force)
    files = save_whole(lora.remove_lora(MERGE[kind](model)), encoding, Path(out))
    if os.path.isfile(result := Path(folder, "result.json")):  # --generate is to ask in the same way
        kept = {"merged": folder, "asked": checkpoint.read_json(result).get("asked")}
        checkpoint.write(Path(out, "result.json"), json.dumps(kept).encode())
    print(f"{out}, a model that transformers and --base open: {', '.join(files)}")


MERGE = dict.fromkeys(("lora", "dora", "adalora", "ia3"), lora.merge_lora) | {"qlora": qlora.merge_qlora}
MERGE["bitfit"] = nothing  # its biases are the model's own
UNMERGEABLE = dict.fromkeys(("adapter", "fusion"), "its layers are not linear") | dict.fromkeys(
    ("prefix", "prompt", "ptuning"), "its vectors are input of the model and change no weight"
)


# ------------------------------------------------------------------------------------- virtual tokens beside the text


def apply_template(model, ids, encoding):
    """A prompt's token ids, with the text and the virtual tokens of P-tuning's template around it."""
    if getattr(model, "template", None) is None:
        return ids
    start = data.start_token(encoding)
    start = start if ids[:1] == start else []  # a prompt that was cut has lost it
    return [*start, *model.apply_template(ids[len(start) :], encoding.encode_ordinary)]


def free_positions(model):
    """How many tokens may be given to the model: virtual tokens in front of the input take positions too."""
    in_front = 0 if getattr(model, "template", None) else getattr(model, "n_tokens", 0)
    return bases.positions(model) - in_front


def fit_data(model, args, encoding, *splits):
    """Puts P-tuning's template around the prompts of the data. Error if an example would not fit the model."""
    if args.accuracy and isinstance(splits[0], data.TokenStream):
        raise Error(f"--accuracy is of answers, and {', '.join(args.data)} is plain text: leave it out")
    if getattr(model, "template", None) is not None:
        if isinstance(splits[0], data.TokenStream):
            raise Error(f"--template goes around a prompt, and {', '.join(args.data)} has none: leave it out")
        for split in splits:
            if any(len(item) > 2 for item in split.items):
                raise Error("--template goes around one prompt, and a conversation has several answers: leave it out")
            split.items = [(apply_template(model, prompt, encoding), rest) for prompt, rest in split.items]
    left = free_positions(model) - len(apply_template(model, [encoding.eot_token], encoding)) + 1
    if args.length > left:
        positions = f"{bases.positions(model)} positions"
        raise Error(f"--length {args.length} does not fit: of the model's {positions} {left} are left for the text")
