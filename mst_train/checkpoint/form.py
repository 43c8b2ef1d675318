"""Whether what a checkpoint holds is what a run takes over: nothing is used before it is known.

    trainer     how far the run had come, its settings, the outcome so far
    model       for each parameter, by name: its weights
    optimizer   for each parameter, by name: what ``optim.Optimizer.state_dict`` gives

A file that is damaged is found by its checksum (files.py). This is about one that was written
by something else.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.checkpoint.files import load_part
from mst_train.deepspeed_adapter import full_shape
from mst_train.engine.protocol import State
from mst_train.errors import UserError

STATES = {"exp_avg", "exp_avg_sq", "step"}
"""What AdamW keeps of a parameter, once it has been updated."""


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """The part ``trainer``: ``step``, ``tokens``, ``position`` (sequences consumed), ``summary``,
    ``config``, ``corpus`` (a fingerprint) and ``bad_steps``.

    Raises UserError where it is none, or cannot be read.
    """
    found = load_part(checkpoint, "trainer")
    problem = _progress_problem(found)
    if problem:
        raise UserError(f"{checkpoint}/trainer.pt is not what a run has saved: {problem}")
    return found


def load_weights(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """The part ``model``; UserError where it is not the weights of such a model."""
    weights = load_part(checkpoint, "model")
    # A tied parameter has several names.
    wanted = dict(model.named_parameters(remove_duplicate=False))
    problem = _names_problem(weights, wanted)
    for name, parameter in wanted.items():
        if problem:
            break
        problem = _tensor_problem(weights[name], full_shape(parameter), parameter.dtype)
        problem = problem and f"{name} {problem}"
    if problem:
        raise UserError(f"{checkpoint}/model.pt is not of this model: {problem}")
    return weights


def load_states(checkpoint: Path, model: nn.Module) -> State:
    """The part ``optimizer``; UserError where it is not the states of such a model's parameters."""
    states = load_part(checkpoint, "optimizer")
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    problem = _names_problem(states, wanted)
    for name, parameter in wanted.items():
        if problem:
            break
        problem = _states_problem(states[name], full_shape(parameter))
        problem = problem and f"{name} {problem}"
    if not problem and len({"master" in state for state in states.values()}) > 1:
        problem = "some parameters have fp32 masters, and others have none"
    if problem:
        raise UserError(f"{checkpoint}/optimizer.pt is not of this model: {problem}")
    return states


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
    "config": _is_group,
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

OPTIONAL = ("summary.loss", "summary.skipped_steps", "bad_steps")


def _progress_problem(found: dict[str, Any]) -> str | None:
    try:
        json.dumps(found)
    except (TypeError, ValueError, RecursionError) as error:
        return f"it holds more than numbers and texts ({error})"
    for key, is_right in PROGRESS.items():
        group, _, name = key.rpartition(".")
        if group in OPTIONAL and group not in found:
            continue
        values = found[group] if group else found
        if name not in values and key in OPTIONAL:
            continue
        if not is_right(values.get(name)):
            return f"{key}={values.get(name)!s:.40} cannot be"
    return None


def _names_problem(found: dict[str, Any], wanted: dict[str, nn.Parameter]) -> str | None:
    different = sorted(map(str, found.keys() ^ wanted.keys()))
    return f"{different[0]:.80} is in one of them alone" if different else None


def _states_problem(states: Any, shape: torch.Size) -> str | None:
    if not isinstance(states, dict):
        return "has no states"
    if states.keys() - {"master"} not in (set(), STATES):
        return f"has the states {', '.join(sorted(map(str, states)))}"
    for key, state in states.items():
        dtype = torch.float32 if key == "master" else None
        problem = _tensor_problem(state, torch.Size() if key == "step" else shape, dtype)
        if problem:
            return f"has a state {key} that {problem}"
    if "step" in states and not 0 <= states["step"].item() < math.inf:
        return f"has been updated {states['step'].item()} times"
    return None


def _tensor_problem(value: Any, shape: torch.Size, dtype: torch.dtype | None) -> str | None:
    """What a tensor is not that it has to be; ``dtype`` None: any floating point."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return "is no tensor"
    if value.shape != shape:
        return f"has the shape {list(value.shape)}, not {list(shape)}"
    if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
        return f"is of type {value.dtype}"
    return None
