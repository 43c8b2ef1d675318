"""A run on its way: where it stands, what it records and saves, and how it ends.

``Run`` has what the loop in train.py asks for, ``running`` whatever ends the loop before its time.

Several processes meet twice a step: ``Run.next_batches`` before it, where they learn of signals and
of what has failed on one of them since, and ``Run.finish_step`` after it, for its record. Between
the two each goes through the same exchanges of the step itself.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from signal import Signals
from typing import Any

import torch

from mst_train import environment
from mst_train.attention import choices
from mst_train.checkpoint.writer import CheckpointWriter
from mst_train.cli.signals import StopSignals
from mst_train.data import Batch, Loader
from mst_train.distributed import (
    WAITING,
    Guard,
    SharedSequences,
    Topology,
    lost_contact,
    together,
    told_once,
)
from mst_train.engine.step import BadStep
from mst_train.errors import DataError, Stopped, TrainingError, UserError, memory_ran_out
from mst_train.evaluate.scores import probe_record
from mst_train.evaluate.validation import validate, validation_batches
from mst_train.files import write_json
from mst_train.memory.tracker import process_peak_bytes
from mst_train.model.flops import training_flops
from mst_train.mst import HostBudgetError
from mst_train.plan.predict import Prediction
from mst_train.run.bad_steps import BadSteps
from mst_train.run.folder import RunFolder
from mst_train.run.header import header
from mst_train.run.profile import StepProfile
from mst_train.run.random_state import random_state
from mst_train.run.setup import SetUp, Start
from mst_train.tracking.metrics import Metrics, Progress

WRITING = timedelta(hours=1)
"""How long processes wait for one that writes its part of a checkpoint."""

log = logging.getLogger(__name__)


class Run:
    """A run between its set-up and its end. ``running`` makes it and closes what it opened."""

    def __init__(self, made: SetUp, opened: ExitStack) -> None:
        start, config, topology = made.start, made.config, made.start.topology
        self.config, self.model, self.engine = config, made.model, made.engine
        self.topology, self.folder = topology, start.folder
        self.step: int = start.progress["step"]
        """The last finished step; one that fails changes nothing of what is saved."""
        self.summary: dict[str, Any] = start.progress["summary"]
        self.bad_steps = BadSteps(config.train, start.progress.get("bad_steps", {}))
        self._tokens: int = start.progress["tokens"]
        self._position: int = start.progress["position"]
        self._saved = self.step
        self._data, self._probes = made.data, made.probes
        size = config.train.micro_batch_size
        self._sequences = SharedSequences(made.data.training, topology, size, self._position)
        self._loader = Loader(self._sequences, size, seed=config.train.seed)
        self._flops_per_token = (
            training_flops(config.model, config.data.sequence_length) / config.data.sequence_length
        )
        self._device_flops = made.prediction and made.prediction.target.device.bf16_flops
        self._started = 0.0
        self._guard = Guard(topology)

        self.fresh = start.checkpoint is None
        with together(start.patient):
            self.metrics = Metrics(
                self.folder.metrics,
                config,
                None if self.fresh else self.step,
                writes=topology.is_rank_zero,
            )
        self.exit_code = 1
        opened.callback(lambda: self.metrics.close(self.exit_code))
        self.progress = Progress(self.step, config.train.steps, shown=topology.is_rank_zero)
        opened.callback(self.progress.close)
        patient = topology.with_timeout(WRITING)
        # Only now: where another process has gone, a signal has to end this one while they connect.
        self._stop = StopSignals(tells=topology.is_rank_zero)
        opened.callback(self._stop.restore)
        self.stopped_by: Signals | None = None
        """The signal that any of the processes got."""
        self._profile = StepProfile(config.train.profile, self.folder.path, topology)
        opened.callback(self._profile.close)
        self.writer = CheckpointWriter(self.folder.checkpoints, config.checkpoint, patient)
        opened.callback(self.writer.close)
        with self._guard.deferred():
            if made.prediction is not None:
                self._describe(made.prediction)
                for line in header(config, made.prediction, made.data, self.step):
                    self.progress.say(line)

    # --- a step -------------------------------------------------------------------------------

    def next_batches(self) -> list[Batch] | None:
        """This process's part of the next step's micro-batches; None where a signal has come.

        Raises what has failed on any of the processes since they last met.
        """
        self._started = time.perf_counter()
        batches: list[Batch] = []
        with self._guard.deferred():
            batches = self._read(self.config.train.accumulation_steps)
        told = self._guard.meet((self._stop.received, self.writer.failed))
        signals, failed = zip(*told, strict=True)
        if any(failed):
            self.writer.wait()
        if any(signals):
            self.stopped_by = Signals(next(filter(None, signals)))
            return None
        self._profile.before(self.step + 1)
        return [self.topology.part_of(batch) for batch in batches]

    def leave_out(self, problem: BadStep) -> dict[str, Any]:
        """What a bad step leaves for its record; raises what ends the run, where it does."""
        try:
            self.bad_steps.bad(self.step + 1, problem)
        except TrainingError as error:  # on all processes, as all have the same numbers
            raise told_once(error, self.topology) from error.__cause__
        self.summary["skipped_steps"] = self.summary.get("skipped_steps", 0) + 1
        return {"skipped": problem.reason}

    def finish_step(self, batches: list[Batch], outcome: dict[str, Any], rate: float) -> None:
        """The step is done: the run has come so far, and has a record of it."""
        seconds = time.perf_counter() - self._started
        tokens = self.topology.world * sum(batch.tokens.numel() for batch in batches)
        speed = tokens / seconds
        self.step, self._tokens = self.step + 1, self._tokens + tokens
        self._position = self._sequences.position(self._loader.state())
        record = {
            "step": self.step,
            **outcome,
            "learning_rate": rate,
            "tokens": self._tokens,
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "model_flops_utilization": self._device_flops
            and speed * self._flops_per_token / (self._device_flops * self.topology.world),
            **self._of_all_processes(seconds),
        }
        if self.model.expert_load is not None:
            record["expert_load"] = self.model.expert_load.tolist()
        self._record(record)
        with self._guard.deferred():
            self._profile.after(self.step)
        self.progress.update(record)
        self.summary |= {key: value for key, value in record.items() if key != "skipped"}

    # --- between steps ------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens now."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.train.steps)

    def validate(self) -> None:
        """The validation losses, where there are validation data."""
        batches: dict[str, list[Batch]] = {}
        with together(self.topology), _reading():
            batches = validation_batches(self._data, self.config.train)
        if not batches:
            return
        try:
            _, record = validate(self.model, batches, self.topology)
        except TrainingError as error:
            raise told_once(error, self.topology) from None
        self._record({"step": self.step, **record})
        losses = (
            f"{key.removeprefix('val_loss').removeprefix('_')} {value:.4f}".strip()
            for key, value in record.items()
            if isinstance(value, float)
        )
        self.progress.say(f"step {self.step}: validation loss {', '.join(losses)}")
        self.summary |= record

    def answer(self) -> None:
        """What the model finds in the texts of ``evaluation.tasks``."""
        record = probe_record(self.model, self._probes, self.topology)
        self._record({"step": self.step, **record})
        shares = (
            f"{task} {record[f'{task}_accuracy']:.0%}" for task in self.config.evaluation.tasks
        )
        self.progress.say(f"step {self.step}: {', '.join(shares)} right")
        self.summary |= record

    def save(self) -> None:
        """A checkpoint of the last finished step, if there is none."""
        if self.step == self._saved:
            return
        self._guard.meet(None)  # a step whose record is lost has to be done again
        self.writer.wait()
        self.metrics.checkpoints()  # before the oldest of them is deleted
        weights, states = self.engine.state()
        state: dict[str, Any] = {"model": weights, "optimizer": states}
        if self.topology.is_rank_zero:
            state["random"] = random_state()
            state["trainer"] = {
                "step": self.step,
                "tokens": self._tokens,
                "position": self._position,
                "bad_steps": self.bad_steps.state(),
                "summary": self.summary,
                "config": dataclasses.asdict(self.config),
                "corpus": self._data.corpus_fingerprint,
                "tokenizer": self._data.tokenizer.fingerprint,
                "attention": choices(),
            }
        self.writer.save(self.step, state)
        self._saved = self.step

    # --- the end ------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """All steps are done: the summary, which is on disk then."""
        self.writer.wait()
        self._finish_records()
        self.exit_code = 0
        return write_summary(self.folder, self.summary, self.topology)

    def stop(self) -> Stopped:
        """A signal asked for it: everything is saved; returns the error that says so."""
        assert self.stopped_by is not None
        self.save()
        self.writer.wait()
        self._record({"step": self.step, "stopped": self.stopped_by.name})
        self.summary = {**self.summary, "stopped": self.stopped_by.name}
        self._finish_records()
        write_summary(self.folder, self.summary, self.topology)
        stopped = Stopped(
            f"{self.stopped_by.name} came, and everything up to step {self.step} of "
            f"{self.config.train.steps} is saved in {self.folder.path}: the same command continues",
            self.stopped_by,
        )
        self.exit_code = stopped.status
        return told_once(stopped, self.topology)

    # --- what these share ---------------------------------------------------------------------

    def data_ended(self, error: DataError) -> TrainingError:
        """Data cannot be read any further, on any process: saves, and returns what to raise."""
        try:
            self.save()
            self.writer.wait()
        except TrainingError as failure:
            return told_once(TrainingError(f"{error}; and {failure}"), self.topology)
        ending = TrainingError(
            f"{error}. Everything up to step {self.step} is saved: the same command continues when "
            f"the data are there again"
        )
        return told_once(ending, self.topology)

    def _read(self, count: int) -> list[Batch]:
        """The next ``count`` batches; fewer where a signal came while they were not there yet."""
        batches: list[Batch] = []
        with _reading():
            while len(batches) < count:
                if self._loader.ready(seconds=0.5):
                    batches.append(next(self._loader))
                elif self._stop.received is not None:
                    break
        return batches

    def _record(self, record: dict[str, Any]) -> None:
        with self._guard.deferred():
            self.metrics.log(record)

    def _finish_records(self) -> None:
        with self._guard.deferred():
            self.metrics.finish(self.summary)
        self._guard.meet(None)

    def _of_all_processes(self, seconds: float) -> dict[str, Any]:
        """The part of a step's record that every process has its own of."""
        own = process_peak_bytes(self.topology.device), WAITING.take()
        peaks, waits = zip(*self.topology.gather(own), strict=True)
        record: dict[str, Any] = {"peak_memory_bytes": max(peaks)}
        if self.topology.world > 1:
            record["peak_memory_process"] = peaks.index(max(peaks))
            if self.config.parallel.zero_stage == 0:  # what DeepSpeed exchanges is not measured
                record["communication_share"] = sum(waits) / len(waits) / seconds
        return record

    def _describe(self, prediction: Prediction) -> None:
        """Write where the run was started and what its memory is predicted to hold."""
        if self.fresh or not self.folder.environment.exists():
            device = torch.device(prediction.target.device.kind)
            about = environment.describe(device, "mst_train")
            about["tokenizer"] = self._data.tokenizer.fingerprint
            write_json(self.folder.environment, about)
        report = prediction.report()
        write_json(self.folder.prediction, report)
        self.metrics.predicted(report["breakdown"])


@contextmanager
def running(made: SetUp) -> Iterator[Run]:
    """The run of ``made``, closed in the end; errors that can be explained are TrainingErrors."""
    with ExitStack() as opened:
        opened.callback(made.start.folder.close)
        run = Run(made, opened)
        try:
            yield run
        except DataError as error:
            raise run.data_ended(error) from error
        except HostBudgetError as error:
            raise TrainingError(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if memory_ran_out(error):
                raise TrainingError(_out_of_memory(made)) from error
            if lost_contact(error):
                run.writer.abandon()
            raise


def finished_before(start: Start) -> dict[str, Any]:
    """The summary of a run with nothing left to do; its storage may have become read-only since."""
    summary: dict[str, Any] = start.progress["summary"]
    try:
        return write_summary(start.folder, summary, start.topology)
    except TrainingError as error:
        if start.topology.is_rank_zero:
            log.warning("%s", error)
        return {**summary, "run_dir": str(start.folder.path)}


def write_summary(folder: RunFolder, summary: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """The run's last word, on disk and returned."""
    summary = {**summary, "run_dir": str(folder.path)}
    with together(topology):
        if topology.is_rank_zero:
            write_json(folder.summary, summary)
    return summary


@contextmanager
def _reading() -> Iterator[None]:
    """Tell trouble with the data that comes up now from what the user gave."""
    try:
        yield
    except (UserError, OSError) as error:
        raise DataError(f"the data cannot be read any further: {error}") from error


def _out_of_memory(made: SetUp) -> str:
    config = made.config
    return (
        f"the device ran out of memory at data.sequence_length={config.data.sequence_length}, "
        f"train.micro_batch_size={config.train.micro_batch_size} with "
        f"memory.policy={config.memory.policy} (predicted {made.largest_parts}): try "
        f"memory.policy=auto, or see what fits with python -m mst_train.plan plan.search=true"
    )
