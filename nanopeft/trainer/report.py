# SPDX-License-Identifier: MIT
"""What a run reports: result.json, time and memory, measured beside what memory.py predicts."""

import json
import platform
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from nanopeft import adapter, gpt, memory, pipeline, zero
from nanopeft.trainer import checkpoint, measure, pictures
from nanopeft.trainer.process import DTYPES

# ---------------------------------------------------------------------------------------------------- time and memory


def in_use(device):
    """(bytes in use now, most since the last call), of the device, or of this process's resident memory; or zeros."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), peak
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
        now, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        Path("/proc/self/clear_refs").write_bytes(b"5")  # sets VmHWM back
    except (OSError, KeyError):  # the peak of the whole run; macOS tells bytes, others kilobytes
        try:
            from resource import RUSAGE_SELF, getrusage
        except ImportError:  # Windows
            return 0, 0
        now = peak = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return now, peak


class Meter:
    """Adds up a run's time and its peak of memory, base included. began: the time at which the run began."""

    def __init__(self, device, began):
        self.device, self.last = device, began
        self.at_start, _ = in_use(device)

    def lap(self, progress, training=False):
        now = time.perf_counter()
        progress.seconds += now - self.last
        progress.training_seconds += (now - self.last) * training
        self.last = now
        progress.peak = max(progress.peak, in_use(self.device)[1] - self.at_start)


class StepMemory:
    """The memory of one step: predicted by memory.py, and measured. The second step, for Adam's state is there then."""

    def __init__(self, args, precision, model, engine, device, first_step):
        self.args, self.precision, self.model, self.engine, self.device = args, precision, model, engine, device
        self.at = None if args.compile or args.fsdp or device.type not in ("cpu", "cuda") else first_step + 1
        self.predicted, self.measured, self.sent, self.saved = {}, {}, {}, None

    @contextmanager
    def step(self, number, length):
        """Around a step of examples of `length` tokens."""
        if number != self.at or self.args.pipeline:
            yield
        elif self.args.tensor or isinstance(self.engine.inner, zero.ZeRO):
            with measure.sent_elements() as self.sent:
                yield
        else:
            stored = [*self.model.parameters(), *self.model.buffers()]
            states = [t for state in self.engine.optimizer.state.values() for t in state.values()]
            with measure.peak_bytes([*stored, *states], self.device) as peak, measure.saved_bytes(stored) as saved:
                self.saved = saved
                yield
            self.saved = None
            self.measured["peak"] = peak()
            self.predicted = predict(self.model, self.args, self.precision, length)

    def after_forward(self):
        if self.saved is not None and not self.args.recompute:  # of which a recomputed block's input is no part
            self.measured.setdefault("activations", self.saved())

    def after_backward(self, number):
        if number == self.at and isinstance(self.engine.inner, zero.ZeRO):
            self.measured.update(measure.kept_by(self.engine.inner))
        elif number == self.at:
            self.measured.update(measure.measured_states(self.model, self.engine.optimizer))


def predict(model, args, precision, length):
    """{what: bytes} that memory.py predicts for a step of this run, with examples of `length` tokens.

    Nothing for what it does not know: targets outside of the blocks, several ranks, adapters of several widths.
    """
    known = args.method in memory.SETTINGS and args.init != "pissa" and not args.ranks
    if not known or vars(model.config).get("model_type") != "gpt2" or args.start is not None:
        return {}  # of shapes or settings that memory.py has not
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
    device, dtype = torch.device(args.device), DTYPES[precision]
    short = 0 if args.pack else gpt.plain_up_to(dtype, device)  # packed rows have a mask
    try:
        found = memory.predict(
            vars(model.config), args.method, precision, args.batch, length, args.accumulate, args.recompute or 0,
            device=device.type, short=short, **how,
        )
    except memory.Error:
        return {}
    return {what: memory.total(parts) for what, parts in found.items()}


# ------------------------------------------------------------------------------------------------------------- one run


def finish(args, precision, progress, counts, after, step_memory, rates, asked, timeline=None):
    """Writes result.json, loss.png and a pipeline's timeline of the last step, and prints what happened."""
    out, before, bubble = Path(args.out), progress.before, {}
    if timeline and timeline[0]:  # at least one step was made
        bubble = {"measured": pipeline.waiting(timeline), "formula": pipeline.bubble(len(timeline), args.accumulate)}
        checkpoint.write(out / "pipeline.svg", lambda path: pictures.plot_timeline(path, timeline))
    result = {
        "method": args.method, "precision": args.precision, "computed_in": precision, "base": args.base,
        "data": args.data, "asked": asked, "steps": progress.step, "best_step": progress.best_step, "keep": args.keep,
        **counts,
        "loss_before": before["loss"], "loss_after": after["loss"],
        "bits_per_byte_before": before["bits"], "bits_per_byte_after": after["bits"],
        "accuracy_before": before["accuracy"], "accuracy_after": after["accuracy"],
        "known_loss_before": before["known"], "known_loss_after": after["known"],
        "tokens_per_second": progress.tokens / max(1e-9, progress.training_seconds),
        "peak_memory_bytes": progress.peak or None, "seconds": progress.seconds,
        "skipped_steps": progress.skipped, "ranks": progress.world,
        "predicted_bytes": step_memory.predicted, "measured_bytes": step_memory.measured,
        "sent_elements": step_memory.sent, "bubble": bubble,
        "python": platform.python_version(), "torch": torch.__version__, "settings": progress.settings,
        "losses": progress.losses, "validation": progress.curve,
    }  # fmt: skip
    checkpoint.write(out / "result.json", json.dumps(result, indent=2).encode())
    title = f"{'scratch' if args.base == 'scratch' else args.method} on {pictures.drawable(', '.join(args.data))}"
    checkpoint.write(out / "loss.png", lambda path: pictures.plot_losses(path, progress, rates, title))

    for when, figures in (("before", before), ("after", after)):
        text = textwrap.indent(figures["sample"].strip(), "    | ", lambda line: True)
        print(f"\nsample {when}\n{text}")
    trained, stored, total = (counts[f"{which}_parameters"] for which in ("trained", "stored", "total"))
    print(f"\nparameters   {trained:,} trained, {stored:,} stored, {total:,} in all ({trained / total:.2%})")
    print(f"loss         {before['loss']:.3f} before, {after['loss']:.3f} after, in nats per token of validation data")
    print(f"             {before['bits']:.3f} before, {after['bits']:.3f} after, in bits per byte")
    if progress.best_step < progress.step:
        kept = f"step {progress.best_step}, the best, is kept" if args.keep == "best" else "the last step is kept"
        print(f"validation   lowest after step {progress.best_step} of {progress.step}: {kept}")
    if after["accuracy"] is not None:
        print(f"accuracy     {before['accuracy']:.1%} before, {after['accuracy']:.1%} after")
    if after["known"] is not None:
        print(f"forgetting   {before['known']:.3f} before, {after['known']:.3f} after, in nats per token of old text")
    print(f"speed        {result['tokens_per_second']:,.0f} tokens/s, {progress.seconds:.0f} s in all")
    print(f"memory       {gigabytes(progress.peak)} at the peak, base included")
    if progress.skipped:
        print(f"skipped      {progress.skipped} steps, on which a gradient overflowed fp16")
    for number, (what, size) in enumerate(step_memory.measured.items()):
        beside = f", {step_memory.predicted[what] / 1e6:.3f} predicted" if step_memory.predicted else ""
        print(f"{'' if number else 'memory of':12} {what:12} {size / 1e6:9.3f} MB{beside}")
    for number, (collective, size) in enumerate(step_memory.sent.items()):
        print(f"{'' if number else 'sent':12} {collective:12} {size:,.0f} elements in a step")
    if bubble:
        print(f"waiting      {bubble['measured']:.1%} of the stages' time, {bubble['formula']:.1%} by the formula")
    print(f"files        {', '.join(sorted(str(path) for path in out.iterdir() if path.suffix))}")


def gigabytes(size):
    return f"{size / 1e9:.2f} GB" if size else "not measured"
