"""The training run, from a configuration to a trained model: read it from top to bottom.

train   set up, loop over steps (step.py), evaluate, save, report
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mst_kernels import set_backend, use_triton
from mst_train import environment
from mst_train.bad_steps import BadSteps
from mst_train.checkpoint import first_undamaged, load_part
from mst_train.checkpoint_writer import CheckpointWriter
from mst_train.config import Config
from mst_train.data import Batch, Data, Loader, fixed_batches, load_data
from mst_train.errors import DataError, Stopped, TrainingError, UserError
from mst_train.evaluate.passkey import Probe, make_probes, passkey_record
from mst_train.memory.devices import GIB
from mst_train.memory.tracker import process_peak_bytes
from mst_train.metrics import Metrics, Progress, write_json
from mst_train.model import Transformer, build_model, select_attention
from mst_train.model.flops import training_flops
from mst_train.model.huggingface import load_weights
from mst_train.mst import HostBudgetError, Offload, Policy
from mst_train.optim import build_optimizer, learning_rate
from mst_train.parallel.topology import world_size
from mst_train.plan.before import before_training, largest_parts
from mst_train.plan.predict import Prediction
from mst_train.random_state import random_state, restore_random_state, seed_everything
from mst_train.run_folder import RunFolder, check_continuation
from mst_train.signals import StopSignals
from mst_train.step import BadStep, evaluate, train_step

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train as configured and return the summary that is written to summary.json.

    Raises UserError where the run cannot start, TrainingError where it cannot go on, and Stopped
    where a signal has ended it: SIGTERM and SIGUSR1 do, once the run has begun (signals.py).
    """
    # What can be refused is refused before anything is written.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _require_one_process(config)
    folder = RunFolder(config)
    checkpoint = first_undamaged(folder.candidates)
    progress_made = _progress_at(checkpoint, config)
    if progress_made["step"] >= config.train.steps:
        log.info("the run in %s is finished: set train.steps higher to go on", folder.path)
        return _write_summary(folder, progress_made["summary"])
    prediction = before_training(config, device)
    config = prediction.config  # with what memory.policy=auto stands for
    data = load_data(config.data)
    _require_vocabulary(config, data)
    _require_same_data(progress_made, data, checkpoint)
    passkeys = make_probes(config, data.tokenizer) if config.evaluation.passkey_every else []

    # Model and optimizer, at their first step or where the checkpoint left them.
    model = _build(config, device)
    if checkpoint is None and config.model.from_pretrained is not None:
        load_weights(model, config.model.from_pretrained)
    optimizer = build_optimizer(
        model, config.optimizer, master_weights=config.precision == "bf16_master"
    )
    seed_everything(config.train.seed)
    folder.open()
    if checkpoint is not None:
        model.load_state_dict(load_part(checkpoint, "model"))
        optimizer.load_state_dict(load_part(checkpoint, "optimizer"))
        restore_random_state(load_part(checkpoint, "random"))
        log.info("continuing from %s", checkpoint)
    step, tokens, position = (progress_made[key] for key in ("step", "tokens", "position"))
    # Of the last finished step; a step that fails changes none of them.
    saved = step
    loader = Loader(
        data.training, config.train.micro_batch_size, seed=config.train.seed, position=position
    )
    bad_steps = BadSteps(config.train, progress_made.get("bad_steps", {}))

    metrics = Metrics(folder.metrics, config, None if checkpoint is None else step)
    progress = Progress(step, config.train.steps)
    flops_per_token = training_flops(config.model, config.data.sequence_length) / (
        config.data.sequence_length
    )
    peak_rate = prediction.target.device.bf16_flops
    summary: dict[str, Any] = progress_made["summary"]
    writer = CheckpointWriter(folder.checkpoints, config.checkpoint)
    stop = StopSignals()
    exit_code = 1

    def save() -> None:
        """A checkpoint of the last finished step, if there is none."""
        nonlocal saved
        if step == saved:
            return
        writer.wait()
        metrics.checkpoints()  # before the oldest of them is deleted
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": random_state(),
            "trainer": {
                "step": step,
                "tokens": tokens,
                "position": position,
                "bad_steps": bad_steps.state(),
                "summary": summary,
                "config": dataclasses.asdict(config),
                "corpus": data.corpus_fingerprint,
            },
        }
        writer.save(step, state)
        saved = step

    try:
        _describe_run(folder, prediction, metrics, fresh=checkpoint is None)
        if checkpoint is None and data.validation and config.train.eval_every:
            summary |= _validate(model, data, config, metrics, progress, step=0)

        while step < config.train.steps and stop.received is None:
            started = time.perf_counter()
            batches = _read(loader, config.train.accumulation_steps, stop)
            if batches is None:
                break
            step_tokens = sum(batch.tokens.numel() for batch in batches)
            rate = learning_rate(step + 1, config.train.steps, config.optimizer)
            outcome: dict[str, Any]
            try:
                loss, gradient_norm, _ = train_step(
                    model,
                    optimizer,
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
            step, tokens, position = step + 1, tokens + step_tokens, loader.state()
            speed = step_tokens / seconds
            record = {
                "step": step,
                **outcome,
                "learning_rate": rate,
                "tokens": tokens,
                "tokens_per_second": speed,
                "step_seconds": seconds,
                "model_flops_utilization": peak_rate and speed * flops_per_token / peak_rate,
                "peak_memory_bytes": process_peak_bytes(device),
            }
            metrics.log(record)
            progress.update(record)
            summary |= {key: value for key, value in record.items() if key != "skipped"}

            if data.validation and _due(step, config.train.eval_every, config):
                summary |= _validate(model, data, config, metrics, progress, step)
            if _due(step, config.evaluation.passkey_every, config):
                summary |= _retrieve(model, passkeys, metrics, progress, step)
            writer.check()
            if _due(step, config.checkpoint.every, config):
                save()

        if step < config.train.steps:
            assert stop.received is not None
            save()
            writer.wait()
            metrics.log({"step": step, "stopped": stop.received.name})
            summary = {**summary, "stopped": stop.received.name}
            metrics.finish(summary)
            _write_summary(folder, summary)
            raise Stopped(
                f"{stop.received.name} came, and everything up to step {step} of "
                f"{config.train.steps} is saved in {folder.path}: the same command continues",
                stop.received,
            )

        writer.wait()
        metrics.finish(summary)
        exit_code = 0
        return _write_summary(folder, summary)
    except Stopped as stopped:
        exit_code = stopped.status
        raise
    except DataError as error:
        try:
            save()
            writer.wait()
        except TrainingError as failure:
            raise TrainingError(f"{error}; and {failure}") from error
        raise TrainingError(
            f"{error}. Everything up to step {step} is saved: the same command continues when the "
            f"data are there again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise TrainingError(_out_of_memory(prediction)) from error
    except HostBudgetError as error:
        raise TrainingError(str(error)) from error
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


def _read(loader: Loader, count: int, stop: StopSignals) -> list[Batch] | None:
    """The next ``count`` batches; None where a signal came while they were not there yet."""
    batches: list[Batch] = []
    with _reading():
        while len(batches) < count:
            if loader.ready(seconds=0.5):
                batches.append(next(loader))
            elif stop.received is not None:
                return None
    return batches


def _due(step: int, every: int, config: Config) -> bool:
    return every > 0 and (step % every == 0 or step == config.train.steps)


def _validate(
    model: Transformer,
    data: Data,
    config: Config,
    metrics: Metrics,
    progress: Progress,
    step: int,
) -> dict[str, Any]:
    assert data.validation is not None
    batches = fixed_batches(
        data.validation, config.train.micro_batch_size, config.train.eval_sequences
    )
    with _reading():
        record = evaluate(model, batches).record()
    metrics.log({"step": step, **record})
    progress.say(f"step {step}: validation loss {record['val_loss']:.4f}")
    return record


def _retrieve(
    model: Transformer, probes: list[Probe], metrics: Metrics, progress: Progress, step: int
) -> dict[str, Any]:
    record = passkey_record(model, probes)
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
    trainer: dict[str, Any] = load_part(checkpoint, "trainer")
    check_continuation(trainer["config"], config, checkpoint)
    return trainer


def _write_summary(folder: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    summary = {**summary, "run_dir": str(folder.path)}
    write_json(folder.summary, summary)
    return summary


def _build(config: Config, device: torch.device) -> Transformer:
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    try:
        set_backend(config.kernel.backend)
        use_triton(torch.empty(0, device=device, dtype=dtype))
    except ValueError as error:
        raise UserError(
            f"kernel.backend={config.kernel.backend} cannot be used: {error}"
        ) from error
    model = build_model(
        config.model,
        policy=Policy.from_config(config.memory),
        attention=select_attention(config.kernel.attention, device, dtype),
        device=device,
        dtype=dtype,
        seed=config.train.seed,
    )
    if config.memory.offload == "host":
        budget = config.memory.host_budget_gib
        model.offload = Offload(device, None if budget is None else int(budget * GIB))
    return model


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


def _out_of_memory(prediction: Prediction) -> str:
    config = prediction.config
    return (
        f"the device ran out of memory at data.sequence_length={config.data.sequence_length}, "
        f"train.micro_batch_size={config.train.micro_batch_size} with "
        f"memory.policy={config.memory.policy} (predicted {largest_parts(prediction)}): try "
        f"memory.policy=auto, or see what fits with python -m mst_train.plan plan.search=true"
    )


def _require_one_process(config: Config) -> None:
    parallel = config.parallel
    if world_size() > 1:
        raise UserError(
            f"{world_size()} processes were started (WORLD_SIZE), and the training command runs in "
            f"one: start python -m mst_train by itself"
        )
    if parallel.sequence_parallel > 1 or parallel.zero_stage > 0:
        raise UserError(
            f"parallel.sequence_parallel={parallel.sequence_parallel} and parallel.zero_stage="
            f"{parallel.zero_stage} are for planning so far (python -m mst_train.plan): training "
            f"runs in one process, so set parallel.sequence_parallel=1 and parallel.zero_stage=0"
        )
