"""What python -m mst_train.prepare reads beside the settings of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mst_train.cli.compose import compose_as
from mst_train.config import Config
from mst_train.config.rules import at_least
from mst_train.config.schema import MOST_PROCESSES, choice


@dataclass(frozen=True)
class PrepareSettings:
    """What python -m mst_train.prepare writes; what it reads are the settings of data."""

    output: str | None = None
    """The folder to write to; as data.source, it is what training reads."""
    workers: int | None = None
    """Processes that tokenise; null: one for each CPU core."""
    shard: str = "1/1"
    """i/N: the i-th of N jobs, which can run at the same time; the last one joins the result."""
    shard_mib: int = 256
    """About how much text goes into a file of tokens (MiB); smaller where a source has less."""
    malformed: str = choice("fail", ("fail", "skip"))
    """Lines, rows and files that hold no text. fail: stop at the first. skip: leave them out and
    list them in malformed.jsonl."""
    verify: bool = False
    """Compare everything in prepare.output with its checksums, and write nothing."""
    vocab_size: int | None = None
    """.idx files without data.tokenizer: the number of token ids."""
    end_of_document: int | None = None
    """.idx files without data.tokenizer: the id that ends a document."""


@dataclass(frozen=True)
class PrepareConfig(Config):
    prepare: PrepareSettings = field(default_factory=PrepareSettings)


def read(arguments: Sequence[str]) -> PrepareConfig:
    """The configuration that the arguments make; UserError with every problem found."""
    return compose_as(PrepareConfig, arguments, _problems)


def _problems(config: PrepareConfig) -> Iterator[str]:
    prepare = config.prepare
    yield from at_least("prepare.shard_mib", prepare.shard_mib, 1, 2**20)
    if prepare.workers is not None:
        yield from at_least("prepare.workers", prepare.workers, 1, MOST_PROCESSES)
    first, _, count = prepare.shard.partition("/")
    numbers = first.isdecimal() and count.isdecimal() and len(prepare.shard) <= 16
    if not (numbers and 1 <= int(first) <= int(count) <= MOST_PROCESSES):
        yield (
            f"prepare.shard={prepare.shard:.40} must be i/N with i from 1 to N: the i-th of N "
            f"jobs, {MOST_PROCESSES} at most"
        )
    if (prepare.vocab_size is None) != (prepare.end_of_document is None):
        yield (
            "prepare.vocab_size and prepare.end_of_document describe tokens without a tokenizer: "
            "give both or neither"
        )
    elif prepare.vocab_size is not None and prepare.end_of_document is not None:
        yield from at_least("prepare.vocab_size", prepare.vocab_size, 1)
        if not 0 <= prepare.end_of_document < prepare.vocab_size < 2**31:
            yield (
                f"prepare.end_of_document={prepare.end_of_document} must be an id from 0 to "
                f"prepare.vocab_size - 1, and prepare.vocab_size={prepare.vocab_size} below 2^31"
            )
