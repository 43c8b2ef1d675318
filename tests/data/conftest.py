import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mst_train.config import DataConfig


@pytest.fixture(scope="session")
def prose() -> Callable[[int, int], str]:
    """prose(seed, words): as ``make_prose``."""
    return make_prose


def make_prose(seed: int, words: int) -> str:
    """Text of made-up words that is the same for the same seed."""
    random_words = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ter", "un", "ves"]
    return " ".join(
        "".join(random_words.choices(syllables, k=random_words.randint(1, 4))) for _ in range(words)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 40 text files."""
    root = tmp_path / "corpus"
    root.mkdir()
    for number in range(40):
        (root / f"{number:02}.txt").write_text(make_prose(number, 20 + 5 * (number % 7)) + "\n")
    return root


@pytest.fixture
def configure(folder: Path, tmp_path: Path) -> Callable[..., DataConfig]:
    """A configuration for the folder, with its cache in the test's own folder."""
    base = DataConfig(
        source=str(folder),
        sequence_length=32,
        validation_fraction=0.1,
        tokenizer_vocab_size=300,
        cache_dir=str(tmp_path / "cache"),
    )
    return lambda **changes: replace(base, **changes)
