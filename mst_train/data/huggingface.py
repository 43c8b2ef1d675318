"""Hugging Face data sets to documents: the one place that imports ``datasets``."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mst_train.config import DataConfig
from mst_train.data.pieces import Document, Piece, Report, ranges
from mst_train.data.readers import documents_of, missing_field
from mst_train.errors import UserError, reason_of

ROWS = 256
"""Rows in memory at a time."""
PIECE_ROWS = 1 << 16
"""The most rows in a piece."""
PIECES = 64
SMALLEST_PIECE_ROWS = 1 << 10
ANSWER_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HuggingFaceRows:
    """The rows of ``data.source`` = NAME or NAME:CONFIG, split ``data.split``; a row is a document.

    With ``data.streaming`` the rows come from where the data set is, a piece from each of its
    files; without, they are downloaded first, and a piece is a range of rows.
    """

    name: str
    text_field: str
    rows: Any
    streamed: bool
    fingerprint: str
    """The one that ``datasets`` gives the loaded split or, where it is streamed, its files."""

    @staticmethod
    def check_name(source: str) -> None:
        """Raises UserError where the Hub answers that it has no such data set.

        Where it does not answer, as without a network, ``datasets`` may have a copy.
        """
        try:
            from huggingface_hub import dataset_info
            from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
        except ImportError:
            return
        try:
            dataset_info(source.partition(":")[0], timeout=ANSWER_SECONDS)
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise UserError(
                f"data.source={source} is neither a file or folder here nor a data set on the "
                f"Hugging Face Hub, or not one for you: correct the name, start a path with ./ or /"
            ) from error
        except Exception:  # of as many types as there are ways not to reach it
            log.info("data.source=%s is no file or folder here: looking for a data set", source)

    @classmethod
    def load(cls, data: DataConfig) -> "HuggingFaceRows":
        """Raises ``UserError`` where there is no such data set or field."""
        name, _, config = data.source.partition(":")
        settings: dict[str, Any] = {"streaming": True} if data.streaming else {}
        try:
            import datasets

            # Its retries without a network, several lines each.
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            rows = datasets.load_dataset(name, config or None, split=data.split, **settings)
            if data.streaming:
                fingerprint = datasets.load_dataset_builder(name, config or None).hash or ""
            else:
                fingerprint = rows._fingerprint
            columns = rows.column_names
            if columns is None:  # streamed, and of a format that does not say
                columns = list(next(iter(rows), {}))
        # Loading runs into network, file system, parser and naming trouble, each with a type of
        # its own: all of it is about what the user named.
        except Exception as error:
            raise UserError(
                f"data.source={data.source} is neither a file or folder here nor a data set that "
                f"`datasets` could load (data.split={data.split}): {reason_of(error)}. Correct the "
                f"name, or start a path with ./ or /"
            ) from error
        if data.text_field not in columns:
            raise missing_field(f"the data set {data.source}", data.text_field, columns)
        return cls(data.source, data.text_field, rows, data.streaming, str(fingerprint))

    def divide(self, limit: int) -> list[Piece]:
        """The pieces; ``limit`` is not needed, since rows of text are short."""
        if self.streamed:
            count = self.rows.num_shards
            return [Piece((), index, index + 1, 0, self.fingerprint) for index in range(count)]
        first = self.rows.select_columns([self.text_field])[: min(ROWS, len(self.rows))]
        texts = [text for text in first[self.text_field] if isinstance(text, str)]
        row_bytes = 1 + sum(len(text) for text in texts) // max(1, len(texts))
        rows = max(SMALLEST_PIECE_ROWS, min(PIECE_ROWS, len(self.rows) // PIECES))
        rows = max(1, min(rows, limit // row_bytes))
        return [
            Piece((), start, stop, (stop - start) * row_bytes, self.fingerprint)
            for start, stop in ranges(len(self.rows), -(-len(self.rows) // rows))
        ]

    def read(self, piece: Piece, report: Report) -> Iterator[Document]:
        rows = self.rows.select_columns([self.text_field])
        if self.streamed:
            rows = rows.shard(num_shards=self.rows.num_shards, index=piece.start)
            place, row = f"{self.name}, file {piece.start + 1}", 0
        else:
            rows = rows.select(range(piece.start, piece.stop))
            place, row = self.name, piece.start
        try:
            for batch in rows.iter(batch_size=ROWS):
                texts = batch[self.text_field]
                yield from documents_of(texts, self.text_field, place, row, report)
                row += len(texts)
        except UserError:
            raise
        # As above: a file of the data set may be gone, damaged or out of reach by now.
        except Exception as error:
            raise UserError(
                f"{place} cannot be read further than row {row} ({reason_of(error)}): start again "
                f"when it can be"
            ) from error
