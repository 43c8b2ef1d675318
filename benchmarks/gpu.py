"""What a GPU has to tell, the decisive things first: python benchmarks/gpu.py [FOLDER] (make gpu).

Each piece is a command of its own with a limit of time, and has its log and its results in FOLDER
(runs/gpu). What fails is told and the rest goes on; started again, it goes on with what is not yet
done. summary.md and summary.json grow with each piece: seconds and peaks, measured and predicted.

  --small        with small dimensions, to see that it works, on a CPU too
  --only NAME    this piece alone, done or not; several times for several

Nothing but torch, numpy and hydra-core is needed; pytest for the tests, matplotlib for plots.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = "mst_train.bench"
LLAMA3_8B = ("model.num_layers=32", "optimizer=in_backward", "bench.optimizer=true")
FOUR_LAYERS = ("model.num_layers=4", "memory.device_budget_gib=24")
"""The longest sequence is some 110K tokens then, and a step some five seconds."""
ON_THE_HOST = (
    *("model.num_layers=16", "precision=bf16_master"),
    *("optimizer.offload=host", "optimizer.in_backward=false"),
)
SMALL = (
    *("model.vocab_size=128", "model.hidden_size=32", "model.intermediate_size=64"),
    *("model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2"),
    *("bench.lengths=[48]", "bench.repetitions=1", "memory.device_budget_gib=0.004"),
)


@dataclass(frozen=True)
class Piece:
    """One command, ``python -m module *arguments``, which may take so many seconds."""

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: int


def step(name: str, tokens: int, variant: str, seconds: int, *others: str) -> Piece:
    """A training step of the whole Llama3-8B in bf16 with its optimizer."""
    settings = (f"bench.lengths=[{tokens}]", f"bench.variants=[{variant}]", "bench.repetitions=1")
    return Piece(name, BENCH, ("+bench=step_gpu", *LLAMA3_8B, *settings, *others), seconds)


PIECES = (
    Piece("tests", "pytest", ("-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"), 110),
    Piece("rates", "mst_train.plan.trial", ("FOLDER/rates.json",), 60),
    step("step_60k", 61440, "mst", 110),
    step("step_60k_without_keeping", 61440, "mst_without_keeping", 110),
    Piece("short", BENCH, ("+bench=short_gpu", "bench.lengths=[256,1024,4096]"), 60),
    Piece("policies", BENCH, ("+bench=step_gpu", "bench.lengths=[16384]"), 60),
    Piece("peers", BENCH, ("+bench=peers_gpu", "bench.repetitions=3"), 90),
    step("offload", 81920, "mst_offload", 110, "memory.host_budget_gib=100"),
    Piece("longest", BENCH, ("+bench=max_sequence_gpu", *FOUR_LAYERS, "bench.variants=[mst]"), 110),
    Piece("systems", BENCH, ("+bench=systems_gpu", "bench.lengths=[16384]"), 90),
    step("host_optimizer", 16384, "mst", 110, *ON_THE_HOST),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="runs/gpu", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", action="append", choices=[piece.name for piece in PIECES])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    summary = given.folder / "summary.json"
    done = json.loads(summary.read_text()) if summary.exists() else {}
    for piece in PIECES:
        if piece.name not in given.only if given.only else done.get(piece.name, {}).get("ok"):
            continue
        found = run(piece, given.folder.resolve(), small=given.small)
        done[piece.name] = found
        summary.write_text(json.dumps(done, indent=2) + "\n")
        (given.folder / "summary.md").write_text("\n".join(table(done)) + "\n")
        print("\n".join(table({piece.name: found})[2:]), flush=True)
    print(f"\n{given.folder / 'summary.md'}")
    return 0 if all(found["ok"] for found in done.values()) else 1


def run(piece: Piece, folder: Path, *, small: bool) -> dict[str, Any]:
    """Whether the piece's command succeeded, how long it took, and its rows with predictions."""
    arguments = [argument.replace("FOLDER", str(folder)) for argument in piece.arguments]
    if piece.module == BENCH:
        arguments += [*(SMALL if small else ()), f"bench.dir={folder / piece.name}"]
    began = time.monotonic()
    with (folder / f"{piece.name}.log").open("w") as log:
        status = finished(command(piece.module, *arguments), log, piece.seconds)
    found = {"ok": status == 0, "status": status, "took": round(time.monotonic() - began, 1)}
    results = folder / piece.name / "results.json"
    if status == 0 and results.exists():
        report = json.loads(results.read_text())
        found |= {key: report[key] for key in ("date", "git_commit", "hardware", "versions")}
        predicts = "bench.optimizer=true" in arguments
        found["rows"] = [
            row | (predicted(row, arguments) if predicts else {}) for row in report["rows"]
        ]
    return found


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def started(arguments: list[str], out: Any, err: Any) -> "subprocess.Popen[bytes]":
    """The command's process, which finds this checkout's packages."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
    )


def finished(arguments: list[str], log: Any, seconds: int) -> int | None:
    """The command's exit status; None where it took longer, and was ended with all it started."""
    process = started(arguments, log, subprocess.STDOUT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def predicted(row: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """What the planner says of a row of a step: its seconds, and its peak beyond what stays."""
    policy, _, rest = row["variant"].partition("_")
    asked = [
        *("model=llama3_8b", "precision=bf16"),  # as step_gpu has them
        *(a for a in arguments if a.startswith(("model.", "optimizer", "kernel.", "precision="))),
        f"data.sequence_length={row['tokens']}",
        f"memory.policy={policy}",
        f"memory.keep.attention={0 if rest == 'without_keeping' else 'all'}",
        f"memory.offload={'host' if rest == 'offload' else 'none'}",
        "plan.output=json",
    ]
    answer = started(command("mst_train.plan", *asked), subprocess.PIPE, subprocess.PIPE)
    said, problem = answer.communicate()
    if answer.returncode:
        return {"prediction": problem.decode().strip()}
    plan = json.loads(said)
    staying = plan["breakdown"]["parameters"] + plan["breakdown"]["optimizer"]
    return {
        "predicted_seconds": plan["predicted_step_seconds"],
        "predicted_bytes": plan["allocated_bytes"] - staying,
    }


def table(done: dict[str, dict[str, Any]]) -> list[str]:
    """The summary in Markdown."""
    lines = [
        "| piece | tokens | variant | seconds | predicted | GiB that go | predicted | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in done.items():
        lines += [f"| {' | '.join(cells)} |" for cells in rows_of(name, found)]
    return lines


def rows_of(name: str, found: dict[str, Any]) -> Iterator[list[str]]:
    if not found["ok"]:
        reason = "out of time" if found["status"] is None else f"status {found['status']}"
        yield [f"{name}: {reason}, see {name}.log", *[""] * 7]
    elif "rows" not in found:
        yield [f"{name}: ok in {found['took']} s", *[""] * 7]
    for row in found.get("rows", ()):
        share = row.get("model_flops_utilization")
        yield [
            name,
            f"{row['tokens']:,}",
            row["variant"] + (f" ({row['problem']})" if row["problem"] else ""),
            number(row["median_seconds"], "{:.4g}"),
            number(row.get("predicted_seconds"), "{:.4g}"),
            number(row["peak_bytes"], "{:.2f}", 2**30),
            number(row.get("predicted_bytes"), "{:.2f}", 2**30),
            number(share, "{:.1%}"),
        ]


def number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


if __name__ == "__main__":
    sys.exit(main())
