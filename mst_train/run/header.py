"""What a run says of itself before its first step."""

from collections.abc import Iterator

import torch

from mst_train.config import Config, ModelConfig
from mst_train.data import Data
from mst_train.distributed.exchange import choose_exchange
from mst_train.model.flops import active_parameter_count, parameter_count
from mst_train.plan.choose import describe
from mst_train.plan.predict import Prediction
from mst_train.units import GIB, duration


def header(config: Config, prediction: Prediction, data: Data, step: int) -> Iterator[str]:
    """Line by line: the model and where it is trained, the data, the way that is left, what it is
    predicted to take. step: the last finished one."""
    yield (
        f"{config.run.name}: {_parameters(config.model)} in {config.precision} on "
        f"{_devices(prediction)}"
    )
    yield f"memory: {describe(prediction)}; {_chunks(prediction)}"
    yield f"data: {_data(config, data)}"
    yield f"run: {_steps(prediction, data, step)}"
    yield f"predicted: {_predicted(prediction, step)}"


def _parameters(model: ModelConfig) -> str:
    text = f"{parameter_count(model):,} parameters"
    if model.num_experts is not None:
        text += f", {active_parameter_count(model):,} of them for each token,"
    return text


def _devices(prediction: Prediction) -> str:
    target, parallel = prediction.target, prediction.config.parallel
    if target.gpus == 1:
        threads = f", threads: {torch.get_num_threads()}" if target.device.kind == "cpu" else ""
        return f"one {target.device.name}{threads}"
    text = f"{target.gpus} x {target.device.name}"
    if parallel.sequence_parallel > 1:
        text += f", {parallel.sequence_parallel} for each sequence, which exchange "
        text += _exchange(prediction)
    if parallel.zero_stage:
        text += f", ZeRO stage {parallel.zero_stage}"
    return text


def _exchange(prediction: Prediction) -> str:
    """What attention needs of the others, as ``parallel.sequence_exchange`` names it."""
    target = prediction.target
    exchange = choose_exchange(prediction.config, target.per_machine, target.device.kind)
    if exchange.name == "both":
        return f"heads in nodes of {exchange.heads} and keys between nodes"
    return exchange.name


def _chunks(prediction: Prediction) -> str:
    policy = prediction.simulation.policy
    if prediction.config.memory.policy != "mst":
        return "no mini-sequences"
    return (
        f"mini-sequences of {policy.block_chunk_tokens:,} tokens in blocks and "
        f"{policy.head_chunk_tokens:,} in the head"
    )


def _data(config: Config, data: Data) -> str:
    parts = [part.source for part in config.data.mixture]
    length, count = config.data.sequence_length, len(data.training)
    held_out = 0 if data.validation is None else len(data.validation)
    known, ids = data.tokenizer.vocab_size, config.model.vocab_size
    unused = f"; it uses {known:,} of the model's {ids:,} token ids" if known < ids else ""
    return (
        f"{', '.join(parts) or config.data.source}; {count:,} sequences of {length:,} tokens in an "
        f"epoch, {held_out:,} held out{unused}"
    )


def _steps(prediction: Prediction, data: Data, step: int) -> str:
    config, tokens = prediction.config, prediction.tokens_per_step
    left = max(config.train.steps - step, 0) * tokens
    epochs = left / (len(data.training) * config.data.sequence_length)
    return (
        f"steps {step + 1} to {config.train.steps} of {tokens:,} tokens: {left:,} tokens, "
        f"{epochs:.3g} epochs; a checkpoint every {config.checkpoint.every} steps"
    )


def _predicted(prediction: Prediction, step: int) -> str:
    found, target, seconds = prediction.simulation, prediction.target, prediction.seconds
    text = f"{found.peak_bytes / GIB:.2f} of {target.budget_bytes / GIB:.2f} GiB"
    if found.host_bytes:
        text += f", {found.host_bytes / GIB:.2f} GiB of the host"
    if seconds is not None:
        whole = (prediction.config.train.steps - step) * seconds
        text += f"; {duration(seconds)} a step, {duration(whole)} for the run"
    return text
