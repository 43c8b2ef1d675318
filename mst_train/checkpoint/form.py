"""Whether what a checkpoint holds is what a run takes over: nothing is used before it is known.

    trainer     how far the run had come, its settings, the outcome so far
    model       for each parameter, by name: its weights
    optimizer   for each parameter, by name: what ``optim.Optimizer.state_dict`` gives

A file that is damaged is found by its checksum (files.py). This is about one that was written
by something else.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.checkpoint.files import load_part
from mst_train.deepspeed_adapter import full_shape
from mst_train.engine.protocol import State
from mst_train.errors import UserError
from mst_train.optim import ADAMW_STATES, MUON_STATES

STATES = ((), ADAMW_STATES, MUON_STATES)
"""What there is of a parameter: nothing before its first update."""


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """The part ``trainer``: ``step``, ``tokens``, ``position`` (sequences consumed), ``summary``,
    ``config``, ``corpus`` and ``tokenizer`` (fingerprints), ``attention`` (the kernels chosen) and
    ``bad_steps``.

    Raises UserError where it is none, or cannot be read.
    """
    found = load_part(checkpoint, "trainer")
    with _refusing(f"{checkpoint}/trainer.pt is not what a run has saved"):
        _require_progress(found)
    return found


def load_weights(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """The part ``model``; UserError where it is not the weights of such a model."""
    weights = load_part(checkpoint, "model")
    # A tied parameter has several names.
    wanted = dict(model.named_parameters(remove_duplicate=False))
    with _refusing(f"{checkpoint}/model.pt is not of this model"):
        _require_names(weights, wanted)
        for name, parameter in wanted.items():
            _require_tensor(name, weights[name], full_shape(parameter), parameter.dtype)
    return weights


def load_states(checkpoint: Path, model: nn.Module) -> State:
    """The part ``optimizer``; UserError where it is not the states of such a model's parameters."""
    states = load_part(checkpoint, "optimizer")
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _refusing(f"{checkpoint}/optimizer.pt is not of this model"):
        _require_names(states, wanted)
        for name, parameter in wanted.items():
            _require_states(name, states[name], full_shape(parameter))
        if len({"master" in state for state in states.values()}) > 1:
            raise _Wrong("some parameters have fp32 masters, and others have none")
    return states


class _Wrong(Exception):
    """What is wrong with a part."""


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except _Wrong as problem:
        raise UserError(f"{what}: {problem}") from problem.__cause__


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_group(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


PROGRESS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "tokens": _is_count,
    "position": _is_count,
    "corpus": lambda value: isinstance(value, str),
    "tokenizer": lambda value: isinstance(value, str),
    "config": _is_group,
    "attention": lambda value: _is_group(value) and all(isinstance(v, str) for v in value.values()),
    "summary": _is_group,
    "summary.step": _is_count,
    "summary.tokens": _is_count,
    "summary.val_loss": lambda value: value is None or _is_number(value),
    "summary.loss": _is_number,
    "summary.skipped_steps": _is_count,
    "bad_steps": _is_group,
    "bad_steps.losses": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "bad_steps.in_a_row": _is_count,
}

OPTIONAL = ("tokenizer", "attention", "summary.loss", "summary.skipped_steps", "bad_steps")


def _require_progress(found: dict[str, Any]) -> None:
    try:
        json.dumps(found)
    except (TypeError, ValueError, RecursionError) as error:
        raise _Wrong(f"it holds more than numbers and texts ({error})") from error
    for key, is_right in PROGRESS.items():
        group, _, name = key.rpartition(".")
        if group in OPTIONAL and group not in found:
            continue
        values = found[group] if group else found
        if name not in values and key in OPTIONAL:
            continue
        if not is_right(values.get(name)):
            raise _Wrong(f"{key}={values.get(name)!s:.40} cannot be")


def _require_names(found: dict[str, Any], wanted: dict[str, nn.Parameter]) -> None:
    different = sorted(map(str, found.keys() ^ wanted.keys()))
    if different:
        raise _Wrong(f"{different[0]:.80} is in one of them alone")


def _require_states(name: str, states: Any, shape: torch.Size) -> None:
    if not isinstance(states, dict):
        raise _Wrong(f"{name} has no states")
    if states.keys() - {"master"} not in map(set, STATES):
        raise _Wrong(f"{name} has the states {', '.join(sorted(map(str, states)))}")
    for key, state in states.items():
        dtype = torch.float32 if key == "master" else None
        place = f"{name} has a state {key} that"
        _require_tensor(place, state, torch.Size() if key == "step" else shape, dtype)
    if "step" in states and not 0 <= states["step"].item() < math.inf:
        raise _Wrong(f"{name} has been updated {states['step'].item()} times")


def _require_tensor(name: str, value: Any, shape: torch.Size, dtype: torch.dtype | None) -> None:
    """``dtype`` None: any floating point."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise _Wrong(f"{name} is no tensor")
    if value.shape != shape:
        raise _Wrong(f"{name} has the shape {list(value.shape)}, not {list(shape)}")
    if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
        raise _Wrong(f"{name} is of type {value.dtype}")
