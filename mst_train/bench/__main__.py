"""python -m mst_train.bench +bench=NAME [key=value ...]: measure."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst_train.cli.command import run_command, show_help
from mst_train.errors import TrainingError, UserError
from mst_train.files import expanded, make_folder

if TYPE_CHECKING:
    from mst_train.bench.config import BenchConfig

HELP = """\
python -m mst_train.bench +bench=NAME [key=value ...]

Measures, and writes results.json, results.md and results.png to bench.dir.
  --help     this page
  --config   print the configuration that the arguments make, and stop

Benches: {benches}
{about}

Settings; those of training (python -m mst_train --help) hold too:

{settings}"""

ABOUT = """\
  step     whole training steps under each memory policy
  short    the same at lengths that do not need the method
  systems  whole steps of this project, transformers, DeepSpeed's ALST and Liger
  peers    the LM head and the MLP alone, as others implement them
  max_sequence  the longest sequence that fits under each policy, beside the prediction
  *_gpu    the same with Llama3-8B's dimensions, for one large GPU"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "nothing was written")


def _run(arguments: list[str]) -> int:
    from mst_train.bench.config import BenchConfig, read
    from mst_train.cli.compose import describe
    from mst_train.cli.config_folders import choices
    from mst_train.cli.reference import as_text

    if "--help" in arguments or "-h" in arguments:
        settings, benches = as_text(BenchConfig, "bench"), ", ".join(choices("bench"))
        show_help(HELP.format(benches=benches, about=ABOUT, settings=settings))
        return 0
    config = read([a for a in arguments if a != "--config"])
    if "--config" in arguments:
        print(describe(config), end="")
        return 0
    if config.bench.kind == "none":
        raise UserError(f"no bench is named: add +bench=NAME, one of {', '.join(choices('bench'))}")
    _require_gpu(config)
    # Packages print to stdout as they please; it is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        report, text = _measure(config)
    print(json.dumps(report) if config.bench.output == "json" else text)
    if report["problems"]:
        raise TrainingError("; ".join(report["problems"]))
    return 0


SMALL = 10**8
"""Parameters of a model with which a bench for GPUs can be tried on a CPU."""


def _require_gpu(config: "BenchConfig") -> None:
    import torch

    from mst_train.model.flops import parameter_count

    name, for_gpu = config.bench.name, config.bench.name.endswith("_gpu")
    if for_gpu and not torch.cuda.is_available() and parameter_count(config.model) > SMALL:
        raise UserError(
            f"+bench={name} is for a GPU, and there is none here: +bench="
            f"{name.removesuffix('_gpu')} is the same for a CPU"
        )


def _measure(config: "BenchConfig") -> tuple[dict[str, Any], str]:
    """The report, written to its folder, and what to show of it."""
    from mst_train import environment
    from mst_train.bench import max_sequence, peers, report, step, systems
    from mst_train.bench.workload import prepare_device

    benches = {
        "step": step.run,
        "short": step.run,
        "systems": systems.run,
        "peers": peers.run,
        "max_sequence": max_sequence.run,
    }
    folder = expanded(config.bench.dir)
    new = not folder.exists()
    make_folder(folder, "bench.dir")
    device = prepare_device(config)
    about = environment.describe(device, "mst_train.bench")  # before the load that this makes
    try:
        rows, problems = benches[config.bench.kind](config, device)
    except UserError:
        if new:
            folder.rmdir()
        raise
    problems += [f"{row['variant']}: {row['problem']}" for row in rows if row["failed"]]
    result = {
        "bench": config.bench.kind,
        **about,
        "settings": dataclasses.asdict(config),
        "rows": rows,
        "problems": problems,
    }
    if config.bench.kind == "systems":
        result["compared_gradients"] = list(systems.COMPARED)
    return result, "\n".join([report.plain(result), *write(result, folder)])


def write(result: dict[str, Any], folder: Path) -> list[str]:
    """Write results.json, results.md and results.png; returns lines to show the user."""
    from mst_train.bench.report import markdown

    data, page, picture = (folder / f"results.{end}" for end in ("json", "md", "png"))
    data.write_text(json.dumps(result, indent=2) + "\n")
    page.write_text(markdown(result))
    try:
        from mst_train.bench.plot import draw

        draw(result, picture)
    except ImportError:
        return [
            f"Results: {data}, {page}",
            f"No plot: matplotlib is not installed here. Where it is: "
            f"python -m mst_train.bench.plot {data}",
        ]
    return [f"Results: {data}, {page}, {picture}"]


if __name__ == "__main__":
    sys.exit(main())
