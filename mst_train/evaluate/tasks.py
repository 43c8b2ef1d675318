"""The tasks by their names, and the probes that a run's settings ask for."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from random import Random

import numpy as np
from numpy.typing import NDArray

from mst_train.config import DEPTH_TASKS, TASKS, Config, EvaluationConfig
from mst_train.data import Vocabulary
from mst_train.errors import UserError
from mst_train.evaluate import needles, words
from mst_train.evaluate.passkey import passkey
from mst_train.evaluate.probe import Pieces, Probe, Text, made

AT_DEPTH = {"niah_single": needles.niah_single, "niah_multikey": needles.niah_multikey}
ANYWHERE = {
    "niah_multivalue": needles.niah_multivalue,
    "niah_multiquery": needles.niah_multiquery,
    "vt": needles.vt,
}
LISTS = {"cwe": words.cwe, "fwe": words.fwe}


def make_probes(config: Config, tokenizer: Vocabulary) -> list[Probe]:
    """The probes of each of ``evaluation.tasks``: ``samples`` of each of ``lengths`` and, where the
    task has one place, of ``depths``.

    The same ones for the same settings, tokenizer and ``train.seed``. Raises UserError where the
    tokens have no text, or a length has no room for a task.
    """
    if tokenizer.model is None:
        raise UserError(
            "the tokens of data.source have no tokenizer to write the texts of evaluation.tasks "
            "in: set evaluation.every=0, or give data.tokenizer"
        )
    settings, seed = config.evaluation, config.train.seed
    pieces = Pieces(tokenizer)
    return [
        make_probe(
            task, pieces, length, depth, settings, _probe_random(task, length, depth, sample, seed)
        )
        for task in settings.tasks
        for length in settings.lengths or [config.data.sequence_length]
        for depth in (settings.depths if task in DEPTH_TASKS else [None])
        for sample in range(settings.samples)
    ]


def texts(config: Config, tokenizer: Vocabulary, count: int, seed: int) -> Iterator[str]:
    """``count`` texts of ``evaluation.tasks`` and ``lengths``, at random depths, to train on.

    They are drawn with other seeds than any probe's. Raises UserError where a length has no room
    for a task.
    """
    settings = config.evaluation
    pieces = Pieces(tokenizer)
    lengths = settings.lengths or [config.data.sequence_length]
    for number in range(count):
        task = settings.tasks[number % len(settings.tasks)]
        generator = Random(f"text {seed} {number}")
        length, depth = generator.choice(lengths), generator.random()
        yield tokenizer.decode(make_probe(task, pieces, length, depth, settings, generator).tokens)


def sample_texts(settings: EvaluationConfig) -> Iterator[str]:
    """A text of each task there is, whatever its length, for what its parts are written in."""
    pieces = Pieces(_Bytes(256, 0))
    for task in TASKS:
        for length in (2**power for power in range(9, 24)):
            with suppress(UserError):
                probe = make_probe(task, pieces, length, 0.5, settings, Random(0))
                yield pieces.tokenizer.decode(probe.tokens)
                break


class _Bytes(Vocabulary):
    """Each byte of a text is a token."""

    def encode_arrays(
        self, texts: list[str], continuing: Collection[int] = ()
    ) -> Iterator[NDArray[np.int32]]:
        yield from (np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def make_probe(
    task: str,
    pieces: Pieces,
    length: int,
    depth: float | None,
    settings: EvaluationConfig,
    generator: Random,
) -> Probe:
    """A text of ``length`` tokens; UserError where that is too short.

    depth: without meaning, and then the probe has none, for a task that is in no single place.
    """
    ruler = settings.ruler
    if task == "passkey":
        assert depth is not None
        return passkey(pieces, length, depth, ruler.digits, generator)
    if task in AT_DEPTH:
        assert depth is not None
        return made(task, pieces, AT_DEPTH[task](ruler, depth, generator), length, float(depth))
    text: Text
    if task in ANYWHERE:
        text = ANYWHERE[task](ruler, generator)
    else:
        text = LISTS[task](ruler, pieces, length, generator)
    return made(task, pieces, text, length, None)


def _probe_random(task: str, length: int, depth: float | None, sample: int, seed: int) -> Random:
    """What a probe is drawn with; the first passkey's is that of the time when it was alone."""
    parts = [f"{seed} {length}"]
    parts += [] if depth is None else [f"{depth:g}"]
    parts += [] if task == "passkey" else [task]
    parts += [f"sample {sample}"] if sample else []
    return Random(" ".join(parts))
