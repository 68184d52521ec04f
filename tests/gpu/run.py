# SPDX-License-Identifier: MIT
"""All that is claimed of a GPU, in one command of at most nine minutes, without network: figures, not promises.

    python tests/gpu/run.py                              all parts on one card: out/gpu/gpu.json and gpu.md
    python tests/gpu/run.py --parts race,memory          some of them, which then have the nine minutes for themselves
    python tests/gpu/run.py --device cpu --out out/cpu   the same code where there is no card, with smaller sizes

Each part is a process of its own with a time limit (parts.py). What a part has found when it ends, fails or is stopped
is kept, and both files are written after each. A row: what, found, expected, and whether it holds.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).parent
# Seconds for each part, in order of value. A part may take what those before have left over
LIMITS = {"correctness": 60, "syncs": 30, "bits": 40, "race": 170, "memory": 50, "resume": 60, "compile": 75,
          "engines": 50}  # fmt: skip
TOTAL = 535


def run_part(name, device, out, limit):
    """The rows of one part, and a line on how it ended."""
    rows, log = out / f"{name}.jsonl", out / f"{name}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "parts.py"), name, "--device", device, "--out", str(out)]
    command += ["--limit", f"{limit:.0f}"]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "GOMP_SPINCOUNT": "10000"}
    if name != "race":  # cuDNN's attention plans each new length for up to a second, and small runs do little else
        environment |= {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    with open(log, "wb") as file:  # a session of its own: what the part has started ends with it
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
            lines = log.read_text(errors="replace").strip().splitlines()
            end = "done" if code == 0 else f"failed: {lines[-1][:300] if lines else f'exit code {code}'}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {limit:.0f} s"
        finally:
            if hasattr(os, "killpg"):
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.kill()
            process.wait()
    found = rows.read_text().splitlines() if rows.exists() else []
    return [json.loads(line) for line in found if line.endswith("}")], end  # the last line may have been cut off


def shown(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else "" if value is None else str(value)


def table(report):
    """The report in Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in report["about"].items())
    lines = ["# On a GPU", "", about, "", "| part | seconds | rows that hold | end |", "|---|---|---|---|"]
    for name, part in report["parts"].items():
        judged = [row["ok"] for row in part["rows"] if row.get("ok") is not None]
        lines.append(f"| {name} | {part['seconds']:.0f} | {sum(judged)} of {len(judged)} | {part['end']} |")
    for name, part in report["parts"].items():
        lines += ["", f"## {name}", "", "| what | found | expected | |", "|---|---|---|---|"]
        for row in part["rows"]:
            verdict = {True: "yes", False: "**no**", None: ""}[row.get("ok")]
            cells = [shown(row.get(key)).replace("|", "/") for key in ("what", "found", "expected")]
            lines.append(f"| {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines) + "\n"


def about(device):
    import torch

    found = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "torch": torch.__version__}
    if device == "cuda":
        found |= {"card": torch.cuda.get_device_name(), "cards": torch.cuda.device_count(), "CUDA": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = "unknown"
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--parts", type=lambda text: text.split(","), default=[*LIMITS], help=f"of {','.join(LIMITS)}")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*LIMITS}:
        parser.error(f"no part {min(unknown)}: there are {', '.join(LIMITS)}")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu checks the same code without one")
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"about": about(args.device), "parts": {}}
    for i, name in enumerate(args.parts):
        later = sum(LIMITS[other] for other in args.parts[i + 1 :])
        limit = max(10, TOTAL - (time.monotonic() - began) - later)
        start = time.monotonic()
        rows, end = run_part(name, args.device, args.out, limit)
        seconds = time.monotonic() - start
        report["parts"][name] = {"seconds": seconds, "end": end, "rows": rows}
        (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "gpu.md").write_text(table(report))
        wrong = [row for row in rows if row.get("ok") is False]
        print(f"{name:12} {seconds:4.0f} s  {len(rows)} rows, {len(wrong)} do not hold; {end}", flush=True)
        for row in wrong[:8]:
            print(f"    {row['what']}: {shown(row['found'])}, expected {shown(row.get('expected'))}", flush=True)
    print(f"{args.out / 'gpu.md'} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
