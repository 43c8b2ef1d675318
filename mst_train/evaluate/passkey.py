"""Passkey retrieval: a number hidden in a long text, asked for at its end.

The task of "Landmark Attention" (Mohtashami and Jaggi, 2023, section 4.2): filler, somewhere in it
a sentence with a number, more filler, the question. The number is given as well, and the model has
to predict each of its tokens from what stands before it (teacher forcing), so a probe costs one
forward without gradients, and only the logits of the answer are computed.

A probe is as long as asked for to the token. Its parts are tokenised one by one, which costs little
for a text of any length and gives the same tokens every time.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mst_train.config import Config
from mst_train.data import Vocabulary
from mst_train.errors import UserError
from mst_train.model import Transformer

INTRODUCTION = "Somewhere in this text is a number. Find it and remember it.\n"
FILLER = "The road was long. A door stood open. Leaves moved in the wind. Nobody came by.\n"
HIDDEN = "The number is {number}. Remember that the number is {number}.\n"
QUESTION = "What is the number? The number is"
DIGITS = 5


@dataclass(frozen=True)
class Probe:
    """One text. tokens: the last ``answer_tokens`` of them are the number to be predicted.

    depth: where the number is hidden, from 0 (the beginning) to 1 (before the question).
    """

    tokens: list[int]
    answer_tokens: int
    depth: float

    @property
    def length(self) -> int:
        return len(self.tokens)


def make_probes(config: Config, tokenizer: Vocabulary) -> list[Probe]:
    """A probe for each of ``evaluation.passkey_lengths`` and ``passkey_depths``.

    The same ones for the same settings, tokenizer and ``train.seed``. Raises UserError where the
    tokens have no text, or a length has no room for a probe.
    """
    if tokenizer.model is None:
        raise UserError(
            "the tokens of data.source have no tokenizer to write a passkey's text in: set "
            "evaluation.passkey_every=0, or give data.tokenizer"
        )
    lengths = config.evaluation.passkey_lengths or [config.data.sequence_length]
    return [
        make_probe(tokenizer, length, depth, config.train.seed)
        for length in lengths
        for depth in config.evaluation.passkey_depths
    ]


def make_probe(tokenizer: Vocabulary, length: int, depth: float, seed: int) -> Probe:
    """A probe of ``length`` tokens with its number at ``depth``.

    The number stands before a whole line of filler, the nearest one above its depth. Raises
    UserError where ``length`` is too short.
    """
    generator = random.Random(f"{seed} {length} {depth:g}")
    number = "".join(generator.choices("0123456789", k=DIGITS))
    introduction = _tokens(tokenizer, INTRODUCTION)
    filler = _after(tokenizer, "\n", FILLER)
    hidden = _after(tokenizer, "\n", HIDDEN.format(number=number))
    question = _after(tokenizer, "\n", QUESTION)
    answer = _after(tokenizer, QUESTION, f" {number}")
    room = length - len(introduction) - len(hidden) - len(question) - len(answer)
    if room < 0:
        raise UserError(
            f"a passkey of {length} tokens has no room for its question, which takes "
            f"{length - room} with this tokenizer: set evaluation.passkey_lengths to that or more"
        )
    before = int(depth * room) // len(filler) * len(filler)
    fill = (filler * (room // len(filler) + 1))[:room]
    tokens = [*introduction, *fill[:before], *hidden, *fill[before:], *question, *answer]
    return Probe(tokens, len(answer), float(depth))


@torch.no_grad()
def score(model: Transformer, probe: Probe) -> dict[str, float]:
    """How a model does: the share of the answer's tokens that it would choose, and their loss."""
    device = model.embedding.weight.device
    tokens_S = torch.tensor(probe.tokens, device=device)
    answer_A = tokens_S[-probe.answer_tokens :]
    hidden_AD = model.hidden(tokens_S[None, :-1])[0, -probe.answer_tokens :]
    logits_AV = model.head_logits(hidden_AD).float()
    return {
        "accuracy": (logits_AV.argmax(-1) == answer_A).double().mean().item(),
        "loss": F.cross_entropy(logits_AV, answer_A).item(),
    }


def passkey_record(model: Transformer, probes: Sequence[Probe]) -> dict[str, Any]:
    """For metrics.jsonl: means over all probes, and each by its length and depth."""
    scores = [{"length": p.length, "depth": p.depth, **score(model, p)} for p in probes]
    return {
        "passkey_accuracy": sum(s["accuracy"] for s in scores) / len(scores),
        "passkey_loss": sum(s["loss"] for s in scores) / len(scores),
        "passkey": scores,
    }


def _tokens(tokenizer: Vocabulary, text: str) -> list[int]:
    """The tokens of a text that stands by itself."""
    tokens: list[int] = next(tokenizer.encode_arrays([text])).tolist()
    return tokens


def _after(tokenizer: Vocabulary, before: str, text: str) -> list[int]:
    """The tokens of ``text`` where it follows ``before``.

    Not those of ``text`` alone: many tokenizers begin every text with a space or a token of its
    own.
    """
    start = _tokens(tokenizer, before)
    whole = _tokens(tokenizer, before + text)
    common = 0
    while common < min(len(start), len(whole)) and start[common] == whole[common]:
        common += 1
    return whole[common:]
