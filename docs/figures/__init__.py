# SPDX-License-Identifier: MIT
"""The figures on the pages: a module for each page, whose public functions each draw NAME.svg from what the library
computes.

Nothing in a figure is in words, so that it serves both languages: symbols, numbers and names in the code.
"""

import importlib
import json
import os
import pkgutil
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin stall a machine with other work

import matplotlib
import torch
from matplotlib.figure import Figure

from nanopeft.trainer import bases, files

matplotlib.rcParams.update({"svg.hashsalt": "nanopeft", "svg.fonttype": "none", "font.size": 10})
ROOT = Path(__file__).parents[2]


def new(width=7, height=3.5, columns=1):
    """(figure, axes) without a background: pages are light or dark."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.patch.set_alpha(0)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def train(model, parameters, steps=20, lr=5e-3, rows=4):
    """Some steps of Adam on the language reference."""
    data = files.load("reference", bases.load_tokenizer("nano"), 128)[0]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step in range(steps):
        ids, labels = data.sample(rows, step * rows, 0)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def draw_all(folder):
    """Draws what is older than its module, this one, or the library."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = [Path(__file__), *(ROOT / "nanopeft").rglob("*.py"), *(ROOT / "docs" / "experiments").glob("*.json")]
    for _, name, _ in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"figures.{name}")
        changed = max(path.stat().st_mtime for path in (*shared, Path(module.__file__)))
        for draw in [f for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__]:
            path = folder / f"{draw.__name__}.svg"
            if callable(draw) and draw.__name__[0] != "_" and (not path.exists() or path.stat().st_mtime < changed):
                torch.manual_seed(0)
                figure = draw()
                figure.savefig(path, metadata={"Date": None}, transparent=True)
                path.with_suffix(".json").write_text(json.dumps(getattr(figure, "facts", {})))


def facts(name):
    """What a figure's function put into figure.facts, for the text beside it."""
    return json.loads((ROOT / "docs" / "made" / "figures" / f"{name}.json").read_text())
