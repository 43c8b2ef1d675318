"""Evaluation of a trained model: a run's checkpoint, or one in Hugging Face's format."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mst_train.bar import bar
from mst_train.checkpoint.trained import TrainedModel, best_device, trained_model
from mst_train.cli.compose import warn_of_unused
from mst_train.cli.run_folder import WEIGHTS
from mst_train.config import Config
from mst_train.data import Batch, Vocabulary, load_data
from mst_train.environment import describe
from mst_train.errors import UserError
from mst_train.evaluate.probe import Probe
from mst_train.evaluate.scores import probe_record
from mst_train.evaluate.tasks import make_probes
from mst_train.evaluate.validation import validate, validation_batches

USED = (
    *("run.", "data.", "evaluation.", "memory.", "kernel."),
    *("train.seed", "train.micro_batch_size", "train.eval_sequences"),
)
"""What is read of the settings, besides what a run's checkpoint decides."""

log = logging.getLogger(__name__)


def evaluate_trained(arguments: Sequence[str]) -> tuple[dict[str, Any], Path | None]:
    """The validation loss, by position too, and the tasks.

    Args:
        arguments: which model (``trained_model``), and settings, of which ``data`` and
            ``evaluation`` say what on.

    Returns:
        (one JSON object, the run's folder). Parts that the data do not allow are null: no
        validation data, tokens without a tokenizer. Of a model that is no run's, so is the step,
        and there is no folder.

    Raises:
        UserError: the data or the model cannot be used, or there is none.
    """
    about = describe(best_device(), "mst_train.evaluate")
    with trained_model([*arguments, "evaluation.every=0"]) as trained:  # memory is no run's here
        warn_of_unused(arguments, USED if trained.checkpoint else (*USED, *WEIGHTS))
        return {**_evaluate(trained), "environment": about}, trained.run


def _evaluate(trained: TrainedModel) -> dict[str, Any]:
    config = trained.config
    data = load_data(config.data)
    if trained.progress.get("corpus") not in (None, data.corpus_fingerprint):
        log.warning("data.source is not what %s was trained on", trained.name)
    trained.check_tokenizer(data.tokenizer)
    probes = _probes(config, data.tokenizer)
    batches = validation_batches(data, config.train)
    log.info("%s", _work(trained, batches, probes))
    model = trained.load(best_device())
    record: dict[str, Any] = {"val_loss": None, "val_loss_by_position": None, "val_tokens": None}
    shown = {name: _bar(some, name or "validation") for name, some in batches.items()}
    found, losses = validate(model, shown)
    record |= losses
    if found is not None:
        record["val_tokens"] = {str(bucket.start): bucket.tokens for bucket in found.buckets}
    tasks = config.evaluation.tasks
    parts = ("", "_accuracy", "_exact", "_loss")
    scores: dict[str, Any] = {f"{task}{part}": None for task in tasks for part in parts}
    if probes:
        scores = probe_record(model, probes, shown=lambda some: _bar(some, "tasks"))
    about = {
        "checkpoint": trained.name,
        "step": trained.progress.get("step"),
        "data": [part.source for part in config.data.mixture] or [config.data.source],
        "sequence_length": config.data.sequence_length,
        "trained_sequence_length": _trained_length(trained),
        "tasks": tasks,
        "samples": config.evaluation.samples,
    }
    return {**about, **record, **scores}


def _trained_length(trained: TrainedModel) -> int | None:
    """The length of the sequences of the run that it is of; None where it is no run's."""
    length: int | None = trained.progress.get("config", {}).get("data", {}).get("sequence_length")
    return length


def _work(trained: TrainedModel, batches: Mapping[str, list[Batch]], probes: list[Probe]) -> str:
    """What is about to be computed, of what and on which device."""
    parts = [
        f"{name or 'validation'}, {sum(len(batch.tokens) for batch in some):,} sequences of "
        f"{trained.config.data.sequence_length:,} tokens"
        for name, some in batches.items()
    ]
    if probes:
        tokens = sum(probe.length for probe in probes)
        tasks = ", ".join(dict.fromkeys(probe.task for probe in probes))
        parts.append(f"{tasks}, {len(probes)} texts of {tokens:,} tokens together")
    on = "the GPU" if best_device().type == "cuda" else "the CPU"
    return f"evaluating {trained.name} on {on}: {'; '.join(parts) or 'there is nothing to do'}"


def _bar(some: Sequence[Any], what: str) -> Iterable[Any]:
    done: Iterable[Any] = bar(some, desc=what, leave=False, disable=None)
    return done


def _probes(config: Config, tokenizer: Vocabulary) -> list[Probe]:
    try:
        return make_probes(config, tokenizer)
    except UserError as error:
        if config.evaluation.lengths:
            raise
        log.warning("no %s: %s", ", ".join(config.evaluation.tasks), error)
        return []
