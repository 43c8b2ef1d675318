"""Evaluation of a run's newest checkpoint, without its training."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mst_train.attention import select_kernels
from mst_train.checkpoint.files import complete_checkpoints, held
from mst_train.checkpoint.form import load_progress, load_weights
from mst_train.cli.compose import recompose, warn_of_unused
from mst_train.config import Config
from mst_train.data import Vocabulary, fixed_batches, load_data
from mst_train.engine.step import evaluate
from mst_train.environment import describe
from mst_train.errors import UserError
from mst_train.evaluate.passkey import Probe, make_probes, passkey_record
from mst_train.model import Policy, Transformer, build_model
from mst_train.precision import weight_type

USED = (
    *("run.", "data.", "evaluation.", "memory.", "kernel."),
    *("train.seed", "train.micro_batch_size", "train.eval_sequences"),
)
"""What is read of a run's settings, besides what a checkpoint decides."""

PASSKEY = ("passkey_accuracy", "passkey_loss", "passkey")

log = logging.getLogger(__name__)


def evaluate_run(run: Path, arguments: list[str]) -> dict[str, Any]:
    """The validation loss, by position too, and passkey retrieval, as one JSON object.

    Args:
        run: the folder whose newest whole checkpoint is evaluated, and stays meanwhile.
        arguments: settings in place of the run's own; ``data`` and ``evaluation`` say what on.

    Parts that the data do not allow are null: no validation data, tokens without a tokenizer.
    Raises UserError where the data or the checkpoint cannot be used, or there is none.
    """
    about = describe(_device(), "mst_train.evaluate")
    with held(lambda: complete_checkpoints(run / "checkpoints")[::-1]) as checkpoint:
        if checkpoint is None:
            raise UserError(f"run.dir={run} holds no whole checkpoint: give the folder of a run")
        trainer = load_progress(checkpoint)
        config = recompose(trainer["config"], arguments)
        warn_of_unused(arguments, USED)
        return {**_evaluate(config, checkpoint, trainer), "environment": about}


def _evaluate(config: Config, checkpoint: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    data = load_data(config.data)
    if trainer["corpus"] != data.corpus_fingerprint:
        log.warning("data.source is not what %s was trained on", checkpoint)
    probes = _probes(config, data.tokenizer)
    model = _load(config, checkpoint)
    record: dict[str, Any] = {"val_loss": None, "val_loss_by_position": None, "val_tokens": None}
    if data.validation is not None:
        limit = config.train.eval_sequences
        batches = fixed_batches(data.validation, config.train.micro_batch_size, limit)
        found = evaluate(model, batches)
        tokens = {str(bucket.start): bucket.tokens for bucket in found.buckets}
        record |= {**found.record(), "val_tokens": tokens}
    passkeys = passkey_record(model, probes) if probes else dict.fromkeys(PASSKEY)
    return {"checkpoint": str(checkpoint), "step": trainer["step"], **record, **passkeys}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _probes(config: Config, tokenizer: Vocabulary) -> list[Probe]:
    try:
        return make_probes(config, tokenizer)
    except UserError as error:
        if config.evaluation.passkey_lengths:
            raise
        log.warning("no passkey retrieval: %s", error)
        return []


def _load(config: Config, checkpoint: Path) -> Transformer:
    """The checkpoint's model on this machine's device, in mini-sequences whatever its policy."""
    device = _device()
    dtype = weight_type(config.precision)
    attention = select_kernels(config.kernel, device, dtype)
    model = build_model(
        config.model,
        policy=Policy.from_config(replace(config.memory, policy="mst", offload="none")),
        attention=attention,
        device=device,
        dtype=dtype,
    )
    model.load_state_dict(load_weights(checkpoint, model))
    return model
