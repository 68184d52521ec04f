# SPDX-License-Identifier: MIT
"""Figures of the page on experiments: those of the scripts, from what came out, and the numbers in its text."""

import importlib
import json
import sys

from figures import ROOT

sys.path.append(str(ROOT / "experiments"))
DONE = sorted(path.stem for path in (ROOT / "docs" / "experiments").glob("*.json"))


def _found(name):
    return json.loads((ROOT / "docs" / "experiments" / f"{name}.json").read_text("utf-8"))


def _drawing(name):
    def draw():
        figure = importlib.import_module(name).draw(_found(name))
        figure.patch.set_alpha(0)
        return figure

    draw.__name__ = f"experiment_{name}"
    return draw


for _name in DONE:
    globals()[f"experiment_{_name}"] = _drawing(_name)
