"""Hugging Face data sets to documents: the one place that imports ``datasets``."""

from collections.abc import Iterator

from mst_train.config import DataConfig
from mst_train.data.readers import missing_field, text_of
from mst_train.errors import UserError

ROWS = 256
"""Rows in memory at a time."""


class HuggingFaceDataset:
    """The rows of ``data.source`` = NAME or NAME:CONFIG, split ``data.split``; a row is a document.

    ``fingerprint`` is the one that ``datasets`` gives the loaded split.
    """

    def __init__(self, data: DataConfig) -> None:
        name, _, config = data.source.partition(":")
        try:
            import datasets

            self._rows = datasets.load_dataset(name, config or None, split=data.split)
        # Loading runs into network, file system, parser and naming trouble, each with a type of
        # its own: all of it is about what the user named.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"data.source={data.source} is neither a file or folder here nor a data set that "
                f"`datasets` could load (data.split={data.split}): {reason}. Correct the name, or "
                f"start a path with ./ or /"
            ) from error
        if data.text_field not in self._rows.column_names:
            raise missing_field(
                f"the data set {data.source}", data.text_field, self._rows.column_names
            )
        self._source, self._text_field = data.source, data.text_field
        self.fingerprint: str = self._rows._fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        row = 0
        for batch in self._rows.select_columns([self._text_field]).iter(batch_size=ROWS):
            for text in batch[self._text_field]:
                row += 1
                yield from text_of(text, f"{self._source}, row {row}", self._text_field)
