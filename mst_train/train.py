"""The training run, from a configuration to a trained model: read it from top to bottom.

train   set up, loop over steps (step.py), evaluate, save, report
"""

import dataclasses
import logging
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mst_kernels import set_backend, use_triton
from mst_train.checkpoint import first_undamaged, load_part, save_checkpoint
from mst_train.config import Config
from mst_train.data import Data, Loader, fixed_batches, load_data
from mst_train.errors import TrainingError, UserError
from mst_train.memory.devices import GIB
from mst_train.memory.tracker import process_peak_bytes
from mst_train.metrics import Metrics, Progress, write_json
from mst_train.model import Transformer, build_model, select_attention
from mst_train.model.flops import training_flops
from mst_train.model.huggingface import load_weights
from mst_train.mst import HostBudgetError, Offload, Policy
from mst_train.optim import build_optimizer, learning_rate
from mst_train.plan.before import before_training, largest_parts
from mst_train.plan.predict import Prediction
from mst_train.run_folder import RunFolder, check_continuation
from mst_train.step import evaluate, train_step

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train as configured and return the summary that is written to summary.json.

    Raises UserError where the run cannot start and TrainingError where it cannot go on.
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

    # Model and optimizer, at their first step or where the checkpoint left them.
    model = _build(config, device)
    if checkpoint is None and config.model.from_pretrained is not None:
        load_weights(model, config.model.from_pretrained)
    optimizer = build_optimizer(
        model, config.optimizer, master_weights=config.precision == "bf16_master"
    )
    _seed_everything(config.train.seed)
    folder.open()
    if checkpoint is not None:
        model.load_state_dict(load_part(checkpoint, "model"))
        optimizer.load_state_dict(load_part(checkpoint, "optimizer"))
        _restore_random_state(load_part(checkpoint, "random"))
        log.info("continuing from %s", checkpoint)
    step, tokens = progress_made["step"], progress_made["tokens"]
    loader = Loader(
        data.training,
        config.train.micro_batch_size,
        seed=config.train.seed,
        position=progress_made["position"],
    )

    metrics = Metrics(folder.metrics, config, None if checkpoint is None else step)
    progress = Progress(step, config.train.steps)
    flops_per_token = training_flops(config.model, config.data.sequence_length) / (
        config.data.sequence_length
    )
    peak_rate = prediction.target.device.bf16_flops
    summary: dict[str, Any] = progress_made["summary"]
    exit_code = 1
    try:
        if checkpoint is None and data.validation and config.train.eval_every:
            summary["val_loss"] = _validate(model, data, config, metrics, progress, step=0)

        while step < config.train.steps:
            step += 1
            started = time.perf_counter()
            rate = learning_rate(step, config.train.steps, config.optimizer)
            batches = [next(loader) for _ in range(config.train.accumulation_steps)]
            loss, gradient_norm, step_tokens = train_step(
                model, optimizer, batches, rate, config.optimizer.max_grad_norm
            )
            seconds = time.perf_counter() - started
            tokens += step_tokens
            speed = step_tokens / seconds
            record = {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": gradient_norm,
                "tokens": tokens,
                "tokens_per_second": speed,
                "step_seconds": seconds,
                "model_flops_utilization": peak_rate and speed * flops_per_token / peak_rate,
                "peak_memory_bytes": process_peak_bytes(device),
            }
            metrics.log(record)
            progress.update(record)
            summary |= record

            if data.validation and _due(step, config.train.eval_every, config):
                summary["val_loss"] = _validate(model, data, config, metrics, progress, step)
            if _due(step, config.checkpoint.every, config):
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": _random_state(),
                    "trainer": {
                        "step": step,
                        "tokens": tokens,
                        "position": loader.state(),
                        "summary": summary,
                        "config": dataclasses.asdict(config),
                        "corpus": data.corpus_fingerprint,
                    },
                }
                save_checkpoint(folder.checkpoints, step, state, config.checkpoint.keep)

        metrics.finish(summary)
        exit_code = 0
        return _write_summary(folder, summary)
    except torch.OutOfMemoryError as error:
        raise TrainingError(_out_of_memory(prediction)) from error
    except HostBudgetError as error:
        raise TrainingError(str(error)) from error
    finally:
        progress.close()
        metrics.close(exit_code)
        folder.close()


def _due(step: int, every: int, config: Config) -> bool:
    return every > 0 and (step % every == 0 or step == config.train.steps)


def _validate(
    model: Transformer,
    data: Data,
    config: Config,
    metrics: Metrics,
    progress: Progress,
    step: int,
) -> float:
    assert data.validation is not None
    batches = fixed_batches(
        data.validation, config.train.micro_batch_size, config.train.eval_sequences
    )
    loss = evaluate(model, batches)
    metrics.log({"step": step, "val_loss": loss})
    progress.say(f"step {step}: validation loss {loss:.4f}")
    return loss


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


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].clone())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


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
    if parallel.sequence_parallel > 1 or parallel.zero_stage > 0:
        raise UserError(
            f"parallel.sequence_parallel={parallel.sequence_parallel} and parallel.zero_stage="
            f"{parallel.zero_stage} are for planning so far (python -m mst_train.plan): training "
            f"runs in one process, so set parallel.sequence_parallel=1 and parallel.zero_stage=0"
        )
