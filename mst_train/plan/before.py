"""What the training command asks of the planner before it starts."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from mst_train.config import AUTO, Config
from mst_train.errors import UserError
from mst_train.memory.devices import device_bytes, this_device
from mst_train.model.flops import parameter_count
from mst_train.plan import buckets
from mst_train.plan.candidates import host_works
from mst_train.plan.choose import choose, describe
from mst_train.plan.predict import LABELS, Prediction, Target, make_target, predict
from mst_train.plan.progress import predicting
from mst_train.rendezvous.dist_env import local_world_size
from mst_train.units import GIB

log = logging.getLogger(__name__)

TRUST = {"cpu": 1.0, "cuda": 1.05}
"""A run is refused where the tensors of its step take so many times what there is.

On a CPU the prediction is exact. On a GPU, attention's workspace is modelled: up to there a run is
warned of and may try."""

LONG = 2**18
"""Tokens on a device whose prediction can take more than some seconds."""

STATES = ("parameters", "gradients", "optimizer")


def before_training(config: Config, device: torch.device, processes: int = 1) -> Prediction:
    """The prediction for a run on this device, with the settings that it will have.

    processes: how many have a device each. Those on this machine share its memory.

    Chooses them where memory.policy is auto; warns where what is configured will probably not fit.
    Raises UserError where it certainly does not, or auto finds nothing that does.
    """
    if device.type == "cpu":
        _require_gpu(config, processes)
    target = make_target(config, this_device(device), processes, per_machine=local_world_size())
    _require_hidden_states(config, target)
    announce(config)
    if config.memory.policy == AUTO:
        with predicting() as advance:
            choice = choose(config, target, advance)
        log.info(choice.reason)
        return choice.chosen
    prediction = predict(config, target)
    problems = [*_device_problems(prediction), *_host_problems(prediction)]
    if problems:
        raise UserError(problems)
    if not prediction.fits:
        log.warning(
            "this run will probably not fit: %s at data.sequence_length=%d needs %.2f GiB (%s) and "
            "has %.2f GiB. memory.policy=auto chooses settings that fit%s",
            describe(prediction),
            config.data.sequence_length,
            prediction.simulation.peak_bytes / GIB,
            largest_parts(prediction),
            target.budget_bytes / GIB,
            _smaller_buckets(prediction),
        )
    return prediction


WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "bf16_master": 2 + 4}
STATE_BYTES = {"fp32": 4, "bf16": 2, "bf16_master": 4}
"""Per parameter: its weight with its fp32 master, and one of the optimizer's states."""


def _resident_bytes(config: Config) -> int:
    """Of the weights and the optimizer's states: two of each parameter, one where Muon updates."""
    model = config.model
    parameters = parameter_count(model)
    states = 2 * parameters
    if config.optimizer.name == "muon":
        states -= parameters - parameter_count(replace(model, num_layers=0))
    return parameters * WEIGHT_BYTES[config.precision] + states * STATE_BYTES[config.precision]


def _require_gpu(config: Config, processes: int) -> None:
    """Whether a CPU's memory holds the weights and their states, asked before a prediction.

    Raises UserError where it does not, and no budget says that the CPU is meant.
    """
    memory = device_bytes(torch.device("cpu")) // local_world_size()
    needed = _resident_bytes(config)
    if config.parallel.zero_stage:  # the states at least are shared out
        needed //= processes
    if config.memory.device_budget_gib is None and needed > memory:
        raise UserError(
            f"there is no GPU here, and {config.run.name} needs one: its weights and optimizer "
            f"states alone take {needed / GIB:.2f} GiB, and this machine has {memory / GIB:.2f} "
            f"GiB{' for each process' if processes > 1 else ''}. Start it on a machine with a GPU; "
            f"whether it fits there, python -m mst_train.plan says with the same arguments and "
            f"plan.device=NAME, such as h100_80gb"
        )


def announce(config: Config) -> None:
    """Say that the prediction of such a step takes a while, where it does."""
    tokens = _tokens(config)
    if tokens >= LONG:
        log.info("predicting the memory of a step of %s tokens: this takes a while", f"{tokens:,}")


def _tokens(config: Config) -> int:
    """Of a micro-batch, on one device."""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    return tokens // config.parallel.sequence_parallel


def _require_hidden_states(config: Config, target: Target) -> None:
    """What every policy holds at once, asked before a prediction that takes minutes."""
    tokens = _tokens(config)
    needed = tokens * config.model.hidden_size * target.dtype.itemsize
    if needed > TRUST[target.device.kind] * target.budget_bytes:
        raise UserError(
            f"{config.run.name} does not fit: the hidden states of {tokens:,} tokens alone take "
            f"{needed / GIB:.2f} GiB and {_whose(target)} {target.budget_bytes / GIB:.2f} GiB. "
            f"Set a smaller train.micro_batch_size or data.sequence_length."
        )


def largest_parts(prediction: Prediction, count: int = 3) -> str:
    """The largest parts of the peak, with their sizes."""
    parts = sorted(prediction.simulation.breakdown.items(), key=lambda item: -item[1])
    return ", ".join(f"{LABELS[kind]} {size / GIB:.2f} GiB" for kind, size in parts[:count])


def _device_problems(prediction: Prediction) -> Iterator[str]:
    target, found = prediction.target, prediction.simulation
    needed, what = found.allocated_bytes, largest_parts(prediction)
    if target.device.kind == "cpu" and found.host_bytes:  # one memory for both
        needed += found.host_bytes
        what += f", offloaded {found.host_bytes / GIB:.2f} GiB"
    if needed <= TRUST[target.device.kind] * target.budget_bytes:
        return
    name = prediction.config.run.name
    yield (
        f"{name} does not fit: its step needs {needed / GIB:.2f} GiB ({what}) "
        f"and {_whose(target)} {target.budget_bytes / GIB:.2f} GiB. {advice(prediction)}"
    )


def _whose(target: Target) -> str:
    if target.budget_bytes < target.device.memory_bytes:
        return "memory.device_budget_gib allows"
    return f"the {target.device.kind} device has"


def _host_problems(prediction: Prediction) -> Iterator[str]:
    config, found = prediction.config, prediction.simulation
    budget = prediction.target.host_budget_bytes
    if budget is None or found.host_bytes <= budget:
        return
    whose = "this machine has"
    if config.memory.host_budget_gib is not None:
        whose = "memory.host_budget_gib allows"
    ways = ["a smaller data.sequence_length", "memory.keep.attention=0"]
    if config.optimizer.offload == "host":
        ways = ["optimizer.offload=none"]
    yield (
        f"{config.run.name} does not fit: what is offloaded needs {found.host_bytes / GIB:.2f} GiB "
        f"of host memory and {whose} {budget / GIB:.2f} GiB. Set {' or '.join(ways)}."
    )


def _smaller_buckets(prediction: Prediction) -> str:
    """What to add to advice where smaller buckets of ZeRO's are enough; else nothing."""
    found = buckets.that_fits(prediction.config, prediction.target, prediction.shortage_bytes)
    return "" if found is None else f". It also fits with {found[0]}"


def advice(prediction: Prediction) -> str:
    """What to do about a step that the device's memory does not hold."""
    config, breakdown = prediction.config, prediction.simulation.breakdown
    states = sum(breakdown.get(kind, 0) for kind in STATES)
    if states <= prediction.target.budget_bytes:
        return (
            "Set memory.policy=auto or a smaller data.sequence_length: python -m mst_train.plan "
            f"with plan.search=true finds the longest{_smaller_buckets(prediction)}."
        )
    optimizer, gpus = config.optimizer, prediction.target.gpus
    here, zero = optimizer.offload == "none", config.parallel.zero_stage
    shared = gpus > 1 and zero > 0
    master = " with precision=bf16_master" if config.precision == "bf16" else ""
    ways = ["a larger device", "a smaller model"]
    if optimizer.name == "adamw" and not optimizer.in_backward:
        if shared:
            ways.append("more devices")
        if not (shared and zero == 3):
            several = "" if gpus > 1 else "several devices and "
            ways.append(f"{several}parallel.zero_stage=3{master}")
    if config.precision != "bf16" and here and not shared:
        ways.append("precision=bf16")
    if not optimizer.in_backward and config.train.accumulation_steps == 1 and here and not shared:
        ways.append("optimizer.in_backward=true with optimizer.max_grad_norm=null")
    if here and host_works(config, gpus):
        needed = ["precision=bf16_master"] if config.precision == "bf16" else []
        needed += ["optimizer.in_backward=false"] if optimizer.in_backward else []
        others = f" with {' and '.join(needed)}" if needed else ""
        ways.append(f"optimizer.offload=host{others}")
    return (
        f"The weights and their states alone are too large: take {', '.join(ways[:-1])} or "
        f"{ways[-1]}."
    )
