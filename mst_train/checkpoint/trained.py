"""A trained model, for commands that only read it: a run's, or one in Hugging Face's format."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mst_train.attention import Attention, select_kernels
from mst_train.checkpoint.files import find_checkpoints, held
from mst_train.checkpoint.form import load_progress, load_weights
from mst_train.cli.compose import compose, recompose
from mst_train.cli.run_folder import named_run
from mst_train.cli.settings import Settings
from mst_train.config import Config, leaves
from mst_train.data import Vocabulary
from mst_train.errors import UserError
from mst_train.model import Policy, Transformer, build_model
from mst_train.model.hf.weights import copy_weights, find_weights
from mst_train.model.transformer import materialize
from mst_train.precision import weight_type

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """Which model it is, before its weights are read.

    config: the run's settings, or those of a run that would start from ``model.from_pretrained``.
    run: the folder that was named; None: the model is ``config.model.from_pretrained``.
    checkpoint: the run's, in that folder.
    progress: how far the run had come; empty where there was none.
    """

    config: Config
    run: Path | None = None
    checkpoint: Path | None = None
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Where its weights are."""
        return str(self.checkpoint or self.config.model.from_pretrained)

    def check_tokenizer(self, tokenizer: Vocabulary) -> None:
        """Warn of a tokenizer that is not the run's; UserError where the model lacks its ids."""
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise UserError(
                f"{self.name} knows {self.config.model.vocab_size} token ids, and the tokenizer "
                f"has {tokenizer.vocab_size}: set data.tokenizer to the one it was trained with"
            )
        if self.progress.get("tokenizer") not in (None, tokenizer.fingerprint):
            log.warning("%s was trained with another tokenizer than this one", self.name)

    def load(
        self,
        device: torch.device,
        attending: Callable[[Attention], Attention] = lambda attention: attention,
    ) -> Transformer:
        """The model with its weights, in mini-sequences whatever its policy.

        attending: makes what the model attends with of the kernels that the settings ask for.
        """
        config = self.config
        dtype = weight_type(config.precision)
        model = build_model(
            config.model,
            policy=Policy.from_config(replace(config.memory, policy="mst", offload="none")),
            attention=attending(select_kernels(config.kernel, device, dtype)),
            device="meta",
            dtype=dtype,
        )
        if self.checkpoint is not None:
            weights = load_weights(self.checkpoint, model)
            materialize(model, device)
            model.load_state_dict(weights)
            return model
        assert config.model.from_pretrained is not None
        found = find_weights(config.model, config.model.from_pretrained)
        materialize(model, device)
        copy_weights(found, model)
        return model


@contextmanager
def trained_model(arguments: Sequence[str]) -> Iterator[TrainedModel]:
    """The model that a command's arguments name, and that stays while this lasts.

    It is ``model.from_pretrained`` where that is among them, and ``run.dir`` otherwise: the newest
    undamaged checkpoint of a run's folder, or a checkpoint's folder. Other arguments are settings
    in place of the run's own.

    Raises UserError where there is none, or the arguments cannot be used.
    """
    run = named_run(arguments)
    if run is None:
        yield _pretrained(arguments)
        return
    with held(lambda: find_checkpoints(run, "run.dir")) as checkpoint:
        assert checkpoint is not None
        progress = load_progress(checkpoint)
        config = run_settings(progress["config"], checkpoint, arguments)
        yield TrainedModel(config, run, checkpoint, progress)


def run_settings(before: dict[str, Any], checkpoint: Path, arguments: Sequence[str] = ()) -> Config:
    """A run's settings ``before``, as its checkpoint has them, with those of the arguments.

    Raises UserError where this version lacks one of its model's, or the arguments cannot be used.
    """
    model = {"model": before.get("model", {})}
    unknown = sorted({key for key, _ in leaves(model)} - set(Settings(Config)))
    if unknown:
        raise UserError(
            f"{checkpoint} has {unknown[0]}, which this version does not know: use the version "
            f"that made it"
        )
    return recompose(before, arguments)


def _pretrained(arguments: Sequence[str]) -> TrainedModel:
    config = compose(arguments)
    if config.model.from_pretrained is None:
        raise UserError(
            "model.from_pretrained=null names no checkpoint: give its folder, or run.dir=DIR"
        )
    return TrainedModel(config)


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
