# SPDX-License-Identifier: MIT
"""Fine-tunes a GPT with the method of your choice and shows what happened.

    python train.py --method lora --precision bf16              the language reference, in about a minute
    python train.py --method prefix --data modules              which package does this function come from?
    python train.py --method full --base gpt2 --data mine.txt   your text, and a model from the hub
    python train.py --method all --data modules                 every method, one table and one figure
    python train.py --method lora --resume                      go on where an interrupted run stopped
    python train.py --generate out/lora --prompt "The import"   text from what was trained
    torchrun --nproc_per_node 2 train.py --method full --zero 2  two processes that share the optimizer and gradients

A run leaves in out/METHOD/ what was trained, in peft's format (adapter, fusion: in one like it, for peft lacks them;
full: a GPT-2 checkpoint), result.json, loss.png, and state.safetensors, from which --resume goes on.

Read it from fine_tune() on: data, base, method, evaluation, loop, evaluation, files, report.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import zlib
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from nanopeft import adamw, adapter, data, gpt, lora, memory, prefix, prompt, ptuning, qlora, quant, wide, zero

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = {  # the options of each, and their defaults
    "full": {"lr": 1e-3},
    "lora": {"lr": 5e-3, "rank": 8, "alpha": 16.0, "targets": "all-linear"},
    "qlora": {"lr": 5e-3, "rank": 8, "alpha": 16.0, "targets": "all-linear", "quant": "nf4"},
    "adapter": {"lr": 5e-3, "placement": "pfeiffer", "reduction": 8},
    "fusion": {"lr": 1e-3, "adapters": None},
    "prefix": {"lr": 1e-1, "tokens": 20, "hidden": None},
    "prompt": {"lr": 1e-1, "tokens": 20, "init": "vocabulary"},
    "ptuning": {"lr": 3e-3, "tokens": None, "encoder": "lstm", "template": None},
}


class Error(ValueError):
    """A run that cannot be done as asked; the message says what would be right."""


class Failure(Exception):
    """A run that was asked for rightly and cannot go on; the message says what is left of it."""


PARTS = (adamw, adapter, data, gpt, lora, memory, prefix, prompt, ptuning, qlora, quant, zero)
ERRORS = (Error, *(part.Error for part in PARTS))


# ----------------------------------------------------------------------------------------------------------- arguments


def refuse(message):
    raise Error(f"{message}; --help shows all options")


def default(method, option):
    return f"({METHODS[method][option]})"


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = refuse  # one line instead of the whole usage
    add = parser.add_argument
    rates = ", ".join(f"{method} {options['lr']:g}" for method, options in METHODS.items())
    add("--method", choices=[*METHODS, "all"], default="lora", help="what is trained; all: one after another (lora)")
    add("--precision", choices=[*DTYPES], default="fp32", help="type of the base's weights and the arithmetic (fp32)")
    add("--base", default="nano", help=f"nano, scratch (nano untrained), a folder, {', '.join(gpt.HUB)} (nano)")
    add("--data", default="reference", help=f"{', '.join(data.TASKS)}, or a .txt or .jsonl file (reference)")
    add("--rank", type=int, help=f"lora, qlora: rank r of the update {default('lora', 'rank')}")
    add("--alpha", type=float, help=f"lora, qlora: the update is scaled by alpha / r {default('lora', 'alpha')}")
    names = f"lora, qlora: ends of layer names, with commas between {default('lora', 'targets')}"
    add("--targets", type=lambda text: text if text == "all-linear" else text.split(","), help=names)
    add("--quant", choices=["nf4", "int8"], help=f"qlora: how the base is stored {default('qlora', 'quant')}")
    where = "houlsby, in both sublayers, or pfeiffer, at the block"
    add("--placement", choices=["houlsby", "pfeiffer"], help=f"adapter: {where} {default('adapter', 'placement')}")
    add("--reduction", type=int, help=f"adapter: the bottleneck is width / reduction {default('adapter', 'reduction')}")
    add("--adapters", nargs="+", metavar="FOLDER", help="fusion: what earlier runs of --method adapter left")
    add("--tokens", type=int, help=f"prefix, prompt, ptuning: how many are trained {default('prefix', 'tokens')}")
    add("--hidden", type=int, help="prefix: width of an MLP to train it through (none)")
    add("--init", help=f"prompt: random, vocabulary, labels, or a text to start from {default('prompt', 'init')}")
    add("--encoder", choices=["lstm", "mlp"], help=f"ptuning: what makes the vectors {default('ptuning', 'encoder')}")
    add("--template", help='ptuning: where the vectors go, as in "[P][P]{source}[P]" (in front)')
    add("--steps", type=int, default=300, help="optimizer steps (300)")
    add("--batch", type=int, default=16, help="examples in a micro-batch (16)")
    add("--accumulate", type=int, default=1, help="micro-batches in a step (1)")
    add("--length", type=int, help="tokens in an example, at most (128, and 256 for modules and .jsonl)")
    add("--lr", type=float, help=f"peak of the learning rate ({rates})")
    add("--weight-decay", type=float, default=0.0, help="of the weight matrices (0)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient (1)")
    add("--seed", type=int, default=0, help="of initialization, batches and samples (0)")
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda, cuda:1, mps (cuda if there is one)")
    add("--zero", type=int, help="under torchrun: ZeRO's stage, 0 to 3; each rank takes its share of every batch")
    add("--fsdp", action="store_true", help="under torchrun: PyTorch's own fully_shard instead of zero.py")
    add("--offload", choices=["cpu", "disk"], help="with --zero: where master copies and moments are kept")
    add("--compile", action="store_true", help="torch.compile each decoder block, and AdamW (not --fsdp's)")
    add("--save-every", type=int, default=100, help="steps from one saved state to the next (100)")
    add("--out", help="folder of the results (out/METHOD)")
    add("--resume", action="store_true", help="go on from the state in the folder of the results, if there is one")
    add("--prompt", help="what the samples go on from (the start of the validation data)")
    add("--generate", metavar="FOLDER", help="do not train: go on from --prompt with what was trained in this folder")
    add("--debug", action="store_true", help="show where in the program an error came from")
    args = parser.parse_args()

    # A flag works or is refused
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    idle = given - {"generate", "prompt", "precision", "device", "seed", "debug"}
    if args.generate is not None and idle:
        raise Error(f"--generate does not train: leave out {', '.join(sorted(idle))}")
    for name in sorted(given):
        owners = [method for method in METHODS if name in METHODS[method]]
        if owners and args.method == "all":
            raise Error(f"--{name} differs from method to method: leave it out with --method all")
        if owners and args.method not in owners:
            raise Error(f"--{name} belongs to --method {', '.join(owners)}")
    if args.method == "fusion" and not args.adapters:
        raise Error("--method fusion needs --adapters: folders that runs of --method adapter left")
    if args.base == "scratch" and args.method != "full":
        raise Error("--base scratch has learned nothing that could be kept frozen: use --method full")
    if args.length is None:
        args.length = 256 if args.data == "modules" or args.data.endswith(".jsonl") else 128
    least = dict(steps=1, batch=1, accumulate=1, length=2, save_every=1, lr=0, weight_decay=0, clip=0)
    for name in [name for name in least if name in given and not least[name] <= getattr(args, name) < math.inf]:
        number = f"at least {least[name]} and finite"
        raise Error(f"--{name.replace('_', '-')} must be {number}, not {getattr(args, name)}")
    world, shares = int(os.environ.get("WORLD_SIZE", 1)), args.fsdp or args.zero is not None
    if world > 1 and not shares:
        raise Error(f"{world} processes would all do the same: share the work with --zero 0, 1, 2 or 3, or --fsdp")
    if shares and "WORLD_SIZE" not in os.environ:
        raise Error("--zero and --fsdp are for several processes: torchrun --nproc_per_node 2 train.py ...")
    if args.zero not in (None, 0, 1, 2, 3) or (args.fsdp and args.zero is not None):
        raise Error("give a stage, --zero 0, 1, 2 or 3, or --fsdp")
    if args.offload and args.zero is None:
        raise Error("--offload belongs to --zero")
    if shares and args.method == "all":
        raise Error("--zero and --fsdp are for training one method")
    if args.fsdp and (args.method == "qlora" or args.precision == "fp16"):
        raise Error("--fsdp is for fp32 and bf16, and not for qlora: use --zero")
    if args.batch % world:
        raise Error(f"--batch {args.batch} cannot be shared by {world} processes: give a multiple of {world}")
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if args.compile and args.device == "cpu" and not shutil.which(compiler):
        raise Error(f"--compile needs a C++ compiler, and {compiler} is not there: set CXX to one, or leave it out")
    if not 0 <= args.seed < 1 << 40:
        raise Error(f"--seed must be from 0 to 2^40 - 1, not {args.seed}")
    if shares and args.device.startswith("cuda:"):
        raise Error(f"each process takes a GPU of its own: --device cuda, not {args.device}")
    try:  # one product: is there such a device, and does it have this type?
        if shares and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        one = torch.ones(1, 1, dtype=DTYPES[args.precision], device=args.device)
        (one @ one).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Error(f"--device {args.device} with --precision {args.precision} does not work here: {reason}") from None

    args.out = args.out or f"out/{args.method}"
    vars(args).update(METHODS.get(args.method, {}) | {name: x for name, x in vars(args).items() if x is not None})
    return args, given


# ---------------------------------------------------------------------------------------------------- base and method


def load_tokenizer(base):
    return data.load_tokenizer(gpt.find_checkpoint("nano" if base == "scratch" else base))


def load_base(base, encoding, dtype, device):
    if base == "scratch":
        return gpt.GPT(vocab_size=encoding.n_vocab).to(device, dtype)
    model = gpt.GPT.from_pretrained(base, dtype)
    if encoding.n_vocab > model.config.vocab_size:
        raise Error(f"{base} has a tokenizer of {encoding.n_vocab} tokens, and a model of {model.config.vocab_size}")
    return model.to(device)


def attach(model, args, encoding, train):
    """The model with what the method trains; all else is frozen."""
    if args.method in ("lora", "qlora"):
        if args.rank > model.config.n_embd:
            width = f"the model's width, {model.config.n_embd}"
            raise Error(f"--rank {args.rank} is above {width}: no update has a rank above it")
        if args.method == "lora":
            return lora.add_lora(model, args.targets, r=args.rank, alpha=args.alpha)
        return qlora.add_qlora(model, args.targets, quant=args.quant, r=args.rank, alpha=args.alpha)
    if args.method == "adapter":
        return adapter.add_adapter(model, placement=args.placement, reduction=args.reduction)
    if args.method == "fusion":
        return adapter.add_fusion(model, [read_adapter(Path(folder)) for folder in args.adapters])
    if args.method == "prefix":
        return prefix.PrefixTuning(model, args.tokens, hidden=args.hidden)
    if args.method == "prompt":
        init = args.init
        if init == "labels":
            if isinstance(train, data.Text):
                raise Error(f"--init labels needs completions, and {args.data} has none: use modules or a .jsonl file")
            init = [i for text in sorted({tuple(c) for _, c in train.items}) for i in text if i != train.pad]
        elif init not in ("random", "vocabulary"):
            init = encoding.encode_ordinary(init)
        return prompt.PromptTuning(model, args.tokens, init=init)
    if args.method == "ptuning":
        return ptuning.PTuning(model, args.tokens, encoder=args.encoder, template=args.template)
    return model


def trained_files(model, method):
    """(state, config): what was trained, in peft's format or, for what peft lacks, in one like it."""
    if method in ("lora", "qlora"):
        return lora.lora_state_dict(model), lora.lora_config(model)
    if method == "adapter":
        return adapter.adapter_state_dict(model), adapter.adapter_config(model)
    if method == "fusion":
        return adapter.fusion_state_dict(model), adapter.fusion_config(model)
    if method == "prefix":
        return prefix.prefix_state_dict(model), prefix.prefix_config(model)
    if method == "prompt":
        return prompt.prompt_state_dict(model), prompt.prompt_config(model)
    return ptuning.ptuning_state_dict(model), ptuning.ptuning_config(model)


def save_trained(model, encoding, args, folder):
    """Writes what was trained, full: a GPT-2 checkpoint; (parameters, bytes) on the disk."""
    if args.method == "full":
        try:
            model.save_pretrained(folder)
            data.save_tokenizer(encoding, folder)
            (folder / "adapter_config.json").unlink(missing_ok=True)  # of an earlier run: --generate would open it
        except (OSError, SafetensorError) as error:
            raise Failure(f"{folder} cannot be written: {error}; --resume writes it again") from None
        files = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
        return sum(p.numel() for p in model.parameters()), sum((folder / name).stat().st_size for name in files)
    state, config = trained_files(model, args.method)
    state = {key: p.cpu().contiguous() for key, p in state.items()}
    config = config | {"base_model_name_or_path": args.base}
    if args.method == "qlora":
        config["base_quantization"] = args.quant  # ours alone: peft passes over it
    write(folder / "adapter_config.json", json.dumps(config, indent=2).encode())
    write(folder / "adapter_model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    files = ("adapter_config.json", "adapter_model.safetensors")
    return sum(p.numel() for p in state.values()), sum((folder / name).stat().st_size for name in files)


def read_adapter(folder):
    """(config, state) of what save_trained wrote."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not os.path.isfile(folder / name):  # a pipe would be waited for
            raise Error(f"{folder} holds no adapter: there is no file {name}")
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        return config, load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise Error(f"{folder} holds no adapter: {error}") from None


def load_trained(folder, dtype, device):
    """(model, tokenizer) from what save_trained wrote."""
    if not os.path.exists(folder / "adapter_config.json"):
        if not os.path.exists(folder / "config.json"):
            unfinished = os.path.exists(folder / "state.safetensors")
            raise Error(f"{folder} holds nothing trained" + ": --resume finishes the run" * unfinished)
        encoding = load_tokenizer(str(folder))
        return load_base(str(folder), encoding, dtype, device), encoding
    config, state = read_adapter(folder)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind == "BOTTLENECK_ADAPTER":
        read, add, load = adapter.adapter_arguments, adapter.add_adapter, adapter.load_adapter_state_dict
    elif kind == "ADAPTER_FUSION":
        read, add, load = adapter.fusion_arguments, adapter.add_fusion, adapter.load_fusion_state_dict
    elif kind == "PREFIX_TUNING":
        read, add, load = prefix.prefix_arguments, prefix.PrefixTuning, prefix.load_prefix_state_dict
    elif kind == "PROMPT_TUNING":
        read, add, load = prompt.prompt_arguments, prompt.PromptTuning, prompt.load_prompt_state_dict
    elif kind in ("P_TUNING", "P_TUNING_TEMPLATE"):
        read, add, load = ptuning.ptuning_arguments, ptuning.PTuning, ptuning.load_ptuning_state_dict
    elif kind == "LORA":
        read, add, load = lora.lora_arguments, lora.add_lora, lora.load_lora_state_dict
    else:
        raise Error(f"{folder / 'adapter_config.json'} has peft_type {kind!r}, which is none of the methods here")
    settings = read(config)
    if add is ptuning.PTuning:  # the file holds what its encoder made: the one that it replaces may be small
        settings |= {"hidden": 1, "layers": 2}
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise Error(f"{folder / 'adapter_config.json'} does not say which base it is for: base_model_name_or_path")
    # First on a base of shapes alone: what does not fit it is refused before it takes any memory
    with torch.device("meta"):
        shapes = gpt.GPT(**gpt.read_config(gpt.find_checkpoint(base) / "config.json"))
    load(add(shapes, **settings), state)
    if "base_quantization" in config:
        add, settings["quant"] = qlora.add_qlora, config["base_quantization"]
    encoding = load_tokenizer(base)
    model = add(load_base(base, encoding, dtype, device), **settings)
    load(model, state)
    return model, encoding


def fill(model, ids, encoding):
    """A prompt's token ids, with the text and the slots of P-tuning's template around it, after the end-of-text."""
    if getattr(model, "template", None) is None:
        return ids
    start = ids[:1] if ids[:1] == [encoding.eot_token] else []  # a prompt that was cut has lost it
    return [*start, *model.fill(ids[len(start) :], encoding.encode_ordinary)]


def room(model):
    """How many tokens may be given to the model: those in front of the input take positions too."""
    in_front = 0 if getattr(model, "template", None) else getattr(model, "n_tokens", 0)
    return model.config.n_positions - in_front


def write(path, content):
    """A file that is there whole or not at all. content: bytes, or a function that writes to the path it is given."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(content) if isinstance(content, bytes) else content(new)
        os.replace(new, path)
    except (OSError, SafetensorError) as error:  # the disk is full, say
        new.unlink(missing_ok=True)
        raise Failure(f"{path} cannot be written, and stays as it was: {error}; --resume then goes on") from None


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, examples, device, rank=0, world=1):
    """(nats per token, bits per byte) over all of the validation data, of which each rank takes a share."""
    model.eval()
    nats, tokens = 0.0, 0
    for ids, labels in list(examples.batches(32))[rank::world]:
        n = (labels[:, 1:] != -100).sum().item()
        nats += model(ids.to(device), labels=labels.to(device)).loss.item() * n
        tokens += n
    model.train()
    nats, tokens = over_ranks(nats, device), over_ranks(tokens, device)
    return nats / tokens, nats / math.log(2) / max(1, examples.bytes())


def over_ranks(number, device):
    return zero.all_sum(number, device) if dist.is_initialized() else number


def accuracy(model, examples, device, rank=0, world=1):
    """Share of the examples whose completion, generated greedily after the prompt, is right to the letter."""
    model.eval()
    right = 0
    batches = []
    for items in examples.by_length(32):
        prompts, completions = zip(*items)
        fits = max(map(len, prompts)) + max(map(len, completions)) <= room(model)
        batches += [items] if fits else [[item] for item in items]  # alone each does
    for items in tqdm(batches[rank::world], desc="accuracy", leave=False, disable=rank > 0):
        prompts, completions = zip(*items)
        longest, n = max(map(len, prompts)), max(map(len, completions))
        ids = torch.tensor([[examples.pad] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        texts = gpt.generate(model, ids, n, attention_mask=mask, eos_token_id=examples.pad)[:, longest:].tolist()
        right += sum(text[: len(c)] == c for text, (_, c) in zip(texts, items))
    model.train()
    return over_ranks(right, device) / len(examples.items)


def sample(model, encoding, text, device, seed):
    """The text and what the model makes of it, up to 80 tokens drawn from the 20 likeliest at each place."""
    model.eval()
    ids = fill(model, [encoding.eot_token, *encoding.encode_ordinary(text)], encoding)
    left = room(model) - len(ids)
    if left < 1:
        raise Error(f"--prompt has {len(ids)} tokens; {room(model) - 1} are the most")
    ids = torch.tensor([ids], device=device)
    torch.manual_seed(seed)
    ids = gpt.generate(model, ids, min(80, left), temperature=0.8, top_k=20, eos_token_id=encoding.eot_token)
    model.train()
    words = [i for i in ids[0].tolist() if 0 <= i < encoding.n_vocab and i != encoding.eot_token]  # no slots
    return encoding.decode(words)


def predict(model, args, length):
    """{what: bytes} that memory.py predicts for a step of this run, with examples of `length` tokens.

    Nothing for what it does not know: targets outside of the blocks, adapters of several widths in a fusion.
    """
    how = {name: vars(args)[name] for name in memory.SETTINGS[args.method] if name in vars(args)}
    if args.method in ("adapter", "fusion"):
        widths = {m.down.out_features for m in model.modules() if isinstance(m, adapter.Adapter)}
        if len(widths) > 1:
            return {}
        how["bottleneck"] = widths.pop()
    if args.method == "fusion":
        how["adapters"] = len(args.adapters)
    if args.method == "ptuning":
        how |= {"tokens": model.n_tokens, "template": model.template is not None}
    try:
        run = (args.method, args.precision, args.batch, length, args.accumulate)
        items = memory.predict(vars(model.config), *run, **how)
    except memory.Error:
        return {}
    return {what: memory.total(parts) for what, parts in items.items()}


def in_use(device):
    """(bytes in use now, most since the last call), of the device, or of this process's resident memory."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), peak
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        now, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    except (OSError, KeyError):  # the peak of the whole run; macOS tells bytes, others kilobytes
        import resource

        now = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return now, peak


# ------------------------------------------------------------------------------------------------------------ training


def learning_rate(step, args):
    """Linear warm-up over a twentieth of the steps, then half a cosine down to zero."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup))) / 2


def checksum(tensors, text):
    """Of all that a state holds: names, types, shapes, bits, and the text."""
    total = zlib.crc32(text.encode())
    for key, t in sorted(tensors.items()):
        total = zlib.crc32(f"{key} {t.dtype} {tuple(t.shape)}".encode(), total)
        total = zlib.crc32(t.cpu().reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def save_state(path, run, states):
    """run: what JSON can hold. The tensors of states are stored by kind and parameter name."""
    tensors = {f"{key} {name}": t for name, kept in states.items() for key, t in kept.items() if torch.is_tensor(t)}
    tensors = {key: t.contiguous() for key, t in tensors.items()}
    metadata = {"run": json.dumps(run), "checksum": checksum(tensors, json.dumps(run))}
    write(path, lambda new: save_file(tensors, new, metadata=metadata))


def load_state(path, settings, params, shapes, optimizer, engine):
    """The run that save_state wrote, its tensors put back; Error if it was another run."""
    try:
        with safe_open(path, "pt") as file:
            text, expected = file.metadata()["run"], file.metadata()["checksum"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise Error(f"{path} is not the state of a run: {error!r}; without --resume the run starts again") from None
    if checksum(tensors, text) != expected:
        raise Error(f"{path} is damaged: its checksum does not fit; without --resume the run starts again")
    run = json.loads(text)
    for name, value in settings.items():
        if (old := run["settings"].get(name)) != value:
            raise Error(f"{path} is of a run with {name} = {old}, not {value}: give the same, or another --out")
    states = {}
    for key, t in tensors.items():
        kind, name = key.split(" ", 1)
        states.setdefault(name, {})[kind] = t
    found = {name: kept["master"].shape for name, kept in states.items()}
    if wrong := [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]:
        raise Error(f"{path} does not fit at {wrong[0]}: the base is not the one of its run")
    for kept in states.values():
        if len(kept) > 1:  # with fp16 there may have been nothing but overflows
            kept["step"] = run["step"] - run["skipped"]
    if engine is not None:
        engine.load_state_dict(states)
        engine.loss_scale, engine.clean = run["loss_scale"], run["clean"]
        return run
    for name, p in params.items():
        p.data.copy_(states[name]["master"])
        if p.dtype.itemsize >= 4 or len(states[name]) == 1:
            del states[name]["master"]
        for key, value in states[name].items():
            optimizer.state[p][key] = value.to(p.device) if torch.is_tensor(value) else value
    return run


def by_decay(params, weight_decay):
    """Parameter groups: decay is for matrices, not for biases and norms."""
    matrices, vectors = ([p for p in params if (p.dim() > 1) == wide] for wide in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class FSDP:
    """PyTorch's own ZeRO stage 3, fully_shard, behind the calls of zero.ZeRO.

    All is sharded in fp32, and in dtype while it is used. build: a function that gives the same model, unsharded.
    """

    def __init__(self, model, blocks, dtype, weight_decay, build, **settings):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes half a second

        for module in (*blocks, model):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(by_decay(self.params.values(), weight_decay), **settings)
        self.build, self.loss_scale, self.clean = build, 1.0, 0

    def backward(self, loss):
        (loss * dist.get_world_size()).backward()  # it takes the mean over ranks, and these are parts of a sum

    def step(self, clip):
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), clip).full_tensor().item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state_dict(self):
        states, names = {}, {"master": "master", "exp_avg": "m", "exp_avg_sq": "v"}
        for name, p in self.params.items():
            kept = {"master": p.detach(), **self.optimizer.state[p]}
            states[name] = {names[key]: t.full_tensor().cpu() for key, t in kept.items() if key in names}
        return states

    @torch.no_grad()
    def load_state_dict(self, states):
        from torch.distributed.tensor import distribute_tensor

        for name, p in self.params.items():
            master, m, v = (
                distribute_tensor(states[name][key].to(p.device), p.device_mesh, p.placements)
                for key in ("master", "m", "v")
            )
            p.copy_(master)
            step = torch.tensor(float(states[name]["step"]))
            self.optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    @contextmanager
    def whole(self):
        model = self.build()
        for name, p in model.named_parameters():
            if name in self.params:
                p.data.copy_(self.params[name].detach().full_tensor())
        yield model


def main():
    args, given = arguments()
    if args.method == "all":
        return compare(args, given)
    dtype, device = DTYPES[args.precision], torch.device(args.device)
    emulated = device.type == "cpu" and dtype.itemsize == 2 and wide.emulates(dtype)
    if emulated and args.compile:
        raise Error(f"this CPU emulates {args.precision}, and --compile cannot help there: leave it out, or take fp32")
    with wide.WideProducts() if emulated else nullcontext():
        if args.generate is not None:
            model, encoding = load_trained(Path(args.generate), dtype, device)
            print(sample(model, encoding, args.prompt or "", device, args.seed))
        else:
            fine_tune(args, dtype, device, emulated)


def fine_tune(args, dtype, device, emulated):
    out = Path(args.out)
    began = time.time()
    torch.manual_seed(args.seed)
    # MKL chooses each function's kernel in its first call; two threads that are both first can get a coarser one, and
    # one run in fifteen then differed (pytorch issue 188792)
    for function in (torch.exp, torch.sqrt, torch.tanh):  # the loss, AdamW, a prefix's MLP
        function(torch.ones(1))

    # Ranks: the processes that torchrun started, which all come by here
    rank, world = 0, 1
    if args.zero is not None or args.fsdp:
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=600))
        rank, world = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_: None

    # Data
    encoding = load_tokenizer(args.base)
    train, valid = data.load(args.data, encoding, args.length)
    if train.cut + valid.cut:
        say(f"{train.cut + valid.cut:,} examples have more than {args.length} tokens and were cut")
    text = args.prompt if args.prompt is not None else valid.opening()

    # Base
    memory_before, _ = in_use(device)
    base = load_base(args.base, encoding, torch.float32 if args.fsdp else dtype, device)
    base_parameters = sum(p.numel() for p in base.parameters())

    # Method
    model = attach(base, args, encoding, train)
    if getattr(model, "template", None) is not None:
        if isinstance(train, data.Text):
            raise Error(f"--template goes around a prompt, and {args.data} has none: leave it out")
        for side in (train, valid):
            side.items = [(fill(model, p, encoding), c) for p, c in side.items]
    left = room(model) - len(fill(model, [encoding.eot_token], encoding)) + 1
    if args.length > left:
        positions = f"{model.config.n_positions} positions"
        raise Error(f"--length {args.length} does not fit: of the model's {positions} {left} are left for the text")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(p.numel() for p in params.values()):
        raise Error(f"--template {args.template!r} has no [P], so there is nothing to train")
    if args.compile:
        for block in base.transformer.h:
            block.compile()

    # Optimizer
    trained = sum(p.numel() for p in params.values())
    added = 0 if args.method == "full" else trained
    total = max(base_parameters + added, sum(p.numel() for p in model.parameters()))  # a fusion has frozen adapters too
    shapes = {name: p.shape for name, p in params.items()}  # ZeRO's stage 3 takes the elements away
    settings, engine = {"lr": args.lr, "betas": (0.9, 0.95)}, None
    if args.fsdp:
        build = lambda: attach(load_base(args.base, encoding, dtype, device), args, encoding, train)  # noqa: E731
        engine = FSDP(model, base.transformer.h, dtype, args.weight_decay, build, **settings)
        params = engine.params  # the whole ones would stay in memory as long as they have a name
    elif args.zero is not None:
        settings |= {"compile": args.compile, "stage": args.zero, "offload": args.offload, "blocks": base.transformer.h}
        engine = zero.ZeRO(model, adamw.AdamW, by_decay(params.values(), args.weight_decay), **settings)
    alone = settings | {"compile": args.compile}
    optimizer = engine.optimizer if engine else adamw.AdamW(by_decay(params.values(), args.weight_decay), **alone)
    # What a rank can use without the others
    whole = engine.whole if engine else lambda: nullcontext(model)

    # Before, or where an earlier run stopped
    run = {"step": 0, "skipped": 0, "losses": [], "tokens": 0, "seconds": 0.0, "training_seconds": 0.0, "peak": 0}
    run |= {"loss_scale": 2.0**16 if args.precision == "fp16" else 1.0, "clean": 0}
    # These change no result
    free = ("out", "resume", "save_every", "generate", "zero", "offload", "fsdp", "debug")
    run["settings"] = {k: v for k, v in vars(args).items() if k not in free}
    state = out / "state.safetensors"
    there = over_ranks(int(args.resume and os.path.isfile(state)), device)  # Path.is_file raises for some names
    if there not in (0, world):
        raise Error(f"{state} is there for {there:.0f} of {world} processes: --out must be on a disk that all can read")
    if there:
        run = load_state(state, run["settings"], params, shapes, optimizer, engine)
        say(f"going on from step {run['step']} of {state}")
        if run["world"] != world:
            say(f"the state is of {run['world']} processes, and here are {world}: other roundings, the same otherwise")
    else:
        with whole() as complete:
            run["loss_before"], run["bits_before"] = evaluate(complete, valid, device, rank, world)
            if not math.isfinite(run["loss_before"]):
                raise Failure(f"loss {run['loss_before']} before any step: {args.base} is damaged, or needs more bits")
            run["accuracy_before"] = accuracy(complete, valid, device, rank, world) if args.data == "modules" else None
            run["sample_before"] = sample(complete, encoding, text, device, args.seed) if rank == 0 else ""
    run["world"] = world
    how = f"{args.precision} with its products in fp32" if emulated else args.precision
    say(f"{args.method}, {how}, {device}: {args.base} learns {args.data}")
    say(f"{trained:,} of {total:,} parameters are trained; state saved every {args.save_every} steps to {state}")

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Error(f"--out {out} cannot be a folder: {error}") from None

    # Loop. Ctrl-C and SIGTERM end it after the step that is under way
    stopped = []
    handlers = {n: signal.signal(n, lambda *_: stopped.append(True)) for n in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=run["step"], unit="step", smoothing=0.05, disable=rank > 0)
    model.train()
    loop_began = time.time()

    def note_peak():
        run["peak"] = max(run["peak"], in_use(device)[1] - memory_before)

    def save(batches):
        nonlocal began, loop_began
        now = time.time()
        run["seconds"] += now - began
        run["training_seconds"] += now - loop_began
        note_peak()
        began = loop_began = now
        with torch.no_grad():  # weights that the last step has ruined must not replace good ones
            ids, labels = (t[rank::world].to(device) for t in batches[-1])
            check(over_ranks(model(ids, labels=labels).loss.item(), device))
        if engine is None:  # a parameter in fp32 is its own master copy
            states = {name: {"master": p.detach(), **optimizer.state[p]} for name, p in params.items()}
        else:
            states = engine.state_dict()
        if rank == 0:
            save_state(state, run, states)

    def check(loss, norm=0.0):
        if not math.isfinite(loss) or not (math.isfinite(norm) or run["loss_scale"] > 1):
            left = f"{state} stays as it was" if state.exists() else "nothing was saved"
            raise Failure(f"loss {loss}, gradient norm {norm} at step {run['step']}: try a smaller --lr; {left}")

    def train_step(batches, forward_done=lambda: None, backward_done=lambda: None):
        """(loss, norm of the gradient) of one update. forward_done is called for each of the batches."""
        total = sum((labels[:, 1:] != -100).sum().item() for _, labels in batches)
        loss = 0.0
        for ids, labels in batches:
            ids, labels = ids[rank::world], labels[rank::world]
            # The mean over all labelled tokens of the step, whatever their share in each rank and micro-batch
            share = (labels[:, 1:] != -100).sum().item() / total
            part = model(ids.to(device), labels=labels.to(device)).loss * share
            loss += part.item()
            if args.method == "fusion":
                part = part + adapter.fusion_penalty(model) / args.accumulate / world
            forward_done()
            if engine is None:
                (part * run["loss_scale"]).backward()
            else:
                engine.backward(part)
        backward_done()
        if engine is not None:
            return over_ranks(loss, device), engine.step(args.clip)
        gradients = [p.grad for p in params.values() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        norm = norms.norm().item() / run["loss_scale"]
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step(grad_scale=min(1.0, args.clip / (norm + 1e-6)) / run["loss_scale"])
        return loss, norm

    # The second step is measured: the optimizer's state is there
    watched = None if args.compile or args.fsdp else run["step"] + 1
    predicted, measured, sent = {}, {}, {}
    while run["step"] < args.steps:
        step = run["step"]
        torch.manual_seed(args.seed * 1_000_003 + step)  # a step needs no random state but its own number
        batches = [train.sample(args.batch) for _ in range(args.accumulate)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if step != watched:
            loss, norm = train_step(batches)
        elif engine is None:
            note_peak()  # peak_bytes starts from 0
            stored = [*model.parameters(), *model.buffers()]
            states = [t for state in optimizer.state.values() for t in state.values()]
            with memory.peak_bytes([*stored, *states], device) as peak, memory.saved_bytes(stored) as saved:
                loss, norm = train_step(batches, lambda: measured.setdefault("activations", saved()))  # noqa: B023
            predicted = predict(model, args, batches[0][0].size(1))
            measured.update(memory.measured_states(model, optimizer), peak=peak())
        else:
            with memory.sent_elements() as sent:
                loss, norm = train_step(batches, backward_done=lambda: measured.update(memory.kept_by(engine)))
        check(loss, norm)
        optimizer.zero_grad()

        # fp16 overflow: skip the step and halve the scale; after 1,000 clean steps try twice the scale again
        run["clean"] += 1
        if not math.isfinite(norm):
            run["skipped"], run["clean"], run["loss_scale"] = run["skipped"] + 1, 0, run["loss_scale"] / 2
        elif args.precision == "fp16" and run["clean"] == 1000:
            run["clean"], run["loss_scale"] = 0, run["loss_scale"] * 2

        run["losses"].append(loss)
        run["tokens"] += sum(ids.numel() for ids, _ in batches)
        run["step"] += 1
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        stop = over_ranks(len(stopped), device)  # a signal may come to one rank first
        if stop or run["step"] % args.save_every == 0 or run["step"] == args.steps:
            save(batches)
        if stop and run["step"] < args.steps:
            bar.close()
            raise Failure(f"stopped after step {run['step']}, saved in {state}; the same command with --resume goes on")
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)

    # After
    with whole() as complete:
        if args.method == "prefix":
            prefix.fold_prefix(complete)  # what only made the parameters has done its work
        if args.method == "ptuning":
            ptuning.fold_ptuning(complete)
        loss_after, bits_after = evaluate(complete, valid, device, rank, world)
        check(loss_after)
        accuracy_after = accuracy(complete, valid, device, rank, world) if args.data == "modules" else None
        note_peak()
        if rank == 0:
            sample_after = sample(complete, encoding, text, device, args.seed)
            stored, stored_bytes = save_trained(complete, encoding, args, out)
    if engine is not None:
        dist.destroy_process_group()
    if rank > 0:
        return

    # Files
    result = {
        "method": args.method, "precision": args.precision, "base": args.base, "data": args.data, "steps": args.steps,
        "trained_parameters": trained, "stored_parameters": stored, "total_parameters": total,
        "stored_bytes": stored_bytes,
        "loss_before": run["loss_before"], "loss_after": loss_after,
        "bits_per_byte_before": run["bits_before"], "bits_per_byte_after": bits_after,
        "accuracy_before": run["accuracy_before"], "accuracy_after": accuracy_after,
        "tokens_per_second": run["tokens"] / run["training_seconds"], "peak_memory_bytes": run["peak"],
        "seconds": run["seconds"] + time.time() - began, "skipped_steps": run["skipped"], "ranks": world,
        "predicted_bytes": predicted, "measured_bytes": measured,
        "sent_elements": sent,
        "python": platform.python_version(), "torch": torch.__version__, "settings": run["settings"],
        "losses": run["losses"],
    }  # fmt: skip
    write(out / "result.json", json.dumps(result, indent=2).encode())
    title = f"{args.method} on {escape(args.data)}"
    write(out / "loss.png", lambda path: plot(path, run["losses"], run["loss_before"], loss_after, title))

    # Report
    for when, text in (("before", run["sample_before"]), ("after", sample_after)):
        print(f"\nsample {when}\n{textwrap.indent(text.strip(), '    | ', lambda line: True)}")
    print(f"\nparameters   {trained:,} trained, {stored:,} stored, {total:,} in all ({trained / total:.2%})")
    print(f"loss         {run['loss_before']:.3f} before, {loss_after:.3f} after, in nats per token of validation data")
    print(f"             {run['bits_before']:.3f} before, {bits_after:.3f} after, in bits per byte")
    if accuracy_after is not None:
        print(f"accuracy     {run['accuracy_before']:.1%} before, {accuracy_after:.1%} after")
    print(f"speed        {result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.0f} s in all")
    print(f"memory       {run['peak'] / 1e9:.2f} GB at the peak, base included")
    if run["skipped"]:
        print(f"skipped      {run['skipped']} steps, on which a gradient overflowed fp16")
    for number, (what, size) in enumerate(measured.items()):
        beside = f", {predicted[what] / 1e6:.3f} predicted" if predicted else ""
        print(f"{'' if number else 'memory of':12} {what:12} {size / 1e6:9.3f} MB{beside}")
    for number, (collective, size) in enumerate(sent.items()):
        print(f"{'' if number else 'sent':12} {collective:12} {size:,.0f} elements in a step")
    print(f"files        {', '.join(sorted(map(str, out.iterdir())))}")


def smooth(losses):
    """Each step's mean over the steps just before it."""
    window = max(1, len(losses) // 30)
    recent = [losses[max(0, i - window) : i + 1] for i in range(len(losses))]
    return [sum(r) / len(r) for r in recent]


def escape(name):
    """A name as matplotlib shows it: a dollar would begin a formula."""
    return name.replace("$", r"\$")


def plot(path, losses, before, after, title):
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="tab:blue", label="training")
    label = f"validation: {before:.2f} → {after:.2f}"
    axes.plot([0, len(losses)], [before, after], "o--", color="tab:orange", label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(args, given):
    """--method all: each method in a process of its own, so that its peak of memory is its own; a table, a figure."""
    out = Path(args.out)
    shared = {f"--{name.replace('_', '-')}": getattr(args, name) for name in sorted(given - {"method", "out"})}
    shared = [flag if value is True else f"{flag}={value}" for flag, value in shared.items()]
    runs = {name: ["--method", name] for name in METHODS if name != "fusion"}
    if args.base not in gpt.HUB:  # scratch has nano's shape and tokenizer: beside GPT-2's its nats mean something else
        runs["scratch"] = ["--method", "full", "--base", "scratch"]
    # A fusion is of adapters of several tasks: this one, and one more
    other = "reference" if args.data == "modules" else "modules"
    runs[f"adapter-{other}"] = ["--method", "adapter", "--data", other]
    runs["fusion"] = ["--method", "fusion", "--adapters", f"{out}/adapter", f"{out}/adapter-{other}"]

    results = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to pass it on
    for name, flags in runs.items():
        print(f"\n{name}", flush=True)
        command = [sys.executable, __file__, *shared, *flags, "--out", f"{out}/{name}"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # its report is in its result.json
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.terminate()  # it saves its state and ends
            code = child.wait() or 1  # 0: it was at its last step
        if code < 0:  # the system's, if memory ran out
            raise Failure(f"{name} was ended by signal {-code}; the same command with --resume goes on")
        if code:
            sys.exit(code)
        results[name] = json.loads((out / name / "result.json").read_text("utf-8"))
    del results[f"adapter-{other}"]

    measure = "loss" if results["full"]["accuracy_after"] is None else "accuracy"
    show = "{:.3f}" if measure == "loss" else "{:.1%}"
    untouched = show.format(results["full"][f"{measure}_before"])
    rows = [["method", "trained", "share", "stored", "on disk", f"{measure} before", "after", "tokens/s", "memory"]]
    rows.append(["untouched", "0", "0 %", "0", "0", untouched, untouched, "", ""])
    for name, r in results.items():
        counts = [f"{r['trained_parameters']:,}", f"{r['trained_parameters'] / r['total_parameters']:.2%}"]
        stored = [f"{r['stored_parameters']:,}", f"{r['stored_bytes'] / 1e6:.2f} MB"]
        quality = [show.format(r[f"{measure}_{when}"]) for when in ("before", "after")]
        cost = [f"{r['tokens_per_second']:,.0f}", f"{r['peak_memory_bytes'] / 1e9:.2f} GB"]
        rows.append([name, *counts, *stored, *quality, *cost])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    table = "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)
    write(out / "compare.json", json.dumps(results, indent=2).encode())
    write(out / "compare.png", lambda path: plot_comparison(path, results, measure, escape(args.data)))
    print(f"\n{table}\n\n{out}/compare.json, {out}/compare.png")


def plot_comparison(path, results, measure, task):
    """Left: what each method reaches, against how much it trains. Right: its training loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, r) in enumerate(results.items()):
        x, y, color = r["trained_parameters"], r[f"{measure}_after"], f"C{i}"
        left.scatter(x, y, color=color, zorder=3)
        beside = (0, 7 if i % 2 else -15)  # above and below in turn: neighbours would write over one another
        left.annotate(name, (x, y), textcoords="offset points", xytext=beside, ha="center", color=color)
        right.plot(range(1, len(r["losses"]) + 1), smooth(r["losses"]), color=color, label=name)
    left.axhline(results["full"][f"{measure}_before"], color="gray", linestyle="--", label="untouched base")
    unit = "nats per token of validation data" if measure == "loss" else "share of validation examples"
    left.set(xscale="log", xlabel="trained parameters", ylabel=f"{measure}, {unit}", title=f"{task}: quality and size")
    left.margins(0.12)
    right.set(xlabel="step", ylabel="training loss, nats per token", title=f"{task}: training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a sample may have characters that the terminal has not
    try:
        main()
        if "WORLD_SIZE" in os.environ:
            # Without torch's clean-up: in it a rank that was done has aborted, and torchrun killed the one that saved
            sys.stdout.flush()
            os._exit(0)
    except (KeyboardInterrupt, Failure, RuntimeError, MemoryError, *ERRORS) as error:
        for bar in [*tqdm._instances]:  # their lines end before the message begins
            bar.close()
        if "--debug" in sys.argv:
            traceback.print_exc()
        line = str(error)
        if isinstance(error, KeyboardInterrupt):
            line = "stopped; what was saved stays, and the same command with --resume goes on from it"
        elif isinstance(error, (RuntimeError, MemoryError)):
            if "memory" not in repr(error).lower() or "illegal" in repr(error):
                raise
            line = f"out of memory: a smaller --batch or --length, or another --method, takes less: {line}"
        # One line without control characters, whatever a file had for a name
        line = "train.py: " + "".join(c if c.isprintable() else " " for c in line)[:1000]
        if isinstance(error, ERRORS):  # wrong use is 2, a failure 1
            print(line, file=sys.stderr)
            sys.exit(2)
        sys.exit(line)
