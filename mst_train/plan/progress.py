"""How many predictions have been made, while one waits for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mst_train.bar import bar


@contextmanager
def predicting() -> Iterator[Callable[[str], None]]:
    """What is given hears of each prediction, by its settings, once it is made."""
    with bar(desc="predicting", unit=" steps", leave=False, disable=None) as shown:

        def advance(what: str) -> None:
            shown.set_postfix_str(what)
            shown.update()

        yield advance
