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

from nanopeft import data
from nanopeft.trainer import Error, bases
from nanopeft.trainer.methods import METHODS
from nanopeft.trainer.process import DTYPES


def refuse(message):
    raise Error(f"{message}; --help shows all options")


def parse(description):
    """(arguments, names of those that were given)."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.error = refuse  # one line instead of the whole usage
    add_flags(parser.add_argument)
    args = parser.parse_args()
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    check_method(args, given)
    check_ranks(args)
    check_device(args)
    args.out = args.out or f"out/{args.method}"
    defaults = METHODS[args.method].defaults if args.method != "all" else {}
    vars(args).update(defaults | {name: x for name, x in vars(args).items() if x is not None})
    if args.generate is None:
        check_out(args)
    return args, given


def settings(args):
    """{flag: value} of all that changes what a run computes: a state goes on with the same ones alone."""
    no_result = ("out", "resume", "force", "save_every", "recompute", "generate", "zero", "offload", "fsdp", "debug")
    no_result += ("tensor", "pipeline", "schedule")
    return {name: value for name, value in vars(args).items() if name not in no_result}


def add_flags(add):
    def default(method, option):
        return f"({METHODS[method].defaults[option]})"

    rates = ", ".join(f"{name} {method.defaults['lr']:g}" for name, method in METHODS.items())
    add("--method", choices=[*METHODS, "all"], default="lora", help="what is trained; all: one after another (lora)")
    add("--precision", choices=[*DTYPES], default="fp32", help="type of the base's weights and the arithmetic (fp32)")
    names = ", ".join(bases.HUB)
    add("--base", default="nano", help=f"nano, scratch (nano untrained), a folder, {names} (nano)")
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
    tokens = f"prefix, prompt, ptuning: number of virtual tokens {default('prefix', 'tokens')}"
    add("--tokens", type=int, help=tokens)
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
    add("--tensor", type=int, metavar="N", help="under torchrun: each large matrix is split over the N processes")
    each = "under torchrun: each of the N processes holds some of the layers; --accumulate gives the micro-batches"
    add("--pipeline", type=int, metavar="N", help=each)
    add("--schedule", choices=["gpipe", "1f1b"], help="with --pipeline: the order of forwards and backwards (1f1b)")
    add("--offload", choices=["cpu", "disk"], help="with --zero: where master copies and moments are kept")
    every = "recompute every K-th block's activations in backward: less memory, more time (1)"
    add("--recompute", type=int, nargs="?", const=1, metavar="K", help=every)
    add("--compile", action="store_true", help="torch.compile each decoder block, and AdamW (not --fsdp's)")
    add("--save-every", type=int, default=100, help="steps from one saved state to the next (100)")
    add("--out", help="folder of the results (out/METHOD)")
    add("--resume", action="store_true", help="go on from the state in the folder of the results, if there is one")
    changed = "go on though the data or the base changed since, with --resume, --generate or adapters of a fusion"
    add("--force", action="store_true", help=changed)
    add("--prompt", help="what the samples go on from (the start of the validation data)")
    add("--generate", metavar="FOLDER", help="do not train: go on from --prompt with what was trained in this folder")
    add("--debug", action="store_true", help="show where in the program an error came from")


def check_method(args, given):
    """Flags that do not belong to the method, and numbers out of range."""
    idle = given - {"generate", "force", "prompt", "precision", "device", "seed", "debug"}
    if args.generate is not None and idle:
        raise Error(f"--generate does not train: leave out {', '.join(sorted(idle))}")
    for name in sorted(given):
        owners = [method for method in METHODS if name in METHODS[method].defaults]
        if owners and args.method == "all":
            raise Error(f"--{name} differs from method to method: leave it out with --method all")
        if owners and args.method not in owners:
            raise Error(f"--{name} belongs to --method {', '.join(owners)}")
    if args.force and args.generate is None and not args.resume and args.method != "fusion":
        raise Error("--force is for --resume, --generate and --method fusion: leave it out")
    if args.method == "fusion" and not args.adapters:
        raise Error("--method fusion needs --adapters: folders that runs of --method adapter left")
    if args.base == "scratch" and args.method != "full":
        raise Error("--base scratch has learned nothing that could be kept frozen: use --method full")
    if args.length is None:
        args.length = 256 if args.data == "modules" or args.data.endswith(".jsonl") else 128
    least = dict(
        steps=1, batch=1, accumulate=1, length=2, save_every=1, recompute=1, tensor=1, pipeline=1,
        lr=0, weight_decay=0, clip=0,
    )  # fmt: skip
    for name in [name for name in least if name in given and not least[name] <= getattr(args, name) < math.inf]:
        number = f"at least {least[name]} and finite"
        raise Error(f"--{name.replace('_', '-')} must be {number}, not {getattr(args, name)}")
    if not 0 <= args.seed < 1 << 40:
        raise Error(f"--seed must be from 0 to 2^40 - 1, not {args.seed}")


def check_out(args):
    """What a run reads must not be what it writes: --resume and other methods would read something else."""
    outs = [Path(args.out)] if args.method != "all" else [Path(args.out, name) for name in (*METHODS, "scratch")]
    reads = [("--adapters", folder) for folder in getattr(args, "adapters", None) or []]
    if args.base not in bases.HUB or os.path.isdir(args.base):
        reads.append(("--base", bases.find_checkpoint("nano" if args.base == "scratch" else args.base)))
    reads += [("--data", args.data)] * args.data.endswith(".txt")
    for flag, name in reads:
        for path in (*outs, *(out / "merges.txt" for out in outs)):  # full leaves a tokenizer
            if os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name):
                raise Error(f"{flag} {name} is where this run would write its results: give another --out")


def check_ranks(args):
    """Several processes: what they share, and what cannot be shared."""
    kinds = [name for name in ("zero", "fsdp", "tensor", "pipeline") if getattr(args, name) not in (None, False)]
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
            raise Error(f"--{name} is for --method {', '.join(methods)}: for {args.method} use --zero or --fsdp")
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
    if shares and args.device.startswith("cuda:"):
        raise Error(f"each process takes a GPU of its own: --device cuda, not {args.device}")


def check_device(args):
    """One product: is there such a device, and does it have this type? And a compiler, if one is needed."""
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
