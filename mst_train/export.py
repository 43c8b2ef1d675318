"""python -m mst_train.export checkpoint=DIR output=DIR: a run's model in Hugging Face's format."""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mst_train.cli.command import run_command, show_help
from mst_train.errors import UserError
from mst_train.files import expanded

if TYPE_CHECKING:
    from mst_train.config import DataConfig

HELP = """\
python -m mst_train.export checkpoint=DIR output=DIR [key=value ...]

Writes a run's model as a checkpoint that transformers reads. The output is whole or not there.
  --help     this page

  checkpoint  a run's folder (its newest checkpoint that is whole), or a folder step_NNNNNNNN
  output      the folder to write: new, or empty
  model_type  llama, mistral, ...; without it the first family that has such models
  tokenizer   a .model file, a tokenizer.json, or null for none; without it the run's"""

KEYS = ("checkpoint", "output", "model_type", "tokenizer")

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "nothing was written")


def _run(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        show_help(HELP)
        return 0
    settings, problems = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in KEYS or not equals or not value:
            problems.append(f"cannot use {argument!r}: give {', '.join(KEYS)}, each as key=value")
        settings[key] = value
    problems += [f"{key} is missing: {key}=DIR" for key in KEYS[:2] if key not in settings]
    if problems:
        raise UserError(problems)
    checkpoint, step = export(**settings)
    print(f"{settings['output']}: the model of {checkpoint}, after {step} steps")
    return 0


def export(
    checkpoint: str | Path,
    output: str | Path,
    model_type: str | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[Path, int]:
    """Write the model of a checkpoint to a new folder.

    Args:
        checkpoint: a checkpoint's folder, or a run's: its newest checkpoint that is undamaged.
        output: where to; it must be new or empty.
        model_type: the family it is written as; None: the first that has such models.
        tokenizer: a .model file or a tokenizer.json; "null": none; None: the run's, where it is
            still there.

    Returns:
        (the checkpoint's folder, its step).

    The weights are those that the run computes with, in their type: bf16 ones without their fp32
    masters. Memory: the checkpoint's file is mapped, one file of the output is held.

    Raises:
        UserError: no whole checkpoint, an output that is there, a model that no family has. Nothing
            is left behind then.
        TrainingError: no room.
    """
    from mst_train.checkpoint.files import find_checkpoints, held

    output = expanded(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output={output} is there already: name a new folder, or empty it")
    with held(lambda: find_checkpoints(expanded(checkpoint), "checkpoint")) as found:
        assert found is not None
        return found, _export(found, output, model_type, tokenizer)


def _export(
    checkpoint: Path, output: Path, model_type: str | None, tokenizer: str | Path | None
) -> int:
    """As ``export``, of an undamaged checkpoint; returns its step."""
    from mst_train.checkpoint.form import load_progress, load_weights
    from mst_train.checkpoint.trained import run_settings
    from mst_train.model import build_model
    from mst_train.model.hf.weights import save_pretrained
    from mst_train.precision import weight_type

    trainer = load_progress(checkpoint)
    config = run_settings(trainer["config"], checkpoint)
    model = build_model(config.model, device="meta", dtype=weight_type(config.precision))
    model.load_state_dict(load_weights(checkpoint, model), assign=True)
    if config.model.tie_embeddings:
        model.head.weight = model.embedding.weight
    with tempfile.TemporaryDirectory() as temporary:
        file, token_ids = _tokenizer(tokenizer, config.data, Path(temporary))
        save_pretrained(
            model,
            output,
            model_type=model_type,
            sequence_length=config.data.sequence_length,
            tokenizer=file,
            token_ids=token_ids,
        )
    step: int = trainer["step"]
    return step


def _tokenizer(
    tokenizer: str | Path | None, data: "DataConfig", temporary: Path
) -> tuple[Path | None, dict[str, int]]:
    """The tokenizer's file, or the folder of its files, and the id that ends a document."""
    from mst_train.data import load_tokenizer

    if str(tokenizer) == "null":
        return None, {}
    if tokenizer is None:
        tokenizer = _run_tokenizer(data, temporary)
    if tokenizer is None:
        return None, {}
    path = expanded(tokenizer)
    # What a tokenizer.json leaves unsaid is in the files beside it.
    files = path.parent if path.suffix == ".json" else path
    return files, {"eos_token_id": load_tokenizer(path).eod}


def _run_tokenizer(data: "DataConfig", temporary: Path) -> Path | None:
    """The tokenizer that a run's tokens were made with, as a file; None where it is gone."""
    from mst_train.data import load_vocabulary

    if data.tokenizer is not None:
        return Path(data.tokenizer)
    try:
        tokenizer = load_vocabulary(data)
    except UserError as error:
        log.warning("the run's tokenizer is left out: %s", error.problems[0])
        return None
    if tokenizer.model is None:
        return None
    file = temporary / tokenizer.file_name
    file.write_bytes(tokenizer.model)
    if file.suffix == ".json":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eod_token}
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    return file


if __name__ == "__main__":
    sys.exit(main())
