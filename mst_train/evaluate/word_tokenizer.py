"""A tokenizer for the tasks alone: each of their words, digits and signs is a token.

A model of a few thousand weights can learn the tasks in it, as no part of a word or a number has to
be put together first.
"""

import json
import re
from collections.abc import Iterable

PATTERN = r" ?[A-Z]{2,}| ?[A-Z]?[a-z]+| ?[A-Z]| ?[0-9]|[\s\S]"
END, UNKNOWN = "<end>", "<unknown>"


def word_tokenizer(texts: Iterable[str], words: Iterable[str]) -> dict[str, str]:
    """The files of a tokenizer that has a token for everything in ``texts``, and for ``words`` and
    digits with a space before them and without: their contents by their names."""
    pieces = {piece for text in texts for piece in re.findall(PATTERN, text)}
    single = [*words, *"0123456789"]
    pieces |= {*single, *(f" {word}" for word in single)}
    vocabulary = {piece: number for number, piece in enumerate([END, UNKNOWN, *sorted(pieces)])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[name], "content": name, **special, "special": True}
            for name in (END, UNKNOWN)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    return {
        "tokenizer.json": json.dumps(tokenizer, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(settings | {"unk_token": UNKNOWN}, indent=1) + "\n",
    }
