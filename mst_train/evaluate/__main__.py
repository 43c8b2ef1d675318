"""python -m mst_train.evaluate run.dir=DIR [key=value ...]: evaluate a run's newest checkpoint."""

import sys

from mst_train.cli.command import run_command
from mst_train.errors import UserError
from mst_train.files import expanded, write_json

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
    if not run.is_dir():
        raise UserError(f"run.dir={run} is no folder: give the folder of a run")
    changed = [a for a in arguments if a.lstrip("+").partition("=")[0].partition(".")[0] in WEIGHTS]
    if changed:
        raise UserError(
            f"cannot use {' '.join(changed)}: the model and its type are the checkpoint's"
        )
    from mst_train.evaluate.checkpoint import evaluate_run
    from mst_train.evaluate.show import render

    result = evaluate_run(run, arguments)
    write_json(run / "evaluation.json", result)
    print(f"{render(result)}\n\nWritten: {run / 'evaluation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
