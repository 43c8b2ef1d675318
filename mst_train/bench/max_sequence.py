"""The longest sequence that fits under each memory policy, found by trying, and the prediction.

On a GPU a length fits if its step runs; running out of memory is recovered from. On a CPU it fits
if the tensors of its step, as tracked, stay within memory.device_budget_gib.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import collect_garbage, out_of_memory, synchronize
from mst_train.bench.progress import progress
from mst_train.bench.step import VARIANTS, host_offload, memory_of, policy_of
from mst_train.bench.workload import build, chosen
from mst_train.config import Config
from mst_train.data import Batch
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.errors import UserError
from mst_train.memory.devices import this_device
from mst_train.memory.extrapolate import with_length
from mst_train.memory.tracker import MemoryTracker
from mst_train.optim import build_optimizer
from mst_train.plan.choose import longest
from mst_train.plan.predict import Target, make_target, predict
from mst_train.plan.search import STEP, longest_fitting
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
    on_cpu = MemoryTracker() if device.type == "cpu" else nullcontext()
    with on_cpu as tracker, progress(len(wanted)) as advance:
        stepper = _Stepper(config, device, tracker)
        for name in wanted:
            advance(name)
            variant = replace(config, memory=memory_of(name, config.memory))
            row = _row(variant, name, target, stepper)
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
    """Training steps of one model at any length and policy, and what they take.

    tracker: sees all tensors from the weights on, on a CPU.
    """

    def __init__(
        self, config: BenchConfig, device: torch.device, tracker: MemoryTracker | None
    ) -> None:
        self.device = device
        self._config, self._tracker = config, tracker
        self._model = build(config, device)
        with torch.profiler.record_function(OPTIMIZER_RANGE):
            masters = config.precision == "bf16_master"
            optimizer = build_optimizer(self._model, config.optimizer, master_weights=masters)
        self._optimizer, self._engine = optimizer, NativeEngine(self._model, optimizer)
        self._step(2)  # the optimizer's states

    def peak_bytes(self, name: str, length: int) -> int | None:
        """All that tensors take at the peak of a step; None where memory runs out."""
        self._model.policy = policy_of(name, self._config)
        offloads = name == "mst_offload"
        self._model.offload = host_offload(self._config, self.device) if offloads else None
        try:
            self._step(length)  # makes the host's buffers, tunes kernels
            return self._peak(length)
        except Exception as error:
            if out_of_memory(error) is None:
                raise
        # What a step held that did not end.
        self._model.zero_grad(set_to_none=True)
        self._model.offload = None
        collect_garbage(self.device)
        self._optimizer.zero_grad()
        return None

    def _peak(self, length: int) -> int:
        collect_garbage(self.device)
        if self._tracker is not None:
            self._tracker.reset_peak()
            self._step(length)
            return self._tracker.peak_bytes
        torch.cuda.reset_peak_memory_stats(self.device)
        self._step(length)
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _step(self, length: int) -> None:
        generator = torch.Generator().manual_seed(self._config.train.seed)
        shape = (self._config.train.micro_batch_size, length)
        tokens = torch.randint(self._config.model.vocab_size, shape, generator=generator)
        positions = torch.arange(length).expand(shape).contiguous()
        batch = Batch(tokens, tokens.clone(), positions, None)
        norm = self._config.optimizer.max_grad_norm
        train_step(self._engine, [batch], 0.0, norm)
