# SPDX-License-Identifier: MIT
"""How the process starts, stops, and says what went wrong: ranks, 16 bits on this CPU, signals, exit codes."""

import errno
import math
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanopeft import zero
from nanopeft.trainer import Error, Failure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = """adalora adamw adapter data dora gpt ia3 lora memory pipeline prefix prompt ptuning qlora quant recompute
           tensor_parallel zero""".split()
ERRORS = (Error, *(import_module(f"nanopeft.{name}").Error for name in PARTS))  # wrong use, wherever it is noticed


class Ranks(NamedTuple):
    """The processes that torchrun started, seen from one of them; one process is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device
    copies: int = 1  # ranks that read the same rows of a batch: all, in tensor parallelism and a pipeline

    def share(self, batch):
        """This rank's rows."""
        return batch[self.rank // self.copies :: self.world // self.copies]

    def sum(self, number):
        return zero.all_sum(number, self.device) if self.world > 1 else number

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)


def start(args):
    """The ranks of this run, which all come by here."""
    device = torch.device(args.device)
    if args.zero is None and not (args.fsdp or args.tensor or args.pipeline):
        return Ranks(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=600))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, args.tensor or args.pipeline or 1)


def settle_kernels():
    """MKL chooses each function's kernel in its first call. Two threads that are both first can get a coarser one,
    and one run in fifteen then differed (pytorch issue 188792)."""
    for function in (torch.exp, torch.sqrt, torch.tanh):  # the loss, AdamW, a prefix's MLP
        function(torch.ones(1))


def slower_than_fp32(dtype):
    """Whether this CPU multiplies matrices of this type more slowly than those of fp32.

    Measured: bf16 instructions take 0.4 to 0.6 times fp32's time, AVX2 alone 30 to 32 times; the line is drawn at 2.
    The best of four products of 256 x 256, on one thread: beside other work two would wait for each other.
    """
    best, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in (dtype, torch.float32):
        x = torch.ones(256, 256, dtype=kind, device="cpu")
        for _ in range(4):
            began = time.perf_counter()
            x @ x
            best[kind] = min(best.get(kind, math.inf), time.perf_counter() - began)
    torch.set_num_threads(threads)
    return best[dtype] > 2 * best[torch.float32]


def computing_precision(precision, ranks):
    """The precision that the run computes in: the one asked for, or fp32 where this CPU is faster in that."""
    if ranks.device.type != "cpu" or precision == "fp32" or not ranks.sum(int(slower_than_fp32(DTYPES[precision]))):
        return precision
    if ranks.rank == 0:  # to stderr: --generate's text is on stdout
        print(f"this CPU multiplies {precision} more slowly than fp32: computing in fp32", file=sys.stderr)
    return "fp32"


@contextmanager
def signals():
    """A list that Ctrl-C, SIGTERM and a closed terminal put something into, so that the step under way ends first."""
    numbers, closed = [signal.SIGINT, signal.SIGTERM], getattr(signal, "SIGHUP", None)  # Windows has no SIGHUP
    if closed and signal.getsignal(closed) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(closed)
    received = []
    handlers = {n: signal.signal(n, lambda n, _: received.append(n)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def outlive_reader(stream):
    """Drops what is written to a stream once its reader, `head` say, has gone: the run goes on."""

    def guarded(function):
        def call(*args):
            try:
                return function(*args)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EINVAL):  # EINVAL: so Windows calls a closed pipe
                    raise

        return call

    stream.write, stream.flush = guarded(stream.write), guarded(stream.flush)


def run(main):
    """Runs main; what goes wrong becomes one line. Exit code 2 is for wrong use, 1 for a failure."""
    sys.stdout.reconfigure(errors="replace")  # a sample may have characters that the terminal has not
    outlive_reader(sys.stdout)
    outlive_reader(sys.stderr)
    try:
        main()
        sys.stdout.flush()
        if "WORLD_SIZE" in os.environ:
            # Without torch's clean-up: in it a rank that was done has aborted, and torchrun killed the one that saved
            os._exit(0)
    except (KeyboardInterrupt, Failure, RuntimeError, MemoryError, *ERRORS) as error:
        for bar in [*tqdm._instances]:  # their lines end before the message begins
            bar.close()
        if "--debug" in sys.argv:
            traceback.print_exc()
        line = str(error)
        if isinstance(error, KeyboardInterrupt):
            line = "stopped: a run goes on from its last saved state, if there is one, with --resume"
        elif isinstance(error, (RuntimeError, MemoryError)):
            if "memory" not in repr(error).lower() or "illegal" in repr(error):
                raise
            line = f"out of memory: a smaller --batch or --length, or another --method, takes less: {line}"
        # One line without control characters, whatever a file had for a name
        line = "train.py: " + "".join(c if c.isprintable() else " " for c in line)[:1000]
        if isinstance(error, ERRORS):
            print(line, file=sys.stderr)
            sys.exit(2)
        sys.exit(line)
