"""How far something has come: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

SILENT_SECONDS = 10.0
"""So long nothing is said between two lines."""

log = logging.getLogger(__name__)


def bar(over: Iterable[Any] | None = None, **settings: Any) -> Any:
    """tqdm's, over an iterable if one is given.

    With ``disable=None``, where nobody watches a terminal, and without tqdm (benches and
    predictions need no more than torch, NumPy and Hydra), it logs a line every SILENT_SECONDS
    instead, as things get done.
    """
    lines = settings.get("disable") is None and "disable" in settings and not sys.stderr.isatty()
    if not lines:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(over, **settings)
    return _Lines(over, **settings)


class _Lines:
    """What a bar says, as lines. Takes tqdm's settings, and heeds those below."""

    disable = True
    """There is no bar."""

    def __init__(
        self,
        over: Iterable[Any] | None = None,
        *,
        desc: str = "",
        total: int | None = None,
        unit: str = "",
        disable: bool | None = None,
        **_: Any,
    ) -> None:
        self._over = over
        self._what, self._unit, self._last = desc, unit, ""
        self._total = len(over) if total is None and isinstance(over, Sized) else total
        self._silent = bool(disable)
        self._done = 0.0
        self._start = self._told = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self._over or ():
            yield item
            self.update()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, more: float = 1) -> None:
        self._done += more
        now = time.monotonic()
        if not self._silent and now - self._told >= SILENT_SECONDS:
            self._told = now
            log.info("%s: %s", self._what, self._state(now - self._start))

    def set_description_str(self, text: str, refresh: bool = True) -> None:
        self._what = text

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self._last = text

    def close(self) -> None:
        pass

    def _state(self, seconds: float) -> str:
        of = f" of {self._total:,}" if self._total else ""
        parts = [f"{self._done:,.0f}{of}{self._unit}", f"{seconds:,.0f} s so far"]
        if self._total and self._done:
            parts.append(f"{seconds * (self._total / self._done - 1):,.0f} s left")
        return ", ".join(parts) + (f" ({self._last})" if self._last else "")
