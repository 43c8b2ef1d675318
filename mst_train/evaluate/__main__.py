"""python -m mst_train.evaluate run.dir=DIR [key=value ...]: evaluate a trained model."""

import sys
from pathlib import Path
from typing import Any

from mst_train.cli.command import run_command, show_help
from mst_train.files import replace_file, write_json, writing

HELP = """\
python -m mst_train.evaluate run.dir=DIR [key=value ...]
python -m mst_train.evaluate model.from_pretrained=FOLDER data.source=... [key=value ...]

Computes the validation loss by position in the sequence, and tasks whose text ends with a question
about it: of a run's newest checkpoint or one that is named (run.dir=DIR/checkpoints/step_NNNNNNNN),
or of a checkpoint in Hugging Face's format, as a run that starts from it with these settings has
them before its first step. Of a run it writes DIR/evaluation.json and evaluation.png, and settings
are the run's own, but for those given:
  --help                   this page
  evaluation.tasks         such as [passkey,niah_multikey,vt,cwe]
  evaluation.lengths       tokens in a task's text, such as [1024,4096], longer than the run's too
  evaluation.depths        where what is asked for is, such as [0,0.5,1]
  evaluation.samples       texts of each task, length and depth
  evaluation.ruler.*       what the texts are like
  train.eval_sequences     validation sequences
  data.sequence_length, data.source, memory.head_chunk_tokens, kernel.attention, ...
  precision, model.rope_scaling.*, with model.from_pretrained"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "nothing was written")


def _run(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        show_help(HELP)
        return 0
    from mst_train.cli.run_folder import named_run

    named_run(arguments, tell=False)
    # torch is imported only now: a mistake in the command line is answered at once.
    from mst_train.evaluate.checkpoint import evaluate_trained
    from mst_train.evaluate.show import render

    result, run = evaluate_trained(arguments)
    if run is not None:
        write_json(run / "evaluation.json", result)
    print(render(result))
    if run is not None:
        print(f"\nWritten: {run / 'evaluation.json'}{_picture(result, run)}")
    return 0


def _picture(result: dict[str, Any], run: Path) -> str:
    """Draw the tasks, if there are any; what to say of it."""
    if not any(result[task] for task in result["tasks"]):
        return ""
    from mst_train.evaluate.plot import picture

    try:
        with writing(run / "evaluation.png"):
            replace_file(run / "evaluation.png", picture(result))
    except ImportError:
        return " (no evaluation.png: pip install matplotlib draws it)"
    return ", evaluation.png"


if __name__ == "__main__":
    sys.exit(main())
