# SPDX-License-Identifier: MIT
"""The parts of run.py as tests, where there is a GPU."""

import runpy
from pathlib import Path

import pytest
import torch

RUN = runpy.run_path(str(Path(__file__).parent / "run.py"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("part", RUN["LIMITS"])
def test_part(part, tmp_path):
    """The part ends by itself, and each of its rows that can be judged holds."""
    rows, end = RUN["run_part"](part, "cuda", tmp_path, 2 * RUN["LIMITS"][part])
    assert end == "done" and rows
    assert not [row for row in rows if row.get("ok") is False]


def test_what_a_part_found_is_kept_when_it_is_stopped(tmp_path):
    """A part that is stopped leaves its rows, and the table says that it was."""
    rows, end = RUN["run_part"]("correctness", "cpu", tmp_path, 12)
    assert (end == "done" or "stopped after 12 s" in end) and rows
    report = {"about": {}, "parts": {"correctness": {"seconds": 12, "end": end, "rows": rows}}}
    assert rows[0]["what"] in RUN["table"](report)


def test_a_part_that_fails_says_why_in_its_last_line(tmp_path):
    """A part that does not exist ends in one line, and ends nothing else."""
    rows, end = RUN["run_part"]("nothing", "cpu", tmp_path, 60)
    assert rows == [] and end.startswith("failed: ") and "nothing" in end
