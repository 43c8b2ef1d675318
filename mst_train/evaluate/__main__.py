"""python -m mst_train.evaluate run.dir=DIR [key=value ...]: evaluate a run's newest checkpoint."""

import sys
from pathlib import Path
from typing import Any

from mst_train.cli.command import run_command
from mst_train.errors import UserError
from mst_train.files import expanded

HELP = """\
python -m mst_train.evaluate run.dir=DIR [key=value ...]

Computes the validation loss by position in the sequence, and passkey retrieval, of a run's newest
checkpoint. Writes DIR/evaluation.json. Settings are the run's own, but for those given here:
  --help                       this page
  evaluation.passkey_lengths   tokens in a passkey's text, such as [1024,4096]
  evaluation.passkey_depths    where its number is, such as [0,0.5,1]
  train.eval_sequences         validation sequences
  data.sequence_length, data.source, memory.head_chunk_tokens, kernel.attention, ..."""

WEIGHTS = ("model", "precision")
"""What a checkpoint decides."""

USED = (
    *("run.", "data.", "evaluation.", "memory.", "kernel."),
    *("train.seed", "train.micro_batch_size", "train.eval_sequences"),
)
"""What this command reads of a run's settings, besides."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "nothing was written")


def _run(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    from mst_train.cli.compose import compose

    names_run = ("run.", "experiment=")
    run = expanded(compose([a for a in arguments if a.lstrip("+").startswith(names_run)]).run.dir)
    result = _evaluate(run, arguments)

    from mst_train.evaluate.show import render
    from mst_train.files import write_json

    file = run / "evaluation.json"
    write_json(file, result)
    print(f"{render(result)}\n\nWritten: {file}")
    return 0


def _evaluate(run: Path, arguments: list[str]) -> dict[str, Any]:
    if not run.is_dir():
        raise UserError(f"run.dir={run} is no folder: give the folder of a run")
    changed = [a for a in arguments if a.lstrip("+").partition("=")[0].partition(".")[0] in WEIGHTS]
    if changed:
        raise UserError(
            f"cannot use {' '.join(changed)}: the model and its type are the checkpoint's"
        )
    import torch

    from mst_train.checkpoint.form import load_progress
    from mst_train.cli.compose import recompose, warn_of_unused
    from mst_train.environment import describe
    from mst_train.evaluate.checkpoint import evaluate_checkpoint, newest_checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = describe(device, "mst_train.evaluate")
    with newest_checkpoint(run) as checkpoint:
        config = recompose(load_progress(checkpoint)["config"], arguments)
        warn_of_unused(arguments, USED)
        return {**evaluate_checkpoint(config, checkpoint), "environment": about}


if __name__ == "__main__":
    sys.exit(main())
