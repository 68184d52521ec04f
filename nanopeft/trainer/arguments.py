# SPDX-License-Identifier: MIT
"""train.py's flags and their defaults. A flag works or is refused."""

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nanopeft.trainer import Error, bases, files
from nanopeft.trainer.methods import METHODS, Adapter
from nanopeft.trainer.process import DTYPES

VALID_TOKENS = 1 << 18


def refuse(message):
    raise Error(f"{message}; --help shows all options")


def parse(description):
    """(arguments, names of those that were given)."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.error = refuse  # one line instead of the whole usage
    add_flags(parser)
    args, untyped = parser.parse_args(), object()
    typed = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), untyped))))
    given = {name for name, value in typed.items() if value is not untyped}  # also with its default value
    if args.start is not None:
        go_on_from(args, given)
    check_method(args, given)
    check_ranks(args)
    check_device(args)
    if args.out == "":  # an unset variable of the shell's
        raise Error("--out is empty: give a folder")
    args.out = args.out or f"out/{args.method}"
    defaults = METHODS[args.method].defaults | {"lr": None} if args.method != "all" else {}  # lr depends on the base
    vars(args).update(defaults | {name: x for name, x in vars(args).items() if x is not None})
    if args.generate is None:
        check_out(args)
    return args, given


def go_on_from(args, given):
    """--from: the method, its settings and the base are the earlier run's."""
    if not os.path.exists(Path(args.start, "adapter_config.json")):
        raise Error(f"--from {args.start}: no adapter_config.json there; to go on from a whole model give it as --base")
    earlier = Adapter(args.start)
    for name, value in (("method", earlier.method), ("base", earlier.base)):
        if name in given and getattr(args, name) != value:
            raise Error(f"--{name} {getattr(args, name)}: the run of {args.start} had {value}; leave it out")
        setattr(args, name, value)
    args.init = earlier.init  # on which the rate depends
    if own := given & (METHODS[args.method].defaults.keys() - {"lr", "lora_plus"}):
        raise Error(f"--from brings the adapter's own settings: leave out {flags_of(own)}")


def settings(args):
    """{flag: value} of what --resume needs to be as it was."""
    no_result = {"out", "resume", "force", "save_every", "recompute", "zero", "offload", "fsdp", "tensor", "pipeline",
                 "schedule", "debug", *MODES, *MODES["generate"]} - {"prompt", "seed"}  # fmt: skip
    return {name: value for name, value in vars(args).items() if name not in no_result}


MODES = {  # what train.py does instead of training, and the flags for it
    "generate": ("prompt", "prompts", "raw", "temperature", "top_k", "max_new_tokens", "samples", "seed"),
    "merge": ("out",),
}


def flags_of(names):
    """Flags as they are typed."""
    return ", ".join(sorted("--from" if name == "start" else f"--{name.replace('_', '-')}" for name in names))


def ranks(text):
    return {name: int(rank) for name, _, rank in (item.rpartition("=") for item in text.split(","))}


def add_flags(parser):
    def default(method, option):
        return f"({METHODS[method].defaults[option]})"

    rates = ", ".join(f"{name} {method.defaults['lr']:g}" for name, method in METHODS.items())
    add = parser.add_argument_group("what is trained, and how its numbers are kept").add_argument
    add("--method", choices=[*METHODS, "all"], default="lora", help="what is trained; all: one after another (lora)")
    add("--precision", choices=[*DTYPES], default="fp32", help="type of the base's weights and the arithmetic (fp32)")
    names = "nano, scratch (nano untrained), a folder, gpt2, or a causal LM of the Hugging Face hub by its name"
    add("--base", default="nano", help=f"{names} (nano)")
    add("--from", dest="start", metavar="FOLDER", help="start from the adapter that an earlier run left")
    start = f"rank r of the update {default('lora', 'rank')}; adalora: at the start {default('adalora', 'rank')}"
    add("--rank", type=int, help=f"lora, qlora, dora: {start}")
    add("--alpha", type=float, help=f"... and adalora: the update is scaled by alpha / r {default('lora', 'alpha')}")
    names = f"... and adalora: ends of layer names, with commas between {default('lora', 'targets')}"
    add("--targets", type=lambda text: text if text == "all-linear" else text.split(","), help=names)
    others = "lora, qlora, dora: other ranks, by a regular expression for the end of a name: mlp.*=16,h.5.*=4"
    add("--ranks", type=ranks, metavar="NAME=R,...", help=f"{others} (none)")
    add("--quant", choices=["nf4", "int8"], help=f"qlora: how the base is stored {default('qlora', 'quant')}")
    where = "houlsby, in both sublayers, or pfeiffer, at the block"
    add("--placement", choices=["houlsby", "pfeiffer"], help=f"adapter: {where} {default('adapter', 'placement')}")
    add("--reduction", type=int, help=f"adapter: the bottleneck is width / reduction {default('adapter', 'reduction')}")
    add("--adapters", nargs="+", metavar="FOLDER", help="fusion: what earlier runs of --method adapter left")
    tokens = f"prefix, prompt, ptuning: number of virtual tokens {default('prefix', 'tokens')}"
    add("--tokens", type=int, help=tokens)
    add("--hidden", type=int, help="prefix: width of an MLP to train it through (none)")
    starts = "lora: kaiming, gaussian, reverse or pissa (kaiming)"
    add("--init", help=f"{starts}; prompt: random, vocabulary, labels, or a text to start from (vocabulary)")
    add("--lora-plus", type=float, metavar="RATIO", help="lora, qlora, dora: B's learning rate is RATIO times A's (1)")
    add("--target-rank", type=int, help=f"adalora: mean rank at the end {default('adalora', 'target_rank')}")
    add("--encoder", choices=["lstm", "mlp"], help=f"ptuning: what makes the vectors {default('ptuning', 'encoder')}")
    add("--template", help='ptuning: where the vectors go, as in "[P][P]{source}[P]" (in front)')

    add = parser.add_argument_group("data").add_argument
    tasks = f"{', '.join(files.TASKS)}; or files: .txt, .jsonl, folders of .txt"
    add("--data", nargs="+", default=["reference"], metavar="NAME", help=f"{tasks} (reference)")
    add("--valid", nargs="+", metavar="FILE", help="data to validate on (a tenth of --data)")
    add("--length", type=int, help="tokens in an example, at most (128, and 256 for modules and .jsonl)")
    add("--pack", action="store_true", help="join short examples into full rows; each attends to itself alone")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="optimizer steps (300); 0: evaluate only")
    add("--epochs", type=float, help="passes over the training data, instead of --steps")
    add("--batch", type=int, default=16, help="rows in a micro-batch (16)")
    add("--accumulate", type=int, default=1, help="micro-batches in a step (1)")
    rates += "; a fifth for pissa, and for bases of over 50 million numbers"
    add("--lr", type=float, help=f"peak of the learning rate ({rates})")
    add("--weight-decay", type=float, default=0.0, help="of the weight matrices (0)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient (1)")
    add("--seed", type=int, default=0, help="of initialization, batches and samples (0)")

    add = parser.add_argument_group("validation").add_argument
    add("--eval-every", type=int, metavar="N", help="steps from one evaluation to the next (a tenth of them)")
    most = f"most tokens to validate on, before and after ({VALID_TOKENS:,}); on the way a quarter of those trained on"
    add("--valid-tokens", type=int, default=VALID_TOKENS, metavar="N", help=most)
    add("--keep", choices=["best", "last"], default="best", help="which step's numbers the run leaves (best)")
    add("--patience", type=int, metavar="N", help="stop after N evaluations without a lower loss (never)")
    names = "text that the base knew, to see what it forgets: .txt, .jsonl, or library, nano's own (nano: library)"
    add("--remember", nargs="+", metavar="FILE", help=names)
    add("--accuracy", action="store_true", help="of .jsonl: the share of answers that are right to the letter")

    add = parser.add_argument_group("files").add_argument
    add("--out", help="folder of the results (out/METHOD)")
    add("--save-every", type=int, default=100, help="steps from one saved state to the next (100)")
    add("--resume", action="store_true", help="go on from the state in the folder of the results, if there is one")
    changed = "go on though the data or the base changed since, with --resume, --from, --generate, --merge or a fusion"
    add("--force", action="store_true", help=changed)
    add("--merge", metavar="FOLDER", help="do not train: write the base with what this run learned to --out")
    add("--debug", action="store_true", help="show where in the program an error came from")

    add = parser.add_argument_group("generation").add_argument
    add("--generate", metavar="FOLDER", help="do not train: go on from --prompt with what was trained in this folder")
    as_typed = r"what samples go on from (--generate: - is standard input). \n stays: in bash a new line is $'one\ntwo'"
    add("--prompt", help=as_typed)
    add("--prompts", metavar="FILE", help="a prompt on each line")
    add("--raw", action="store_true", help="the prompt alone, without the template of the data")
    add("--temperature", type=float, default=0.8, help="0: the likeliest token; 1: as the model has it (0.8)")
    add("--top-k", type=int, default=20, metavar="K", help="draw from the K likeliest tokens (20)")
    add("--max-new-tokens", type=int, default=80, metavar="N", help="most tokens of a text (80)")
    add("--samples", type=int, default=1, metavar="N", help="texts for each prompt (1)")

    add = parser.add_argument_group("device, and several processes under torchrun").add_argument
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda, cuda:1, mps (cuda if there is one)")
    every = "recompute every K-th block's activations in backward: less memory, more time (1)"
    add("--recompute", type=int, nargs="?", const=1, metavar="K", help=every)
    add("--compile", action="store_true", help="torch.compile each decoder block, and AdamW (not --fsdp's)")
    add("--zero", type=int, help="ZeRO's stage, 0 to 3; each rank takes its share of every batch")
    add("--offload", choices=["cpu", "disk"], help="with --zero: where master copies and moments are kept")
    add("--fsdp", action="store_true", help="PyTorch's own fully_shard instead of zero.py")
    add("--tensor", type=int, metavar="N", help="each large matrix is split over the N processes")
    each = "each of the N processes holds some of the layers; --accumulate gives the micro-batches"
    add("--pipeline", type=int, metavar="N", help=each)
    add("--schedule", choices=["gpipe", "1f1b"], help="with --pipeline: the order of forwards and backwards (1f1b)")


def check_method(args, given):
    """Flags that do not belong to the method, and numbers out of range."""
    for mode, flags in MODES.items():
        idle = given - {mode, "precision", "device", "force", "debug", *flags}
        if getattr(args, mode) is not None and idle:
            raise Error(f"--{mode} does not train: leave out {flags_of(idle)}")
    if args.generate is None and (idle := given & set(MODES["generate"]) - {"prompt", "seed"}):
        raise Error(f"{flags_of([min(idle)])} belongs to --generate")
    if args.merge is not None and args.out is None:
        raise Error("--merge needs --out: the folder that the merged model is written to")
    for name in sorted(given):
        owners = [method for method in METHODS if name in METHODS[method].defaults]
        if owners and args.method == "all":
            raise Error(f"{flags_of([name])} differs from method to method: leave it out with --method all")
        if owners and args.method not in owners:
            raise Error(f"{flags_of([name])} belongs to --method {', '.join(owners)}")
    reads_adapter = (args.generate, args.merge, args.start) != (None, None, None)
    if args.force and not reads_adapter and not args.resume and args.method != "fusion":
        raise Error("--force is for --resume, --from, --generate, --merge and --method fusion: leave it out")
    if args.method == "fusion" and not args.adapters and args.start is None:
        raise Error("--method fusion needs --adapters: folders that runs of --method adapter left")
    if args.base == "scratch" and args.method != "full":
        raise Error("--base scratch has learned nothing that could be kept frozen: use --method full")
    if args.method == "adalora" and (args.fsdp or args.zero is not None):
        raise Error("--method adalora scores whole gradients, which --zero and --fsdp divide: leave them out")
    if args.method == "fusion" and (args.fsdp or args.zero == 3):
        raise Error("--method fusion has a penalty on whole matrices, which --zero 3 and --fsdp divide: use --zero 2")
    if args.prompt == "-" and args.generate is None:
        raise Error("--prompt -, standard input, belongs to --generate")
    if args.pack and args.method in ("prefix", "prompt", "ptuning", "all"):
        raise Error("--pack joins examples into a row, and prefix, prompt, ptuning have their vectors once in a row")
    if args.pack and args.pipeline:
        raise Error("--pack gives each token a position, which the stages of --pipeline do not pass on: leave it out")
    if args.prompt is not None and args.prompts is not None:
        raise Error("--prompt and --prompts both say what to go on from: give one of them")
    if args.epochs is not None and args.steps is not None:
        raise Error("--steps and --epochs both say how long: give one of them")
    if args.steps is None and args.epochs is None:
        args.steps = 300
    if args.remember is None and args.base == "nano":
        args.remember = ["library"]
    if args.length is None:
        args.length = 256 if args.data == ["modules"] or args.data[0].endswith(".jsonl") else 128
    least = dict(
        steps=0, epochs=0, batch=1, accumulate=1, length=2, save_every=1, eval_every=1, valid_tokens=1, patience=1,
        recompute=1, tensor=1, pipeline=1, lr=0, weight_decay=0, clip=0, temperature=0, top_k=1, max_new_tokens=1,
        samples=1, lora_plus=0,
    )  # fmt: skip
    for name in [name for name in least if name in given and not least[name] <= getattr(args, name) < math.inf]:
        number = f"at least {least[name]} and finite"
        raise Error(f"--{name.replace('_', '-')} must be {number}, not {getattr(args, name)}")
    if args.clip == 0:
        raise Error("--clip 0 would leave nothing of the gradients: for none to be clipped give a large number")
    if not 0 <= args.seed < 1 << 40:
        raise Error(f"--seed must be from 0 to 2^40 - 1, not {args.seed}")


def check_out(args):
    """What a run reads must not be what it writes: --resume and other methods would read something else."""
    names = ["nano", "scratch", *bases.HUB, *[args.base] * (not os.path.isdir(args.base))]
    if (name := os.path.normpath(args.out)) in names:
        raise Error(f"--out {name} is also the name of a base, which would be read in its place: give another")
    if args.steps == 0 and not args.resume and os.path.exists(Path(args.out, "state.safetensors")):
        raise Error(f"--steps 0 trains nothing, and would replace the results in {args.out}: give another --out")
    outs = [Path(args.out)] if args.method != "all" else [Path(args.out, name) for name in (*METHODS, "scratch")]
    reads = [("--adapters", folder) for folder in args.adapters or []]
    reads.append(("--base", args.base if os.path.isdir(args.base) else bases.find_checkpoint("nano")))
    reads += [("--from", args.start)] * (args.start is not None)
    if args.merge is not None:
        reads += [("--merge", args.merge), ("its base", Adapter(args.merge).base)]
    reads += [("--data", path) for path in args.data if path.endswith(".txt")]
    for flag, name in reads:
        for path in (out / file for out in outs for file in ("", "merges.txt", "vocab.txt")):  # a tokenizer's
            if os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name):
                raise Error(f"{flag} {name} is where this run would write its results: give another --out")


def check_ranks(args):
    """Several processes: what they share, and what cannot be shared."""
    given = {name: getattr(args, name) for name in ("zero", "fsdp", "tensor", "pipeline")}
    kinds = [name for name, value in given.items() if value is not None and value is not False]  # 0 == False
    world, shares = int(os.environ.get("WORLD_SIZE", 1)), len(kinds) > 0
    if world > 1 and not shares:
        raise Error(
            f"{world} processes would all do the same: share the work with --zero 0, 1, 2 or 3, --fsdp, "
            f"--tensor {world} or --pipeline {world}"
        )
    if shares and "WORLD_SIZE" not in os.environ:
        n = args.tensor or args.pipeline or 2
        raise Error(f"--{kinds[0]} is for several processes: torchrun --nproc_per_node {n} train.py ...")
    for name in [name for name in ("tensor", "pipeline") if name in kinds]:
        methods = ("full", "lora", "adapter", "qlora")[: 3 if name == "tensor" else 4]  # quantized blocks are not cut
        if len(kinds) > 1:
            raise Error(f"--{name} with --{next(k for k in kinds if k != name)} needs a mesh of processes: give one")
        if getattr(args, name) != world:
            raise Error(f"--{name} {getattr(args, name)} with {world} processes: give torchrun as many")
        if args.method not in methods:
            others = {"qlora": "--zero", "adalora": "one process", "all": "one process"}
            use = others.get(args.method, "--zero or --fsdp")
            raise Error(f"--{name} is for --method {', '.join(methods)}: for {args.method} use {use}")
    if args.schedule and not args.pipeline:
        raise Error("--schedule belongs to --pipeline")
    if args.zero not in (None, 0, 1, 2, 3) or (args.fsdp and args.zero is not None):
        raise Error("give a stage, --zero 0, 1, 2 or 3, or --fsdp")
    if args.offload and args.zero is None:
        raise Error("--offload belongs to --zero")
    if shares and args.method == "all":
        raise Error("--zero and --fsdp are for training one method")
    if args.fsdp and (args.method == "qlora" or args.precision == "fp16"):
        raise Error("--fsdp is for fp32 and bf16, and not for qlora: use --zero")
    if args.batch % world and not (args.tensor or args.pipeline):
        raise Error(f"--batch {args.batch} cannot be shared by {world} processes: give a multiple of {world}")
    if shares and args.device == "cuda" and not dist.is_nccl_available():
        raise Error("several GPUs need NCCL, which torch lacks here, as on Windows: --device cpu")
    if shares and args.device == "mps":
        raise Error("gloo has no messages between Apple's GPUs: several processes need --device cpu or cuda")
    if shares and args.device.startswith("cuda:"):
        raise Error(f"each process takes a GPU of its own: --device cuda, not {args.device}")


def check_device(args):
    """Tries one product on the device, in this type; looks for a compiler if one is needed."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if args.compile and args.device == "cpu" and not shutil.which(compiler):
        raise Error(f"--compile needs a C++ compiler, and {compiler} is not there: set CXX to one, or leave it out")
    try:
        if args.device == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        one = torch.ones(1, 1, dtype=DTYPES[args.precision], device=args.device)
        (one @ one).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Error(f"--device {args.device} with --precision {args.precision} does not work here: {reason}") from None
