# SPDX-License-Identifier: MIT
"""What docs/results.md says of the experiments is what came out of them."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DONE = sorted(path.stem for path in (ROOT / "docs" / "experiments").glob("*.json"))


@pytest.fixture
def experiment(monkeypatch):
    """A function of an experiment's name: (its script as a module, what came out, its section of docs/results.md)."""
    monkeypatch.syspath_prepend(ROOT / "experiments")

    def find(name):
        found = json.loads((ROOT / "docs" / "experiments" / f"{name}.json").read_text("utf-8"))
        text = (ROOT / "docs" / "results.md").read_text("utf-8")
        sections = [part for part in re.split(r"^###? ", text, flags=re.M) if f"experiments/{name}.py" in part]
        assert len(sections) == 1
        return importlib.import_module(name), found, sections[0]

    return find


@pytest.mark.parametrize("name", DONE)
def test_tables_and_numbers_are_those_of_the_runs(experiment, name):
    """A section has the tables that its script makes of the JSON, and in its text no other loss or share than they."""
    script, found, section = experiment(name)
    tables = script.tables(found)
    assert tables in section
    numbers = set(re.findall(r"\d+\.\d\d+", section.replace(tables, "")))
    assert numbers <= set(re.findall(r"\d+\.\d\d+", tables))


@pytest.mark.parametrize("name", DONE)
def test_runs_are_those_of_the_script(experiment, name):
    """Each setting ran with its flags, on three seeds."""
    script, found, _ = experiment(name)
    for setting, flags in getattr(script, "SETTINGS", {}).items():
        assert set(flags.split()) <= set(found[setting]["flags"].split())
    assert {len(values) for setting in found.values() for key, values in setting.items() if key != "flags"} == {3}


@pytest.mark.parametrize("name", DONE)
def test_the_picture_is_drawn(experiment, name):
    """Each experiment draws a figure from what came out alone."""
    script, found, _ = experiment(name)
    drawn = script.draw(found)
    assert sum(len(axes.lines) + len(axes.collections) for axes in drawn.axes) > 0
    assert (ROOT / "docs" / "experiments" / f"{name}.png").exists()
