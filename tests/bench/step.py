# SPDX-License-Identifier: MIT
"""A training step of each technique, and generation, against transformers + peft (+ bitsandbytes): time and memory.

    python tests/bench/step.py --shape gpt2 --steps 10 --out out/bench/gpt2       a table, gpt2.json and gpt2.png
    python tests/bench/step.py --growth --shape nano --out out/bench/growth       LoRA over batch, length and rank
    python tests/bench/step.py --scale --batch 1 --steps 3 --out out/bench/scale  LoRA from nano to GPT-2 XL
    python tests/bench/step.py --compile --methods lora                           both sides compiled
    python tests/bench/step.py --device cuda --shape llama --methods lora         on a GPU, eager and compiled

Random weights, random tokens, bf16, 4 x 256 tokens. Each side runs in a process of its own; they take turns step by
step, so that other load on the machine hits each alike: only the ratios mean something. Seconds are the best round's;
on a machine with other work, --clock cpu counts those of the processor instead. The peer is tried in several
configurations, and the fastest counts; our AdamW is compiled for `full`, where it has much to do. Memory is the peak of
the process's resident memory (VmHWM, Linux) above what it held when the model with its technique had run on a few
tokens, and gradients and optimizer were not there; "tight" is the same ratio in one more step, in which the holes that
malloc keeps in its heap are given back.

On a CPU without bf16 instructions both sides run in fp32, as train.py does there.

On a GPU each side computes alone, one after the other, with a batch that fills it: halved until it fits. Its
seconds are the mean of all steps between two waits for the GPU, its memory is torch's max_memory_allocated, and the
share is of the card's dense bf16 rate.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin stall a machine with other work

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanopeft import adamw, gpt, lora, memory, prefix, prompt, ptuning, qlora
from nanopeft.trainer import bases, huggingface
from nanopeft.trainer.process import slower_than_fp32

BF16 = torch.bfloat16
SHAPES = {
    "nano": dict(vocab_size=3072, n_positions=512, n_embd=256, n_layer=6, n_head=4),
    "gpt2": dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
}
SHAPES["medium"] = SHAPES["gpt2"] | dict(n_embd=1024, n_layer=24, n_head=16)
SHAPES["large"] = SHAPES["gpt2"] | dict(n_embd=1280, n_layer=36, n_head=20)
SHAPES["xl"] = SHAPES["gpt2"] | dict(n_embd=1600, n_layer=48, n_head=25)
LLAMA = dict(  # the shape of Llama 3.2 1B
    vocab_size=128256, max_position_embeddings=1024, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, intermediate_size=8192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
BATCH = {"nano": 256, "gpt2": 32, "medium": 16, "llama": 8}  # of 1,024 tokens, on a card of 80 GB
RATES = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 products, from the cards' data sheets
METHODS = ("full", "lora", "qlora", "prefix", "prompt", "ptuning")
N = 20  # tokens of a prefix or prompt
# name: (type of the base, type of what is trained, autocast, GPT-2's activation as transformers calls it)
PEERS = {
    "bf16": (BF16, BF16, False, "gelu_new"),
    "bf16, fused gelu": (BF16, BF16, False, "gelu_pytorch_tanh"),  # the same function in one kernel
    "bf16 + autocast": (BF16, torch.float32, True, "gelu_new"),
    "fp32 + autocast": (torch.float32, torch.float32, True, "gelu_new"),
    "fp32": (torch.float32, torch.float32, False, "gelu_new"),  # these two where bf16 is slower
    "fp32, fused gelu": (torch.float32, torch.float32, False, "gelu_pytorch_tanh"),
}
PROMPT, NEW = 32, 64  # tokens read and written in the race of generation
MATMUL = 2048


# -------------------------------------------------------------------------------------------------------- the two sides


def our_model(method, shape, rank, dtype, device="cpu"):
    if shape == "llama":
        import transformers

        model = huggingface.with_loss(llama(transformers, dtype).to(device))
    else:
        model = gpt.GPT(**SHAPES[shape]).to(device, dtype)
    if method == "lora":
        lora.add_lora(model, r=rank)
    elif method == "qlora":
        qlora.add_qlora(model, r=rank)
    elif method == "prefix":
        model = prefix.PrefixTuning(model, N)
    elif method == "prompt":
        model = prompt.PromptTuning(model, N)
    elif method == "ptuning":
        model = ptuning.PTuning(model, N)
    return model


def llama(transformers, dtype):
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="sdpa")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")  # drawing a thousand million numbers on a CPU would take longer than the race
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.view(-1)[:].copy_(noise(p.numel(), dtype))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table was made on "meta" too
    return model


def noise(n, dtype):
    """n numbers of deviation 0.02, which repeat after 2^20."""
    some = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    return some.to(dtype).repeat(-(-n // len(some)))[:n]


def peer_model(method, shape, rank, base_type, own_type, autocast, activation, device="cpu"):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if shape == "llama":
        model = llama(transformers, base_type)
    else:
        config = transformers.GPT2Config(
            **SHAPES[shape], bos_token_id=0, eos_token_id=None, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
            activation_function=activation, attn_implementation="sdpa",
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).to(base_type)
    if method == "qlora":
        four_bit = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=BF16 if autocast else base_type,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            options = dict(quantization_config=four_bit, dtype=base_type, device_map={"": device})
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model = model if method == "qlora" else model.to(device)
    if method in ("full", "generate"):
        return model
    import peft

    prompts = dict(task_type="CAUSAL_LM", num_virtual_tokens=N)
    d = LLAMA["hidden_size"] if shape == "llama" else SHAPES[shape]["n_embd"]
    adapter = {
        "lora": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=16, fan_in_fan_out=shape != "llama"
        ),
        "prefix": lambda: peft.PrefixTuningConfig(**prompts),
        "prompt": lambda: peft.PromptTuningConfig(**prompts),
        "ptuning": lambda: peft.PromptEncoderConfig(
            **prompts, encoder_reparameterization_type="LSTM", encoder_hidden_size=d // 2, encoder_num_layers=2
        ),
    }
    model = peft.get_peft_model(model, adapter["lora" if method == "qlora" else method]())
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(own_type)
    return model


def compile_blocks(model):
    torch._dynamo.config.cache_size_limit = 256
    for block in bases.blocks(model):
        block.compile()


def resident(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def work(pipe, side, method, shape, batch, length, rank, threads, dtype, compiled):
    """One racer: sends when it is ready, the seconds (wall, CPU per thread) of each call asked for, and the peak."""
    warnings.simplefilter("ignore")  # peft's and transformers', of each other
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    context = contextlib.nullcontext
    if method == "matmul":
        x = torch.randn(MATMUL, MATMUL).to(dtype)
        model = None
    elif side == "ours":
        model = our_model(method, shape, rank, dtype)
    else:
        base_type, own_type, autocast, activation = PEERS[side]
        model = peer_model(method, shape, rank, base_type, own_type, autocast, activation)
        if autocast:
            context = lambda: torch.autocast("cpu", dtype=BF16)  # noqa: E731
    ids = torch.randint(SHAPES[shape]["vocab_size"], (batch, PROMPT if method == "generate" else length))
    if method == "matmul":

        def call():
            x @ x

    elif method == "generate":
        model.eval()
        options = {} if side == "ours" else dict(do_sample=False, use_cache=True, pad_token_id=0)

        def call(ids=ids, new=NEW):
            options["attention_mask"] = None if side == "ours" else torch.ones_like(ids)
            model.generate(ids, max_new_tokens=new, **options)

        call(ids[:, :4], 2)
    else:
        options = {} if side == "ours" or method == "prefix" else dict(use_cache=False)
        trained = [p for p in model.train().parameters() if p.requires_grad]
        if compiled:
            compile_blocks(model)

        def backward(ids):
            with context():
                loss = model(input_ids=ids, labels=ids, **options).loss
            loss.backward()

        def call():
            backward(ids)
            optimizer.step()
            optimizer.zero_grad()

        backward(ids if compiled else ids[:1, :8])  # compiled once, for the shape that is measured
        for p in trained:
            p.grad = None
    gc.collect()
    # What building the model has left behind, and the code that torch loads at its first use, are not counted
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    if method not in ("matmul", "generate"):
        if side == "ours":
            optimizer = adamw.AdamW(trained, compile=method == "full")
        else:
            optimizer = torch.optim.AdamW(trained, fused=True)

    pipe.send("ready")
    while pipe.recv() == "go":
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        pipe.send((time.perf_counter() - wall, (time.process_time() - cpu) / threads))
    trained = 0 if model is None else sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = resident("VmHWM") - before
    libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: from here on, what is freed goes back to the system at once
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    call()
    pipe.send(dict(memory=memory, tight=resident("VmHWM") - before, trained=trained))


# ------------------------------------------------------------------------------------------------------------- the race


def race(racers, rounds, warmup=2):
    """{name: work's arguments} → {name: {"wall": [...], "cpu": [...], "memory": bytes}}, all taking turns."""
    context = multiprocessing.get_context("forkserver")  # imports once, and each racer starts from a clean heap
    context.set_forkserver_preload(["torch", "transformers.models.gpt2.modeling_gpt2", "peft", "bitsandbytes"])
    pipes, found = {}, {name: dict(wall=[], cpu=[]) for name in racers}
    for name, arguments in racers.items():
        pipes[name], other = context.Pipe()
        context.Process(target=work, args=(other, *arguments), daemon=True).start()
        other.close()
        pipes[name].recv()
    for turn in range(warmup + rounds):
        for name, pipe in pipes.items():
            pipe.send("go")
            wall, cpu = pipe.recv()
            if turn >= warmup:  # the first ones allocate
                found[name]["wall"].append(wall)
                found[name]["cpu"].append(cpu)
    for name, pipe in pipes.items():
        pipe.send("stop")
        found[name] |= pipe.recv()
    return found


def flops(method, shape, batch, length, rank):
    """Multiplications and additions in the matrix products that a step cannot do without (attention: its lower half).

    A linear layer with P weights takes 2 P for each token forward, 2 P for dx, and 2 P for dW if W is trained.
    """
    if shape == "llama":
        V, d, layers, f = (LLAMA[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"))
        w = d * LLAMA["num_key_value_heads"] // LLAMA["num_attention_heads"]  # width of the keys
        linears = [(d, d), (d, w), (d, w), (d, d), (d, f), (d, f), (f, d)]
    else:
        V, _, d, layers, _ = SHAPES[shape].values()
        linears = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    seen = length + (N if method in ("prompt", "ptuning") else 0)  # tokens computed
    keys = seen / 2 + (N if method == "prefix" else 0)  # keys that a query sees, in the mean
    weights = layers * sum(i * o for i, o in linears) + V * d
    per_token = (6 if method == "full" else 4) * weights
    per_token += layers * 3 * 4 * d * keys  # q K' and p V: 4 d for each key forward, twice that backward
    if method in ("lora", "qlora"):
        per_token += 6 * layers * rank * sum(i + o for i, o in linears)
    return batch * seen * per_token


# ------------------------------------------------------------------------------------------------------------ on a GPU


def work_on_gpu(pipe):
    """A process for one side: to each of run_on_gpu's arguments it answers {"seconds", ...}, or {"error": a line}."""
    warnings.simplefilter("ignore")
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:  # the race is over
            return
        try:
            pipe.send(run_on_gpu(*arguments))
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            line = "out of memory" if memory else (str(error).strip() or repr(error)).splitlines()[-1][:200]
            pipe.send({"error": line})
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def ask(workers, side, arguments, limit):
    """The answer of a side's process, which is started where there is none, and ended after an error."""
    if side not in workers:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        workers[side] = context.Process(target=work_on_gpu, args=(other,), daemon=True), pipe
        workers[side][0].start()
        other.close()
    process, pipe = workers[side]
    pipe.send((side, *arguments))
    try:
        found = pipe.recv() if pipe.poll(limit) else {"error": f"not done after {limit:.0f} s"}
    except EOFError:
        process.join()
        found = {"error": f"ended with exit code {process.exitcode}"}
    if "error" in found:  # a clean one for the next
        process.kill()
        process.join()
        del workers[side]
    return found


def run_on_gpu(side, method, shape, batch, length, rank, steps, device, compiled):
    on_gpu, context = device == "cuda", contextlib.nullcontext
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    torch.manual_seed(0)
    if compiled:
        torch._dynamo.reset()
    if side == "ours":
        model = our_model(method, shape, rank, BF16, device)
        options = {}
    else:
        kind = "fp32 + autocast" if method == "full" else "bf16, fused gelu"  # full: ours keeps fp32 master copies
        base_type, own_type, autocast, _ = PEERS[kind]
        model = peer_model(method, shape, rank, base_type, own_type, autocast, "gelu_pytorch_tanh", device)
        options = {} if method == "prefix" else {"use_cache": False}
        if autocast:
            context = lambda: torch.autocast(device, dtype=BF16)  # noqa: E731
    model.train()
    if compiled:
        compile_blocks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if side == "ours":
        optimizer = adamw.AdamW(trained, compile=compiled)
    else:
        optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(LLAMA["vocab_size"] if shape == "llama" else SHAPES[shape]["vocab_size"], (batch, length))
    ids = ids.to(device)

    def step():
        with context():
            loss = model(input_ids=ids, labels=ids, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    began = time.perf_counter()
    for _ in range(3):  # the first ones allocate, and compile
        step()
    wait()
    first = time.perf_counter() - began
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    seconds = (time.perf_counter() - began) / steps
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    return dict(seconds=seconds, memory=memory, first_steps=first, trained=sum(p.numel() for p in trained))


def card_rate():
    """The dense bf16 rate of the card, if it is known. A slice of a card has less."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for card, rate in RATES.items() if card in name and "MIG" not in name), None)


def race_on_gpu(workers, method, shape, batch, args, compiled):
    """One row: each side with a batch that it has memory for. A side that fails has an "error" instead.

    workers: a dict of the two sides' processes, kept from row to row.
    """
    row = dict(method=method, shape=shape, compiled=compiled, length=args.length)
    for side in ("ours", "peer"):
        n, found = batch, {"error": "out of memory"}
        while n and found.get("error") == "out of memory":
            arguments = (method, shape, n, args.length, args.rank, args.steps, args.device, compiled)
            found = ask(workers, side, arguments, args.limit)
            found["batch"], n = n, n // 2
        if "seconds" in found:
            found["tokens_per_second"] = found["batch"] * args.length / found["seconds"]
            found["flops"] = flops(method, shape, found["batch"], args.length, args.rank) / found["seconds"]
            found["share"] = found["flops"] / card_rate() if args.device == "cuda" and card_rate() else None
        row[side] = found
    if "seconds" in row["ours"] and "seconds" in row["peer"]:
        row["speed"] = row["ours"]["tokens_per_second"] / row["peer"]["tokens_per_second"]
    return row


def gpu_batch(shape, length):
    """BATCH, for this card's memory and rows of this length: a power of two."""
    size = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80e9
    return 1 << max(0, math.floor(math.log2(max(1, BATCH[shape] * 1024 / length * size / 79e9))))


def gpu_line(row):
    parts = [f"{row['shape']:7}{row['method']:8}{'compiled' if row['compiled'] else 'eager':9}"]
    for side in ("ours", "peer"):
        x = row[side]
        if "error" in x:
            parts.append(f"{side}: {x['error']}")
        else:
            share = f", {x['share']:.1%} of the card's rate" if x["share"] else ""
            memory = f", {x['memory'] / 1e9:.2f} GB" if x["memory"] else ""
            parts.append(f"{side} {x['tokens_per_second']:,.0f} tokens/s{memory}{share}, batch {x['batch']}")
    return "; ".join(parts) + (f"; {row['speed']:.2f} x" if "speed" in row else "")


# ------------------------------------------------------------------------------------------------------------ the table


def compare(method, shape, batch, rank, args):
    """One row of the table."""
    rest = (shape, batch, args.length, rank, args.threads, args.dtype, args.compile)
    narrow = args.dtype == BF16
    peers = [name for name, (base, _, autocast, _) in PEERS.items() if (base == BF16 or autocast) == narrow]
    sides = ["ours", *(name for name in peers if method != "generate" or "autocast" not in name)]
    racers = {side: (side, method, *rest) for side in sides}
    found = race(racers | {"matmul": ("ours", "matmul", *rest)}, args.steps)
    seconds = {side: min(found[side][args.clock]) for side in found}
    best = min(sides[1:], key=seconds.get)
    tokens = batch * (NEW if method == "generate" else args.length)
    row = dict(
        method=method, shape=shape, batch=batch, best=best, tokens=tokens, trained=found["ours"]["trained"],
        seconds=seconds, tokens_per_second={side: tokens / seconds[side] for side in sides},
        speed=seconds[best] / seconds["ours"],
        memory={side: found[side]["memory"] for side in sides},
        memory_ratio=found["ours"]["memory"] / found[best]["memory"],
        tight_ratio=found["ours"]["tight"] / found[best]["tight"],
        matmul=2 * MATMUL**3 / seconds["matmul"], raw=found,
    )  # fmt: skip
    if method != "generate":
        row["flops"] = flops(method, shape, batch, args.length, rank)
        row["share"] = row["flops"] / seconds["ours"] / row["matmul"]
    return row


HEAD = (
    f"{'':13}{'tok/s':>8}{'peer':>8}{'speed':>7}{'MB':>8}{'peer':>8}{'ratio':>7}{'tight':>7}{'GFLOP':>8}{'share':>7}"
    "  the peer's best, and the others' speed"
)


def line(row):
    best, rate, memory = row["best"], row["tokens_per_second"], row["memory"]
    others = ", ".join(f"{k} {rate['ours'] / v:.2f} x" for k, v in rate.items() if k not in (best, "ours"))
    work = f"{row['flops'] / 1e9:8.1f}{row['share']:7.1%}" if "flops" in row else " " * 15
    return (
        f"{row['method'] + (' ' + str(row['batch']) if row['method'] == 'generate' else ''):13}"
        f"{rate['ours']:8.0f}{rate[best]:8.0f}{row['speed']:6.2f}x"
        f"{memory['ours'] / 1e6:8.1f}{memory[best] / 1e6:8.1f}{row['memory_ratio']:7.2f}{row['tight_ratio']:7.2f}"
        f"{work}  {best} ({others})"
    )


def slope(xs, ys):
    """The exponent e of y ~ x^e: least squares through the logarithms."""
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def grow(args):
    """Time and memory of our LoRA step as one of batch, length and rank doubles."""
    print(f"LoRA on {args.shape}: {'':10}{'batch':>8}{'length':>8}{'rank':>8}{'ms':>10}{'MB':>10}")
    results = {}
    for name, values in dict(batch=(1, 2, 4, 8), length=(64, 128, 256, 512), rank=(4, 16, 64, 256)).items():
        points = []
        for value in values:
            batch, length, rank = (value if name == key else args.__dict__[key] for key in ("batch", "length", "rank"))
            rest = (args.shape, batch, length, rank, args.threads, args.dtype, args.compile)
            found = race({"ours": ("ours", "lora", *rest)}, args.steps)["ours"]
            points.append((value, min(found[args.clock]), found["memory"]))
            print(f"{'':24}{batch:11}{length:8}{rank:8}{points[-1][1] * 1e3:10.1f}{points[-1][2] / 1e6:10.1f}")
        xs, seconds, memory = zip(*points)
        results[name] = dict(points=points, time=slope(xs, seconds), memory=slope(xs, memory))
        print(f"over {name}: time grows with the power {slope(xs, seconds):.2f}, memory with {slope(xs, memory):.2f}")
    return results


def scale(args):
    """Time and memory of our LoRA step over GPT-2's sizes, beside the FLOPs and the bytes that memory.py predicts."""
    print(f"{'LoRA':8}{'parameters':>16}{'GFLOP':>10}{'ms':>10}{'weights':>10}{'above':>10}{'predicted':>10} MB")
    results, precision = [], "bf16" if args.dtype == BF16 else "fp32"
    for shape, sizes in SHAPES.items():
        rest = (shape, args.batch, args.length, args.rank, args.threads, args.dtype, args.compile)
        found = race({"ours": ("ours", "lora", *rest)}, args.steps)["ours"]
        with torch.device("meta"):
            config = vars(gpt.GPT(**sizes).config)
        short = gpt.plain_up_to(args.dtype, torch.device("cpu"))
        parts = memory.predict(config, "lora", precision, args.batch, args.length, rank=args.rank, short=short)
        row = dict(
            shape=shape, parameters=memory.sizes_of(config).Ψ, seconds=min(found[args.clock]), memory=found["tight"],
            flops=flops("lora", shape, args.batch, args.length, args.rank), weights=memory.total(parts["parameters"]),
        )  # fmt: skip
        row["predicted"] = memory.total(parts["peak"]) - row["weights"]
        results.append(row)
        sizes = "".join(f"{row[key] / 1e6:10.1f}" for key in ("weights", "memory", "predicted"))
        size, work, ms = row["parameters"], row["flops"] / 1e9, row["seconds"] * 1e3
        print(f"{shape:8}{size:16,}{work:10.1f}{ms:10.1f}{sizes}", flush=True)
    for key in ("flops", "seconds", "weights", "memory", "predicted"):
        e = slope([row["parameters"] for row in results], [row[key] for row in results])
        print(f"{key} ~ parameters^{e:.2f}")
    return results


def chart(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [row["method"] + (f" {row['batch']}" if row["method"] == "generate" else "") for row in rows]
    for axis, key, title in (
        (axes[0], "speed", "tokens per second, peer's best = 1"),
        (axes[1], "memory_ratio", "peak memory above the weights, peer's best = 1"),
    ):
        bars = axis.bar(names, [row[key] for row in rows])
        axis.bar_label(bars, fmt="%.2f")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title} ({rows[0]['shape']})", fontsize=10)
        axis.tick_params(axis="x", rotation=30)
    figure.savefig(path, dpi=120)


def main_on_gpu(args):
    if not torch.cuda.is_available():
        sys.exit("step.py: --device cuda, and torch finds no GPU here")
    args.length, rows, workers = args.length or 1024, [], {}
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bf16")
    for method in [m for m in args.methods if m != "generate"]:
        for compiled in (False, True):
            batch = args.batch or gpu_batch(args.shape, args.length)
            rows.append(race_on_gpu(workers, method, args.shape, batch, args, compiled))
            print(gpu_line(rows[-1]), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=(*SHAPES, "llama"), default="gpt2")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "generate"), default=(*METHODS, "generate"))
    parser.add_argument("--steps", type=int, default=10, help="rounds that count, after two that do not")
    parser.add_argument("--batch", type=int, help="rows (4; on a GPU as many as fill it)")
    parser.add_argument("--length", type=int, help="tokens of a row (256; on a GPU 1,024)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--compile", action="store_true", help="on a CPU: both sides' blocks (on a GPU: both ways)")
    parser.add_argument("--growth", action="store_true", help="how time and memory of LoRA grow, instead")
    parser.add_argument("--scale", action="store_true", help="the same from nano to GPT-2 XL")
    parser.add_argument("--out", type=Path, help="a path without suffix: .json and .png are added")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=float, default=120, help="on a GPU: seconds for each side of a race")
    args = parser.parse_args()
    if args.device == "cuda":
        return main_on_gpu(args)
    if args.shape == "llama":
        parser.error("--shape llama is for --device cuda")
    args.batch, args.length = args.batch or 4, args.length or 256
    args.dtype = torch.float32 if slower_than_fp32(BF16) else BF16  # once: all processes must do the same
    size = f"{args.shape}, {args.dtype}, {args.batch} x {args.length} tokens"
    print(f"torch {torch.__version__}, {args.threads} threads, {size}, {args.clock} seconds")
    if args.growth or args.scale:
        rows = grow(args) if args.growth else scale(args)
    else:
        # Measured inside one process: beside some seconds for torch, the difference of two would be lost in noise
        code = "import time, torch; t = time.perf_counter(); import nanopeft.lora; print(time.perf_counter() - t)"
        runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True) for _ in range(3)]
        print(f"import nanopeft.lora, after torch: {min(float(run.stdout) for run in runs) * 1e3:.1f} ms\n{HEAD}")
        rows = []
        for method in args.methods:
            for batch in (1, 4) if method == "generate" else (args.batch,):
                rows.append(compare(method, args.shape, batch, args.rank, args))
                print(line(rows[-1]), flush=True)
        rate = max(row["matmul"] for row in rows)
        print(f"share: of {rate / 1e9:.0f} GFLOP/s, this machine's product of {MATMUL} x {MATMUL} matrices")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        if not (args.growth or args.scale):
            chart(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
