"""The training run, from a configuration to a trained model: read it from top to bottom.

train   set up, loop over steps (step.py), evaluate, save, report
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from mst_kernels import set_backend, use_triton
from mst_train import environment
from mst_train.bad_steps import BadSteps
from mst_train.checkpoint import first_undamaged, load_part
from mst_train.checkpoint_form import load_progress, load_states, load_weights
from mst_train.checkpoint_writer import CheckpointWriter
from mst_train.config import Config, MemoryConfig, OptimizerConfig
from mst_train.data import Batch, Data, Loader, fixed_batches, load_data
from mst_train.errors import DataError, Stopped, TrainingError, UserError
from mst_train.evaluate.passkey import Probe, make_probes, passkey_record
from mst_train.launched import local_rank
from mst_train.memory.devices import GIB
from mst_train.memory.tracker import process_peak_bytes
from mst_train.metrics import Metrics, Progress, write_json
from mst_train.model import Transformer, build_model, select_attention
from mst_train.model.attention import Attention
from mst_train.model.flops import training_flops
from mst_train.model.huggingface import copy_weights, find_weights
from mst_train.mst import HostBudgetError, Offload, Policy
from mst_train.optim import learning_rate
from mst_train.parallel import (
    WAITING,
    SharedSequences,
    Topology,
    UlyssesAttention,
    build_engine,
    check_engine,
    check_same,
    joined,
    lost_contact,
    partition,
    together,
    told_once,
    whole_parameters,
)
from mst_train.plan.before import before_training, largest_parts
from mst_train.plan.predict import Prediction
from mst_train.random_state import random_state, restore_random_state, seed_everything
from mst_train.run_folder import RunFolder, check_continuation
from mst_train.signals import StopSignals
from mst_train.step import BadStep, evaluate, train_step

SETTING_UP = timedelta(days=1)
"""How long processes wait for one that prepares the data or plans the run."""

WRITING = timedelta(hours=1)
"""How long they wait for one that writes its part of a checkpoint."""

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train as configured and return the summary that is written to summary.json.

    Where torchrun has started several processes, all of them call this with the same configuration;
    the first one writes the run's folder, and all return the same.

    Raises UserError where the run cannot start, TrainingError where it cannot go on, and Stopped
    where a signal has ended it: SIGTERM and SIGUSR1 do, once the run has begun (signals.py).
    """
    with joined(config) as topology:
        return _train(config, topology)


def _train(config: Config, topology: Topology) -> dict[str, Any]:
    # What can be refused is refused before anything is written.
    patient = topology.patient(SETTING_UP)
    found: str | None = None
    with together(patient):
        check_engine(config, topology.world)
        folder = RunFolder(config)
        if topology.is_first:
            undamaged = first_undamaged(folder.candidates)
            found = None if undamaged is None else str(undamaged)
    found = patient.from_first(found)
    checkpoint = None if found is None else Path(found)
    with together(patient):
        progress_made = _progress_at(checkpoint, config)
    if progress_made["step"] >= config.train.steps:
        log.info("the run in %s is finished: set train.steps higher to go on", folder.path)
        return _finished(folder, progress_made["summary"], topology)
    prediction, config, parts = _predict(config, patient)
    data = _load_data(config, patient)
    with together(patient):
        _require_vocabulary(config, data)
        _require_same_data(progress_made, data, checkpoint)
        passkeys = make_probes(config, data.tokenizer) if config.evaluation.passkey_every else []
        attention = _select_kernels(config, topology)

    # Model and optimizer, at their first step or where the checkpoint left them.
    model = _build_model(config, attention, topology)
    if checkpoint is None and config.model.from_pretrained is not None:
        with together(patient):
            pretrained = find_weights(config.model, config.model.from_pretrained)
        copy_weights(pretrained, model, whole_parameters(config, topology))
    engine = build_engine(model, config, topology)
    seed_everything(config.train.seed)
    with together(patient):
        if topology.is_first:
            folder.open()
    lock = patient.from_first(folder.lock)
    with together(patient):
        folder.require_shared(lock)
        if checkpoint is not None:
            weights, states = load_weights(checkpoint, model), load_states(checkpoint, model)
    if checkpoint is not None:
        engine.load(weights, states)
        with together(patient):
            restore_random_state(load_part(checkpoint, "random"))
        del weights, states  # mapped files, which could not go when the checkpoint does
        log.info("continuing from %s", checkpoint)
    step, tokens, position = (progress_made[key] for key in ("step", "tokens", "position"))
    # Of the last finished step; a step that fails changes none of them.
    saved = step
    sequences = SharedSequences(data.training, topology, config.train.micro_batch_size, position)
    loader = Loader(sequences, config.train.micro_batch_size, seed=config.train.seed)
    bad_steps = BadSteps(config.train, progress_made.get("bad_steps", {}))

    resumed_at = None if checkpoint is None else step
    with together(patient):
        metrics = Metrics(folder.metrics, config, resumed_at, writes=topology.is_first)
    progress = Progress(step, config.train.steps, shown=topology.is_first)
    flops_per_token = training_flops(config.model, config.data.sequence_length) / (
        config.data.sequence_length
    )
    device_rate = prediction and prediction.target.device.bf16_flops
    summary: dict[str, Any] = progress_made["summary"]
    writer = CheckpointWriter(folder.checkpoints, config.checkpoint, topology.patient(WRITING))
    stop = StopSignals(tells=topology.is_first)
    stopped_by = None
    exit_code = 1

    def save() -> None:
        """A checkpoint of the last finished step, if there is none."""
        nonlocal saved
        if step == saved:
            return
        writer.wait()
        metrics.checkpoints()  # before the oldest of them is deleted
        weights, states = engine.state()
        state: dict[str, Any] = {"model": weights, "optimizer": states}
        if topology.is_first:
            state["random"] = random_state()
            state["trainer"] = {
                "step": step,
                "tokens": tokens,
                "position": position,
                "bad_steps": bad_steps.state(),
                "summary": summary,
                "config": dataclasses.asdict(config),
                "corpus": data.corpus_fingerprint,
            }
        writer.save(step, state)
        saved = step

    try:
        with together(topology):
            if prediction is not None:
                _describe_run(folder, prediction, metrics, fresh=checkpoint is None)
        if checkpoint is None and data.validation and config.train.eval_every:
            summary |= _validate(model, data, config, topology, metrics, progress, step=0)

        while step < config.train.steps:
            started = time.perf_counter()
            with together(topology):
                batches = _read(loader, config.train.accumulation_steps, stop)
            signals, failed = zip(*topology.gather((stop.received, writer.failed)), strict=True)
            if any(failed):
                writer.wait()
            if any(signals):
                stopped_by = Signals(next(filter(None, signals)))
                break
            batches = [topology.rows_of(batch) for batch in batches]
            rate = learning_rate(step + 1, config.train.steps, config.optimizer)
            outcome: dict[str, Any]
            with together(topology):
                try:
                    loss, gradient_norm, _ = train_step(
                        engine,
                        batches,
                        rate,
                        config.optimizer.max_grad_norm,
                        bad_steps.loss_limit,
                    )
                    bad_steps.good(loss)
                    outcome = {"loss": loss, "grad_norm": gradient_norm}
                except BadStep as problem:
                    bad_steps.bad(step + 1, problem)
                    outcome = {"skipped": problem.reason}
                    summary["skipped_steps"] = summary.get("skipped_steps", 0) + 1
            seconds = time.perf_counter() - started
            step_tokens = topology.world * sum(batch.tokens.numel() for batch in batches)
            step, tokens = step + 1, tokens + step_tokens
            position = sequences.position(loader.state())
            speed = step_tokens / seconds
            record = {
                "step": step,
                **outcome,
                "learning_rate": rate,
                "tokens": tokens,
                "tokens_per_second": speed,
                "step_seconds": seconds,
                "model_flops_utilization": device_rate
                and speed * flops_per_token / (device_rate * topology.world),
                **_of_all_processes(topology, config, seconds),
            }
            with together(topology):
                metrics.log(record)
            progress.update(record)
            summary |= {key: value for key, value in record.items() if key != "skipped"}

            if data.validation and _due(step, config.train.eval_every, config):
                summary |= _validate(model, data, config, topology, metrics, progress, step)
            if _due(step, config.evaluation.passkey_every, config):
                summary |= _retrieve(model, passkeys, topology, metrics, progress, step)
            if _due(step, config.checkpoint.every, config):
                save()

        if step < config.train.steps:
            assert stopped_by is not None
            save()
            writer.wait()
            with together(topology):
                metrics.log({"step": step, "stopped": stopped_by.name})
            summary = {**summary, "stopped": stopped_by.name}
            with together(topology):
                metrics.finish(summary)
            _write_summary(folder, summary, topology)
            stopped = Stopped(
                f"{stopped_by.name} came, and everything up to step {step} of "
                f"{config.train.steps} is saved in {folder.path}: the same command continues",
                stopped_by,
            )
            raise told_once(stopped, topology)

        writer.wait()
        with together(topology):
            metrics.finish(summary)
        exit_code = 0
        return _write_summary(folder, summary, topology)
    except Stopped as stopped:
        exit_code = stopped.status
        raise
    except DataError as error:
        try:
            save()
            writer.wait()
        except TrainingError as failure:
            raise told_once(TrainingError(f"{error}; and {failure}"), topology) from error
        ending = TrainingError(
            f"{error}. Everything up to step {step} is saved: the same command continues when the "
            f"data are there again"
        )
        raise told_once(ending, topology) from error
    except torch.OutOfMemoryError as error:
        raise TrainingError(_out_of_memory(config, parts)) from error
    except HostBudgetError as error:
        raise TrainingError(str(error)) from error
    except RuntimeError as error:
        if lost_contact(error):
            writer.abandon()
        raise
    finally:
        writer.close()
        stop.restore()
        progress.close()
        metrics.close(exit_code)
        folder.close()


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Tell trouble with the data that comes up now from what the user gave."""
    try:
        yield
    except (UserError, OSError) as error:
        raise DataError(f"the data cannot be read any further: {error}") from error


def _read(loader: Loader, count: int, stop: StopSignals) -> list[Batch]:
    """The next ``count`` batches; fewer where a signal came while they were not there yet."""
    batches: list[Batch] = []
    with _reading():
        while len(batches) < count:
            if loader.ready(seconds=0.5):
                batches.append(next(loader))
            elif stop.received is not None:
                break
    return batches


def _of_all_processes(topology: Topology, config: Config, seconds: float) -> dict[str, Any]:
    """The part of a step's record that every process has its own of."""
    own = process_peak_bytes(topology.device), WAITING.take()
    peaks, waits = zip(*topology.gather(own), strict=True)
    record: dict[str, Any] = {"peak_memory_bytes": max(peaks)}
    if topology.world > 1:
        record["peak_memory_process"] = peaks.index(max(peaks))
        if config.parallel.zero_stage == 0:  # what DeepSpeed exchanges is not measured
            record["communication_share"] = sum(waits) / len(waits) / seconds
    return record


def _due(step: int, every: int, config: Config) -> bool:
    return every > 0 and (step % every == 0 or step == config.train.steps)


def _validate(
    model: Transformer,
    data: Data,
    config: Config,
    topology: Topology,
    metrics: Metrics,
    progress: Progress,
    step: int,
) -> dict[str, Any]:
    assert data.validation is not None
    size, limit = config.train.micro_batch_size, config.train.eval_sequences
    with together(topology), _reading():
        batches = list(fixed_batches(data.validation, size, limit))
    record = evaluate(model, batches, topology).record()
    with together(topology):
        metrics.log({"step": step, **record})
    progress.say(f"step {step}: validation loss {record['val_loss']:.4f}")
    return record


def _retrieve(
    model: Transformer,
    probes: list[Probe],
    topology: Topology,
    metrics: Metrics,
    progress: Progress,
    step: int,
) -> dict[str, Any]:
    record = passkey_record(model, probes, topology)
    with together(topology):
        metrics.log({"step": step, **record})
    progress.say(f"step {step}: passkeys {record['passkey_accuracy']:.0%} right")
    return record


def _describe_run(
    folder: RunFolder, prediction: Prediction, metrics: Metrics, *, fresh: bool
) -> None:
    """Write where the run was started and what its memory is predicted to hold."""
    if fresh or not folder.environment.exists():
        device = torch.device(prediction.target.device.kind)
        write_json(folder.environment, environment.describe(device, "mst_train"))
    report = prediction.report()
    write_json(folder.prediction, report)
    metrics.predicted(report["breakdown"])


def _progress_at(checkpoint: Path | None, config: Config) -> dict[str, Any]:
    """How far the run had come; its settings at the time must allow it to go on."""
    if checkpoint is None:
        return {"step": 0, "tokens": 0, "position": 0, "summary": {"val_loss": None}}
    progress_made = load_progress(checkpoint)
    check_continuation(progress_made["config"], config, checkpoint)
    return progress_made


def _finished(folder: RunFolder, summary: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """The summary of a run that was finished before; storage may have become read-only since."""
    try:
        return _write_summary(folder, summary, topology)
    except TrainingError as error:
        if topology.is_first:
            log.warning("%s", error)
        return {**summary, "run_dir": str(folder.path)}


def _write_summary(
    folder: RunFolder, summary: dict[str, Any], topology: Topology
) -> dict[str, Any]:
    summary = {**summary, "run_dir": str(folder.path)}
    with together(topology):
        if topology.is_first:
            write_json(folder.summary, summary)
    return summary


def _predict(config: Config, topology: Topology) -> tuple[Prediction | None, Config, str]:
    """What the first process expects of a step: the prediction, which it alone has; the settings
    with what memory.policy=auto stands for; the largest parts of the memory.
    """
    prediction: Prediction | None = None
    told: dict[str, Any] = {}
    with together(topology):
        if topology.is_first:
            prediction = before_training(config, topology.device, topology.world)
            chosen = prediction.config
            told = {
                "memory": dataclasses.asdict(chosen.memory),
                "optimizer": dataclasses.asdict(chosen.optimizer),
                "parts": largest_parts(prediction),
            }
    told = topology.from_first(told)
    config = dataclasses.replace(
        config,
        memory=MemoryConfig(**told["memory"]),
        optimizer=OptimizerConfig(**told["optimizer"]),
    )
    return prediction, config, told["parts"]


def _load_data(config: Config, topology: Topology) -> Data:
    """What the first process prepares the others find, in a cache of their machine's at the latest
    after one of them has prepared it there."""
    loaded: list[Data] = []
    for mine in (topology.is_first, local_rank() == 0, True):
        with together(topology):
            if mine and not loaded:
                loaded.append(load_data(config.data))
    (data,) = loaded
    check_same(topology, {"what data.source holds": data.corpus_fingerprint})
    return data


def _select_kernels(config: Config, topology: Topology) -> Attention:
    """The kernels that the settings ask for; UserError where they cannot be used here."""
    device, dtype = topology.device, _weight_type(config)
    try:
        set_backend(config.kernel.backend)
        use_triton(torch.empty(0, device=device, dtype=dtype))
    except ValueError as error:
        raise UserError(
            f"kernel.backend={config.kernel.backend} cannot be used: {error}"
        ) from error
    return select_attention(config.kernel.attention, device, dtype)


def _build_model(config: Config, attention: Attention, topology: Topology) -> Transformer:
    """The model as it is drawn; with parallel.zero_stage=3 this process's part of it."""
    if topology.sequence_group is not None:
        attention = UlyssesAttention(attention, topology.sequence_group)
    model = build_model(
        config.model,
        policy=Policy.from_config(config.memory),
        attention=attention,
        device=topology.device,
        dtype=_weight_type(config),
        seed=config.train.seed,
        partition=partition(config, topology),
    )
    if config.memory.offload == "host":
        budget = config.memory.host_budget_gib
        model.offload = Offload(topology.device, None if budget is None else int(budget * GIB))
    return model


def _weight_type(config: Config) -> torch.dtype:
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def _require_vocabulary(config: Config, data: Data) -> None:
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
            f"vocabulary of {data.tokenizer.vocab_size}: raise it to that at least"
        )


def _require_same_data(progress_made: dict[str, Any], data: Data, checkpoint: Path | None) -> None:
    if checkpoint is not None and progress_made["corpus"] != data.corpus_fingerprint:
        raise UserError(
            f"data.source holds other documents than when {checkpoint} was made, so the run's "
            f"place in them is lost: restore them, or start anew with another run.dir"
        )


def _out_of_memory(config: Config, parts: str) -> str:
    return (
        f"the device ran out of memory at data.sequence_length={config.data.sequence_length}, "
        f"train.micro_batch_size={config.train.micro_batch_size} with "
        f"memory.policy={config.memory.policy} (predicted {parts}): try "
        f"memory.policy=auto, or see what fits with python -m mst_train.plan plan.search=true"
    )
