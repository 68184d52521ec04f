# SPDX-License-Identifier: MIT
"""Fine-tunes a GPT with the method of your choice and shows what happened.

    python train.py --method lora --precision bf16              the language reference, in about a minute
    python train.py --method lora --data modules                which package does this function come from?
    python train.py --method full --base gpt2 --data mine.txt   your text, and a model from the hub
    python train.py --method lora --resume                      go on where an interrupted run stopped
    python train.py --generate out/lora --prompt "The import"   text from what was trained

A run leaves in out/METHOD/ the adapter in peft's format (full: a GPT-2 checkpoint), result.json, loss.png, and
state.safetensors, from which --resume goes on.

Read it from main() on: data, base, method, evaluation, loop, evaluation, files, report.
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import textwrap
import time
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from nanopeft import adamw, data, gpt, lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATE = {"full": 1e-3, "lora": 5e-3}
LORA = {"rank": 8, "alpha": 16.0, "targets": "all-linear"}


class Error(ValueError):
    """A run that cannot be done as asked; the message says what would be right."""


# ----------------------------------------------------------------------------------------------------------- arguments


def refuse(message):
    raise Error(f"{message}; --help shows all options")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse  # one line instead of the whole usage
    add = parser.add_argument
    add("--method", choices=[*LEARNING_RATE], default="lora", help="what is trained (lora)")
    add("--precision", choices=[*DTYPES], default="fp32", help="type of the base's weights and the arithmetic (fp32)")
    add("--base", default="nano", help=f"nano, scratch (nano untrained), a folder, {', '.join(gpt.HUB)} (nano)")
    add("--data", default="reference", help=f"{', '.join(data.TASKS)}, or a .txt or .jsonl file (reference)")
    add("--rank", type=int, help=f"lora: rank r of the update ({LORA['rank']})")
    add("--alpha", type=float, help=f"lora: the update is scaled by alpha / r ({LORA['alpha']:g})")
    add("--targets", help=f"lora: ends of layer names, with commas between ({LORA['targets']})")
    add("--steps", type=int, default=300, help="optimizer steps (300)")
    add("--batch", type=int, default=16, help="examples in a micro-batch (16)")
    add("--accumulate", type=int, default=1, help="micro-batches in a step (1)")
    add("--length", type=int, help="tokens in an example, at most (128, and 256 for modules and .jsonl)")
    add("--lr", type=float, help=f"peak of the learning rate ({LEARNING_RATE})")
    add("--weight-decay", type=float, default=0.0, help="of the weight matrices (0)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient (1)")
    add("--seed", type=int, default=0, help="of initialization, batches and samples (0)")
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda, cuda:1, mps (cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile each decoder block")
    add("--save-every", type=int, default=100, help="steps from one saved state to the next (100)")
    add("--out", help="folder of the results (out/METHOD)")
    add("--resume", action="store_true", help="go on from the state in the folder of the results, if there is one")
    add("--prompt", help="what the samples go on from (the start of the validation data)")
    add("--generate", metavar="FOLDER", help="do not train: go on from --prompt with what was trained in this folder")
    args = parser.parse_args()

    # A flag works or is refused
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    idle = given - {"generate", "prompt", "precision", "device", "seed"}
    if args.generate and idle:
        raise Error(f"--generate does not train: leave out {', '.join(sorted(idle))}")
    if args.method != "lora" and given & LORA.keys():
        raise Error(f"--{min(given & LORA.keys())} belongs to --method lora")
    if args.base == "scratch" and args.method != "full":
        raise Error("--base scratch has learned nothing that could be kept frozen: use --method full")
    if args.length is None:
        args.length = 256 if args.data == "modules" or args.data.endswith(".jsonl") else 128
    for name, least in dict(steps=1, batch=1, accumulate=1, length=2, save_every=1).items():
        if getattr(args, name) < least:
            raise Error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for name in ("lr", "weight_decay", "clip"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < math.inf:
            raise Error(f"--{name.replace('_', '-')} must be a finite number of at least 0, not {getattr(args, name)}")
    try:  # one product: is there such a device, and does it have this type?
        one = torch.ones(1, 1, dtype=DTYPES[args.precision], device=args.device)
        (one @ one).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Error(f"--device {args.device} with --precision {args.precision} does not work here: {reason}") from None

    args.out = args.out or f"out/{args.method}"
    args.lr = LEARNING_RATE[args.method] if args.lr is None else args.lr
    if args.method == "lora":
        for name in LORA:
            setattr(args, name, LORA[name] if getattr(args, name) is None else getattr(args, name))
    return args


# ---------------------------------------------------------------------------------------------------- base and method


def load_tokenizer(base):
    folder = gpt.find_checkpoint("nano" if base == "scratch" else base)
    if base in gpt.HUB and not (folder / "vocab.json").exists():
        return tiktoken.get_encoding("gpt2")
    return data.load_tokenizer(folder)


def load_base(base, encoding, dtype, device):
    if base == "scratch":
        return gpt.GPT(vocab_size=encoding.n_vocab).to(device, dtype)
    return gpt.GPT.from_pretrained(base, dtype).to(device)


def save_trained(model, encoding, args, folder):
    """What was trained, in the format of its peers; the number of parameters stored."""
    if args.method == "full":
        model.save_pretrained(folder)
        data.save_tokenizer(encoding, folder)
        return sum(p.numel() for p in model.parameters())
    state = {key: p.cpu().contiguous() for key, p in lora.lora_state_dict(model).items()}
    config = lora.lora_config(model) | {"base_model_name_or_path": args.base}
    write(folder / "adapter_config.json", json.dumps(config, indent=2).encode())
    write(folder / "adapter_model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    return sum(p.numel() for p in state.values())


def load_trained(folder, dtype, device):
    """(model, tokenizer) from what save_trained wrote."""
    if not (folder / "adapter_config.json").exists():
        encoding = load_tokenizer(str(folder))
        return load_base(str(folder), encoding, dtype, device), encoding
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise Error(f"{folder} holds no adapter: {error}") from None
    settings = lora.lora_arguments(config)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise Error(f"{folder / 'adapter_config.json'} does not say which base it is for: base_model_name_or_path")
    encoding = load_tokenizer(base)
    model = lora.add_lora(load_base(base, encoding, dtype, device), **settings)
    lora.load_lora_state_dict(model, state)
    return model, encoding


def write(path, content):
    """A file that is there whole or not at all. content: bytes, or a function that writes to the path it is given."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content) if isinstance(content, bytes) else content(new)
    os.replace(new, path)


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, examples, device):
    """(nats per token, bits per byte) over all of the validation data."""
    model.eval()
    nats, tokens = 0.0, 0
    for ids, labels in examples.batches(32):
        n = (labels[:, 1:] != -100).sum().item()
        nats += model(ids.to(device), labels=labels.to(device)).loss.item() * n
        tokens += n
    model.train()
    return nats / tokens, nats / math.log(2) / max(1, examples.bytes())


def accuracy(model, examples, device):
    """Share of the examples whose completion, generated greedily after the prompt, is right to the letter."""
    model.eval()
    right = 0
    for items in tqdm(examples.by_length(32), desc="accuracy", leave=False):
        n = max(len(c) for _, c in items)
        prompts = [p[n - model.config.n_positions :] for p, _ in items]
        longest = max(map(len, prompts))
        ids = torch.tensor([[examples.pad] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        texts = gpt.generate(model, ids, n, attention_mask=mask, eos_token_id=examples.pad)[:, longest:].tolist()
        right += sum(text[: len(c)] == c for text, (_, c) in zip(texts, items))
    model.train()
    return right / len(examples.items)


def sample(model, encoding, prompt, device, seed):
    """The prompt and what the model makes of it, up to 80 tokens drawn from the 20 likeliest at each place."""
    model.eval()
    ids = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    room = model.config.n_positions - len(ids)
    if room < 1:
        raise Error(f"--prompt has {len(ids)} tokens; {model.config.n_positions - 1} are the most")
    ids = torch.tensor([ids], device=device)
    torch.manual_seed(seed)
    ids = gpt.generate(model, ids, min(80, room), temperature=0.8, top_k=20, eos_token_id=encoding.eot_token)
    model.train()
    return encoding.decode([i for i in ids[0].tolist() if i != encoding.eot_token])


def memory(device):
    """(bytes in use now, most since the last call), of the device, or of this process's resident memory."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), peak
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        now, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    except OSError:  # macOS tells the peak of the whole run only
        import resource

        now = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return now, peak


# ------------------------------------------------------------------------------------------------------------ training


def learning_rate(step, args):
    """Linear warm-up over a twentieth of the steps, then half a cosine down to zero."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup))) / 2


def save_state(path, run, params, optimizer):
    """run: what JSON can hold. The rest: parameters and their optimizer state, by name."""
    tensors = {f"parameter {name}": p.detach().contiguous() for name, p in params.items()}
    for name, p in params.items():
        tensors |= {f"{key} {name}": t for key, t in optimizer.state[p].items() if torch.is_tensor(t)}
    write(path, lambda new: save_file(tensors, new, metadata={"run": json.dumps(run)}))


def load_state(path, settings, params, optimizer):
    """The run that save_state wrote, its tensors put back; Error if it was another run."""
    try:
        with safe_open(path, "pt") as file:
            run = json.loads(file.metadata()["run"])
            for name, value in settings.items():
                if (old := run["settings"].get(name)) != value:
                    raise Error(f"{path} is of a run with {name} = {old}, not {value}: give the same, or another --out")
            for key in file.keys():
                kind, name = key.split(" ", 1)
                p = params[name]
                if kind == "parameter":
                    p.data.copy_(file.get_tensor(key))
                else:
                    optimizer.state[p][kind] = file.get_tensor(key).to(p.device)
                    optimizer.state[p]["step"] = run["updates"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, Error) else Error(f"{path} is not the state of a run: {error!r}") from None
    return run


def main():
    args = arguments()
    dtype, device = DTYPES[args.precision], torch.device(args.device)
    if args.generate:
        model, encoding = load_trained(Path(args.generate), dtype, device)
        print(sample(model, encoding, args.prompt or "", device, args.seed))
        return
    out = Path(args.out)
    began = time.time()
    torch.manual_seed(args.seed)

    # Data
    encoding = load_tokenizer(args.base)
    train, valid = data.load(args.data, encoding, args.length)
    if train.cut + valid.cut:
        print(f"{train.cut + valid.cut:,} examples have more than {args.length} tokens and were cut")
    prompt = args.prompt if args.prompt is not None else valid.opening()

    # Base
    memory_before, _ = memory(device)
    model = load_base(args.base, encoding, dtype, device)
    if args.length > model.config.n_positions:
        raise Error(f"--length {args.length} is more than the {model.config.n_positions} positions of {args.base}")

    # Method
    if args.method == "lora":
        targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
        lora.add_lora(model, targets, r=args.rank, alpha=args.alpha)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if args.compile:
        for block in model.transformer.h:
            block.compile()

    # Optimizer: decay is for matrices, not for biases and norms
    matrices, vectors = ([p for p in params.values() if (p.dim() > 1) == wide] for wide in (True, False))
    optimizer = adamw.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95),
    )  # fmt: skip

    # Before, or where an earlier run stopped
    run = {"step": 0, "updates": 0, "losses": [], "tokens": 0, "seconds": 0.0, "training_seconds": 0.0, "peak": 0}
    run |= {"loss_scale": 2.0**16 if args.precision == "fp16" else 1.0, "clean": 0, "skipped": 0}
    free = ("out", "resume", "save_every", "generate", "prompt")  # these change no result
    run["settings"] = {k: v for k, v in vars(args).items() if k not in free}
    state = out / "state.safetensors"
    if args.resume and state.exists():
        run = load_state(state, run["settings"], params, optimizer)
        print(f"going on from step {run['step']} of {state}")
    else:
        run["loss_before"], run["bits_before"] = evaluate(model, valid, device)
        run["accuracy_before"] = accuracy(model, valid, device) if args.data == "modules" else None
        run["sample_before"] = sample(model, encoding, prompt, device, args.seed)
    trained, total = sum(p.numel() for p in params.values()), sum(p.numel() for p in model.parameters())
    print(f"{args.method}, {args.precision}, {device}: {args.base} learns {args.data}")
    print(f"{trained:,} of {total:,} parameters are trained; state saved every {args.save_every} steps to {state}")

    out.mkdir(parents=True, exist_ok=True)

    # Loop. Ctrl-C and SIGTERM end it after the step that is under way
    stopped = []
    handlers = {n: signal.signal(n, lambda *_: stopped.append(True)) for n in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=run["step"], unit="step", smoothing=0.05)
    model.train()
    loop_began = time.time()

    def save():
        nonlocal began, loop_began
        now = time.time()
        run["seconds"] += now - began
        run["training_seconds"] += now - loop_began
        run["peak"] = max(run["peak"], memory(device)[1] - memory_before)
        began = loop_began = now
        save_state(state, run, params, optimizer)

    while run["step"] < args.steps:
        step = run["step"]
        torch.manual_seed(args.seed * 1_000_003 + step)  # a step needs no random state but its own number
        batches = [train.sample(args.batch) for _ in range(args.accumulate)]
        counts = [(labels[:, 1:] != -100).sum().item() for _, labels in batches]
        loss = 0.0
        for (ids, labels), count in zip(batches, counts):
            # The mean over all labelled tokens of the step, whatever their share in each micro-batch
            part = model(ids.to(device), labels=labels.to(device)).loss * (count / sum(counts))
            (part * run["loss_scale"]).backward()
            loss += part.item()
        gradients = [p.grad for p in params.values() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        norm = norms.norm().item() / run["loss_scale"]
        if not math.isfinite(loss) or not (math.isfinite(norm) or run["loss_scale"] > 1):
            sys.exit(f"train.py: loss {loss}, gradient norm {norm} at step {step}: try a smaller --lr ({state} stays)")
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.step(grad_scale=min(1.0, args.clip / (norm + 1e-6)) / run["loss_scale"])
            run["updates"], run["clean"] = run["updates"] + 1, run["clean"] + 1
        else:  # fp16 overflow: skip the step and halve the scale; after 1,000 clean steps try twice the scale again
            run["skipped"], run["clean"] = run["skipped"] + 1, 0
            run["loss_scale"] /= 2
        if args.precision == "fp16" and run["clean"] == 1000:
            run["clean"], run["loss_scale"] = 0, run["loss_scale"] * 2
        optimizer.zero_grad()

        run["losses"].append(loss)
        run["tokens"] += sum(ids.numel() for ids, _ in batches)
        run["step"] += 1
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        if stopped or run["step"] % args.save_every == 0 or run["step"] == args.steps:
            save()
        if stopped and run["step"] < args.steps:
            bar.close()
            sys.exit(f"train.py: stopped after step {run['step']}; the same command with --resume goes on")
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)

    # After
    loss_after, bits_after = evaluate(model, valid, device)
    accuracy_after = accuracy(model, valid, device) if args.data == "modules" else None
    sample_after = sample(model, encoding, prompt, device, args.seed)
    peak = max(run["peak"], memory(device)[1] - memory_before)

    # Files
    stored = save_trained(model, encoding, args, out)
    result = {
        "method": args.method, "precision": args.precision, "base": args.base, "data": args.data, "steps": args.steps,
        "trained_parameters": trained, "stored_parameters": stored, "total_parameters": total,
        "loss_before": run["loss_before"], "loss_after": loss_after,
        "bits_per_byte_before": run["bits_before"], "bits_per_byte_after": bits_after,
        "accuracy_before": run["accuracy_before"], "accuracy_after": accuracy_after,
        "tokens_per_second": run["tokens"] / run["training_seconds"], "peak_memory_bytes": peak,
        "seconds": run["seconds"] + time.time() - began, "skipped_steps": run["skipped"],
        "python": platform.python_version(), "torch": torch.__version__, "settings": run["settings"],
    }  # fmt: skip
    write(out / "result.json", json.dumps(result, indent=2).encode())
    title = f"{args.method} on {args.data}"
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
    print(f"memory       {peak / 1e9:.2f} GB at the peak, base included")
    print(f"files        {', '.join(str(out / f) for f in sorted(p.name for p in out.iterdir()))}")


def plot(path, losses, before, after, title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = max(1, len(losses) // 30)
    recent = [losses[max(0, i - window) : i + 1] for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(range(1, len(losses) + 1), [sum(r) / len(r) for r in recent], color="tab:blue", label="training")
    label = f"validation: {before:.2f} → {after:.2f}"
    axes.plot([0, len(losses)], [before, after], "o--", color="tab:orange", label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except (Error, adamw.Error, data.Error, gpt.Error, lora.Error) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
