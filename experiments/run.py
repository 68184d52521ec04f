# SPDX-License-Identifier: MIT
"""What the experiments share: train.py once for each setting and seed, several side by side on one thread each.

A run that has ended is not run again, and one that was stopped goes on: the same command resumes an experiment. What
came out stands in docs/experiments/NAME.json, with the flags of each setting. Its figure is drawn from that file, and
its tables in docs/results.md are what `tables` of its script makes of it.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "experiments"
KEPT = ("trained_parameters", "loss_before", "loss_after", "known_loss_before", "known_loss_after", "best_step",
        "accuracy_after")  # fmt: skip
UNITS = {"loss_after": "loss, nats per token", "accuracy_after": "right answers",
         "fall": "fall of the loss, nats per token"}  # fmt: skip


def call(flags, folder, made="result.json"):
    """train.py on one thread, unless it has made its file already. What is in result.json."""
    if not (folder / made).exists():
        command = [sys.executable, ROOT / "train.py", *map(str, flags), "--out", folder]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((folder / made).read_text("utf-8"))


def run(name, settings, common="", seeds=(0, 1, 2), after=None):
    """{setting: its flags and, for each figure in KEPT, the values of all seeds}. settings: {name: flags}.

    after: a function of the folder of a run that is done, for more figures: {name: value}.
    """

    def one(setting, seed):
        folder = OUT / name / f"{setting} {seed}"
        result = call(f"{common} {settings[setting]} --seed {seed} --resume".split(), folder)
        return {key: result[key] for key in KEPT if key in result} | (after(folder) if after else {})

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {(setting, seed): pool.submit(one, setting, seed) for seed in seeds for setting in settings}
        results = {key: future.result() for key, future in tqdm(futures.items(), desc=name, unit="run")}
    found = {}
    for setting, flags in settings.items():
        runs = [results[setting, seed] for seed in seeds]
        found[setting] = {"flags": f"{common} {flags}".strip()} | {key: [run[key] for run in runs] for key in runs[0]}
    store(name, found)
    return found


def store(name, found):
    docs = ROOT / "docs" / "experiments"
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def mean(values):
    """(mean, standard error of the mean)."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def shown(values, key="loss_after"):
    """Mean ± standard error. forgotten: by how much the loss on the base's old text has risen."""
    if key == "forgotten":
        before, after = values["known_loss_before"], values["known_loss_after"]
        if None in after:  # P-tuning's template, which no other text has
            return ""
        return "{:.3f} ± {:.3f}".format(*mean([y - x for x, y in zip(before, after)]))
    return "{:.3f} ± {:.3f}".format(*mean(values[key]))


def table(header, rows):
    """Lines of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def settings_table(found, key="loss_after"):
    """A line for each setting."""
    rows = [[name, f"{values['trained_parameters'][0]:,}", shown(values, key), shown(values, "forgotten")]
            for name, values in found.items()]  # fmt: skip
    return table(["setting", "trained", UNITS[key], "forgotten"], rows)


def curve(axes, xs, settings, key="loss_after", **style):
    """Means over seeds with their standard errors."""
    means, errors = zip(*(mean(values[key]) for values in settings))
    axes.errorbar(xs, means, errors, marker="o", capsize=3, **style)
    axes.set(ylabel=UNITS.get(key, UNITS["loss_after"]))
    axes.grid(alpha=0.3)
    axes.legend()


def dots(axes, found, key="loss_after"):
    """A line for each setting: the mean over seeds with its standard error."""
    for y, values in enumerate(found.values()):
        x, error = mean(values[key])
        axes.errorbar(x, y, xerr=error, fmt="o", color="tab:blue", capsize=3)
    axes.set(yticks=range(len(found)), yticklabels=found, xlabel=UNITS[key])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def save(figure, name):
    """Writes the experiment's picture."""
    figure.savefig(ROOT / "docs" / "experiments" / f"{name}.png", dpi=110)
    print(f"docs/experiments/{name}.json, docs/experiments/{name}.png")
