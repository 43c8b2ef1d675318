"""Checkpoints written while training goes on."""

import copy
import logging
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from mst_train.checkpoint.files import save_checkpoint
from mst_train.config import CheckpointConfig
from mst_train.distributed.topology import Topology
from mst_train.errors import TrainingError

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes a run's checkpoints, in a thread where ``checkpoint.background`` is set.

    ``save`` then returns as soon as it has copied the state to host memory, and the copy is
    written while the next steps run. One checkpoint is written at a time: ``save`` waits for the
    one before. What went wrong in the thread is raised by the next ``save`` or ``wait``.

    Memory: with ``checkpoint.background`` a copy of the whole state on the host, from ``save``
    until it is written; otherwise none.

    Args:
        folder: where checkpoints are.
        config: how they are written.
        processes: those that write each checkpoint together, with a connection that nobody else
            uses (``Topology.with_timeout``).
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, processes: Topology | None = None
    ) -> None:
        self._folder, self._config, self._processes = folder, config, processes
        self._pending: Future[Path] | None = None
        self._thread: Thread | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state`` as the checkpoint of ``step``, as ``save_checkpoint`` does.

        Raises TrainingError where it, or the checkpoint before it, cannot be written.
        """
        self.wait()
        keep = self._config.keep
        if self._config.background:
            copied = on_host(state)
            self._pending = Future()
            arguments = (self._pending, self._folder, step, copied, keep, self._processes)
            # The run may have to end while another process keeps this one waiting for ever.
            self._thread = Thread(target=_save, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            save_checkpoint(self._folder, step, state, keep, self._processes)

    @property
    def failed(self) -> bool:
        """Whether a checkpoint has turned out not to be writable, which ``wait`` then raises."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Until the checkpoint is written. Raises TrainingError where it cannot be."""
        if self._pending is not None and self._thread is not None:
            self._thread.join()  # not the result alone: the thread then still frees the copy
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait as ``wait`` does, for a run that is ending anyway: a failure is a warning."""
        try:
            self.wait()
        except TrainingError as error:
            log.warning("%s", error)

    def abandon(self) -> None:
        """Wait no longer for a checkpoint that another process keeps from being finished."""
        self._pending = None


def _save(future: "Future[Path]", *arguments: Any) -> None:
    try:
        future.set_result(save_checkpoint(*arguments))
    except BaseException as error:
        future.set_exception(error)


def on_host(state: Any) -> Any:
    """A copy of a state (dicts, lists and tuples of tensors and values), its tensors on the CPU.

    Tensors that share memory share it in the copy too, so that both are saved as the same bytes.
    """
    return _copy(state, {})


def _copy(value: Any, storages: dict[tuple[Any, ...], torch.UntypedStorage]) -> Any:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        key = (storage.device, storage.data_ptr(), storage.nbytes())
        if key not in storages:
            storages[key] = storage.cpu() if storage.device.type != "cpu" else storage.clone()
        place = (value.storage_offset(), value.size(), value.stride())
        return torch.empty(0, dtype=value.dtype).set_(storages[key], *place)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with what a module's state_dict carries besides its items
        for key, item in value.items():
            copied[key] = _copy(item, storages)
        return copied
    if isinstance(value, list | tuple):
        return type(value)(_copy(item, storages) for item in value)
    return value
