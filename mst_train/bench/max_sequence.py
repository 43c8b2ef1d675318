"""The longest sequence that fits under each memory policy, found by trying, and the prediction.

On a GPU a length fits if its step runs; running out of memory is recovered from. On a CPU it fits
if the tensors of its step, as tracked, stay within memory.device_budget_gib.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mst_train.attention import select_attention
from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import collect_garbage, out_of_memory, synchronize
from mst_train.bench.progress import Progress
from mst_train.bench.step import VARIANTS, memory_of, policy_of
from mst_train.bench.workload import chosen
from mst_train.config import Config
from mst_train.data import Batch
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.errors import UserError
from mst_train.memory.devices import this_device
from mst_train.memory.simulate import with_length
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Transformer, build_model
from mst_train.mst import Offload
from mst_train.optim import Optimizer, build_optimizer
from mst_train.plan.choose import longest
from mst_train.plan.predict import Target, make_target, predict
from mst_train.plan.search import STEP, longest_fitting
from mst_train.precision import weight_type
from mst_train.ranges import OPTIMIZER_RANGE
from mst_train.units import GIB

NEAR = 0.03
"""The search begins this far from the prediction, on both sides."""


def run(config: BenchConfig, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of measurements, and what is wrong with them."""
    if device.type == "cpu" and config.memory.device_budget_gib is None:
        raise UserError("+bench=max_sequence on a CPU needs a limit: set memory.device_budget_gib")
    target = make_target(config, this_device(device))
    if device.type == "cuda":
        share = target.budget_bytes / target.device.memory_bytes
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    rows, problems = [], []
    wanted = chosen(config, VARIANTS)
    with _Stepper(config, device) as stepper, Progress(len(wanted)) as progress:
        for name in wanted:
            progress.advance(name)
            row = _row(
                replace(config, memory=memory_of(name, config.memory)), name, target, stepper
            )
            rows.append(row)
            found, predicted = row["peak_bytes"], row["predicted_bytes"]
            if found and abs(predicted / found - 1) > 0.03:
                problems.append(
                    f"{name}: predicted {predicted / GIB:.2f} GiB at {row['tokens']} tokens, and "
                    f"measured {found / GIB:.2f}: more than 3% apart"
                )
    return rows, problems


def _row(config: Config, name: str, target: Target, stepper: "_Stepper") -> dict[str, Any]:
    predicted = longest(config, target)
    points: list[dict[str, int | None]] = []

    def excess(length: int) -> int:
        guess = predict(with_length(config, length), target)
        peak = stepper.peak_bytes(name, length)
        points.append(
            {
                "tokens": length,
                "predicted_bytes": guess.simulation.allocated_bytes,
                "measured_bytes": peak,
            }
        )
        if peak is None:
            return max(guess.shortage_bytes, 1)
        if stepper.device.type == "cuda":
            return min(peak - target.budget_bytes, 0)  # it ran
        return peak - target.budget_bytes

    guess = predicted.config.data.sequence_length if predicted else None
    length = longest_fitting(excess, start=_start(guess))
    at_end = next((point for point in points if point["tokens"] == length), None)
    return {
        "work": "longest",
        "tokens": length or 0,
        "predicted_tokens": guess,
        "variant": name,
        "peak_bytes": at_end and at_end["measured_bytes"],
        "predicted_bytes": at_end and at_end["predicted_bytes"],
        "points": points,
        "seconds": [],
        "cpu_seconds": [],
        "median_seconds": None,
        "problem": None if length else "no length fits",
        "failed": False,
    }


def _start(guess: int | None) -> tuple[int, int] | None:
    if guess is None:
        return None
    steps = guess // STEP
    apart = max(int(steps * NEAR), 1)
    return max(steps - apart, 1) * STEP, (steps + apart) * STEP


class _Stepper:
    """Training steps of one model at any length and policy, and what they take."""

    def __init__(self, config: BenchConfig, device: torch.device) -> None:
        self.device = device
        self._config = config
        self._tracker = MemoryTracker() if device.type == "cpu" else None

    def __enter__(self) -> "_Stepper":
        if self._tracker is not None:
            self._tracker.__enter__()  # type: ignore[no-untyped-call]
        self._model, self._optimizer = self._build()
        return self

    def __exit__(self, *arguments: Any) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(*arguments)

    def peak_bytes(self, name: str, length: int) -> int | None:
        """All that tensors take at the peak of a step; None where memory runs out."""
        self._model.policy = policy_of(name, self._config)
        budget = self._config.memory.host_budget_gib
        offloads = name == "mst_offload"
        limit = None if budget is None else int(budget * GIB)
        self._model.offload = Offload(self.device, limit) if offloads else None
        try:
            self._step(length)  # makes the host's buffers, tunes kernels
            return self._measured(lambda: self._step(length))
        except Exception as error:
            if out_of_memory(error) is None:
                raise
        self._recover()
        return None

    def _measured(self, work: Callable[[], None]) -> int:
        collect_garbage(self.device)
        if self._tracker is not None:
            self._tracker.reset_peak()
            work()
            return self._tracker.peak_bytes
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _recover(self) -> None:
        """Give back what a step held that did not end."""
        self._model.zero_grad(set_to_none=True)
        self._model.offload = None
        gc.collect()
        collect_garbage(self.device)
        self._optimizer.zero_grad()

    def _build(self) -> tuple[Transformer, Optimizer]:
        config, dtype = self._config, weight_type(self._config.precision)
        model = build_model(
            config.model,
            attention=select_attention(config.kernel.attention, self.device, dtype),
            device=self.device,
            dtype=dtype,
            seed=config.train.seed,
        )
        with torch.profiler.record_function(OPTIMIZER_RANGE):
            masters = config.precision == "bf16_master"
            optimizer = build_optimizer(model, config.optimizer, master_weights=masters)
        self._engine = NativeEngine(model, optimizer)
        self._step(2)  # the optimizer's states
        return model, optimizer

    def _step(self, length: int) -> None:
        generator = torch.Generator().manual_seed(self._config.train.seed)
        shape = (self._config.train.micro_batch_size, length)
        tokens = torch.randint(self._config.model.vocab_size, shape, generator=generator)
        positions = torch.arange(length).expand(shape).contiguous()
        batch = Batch(tokens, tokens.clone(), positions, None)
        norm = self._config.optimizer.max_grad_norm
        train_step(self._engine, [batch], 0.0, norm)
