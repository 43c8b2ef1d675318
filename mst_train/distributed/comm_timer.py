"""How long a process's work stands still for exchanges with others."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitingTime:
    """Adds up the time of exchanges: on a GPU that of its stream, without holding it up."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Around an exchange, and the wait for its result, of tensors on ``device``."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pairs.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """The seconds since the last call. Waits for exchanges that are under way on a GPU."""
        for begin, end in self._pairs:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        seconds, self._seconds, self._pairs = self._seconds, 0.0, []
        return seconds


WAITING = WaitingTime()
"""Of this process: gradients, totals and shared sequences; not what DeepSpeed exchanges."""
