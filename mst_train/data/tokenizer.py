"""Text to token ids and back: byte-pair encoding by sentencepiece.

A tokenizer trained here loses nothing: decode(encode(text)) == text for every text that has a
UTF-8 form. Spaces, tabs, newlines and NUL are kept as they are, the usual runs of spaces are single
tokens, and what is not in the vocabulary is spelt in bytes. A sentencepiece model that the user
brings keeps its own rules (Llama's, for one, puts a space before the text). Where it has a
beginning-of-sequence token, as those of Llama, Mistral and Gemma have, each document begins with
it. What comes before a text comes once, in however many parts a document is read.
"""

import hashlib
import io
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mst_train.data.pieces import after_newline, between_words, cores
from mst_train.errors import UserError
from mst_train.files import reading, replace_file

SAMPLE_CHARACTERS = 8_000_000
"""The most text a tokenizer is trained on."""
SAMPLE_PART_CHARACTERS = 16_384
"""The unit of the sample; sentencepiece holds positions in a word in 16 bits."""
ENCODE_BATCH_CHARACTERS = 4_000_000
"""About how much text is encoded in one call, whose result is a list of Python's large integers."""
ENCODE_PART_CHARACTERS = 262_144
"""Longer texts are encoded part by part: sentencepiece needs 40 bytes per character of the part,
and its time per character grows with the part's length."""
ADVICE = "give a sentencepiece .model file or a tokenizer.json, or null to have one trained"
SMALLEST_VOCABULARY = 300
"""What the configuration accepts as data.tokenizer_vocab_size."""

# sentencepiece writes a space as U+2581, so that a real U+2581 would come back as a space.
_SPACE_SYMBOL = "\u2581"
_SPACE_SYMBOLS = re.compile(f"({_SPACE_SYMBOL}+)")
# sentencepiece trains on no text that has its mark for unknown characters in it.
_RESERVED = "\u2585"

log = logging.getLogger(__name__)


class Vocabulary:
    """Token ids without a tokenizer: what is known of tokens that came as such.

    Attributes:
        vocab_size: the number of token ids.
        eod: the id that ends a document; no text encodes to it.
        fingerprint: stands for the ids and what they mean.
        model: the bytes of the tokenizer's file; None where there is none.
        file_name: what that file is called among others.
        threads: how many encode at a time.
    """

    model: bytes | None = None
    file_name = "tokenizer.model"
    threads = 1
    eod_token: str | None = None
    """How ``eod`` is written in the tokenizer's vocabulary, where that is known."""

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod = vocab_size, eod
        self.fingerprint = hashlib.sha256(f"{vocab_size} {eod}".encode()).hexdigest()[:32]

    def encode_arrays(
        self, texts: list[str], continuing: Collection[int] = ()
    ) -> Iterator[NDArray[np.int32]]:
        """The token ids of each text, without an end-of-document id.

        continuing: the places in ``texts`` of those that go on with a document: nothing is put
        before them.
        """
        raise UserError(
            "data.source holds text, and there is no tokenizer: give a sentencepiece .model file "
            "or a tokenizer.json as data.tokenizer, and neither prepare.vocab_size nor "
            "prepare.end_of_document"
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text, without an end-of-document id."""
        return [tokens.tolist() for tokens in self.encode_arrays(texts)]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; end-of-document ids have none."""
        raise UserError("these tokens were prepared without a tokenizer, so they have no text")


class TextTokenizer(Vocabulary):
    """What sentencepiece's and Hugging Face's tokenizers have in common.

    A subclass sets ``model``, the ids ``_before`` each document, and its ``_lead``.
    """

    _before: list[int]
    _lead: "Lead"

    def encode_arrays(
        self, texts: list[str], continuing: Collection[int] = ()
    ) -> Iterator[NDArray[np.int32]]:
        """As ``Vocabulary``; ``threads`` threads encode several texts at a time."""
        texts = self._lead.put_before(texts, continuing)
        parts = ((index, part) for index, text in enumerate(texts) for part in self._parts(text))
        for index, found in groupby(self._numbered(parts, continuing), itemgetter(0)):
            before = np.array([] if index in continuing else self._before, np.int32)
            yield np.concatenate([before, *(ids for _, ids in found)])

    def _numbered(
        self, parts: Iterable[tuple[int, str]], continuing: Collection[int]
    ) -> Iterator[tuple[int, NDArray[np.int32]]]:
        for batch in batches(parts):
            encoded = self._encoded([part for _, part in batch])
            for (index, part), ids in zip(batch, encoded, strict=True):
                if index in continuing:
                    ids = self._lead.taken_from(ids, part)
                yield index, np.array(ids, np.int32)

    def _parts(self, text: str) -> Iterator[str]:
        """A text in parts that are encoded by themselves."""
        yield text

    def _encoded(self, parts: list[str]) -> Iterator[list[int]]:
        """The token ids of each, and nothing before them."""
        raise NotImplementedError


class Tokenizer(TextTokenizer):
    """A sentencepiece model."""

    def __init__(self, model: bytes, name: str) -> None:
        """``name`` says in messages where ``model`` is from.

        Raises:
            UserError: not a sentencepiece model, or one without an end-of-sequence id.
        """
        try:
            import sentencepiece  # measurements on random tokens do without

            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            vocab_size: int = self._processor.vocab_size()
            if vocab_size == 0:
                raise RuntimeError("no pieces")
            pieces = "".join(self._processor.encode("a", out_type=str))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{name} is not a sentencepiece model: give a .model file") from error
        eod: int = self._processor.eos_id()
        if eod < 0:
            raise UserError(
                f"{name} has no end-of-sequence id, which ends a document: give a sentencepiece "
                f"model that was trained with one (eos_id)"
            )
        super().__init__(vocab_size, eod)
        self.model = model
        bos: int = self._processor.bos_id()
        self._before = [bos] if bos >= 0 else []
        self.fingerprint = hashlib.sha256(model + b"bos" * len(self._before)).hexdigest()[:32]
        self.threads = cores()
        # A model that puts a space before each text would put one before each part of a text.
        self._divisible = not pieces.startswith(_SPACE_SYMBOL)
        self._lead = Lead(self._processor.encode, self._processor.piece_to_id("a"))
        self._space_symbol_ids = self._in_bytes(_SPACE_SYMBOL)

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is sent to another process."""
        return Tokenizer, (self.model, "data.tokenizer"), {"threads": self.threads}

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer in a .model file; ``UserError`` where there is none."""
        name = f"data.tokenizer={path}"
        with reading(name, ADVICE):
            return cls(path.read_bytes(), name)

    def save(self, path: Path) -> Self:
        """Write the .model file, so that it is there whole or not at all; ``OSError``."""
        assert self.model is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, self.model, path.parent)
        return self

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; end-of-document ids have none."""
        text: str = self._processor.decode(tokens)
        return text

    def _parts(self, text: str) -> Iterator[str]:
        if not self._divisible:
            yield text
            return
        for part in cut(text, ENCODE_PART_CHARACTERS, between_words):
            if self._space_symbol_ids and _SPACE_SYMBOL in part:
                yield from _SPACE_SYMBOLS.split(part)
            else:
                yield part

    def _encoded(self, parts: list[str]) -> Iterator[list[int]]:
        encoded = self._processor.encode(parts, num_threads=self.threads)
        for part, ids in zip(parts, encoded, strict=True):
            if self._divisible and self._space_symbol_ids and part.startswith(_SPACE_SYMBOL):
                ids = self._space_symbol_ids * len(part)  # a run of them cut out by ``_parts``
            yield ids

    def _in_bytes(self, text: str) -> list[int]:
        """``text`` spelt in byte tokens; empty where the model has none."""
        tokens = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        return tokens if all(self._processor.is_byte(token) for token in tokens) else []


class Lead:
    """Keeps a tokenizer that puts a space before each text from putting one into a document.

    Where a document goes on, it is given a line end before the text, and what it makes of that and
    of the space is taken away again.
    """

    def __init__(self, encode: Callable[[str], list[int]], a: int | None) -> None:
        """encode: without special tokens. a: the id of "a" with nothing before it."""
        self._encode = encode
        *ids, last = encode("\na") or [-1]
        self._ids = ids if last == a and encode("a") != [a] else []

    def put_before(self, texts: list[str], continuing: Collection[int]) -> list[str]:
        if not self._ids:
            return texts
        return ["\n" + text if i in continuing else text for i, text in enumerate(texts)]

    def taken_from(self, ids: list[int], text: str) -> list[int]:
        """``ids``, those of a ``text`` that ``put_before`` has returned, without its line end."""
        size = len(self._ids)
        return ids[size:] if ids[:size] == self._ids else self._encode(text[1:])


def batches(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Numbered texts in lists of about ENCODE_BATCH_CHARACTERS."""
    batch, characters = [], 0
    for index, part in parts:
        batch.append((index, part))
        characters += len(part)
        if characters >= ENCODE_BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer.

    The model depends on the documents, their order and ``vocab_size`` alone. It learns from at most
    SAMPLE_CHARACTERS of text, spread evenly over the documents, and holds no more than that plus
    one document in memory. Newlines join other characters in a token, spaces only start one.

    Raises:
        UserError: the text is too little, or has too many distinct characters, for ``vocab_size``.
    """
    model = io.BytesIO()
    try:
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part.replace(_RESERVED, " ") for part in sample(documents)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SAMPLE_PART_CHARACTERS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=16,  # recorded in the model, so not the number of cores
            minloglevel=4,
        )
    except RuntimeError as error:
        raise _training_problem(str(error), vocab_size) from error
    return Tokenizer(model.getvalue(), "the tokenizer that was trained")


def kept_tokenizer(folder: Path, key: str, train: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in ``folder``, in a file whose name has its checksum.

    Where there is none, or it is damaged, what ``train`` gives, kept for later (``OSError``).
    """
    for path in sorted(folder.glob(f"{key}-*.model")):
        try:
            model = path.read_bytes()
            if path.name == _kept_name(key, model):
                return Tokenizer(model, str(path))
        except OSError:
            pass
        log.warning("%s is damaged: training it again", path)
    tokenizer = train()
    assert tokenizer.model is not None
    return tokenizer.save(folder / _kept_name(key, tokenizer.model))


def _kept_name(key: str, model: bytes) -> str:
    return f"{key}-{hashlib.sha256(model).hexdigest()[:32]}.model"


def sample(documents: Iterable[str]) -> list[str]:
    """At most SAMPLE_CHARACTERS of the documents' text, in parts spread evenly over all of it.

    One pass, whatever the length: every ``stride``-th part is kept, and when they grow too many,
    every second one of them is dropped and the stride doubles.
    """
    kept: list[str] = []
    characters, stride = 0, 1
    parts = (part for text in documents for part in cut(text, SAMPLE_PART_CHARACTERS))
    for index, part in enumerate(parts):
        if index % stride:
            continue
        kept.append(part)
        characters += len(part)
        while characters > SAMPLE_CHARACTERS and len(kept) > 1:
            kept = kept[::2]
            characters, stride = sum(map(len, kept)), 2 * stride
    return kept


def cut(
    text: str, limit: int, place: Callable[[str, int, int], int] = after_newline
) -> Iterator[str]:
    """``text`` in parts of at most ``limit`` characters; ``place`` finds a good one to cut at."""
    start = 0
    while len(text) - start > limit:
        end = place(text, start, start + limit)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _training_problem(reason: str, vocab_size: int) -> UserError:
    key = f"data.tokenizer_vocab_size={vocab_size}"
    if largest := re.search(r"value <= (\d+)", reason):
        if int(largest[1]) < SMALLEST_VOCABULARY:
            return UserError(
                f"data.source holds too little text to train a tokenizer ({key}): give more text, "
                f"or a trained sentencepiece model as data.tokenizer"
            )
        return UserError(
            f"{key} is more than the text of data.source can fill: set it to {largest[1]} or less, "
            f"or give more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return UserError(
            f"{key} is too small for the distinct characters of data.source: set it to "
            f"{smallest[1]} or more"
        )
    return UserError(f"no tokenizer can be trained on data.source ({key}): {reason}")
