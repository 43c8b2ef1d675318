"""What runs now, on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mst_train.bar import bar as new_bar


@contextmanager
def progress(runs: int) -> Iterator[Callable[[str], None]]:
    """Counts the runs of a bench; what is given hears of each, by its name, as it begins."""
    begun = 0
    with new_bar(
        total=runs, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True
    ) as bar:

        def advance(name: str) -> None:
            nonlocal begun
            bar.update(min(begun, 1))  # the one before is over
            bar.set_description_str(name)
            begun += 1
            if bar.disable and begun % max(runs // 20, 1) == 0:
                print(f"run {begun} of {runs}: {name}", file=sys.stderr, flush=True)

        yield advance
        bar.update(1)
