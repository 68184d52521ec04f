# SPDX-License-Identifier: MIT
"""Fine-tunes a language model with the method of your choice and shows what happened.

    python train.py --method lora --precision bf16              the language reference, in a minute or two
    python train.py --method prefix --data modules              which package does this function come from?
    python train.py --method full --base gpt2 --data mine.txt   your text, and a model from the hub
    python train.py --method all --data modules                 every method, one table and one figure
    python train.py --method lora --resume                      go on where an interrupted run stopped
    python train.py --from out/lora --data more.txt --out out/2 more training of what was trained
    python train.py --generate out/lora --prompt "The import"   text from what was trained
    python train.py --merge out/lora --out merged               a whole model, with what was trained in its weights
    torchrun --nproc_per_node 2 train.py --method full --zero 2  two processes that share the optimizer and gradients
    torchrun --nproc_per_node 2 train.py --tensor 2              ... that split each large matrix
    torchrun --nproc_per_node 2 train.py --pipeline 2 --accumulate 8     ... that hold half of the layers each

A run leaves in out/METHOD/ what was trained, in peft's format (adapter, fusion, bitfit: in one like it; full: the whole
model), result.json, loss.png (adalora: ranks.svg), and state.safetensors, from which --resume goes on.

This file is the recipe, read from fine_tune() on: data, base, method, engine, evaluation, loop, evaluation, files,
report. What it stands on is in nanopeft/trainer/; the methods themselves are in nanopeft/.
"""

import math
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: waiting threads soon sleep, and leave others the cores

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanopeft import pipeline, recompute
from nanopeft.trainer import Error, Failure, arguments, bases, checkpoint, files, generation, methods, process, report
from nanopeft.trainer.compare import compare
from nanopeft.trainer.engine import Engine, storage_dtype
from nanopeft.trainer.evaluate import accuracy, count_labels, evaluate, mean_loss


def main():
    args, given = arguments.parse(__doc__)
    if args.method == "all":
        return compare(args, given)
    ranks = process.start(args)
    if args.merge is not None:
        with checkpoint.claim(args.out):
            return methods.merge(args.merge, args.out, process.DTYPES[args.precision], ranks.device, args.force)
    precision = process.computing_precision(args.precision, ranks)
    if args.generate is not None:
        model, encoding = methods.load(args.generate, process.DTYPES[precision], ranks.device, args.force)
        return generation.answer(model, encoding, args, ranks.device)
    with checkpoint.claim(args.out, ranks.rank):
        fine_tune(args, precision, ranks)


def fine_tune(args, precision, ranks):
    began = time.perf_counter()
    rank, world, device, _ = ranks
    dtype = process.DTYPES[precision]
    out, state = Path(args.out), Path(args.out) / "state.safetensors"
    torch.manual_seed(args.seed)
    process.settle_kernels()

    # Data: token ids, and labels that say which of them are scored
    ranks.say(f"{args.method}, {precision}, {device}: {args.base} learns {', '.join(args.data)}")
    encoding = methods.load_tokenizer(args.base)
    train, valid = files.load(args.data, encoding, args.length, valid=args.valid, pack=args.pack)
    for line in methods.remarks(train, valid, encoding, args):
        ranks.say(line)
    valid, known = valid.head(args.valid_tokens), files.load_known(args.remember, encoding, args.length)
    opening = generation.opening(args, encoding, valid)
    per_step = args.batch * args.accumulate
    if args.epochs is not None:
        args.steps = math.ceil(args.epochs * train.steps_per_epoch(per_step))
    args.eval_every = args.eval_every or max(1, math.ceil(args.steps / 10))

    # Base: the pretrained model
    meter = report.Meter(device, began)
    base = methods.load_base(args.base, encoding, storage_dtype(args, dtype), device)
    base_size, blocks = sum(p.numel() for p in base.parameters()), bases.blocks(base)
    args.lr = methods.default_rate(args, base_size) if args.lr is None else args.lr
    if args.pack and not bases.packs(base):
        raise Error(f"--pack: {args.base} does not keep examples of one row apart by their positions; leave it out")

    # Method: freezes the base and adds what is trained
    model = methods.add(base, args, encoding, train)
    methods.fit_data(model, args, encoding, train, valid)
    if known and getattr(model, "template", None):  # without the template's virtual tokens the model is the base
        if args.remember != ["library"]:
            raise Error("--remember: on text without the template nothing changes; leave it out")
        known = None
    method = methods.METHODS[args.method]
    counts = methods.count(args.method, base_size, model)
    checksums = methods.checksums(args, base, valid)
    if args.recompute:
        recompute.recompute(blocks, args.recompute)
    if args.compile:
        compile_blocks(blocks)

    # Engine: one process, ZeRO, FSDP, tensor parallelism or a pipeline. engine.backward adds up gradients. engine.step
    # sums them over ranks, clips, and updates if their norm is finite. engine.whole gathers what is sharded
    rebuild = lambda: methods.add(methods.load_base(args.base, encoding, dtype, device), args, encoding, train)  # noqa: E731
    engine = Engine(args, model, blocks, dtype, rebuild)
    method.attach(model, engine.optimizer, args)

    # Evaluate the untouched model, or go on where an earlier run stopped
    progress = resume(args, state, checksums, engine, ranks)
    trained = f"{counts['trained_parameters']:,} of {counts['total_parameters']:,} parameters"
    ranks.say(f"{trained} are trained, with a learning rate of {args.lr:g} at its peak")
    # Evaluations on the way take a quarter of the tokens trained on in between: at a third of a step's cost each, a
    # tenth of the time
    watched = valid.head(max(2048, args.eval_every * per_step * args.length // 4))
    if progress.step == 0:
        with engine.whole() as complete:
            progress.before = examine(args, complete, valid, known, encoding, opening, ranks, "before any step")
            progress.note(evaluate(complete, watched, ranks)[0] if watched is not valid else progress.before["loss"])
        checkpoint.set_aside(state, ranks)
    if args.accumulate < (args.pipeline or 0):
        bubble = pipeline.bubble(args.pipeline, args.accumulate)
        ranks.say(f"--accumulate {args.accumulate} is below --pipeline {args.pipeline}: stages wait {bubble:.0%}")
    ranks.say(f"state saved every {args.save_every} steps to {state}")
    meter.lap(progress)

    # Loop: one optimizer step after the other
    model.train()
    step_memory = report.StepMemory(args, precision, model, engine, device, progress.step)
    bar = tqdm(total=args.steps, initial=progress.step, unit="step", smoothing=0.05, disable=rank > 0)
    with process.signals() as stop, bar:
        for step in range(progress.step, args.steps):
            if progress.is_stuck(args.patience):
                break
            # 1. Sample. Seeds depend on the step's number alone: --resume draws what an unbroken run would have drawn
            torch.manual_seed(args.seed * 1_000_003 + step)
            first = step * per_step
            batches = [train.sample(args.batch, i, args.seed) for i in range(first, first + per_step, args.batch)]
            scored = sum(count_labels(labels) for _, labels, *_ in batches)
            with step_memory.step(step, batches[0][0].size(1)):
                # 2. Forward and backward. The loss is the mean over all scored tokens of the step, whatever share of
                # them is in each rank and micro-batch
                loss = 0.0
                if args.pipeline:  # its stages work on different micro-batches at the same time
                    loss = engine.backward_batches(batches)
                else:
                    for batch in batches:
                        rows = [ranks.share(t) for t in batch]
                        part = mean_loss(model, rows, device) * (count_labels(rows[1]) / scored)
                        objective = part + method.penalty(model) / args.accumulate / world
                        step_memory.after_forward()
                        engine.backward(objective)
                        loss += part.detach()
                step_memory.after_backward(step)
                # 3. Clip and update. Here the host first waits for a GPU: the norm decides whether to update
                norm = engine.step(learning_rate(step, args), args.clip)
            loss = ranks.sum(float(loss)) / ranks.copies
            check_finite(progress, state, loss=loss, gradient_norm=norm)
            # 4. Log
            progress.step += 1
            progress.losses.append(loss)
            progress.tokens += sum(ids.numel() for ids, *_ in batches)
            bar.set_postfix(loss=f"{loss:.3f}", validation=f"{progress.curve[-1][1]:.3f}", refresh=False)
            bar.update()
            # 5. Evaluate, and keep the best
            last, better = progress.step == args.steps, False
            if progress.step % args.eval_every == 0 or last:
                meter.lap(progress, training=True)
                with engine.whole() as complete:
                    better = progress.note(evaluate(complete, watched, ranks)[0]) and args.keep == "best"
                    if better and rank == 0:
                        methods.save(complete, encoding, args, out, checksums["base"])
                        progress.kept = methods.checksum_of_kept(out)
                meter.lap(progress)
            # 6. Save the state: always with better weights, so that the two fit. Ranks agree on a stop, as a signal may
            # reach one of them earlier
            stopped = ranks.sum(len(stop)) > 0
            if stopped or better or last or progress.step % args.save_every == 0:
                meter.lap(progress, training=True)
                save(engine, progress, state, batches[-1], ranks)
                meter.lap(progress)
            if stopped and progress.step < args.steps:
                raise Failure(f"stopped after step {progress.step}: {state} is saved, and --resume goes on from it")

    timeline = engine.inner.timeline() if args.pipeline else None

    # Evaluate what was trained, and save it
    with engine.whole() as complete:
        method.discard(complete)
        if args.keep == "best" and progress.best_step < progress.step:
            methods.restore(complete, args, out, progress, ranks)
        after = examine(args, complete, valid, known, encoding, opening, ranks, f"after step {progress.step}")
        meter.lap(progress)
        if rank == 0 and args.steps > 0:
            counts |= methods.save(complete, encoding, args, out, checksums["base"])
    if world > 1:
        dist.destroy_process_group()

    # Report
    if rank == 0:
        rates = [learning_rate(step, args) for step in range(progress.step)]
        report.finish(args, precision, progress, counts, after, step_memory, rates, valid.asked, timeline)


def compile_blocks(blocks):
    """torch.compile for each block. All share one function, which torch compiles in eight variants at most. With a
    prefix each block needs its own, since it has other keys and values."""
    torch._dynamo.config.cache_size_limit = max(8, 4 * len(blocks))
    for block in blocks:
        block.compile()


def learning_rate(step, args):
    """Linear warm-up over a twentieth of the steps, while Adam's v is unreliable, then half a cosine towards zero."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup))) / 2


def examine(args, model, valid, known, encoding, opening, ranks, when):
    """The figures of a model on the validation data and on what the base knew, and a sample of what it writes."""
    loss, bits = evaluate(model, valid, ranks)
    if not math.isfinite(loss):
        raise Failure(f"loss {loss} {when}: {args.base} is damaged or needs more bits, or --lr is too large")
    right = accuracy(model, valid, ranks) if args.accuracy or args.data == ["modules"] else None
    text = generation.sample(model, encoding, opening, ranks.device, args.seed) if ranks.rank == 0 else ""
    old = evaluate(model, known, ranks)[0] if known else None
    return {"loss": loss, "bits": bits, "accuracy": right, "known": old, "sample": text}


def check_finite(progress, state, **values):
    """Raises Failure for a loss or gradient norm that is inf or NaN."""
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        left = f"{state} stays as it was" if state.exists() else "nothing was saved"
        raise Failure(f"{found} after step {progress.step}: try a smaller --lr; {left}")


@torch.no_grad()
def save(engine, progress, state, batch, ranks):
    """Saves all that --resume needs, after one more loss: weights that a step has ruined must not replace good ones."""
    rows = [ranks.share(t).to(ranks.device) for t in batch]
    check_finite(progress, state, loss=ranks.sum(engine.loss(rows)))
    states = engine.state_dict()
    progress.loss_scale, progress.clean, progress.skipped = engine.loss_scale, engine.clean, engine.skipped
    if ranks.rank == 0:
        checkpoint.save_state(state, progress, states)


def resume(args, state, checksums, engine, ranks):
    """The progress of the run whose state is there, loaded into the engine; or that of a new one."""
    checkpoint.check_space(state.parent, engine.shapes)
    settings = arguments.settings(args)
    if ranks.sum(int(os.path.isfile(state.with_name(".lock0")))) < ranks.world:  # rank 0's, from checkpoint.claim
        raise Error(f"--out {args.out} is another folder on each machine: it must be on a disk of all")
    if not (args.resume and os.path.isfile(state)):  # Path.is_file raises for some names
        return checkpoint.Progress(settings, checksums, world=ranks.world)
    progress, states = checkpoint.load_state(state, settings, engine.shapes, checksums, args.force)
    engine.load_state_dict(states)
    engine.loss_scale, engine.clean, engine.skipped = progress.loss_scale, progress.clean, progress.skipped
    ranks.say(f"going on from step {progress.step} of {state}")
    for line in progress.go_on_with(checksums, ranks.world):
        ranks.say(line)
    return progress


if __name__ == "__main__":
    process.run(main)
