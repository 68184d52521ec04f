# SPDX-License-Identifier: MIT
"""What the experiments share: train.py once for each setting and seed, several side by side on one thread each.

A run that has ended is not run again, and one that was stopped goes on: the same command resumes an experiment. What
came out stands in docs/experiments/NAME.json, with the flags of each setting; its figure is drawn from that file.
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
KEPT = ("trained_parameters", "loss_before", "loss_after", "known_loss_before", "known_loss_after", "best_step")


def run(name, settings, common="", seeds=(0, 1, 2)):
    """{setting: its flags and, for each figure in KEPT, the values of all seeds}. settings: {name: flags}."""
    out, docs = ROOT / "out" / "experiments" / name, ROOT / "docs" / "experiments"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def one(setting, seed):
        folder = out / f"{setting} {seed}"
        if not (folder / "result.json").exists():
            flags = f"{common} {settings[setting]} --seed {seed} --resume".split()
            command = [sys.executable, ROOT / "train.py", *flags, "--out", folder]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{setting}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads((folder / "result.json").read_text("utf-8"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {(setting, seed): pool.submit(one, setting, seed) for seed in seeds for setting in settings}
        results = {key: future.result() for key, future in tqdm(futures.items(), desc=name, unit="run")}
    found = {}
    for setting, flags in settings.items():
        values = {key: [results[setting, seed][key] for seed in seeds] for key in KEPT}
        found[setting] = {"flags": f"{common} {flags}".strip()} | values
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def mean(values):
    """(mean, standard error of the mean)."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def table(found, key="loss_after"):
    """Lines of Markdown: each setting's mean and standard error."""
    lines = ["| setting | trained | loss | forgotten |", "|---|---|---|---|"]
    for setting, values in found.items():
        forgotten = [after - before for before, after in zip(values["known_loss_before"], values["known_loss_after"])]
        shown = ["{:.3f} ± {:.3f}".format(*mean(column)) for column in (values[key], forgotten)]
        lines.append(f"| {setting} | {values['trained_parameters'][0]:,} | {' | '.join(shown)} |")
    return "\n".join(lines)


def save(figure, name):
    figure.savefig(ROOT / "docs" / "experiments" / f"{name}.png", dpi=110)
    print(f"docs/experiments/{name}.json, docs/experiments/{name}.png")
