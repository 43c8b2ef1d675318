"""A bar of progress on a terminal, where the package for it is installed."""

from collections.abc import Iterable, Iterator
from typing import Any


def bar(over: Iterable[Any] | None = None, **settings: Any) -> Any:
    """tqdm's, over an iterable if one is given; without tqdm, one that shows nothing: benches and
    predictions need no more than torch, NumPy and Hydra.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar(over)
    return tqdm(over, **settings)


class _NoBar:
    disable = True

    def __init__(self, over: Iterable[Any] | None) -> None:
        self._over = over

    def __iter__(self) -> Iterator[Any]:
        return iter(self._over or ())

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, more: float = 1) -> None:
        pass

    def set_description_str(self, text: str, refresh: bool = True) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass
