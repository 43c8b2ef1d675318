"""Tokens to text, as they come."""

from mst_train.data import Vocabulary

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers give for the bytes of a character whose others are still to come."""


class TextStream:
    """The text that follows a prompt, token after token.

    A token's text depends on the one before it (a space, or none), and a character may be several
    tokens: what is given is what the text gains by them.
    """

    def __init__(self, tokenizer: Vocabulary, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._before, self._new = prompt, list[int]()

    def add(self, token: int) -> str:
        """The text that is complete with this token; empty where none is."""
        self._new.append(token)
        text = self._gained()
        if text.endswith(INCOMPLETE):
            return ""
        self._before, self._new = self._new, []
        return text

    def rest(self) -> str:
        """What has not been given at the end."""
        return self._gained()

    def _gained(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._before + self._new)[len(decode(self._before)) :]
