"""How far tokenising has come: a bar where someone watches, a line at first and each minute where
not."""

import logging
import sys
import time
from typing import Self

from mst_train.bar import bar

LOG_SECONDS = 60.0

log = logging.getLogger(__name__)


class Rate:
    """Bytes of text done, tokens per second and the time left.

    ``size``: the bytes of everything, 0 where that is not known; ``done``: those of before.
    """

    def __init__(self, name: str, size: int, done: int) -> None:
        self.tokens = 0
        self._name, self._size = name, size
        self._first = self._done = done
        self._start = self._logged = time.monotonic()
        self._bar = bar(
            desc=f"tokenising {name}",
            total=size or None,
            initial=done,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        if self._bar.disable:
            size = f"{(self._size - self._done) / 1e6:,.1f} MB of " if self._size else ""
            log.info("tokenising %s%s", size, self._name)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, size: int, tokens: int) -> None:
        """A batch of ``size`` bytes was tokenised."""
        self.tokens += tokens
        before = self._done
        # Sizes of compressed and columnar files are estimates.
        self._done = min(before + size, self._size) if self._size else before + size
        seconds = time.monotonic() - self._start
        speed = self.tokens / max(seconds, 1e-9)
        self._bar.set_postfix_str(f"{speed / 1000:,.0f}k tokens/s", refresh=False)
        self._bar.update(self._done - before)
        if self._bar.disable and time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("tokenising %s: %s, %.0f tokens/s", self._name, self._state(seconds), speed)

    def _state(self, seconds: float) -> str:
        done = f"{self._done / 1e6:,.0f} MB"
        if not self._size or self._done == self._first:
            return done
        left = (self._size - self._done) / (self._done - self._first) * seconds
        return f"{done} of {self._size / 1e6:,.0f} MB, {left / 60:.0f} minutes left"
