"""What runs now, on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
from types import TracebackType
from typing import Any, Self


class Progress:
    """Counts the runs of a bench. The bar needs tqdm; without it there are lines."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._begun = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=runs, unit="run", file=sys.stderr, dynamic_ncols=True)

    def advance(self, name: str) -> None:
        """A run begins; the one before it is over."""
        self._begun += 1
        if self._bar is not None:
            self._bar.update(min(self._begun - 1, 1))
            self._bar.set_description_str(name)
        elif self._begun % max(self._runs // 20, 1) == 0:
            print(f"run {self._begun} of {self._runs}: {name}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            if error is None:
                self._bar.update(1)
            self._bar.close()
