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


def test_the_host_waits_for_the_norm_and_the_loss(tmp_path):
    """On a CPU too it can be counted what would make the host wait for a GPU in a step: two numbers, in each method."""
    rows, end = RUN["run_part"]("syncs", "cpu", tmp_path, 300)
    assert end == "done" and len(rows) == 12
    assert not [row for row in rows if not row["ok"]]


def test_what_a_part_found_is_kept_when_it_is_stopped(tmp_path):
    """A part that is stopped leaves its rows whole, and the table shows them and how it ended."""
    (tmp_path / "parts.py").write_text(
        "import sys, time\n"
        "with open(sys.argv[sys.argv.index('--out') + 1] + '/slow.jsonl', 'w') as file:\n"
        "    print('{\"what\": \"first\", \"found\": 1}\\n{\"what\": \"cut', end='', file=file, flush=True)\n"
        "    time.sleep(600)\n"
    )
    run_part = RUN["run_part"]
    kept, run_part.__globals__["HERE"] = run_part.__globals__["HERE"], tmp_path
    try:
        rows, end = run_part("slow", "cpu", tmp_path, 5)
    finally:
        run_part.__globals__["HERE"] = kept
    assert rows == [{"what": "first", "found": 1}] and end == "stopped after 5 s"
    report = {"about": {}, "parts": {"slow": {"seconds": 5.0, "end": end, "rows": rows}}}
    shown = RUN["table"](report)
    assert "| first | 1 |" in shown and "| slow | 5 | 0 of 0 | stopped after 5 s |" in shown


def test_a_part_that_fails_says_why_in_its_last_line(tmp_path):
    """A part that does not exist ends in one line, and ends nothing else."""
    rows, end = RUN["run_part"]("nothing", "cpu", tmp_path, 60)
    assert rows == [] and end.startswith("failed: ") and "nothing" in end
