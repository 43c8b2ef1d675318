"""The text that training is measured on: the headers of the operators of the installed torch.

A document is all headers of one operator (abs.h, abs_native.h, abs_ops.h, ...), one after the
other, some 2,800 tokens. They are generated, and real: each repeats the operator's names and
signatures in a form of its own, so that text hundreds to thousands of tokens back tells what comes
next.
"""

import contextlib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

VOCABULARY = 1024
KINDS = re.compile(r"_(native|ops|meta|[a-z]+_dispatch)$")
"""What follows the operator in a header's name."""


@contextlib.contextmanager
def prepared() -> Iterator[tuple[str, ...]]:
    """Overrides of ``data`` and of the model's vocabulary; the files are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "operators.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
        yield (
            f"data.source={source}",
            f"data.cache_dir={folder}",
            "data.validation_fraction=0.04",
            f"data.tokenizer_vocab_size={VOCABULARY}",
            f"model.vocab_size={VOCABULARY}",
        )


def documents() -> list[str]:
    """One for each operator, in the order of their names; each header after its name."""
    found = defaultdict(list)
    for header in sorted(Path(torch.__file__).with_name("include").glob("ATen/ops/*.h")):
        found[KINDS.sub("", header.stem)].append(f"// {header.name}\n{header.read_text()}")
    return ["\n".join(headers) for headers in found.values()]


def name() -> str:
    """The text, as the page names it."""
    return f"the headers of torch {torch.__version__}'s operators, an operator a document"
