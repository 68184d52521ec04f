# SPDX-License-Identifier: MIT
"""Kills runs of train.py at random moments, goes on with --resume, and counts what was lost.

    OMP_NUM_THREADS=1 python tests/bench/kill.py --kills 100

Each method trains a base of two small layers. SIGKILL and SIGTERM come in turn, at moments drawn over the whole run;
every fourth waits from there for a save to begin. A state is lost if --resume cannot read it, or if more steps than lie
between two saves are gone. At the end of each method what was trained, its optimizer's state and every loss must be,
bit for bit, those of a run that nobody killed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from nanopeft import adapter, gpt
from nanopeft.trainer import tokenizer
from nanopeft.trainer.bases import save_gpt

STEPS, SAVE_EVERY = 30, 3
METHODS = {
    "full": "--method full",
    "lora": "--method lora",
    "qlora": "--method qlora",
    "adapter": "--method adapter --reduction 4",
    "fusion": "--method fusion --adapters {files}/one {files}/two",
    "prefix": "--method prefix --tokens 5 --hidden 8",
    "prompt": "--method prompt --tokens 5",
    "ptuning": "--method ptuning --data {files}/a.jsonl --template [P]So[P]{{source}}[P]",
}
# What a killed process did is seen from outside: a byte for each step, written after it
CHILD = """
import os, runpy, sys
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1), os.dup2(log, 2)
sys.path.insert(0, os.path.dirname(script))
sys.argv = [script, *flags]
from nanopeft import adamw
step, counter = adamw.AdamW.step, os.open(count, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
def counted(self, *args, **options):
    step(self, *args, **options)
    os.write(counter, b".")
adamw.AdamW.step = counted
exec(first)
runpy.run_path(script, run_name="__main__")
"""
# A process that has imported everything, and is copied for each run
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "tiktoken", "tqdm", "safetensors.torch", "matplotlib.pyplot", "torch._dynamo"])


def make_files(folder):
    """A base of two small layers, a text, examples, and two adapters for a fusion."""
    encoding = tokenizer.train_tokenizer([], 257)
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    save_gpt(model, folder / "base")
    tokenizer.save_tokenizer(encoding, folder / "base")
    (folder / "a.txt").write_text("".join(f"The number {i} comes before {i + 1}.\n\n" for i in range(100)))
    lines = [json.dumps({"prompt": f"{i} is", "completion": "odd" if i % 2 else "even"}) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    for name in ("one", "two"):
        adapter.add_adapter(model, placement="pfeiffer", reduction=4)
        (folder / name).mkdir()
        save_file(adapter.adapter_state_dict(model), folder / name / "adapter_model.safetensors")
        config = adapter.adapter_config(model) | {"base_model_name_or_path": f"{folder}/base"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        adapter.remove_adapter(model)
    return folder


def start(files, out, flags, first=""):
    """train.py in a process of its own, with quick settings. first: what the process runs before it."""
    quick = f"--base {files}/base --data {files}/a.txt --steps {STEPS} --save-every {SAVE_EVERY} --batch 2 --length 32"
    flags = f"{quick} --out {out} {flags}".format(files=files).split()
    names = {"script": str(ROOT / "train.py"), "flags": flags, "first": first}
    names |= {"log": f"{out}.log", "count": f"{out}.count"}
    process = context.Process(target=exec, args=(CHILD, names))
    process.start()
    return process


def state_step(out):
    """The step that the state in a folder is of; 0 without a state."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["run"])["step"]


def kept(out):
    """What a finished run has left that must not depend on kills, by name."""
    found = {name: (out / name).read_bytes() for name in os.listdir(out) if "model" in name}
    found |= {key: t.numpy().tobytes() for key, t in load_file(out / "state.safetensors").items()}
    result = json.loads((out / "result.json").read_text())
    return found | {key: result[key] for key in ("losses", "loss_before", "loss_after", "skipped_steps")}


def whole_run(files, out, flags):
    """(what it left, the seconds it took) of a run that nobody kills."""
    began = time.time()
    process = start(files, out, flags)
    process.join()
    assert process.exitcode == 0, Path(f"{out}.log").read_text()
    return kept(out), time.time() - began


def differences(found, expected):
    keys = found.keys() ^ expected.keys() or {key for key in found if found[key] != expected[key]}
    return [f"other than in a whole run: {', '.join(sorted(keys)[:5])}"] if keys else []


def kill_once(files, out, flags, signal_number, delay, in_save=False):
    """Runs or resumes, and kills after a delay: (steps lost, whether a save was cut off), or None if it had ended."""
    before, count, saving = state_step(out), Path(f"{out}.count"), out / "state.safetensors.new"
    count.unlink(missing_ok=True)
    if in_save:
        saving.unlink(missing_ok=True)
    process = start(files, out, f"{flags} --resume")
    time.sleep(delay)
    while in_save and process.is_alive() and not saving.exists():
        pass
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid, signal_number)
    process.join()
    if process.exitcode == 0:
        return None
    log = Path(f"{out}.log").read_text() if os.path.exists(f"{out}.log") else "killed before it could write"
    stopped = process.exitcode == 1 and "--resume goes on" in log.splitlines()[-1]
    assert process.exitcode == -signal_number or stopped, log
    done = before + (count.stat().st_size if count.exists() else 0)
    lost = done - state_step(out)
    return lost, saving.exists()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    kills, cut_off, unsaved, worst, problems = 0, 0, 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        files = make_files(Path(name))
        for i, (method, flags) in enumerate(METHODS.items()):
            whole, seconds = whole_run(files, files / f"{method}-whole", flags)
            out, share = files / method, args.kills * (i + 1) // len(METHODS)
            while kills < share:
                number = (signal.SIGKILL, signal.SIGTERM)[kills % 2]
                killed = kill_once(files, out, flags, number, draw.uniform(0, seconds), in_save=kills % 4 == 0)
                if killed is None:  # it had ended: the next kills hit a new run
                    problems += differences(kept(out), whole)
                    (out / "state.safetensors").unlink()
                    continue
                kills += 1
                lost, cut = killed
                worst, cut_off, unsaved = max(worst, lost), cut_off + cut, unsaved + (state_step(out) == 0)
                problems += [f"{lost} steps lost"] * (lost > SAVE_EVERY)
            last, _ = whole_run(files, out, f"{flags} --resume")
            problems += differences(last, whole)
            print(f"{method}: {kills} kills so far; {'; '.join(problems) or 'nothing lost'}", flush=True)
    print(
        f"{kills} kills, {cut_off} of them in a save and {unsaved} before the first; at most {worst} steps were lost,"
    )
    print(f"with {SAVE_EVERY} from save to save; states lost or changed: {len(problems)}")
    sys.exit(len(problems) > 0)


if __name__ == "__main__":
    main()
