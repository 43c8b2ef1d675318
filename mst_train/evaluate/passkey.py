"""Passkey retrieval: a number hidden in a long text, asked for at its end.

The task of "Landmark Attention" (Mohtashami and Jaggi, 2023, section 4.2): filler, somewhere in it
a sentence with a number, more filler, the question. The number is given as well, and the model has
to predict each of its tokens from what stands before it (teacher forcing), so a probe costs one
forward without gradients, and only the logits of the answer are computed.

A probe is as long as asked for to the token. Its parts are tokenised one by one, which costs little
for a text of any length and gives the same tokens every time.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import dropwhile, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_train.config import Config
from mst_train.data import IGNORED, Batch, Vocabulary
from mst_train.distributed import Topology
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


def passkey_record(
    model: Transformer,
    probes: Sequence[Probe],
    topology: Topology | None = None,
    shown: Callable[[Sequence[Probe]], Iterable[Probe]] = iter,
) -> dict[str, Any]:
    """How a model does, for metrics.jsonl: means over all probes, and each by length and depth.

    accuracy: the share of the answer's tokens that the model would choose; loss: theirs. Several
    processes share the work, and return the same. shown: shows how far they are.
    """
    topology = topology or Topology(device=model.embedding.weight.device)
    groups = topology.data_parallel
    rounds = math.ceil(len(probes) / groups)
    sums_PS = torch.zeros(rounds * groups, 2, dtype=torch.float64, device=topology.device)
    batches = topology.shared(_batch(probe, topology.length_multiple) for probe in shown(probes))
    for turn, batch in enumerate(batches):
        sums_PS[turn * groups + topology.data_index] = _score(model, batch, topology.device)
    topology.sum_([sums_PS])
    scores = [
        {
            "length": probe.length,
            "depth": probe.depth,
            "accuracy": right / probe.answer_tokens,
            "loss": loss / probe.answer_tokens,
        }
        for probe, (right, loss) in zip(probes, sums_PS[: len(probes)].tolist(), strict=True)
    ]
    return {
        "passkey_accuracy": sum(s["accuracy"] for s in scores) / len(scores),
        "passkey_loss": sum(s["loss"] for s in scores) / len(scores),
        "passkey": scores,
    }


def _batch(probe: Probe, multiple: int) -> Batch:
    """A probe as a batch of one row, whose labels are the answer.

    Its length is made a multiple of ``multiple`` by tokens at its end, which no other one sees.
    """
    tokens_S = torch.tensor(probe.tokens[:-1])
    labels_S = torch.full_like(tokens_S, IGNORED)
    labels_S[-probe.answer_tokens :] = torch.tensor(probe.tokens[-probe.answer_tokens :])
    missing = -len(tokens_S) % multiple
    return Batch(
        F.pad(tokens_S, (0, missing))[None],
        F.pad(labels_S, (0, missing), value=IGNORED)[None],
        torch.arange(len(tokens_S) + missing)[None],
    )


@torch.no_grad()
def _score(model: Transformer, batch: Batch, device: torch.device) -> Tensor:
    """How many of the batch's labels the model would choose, and the sum of their losses: [2]."""
    hidden_SD = model.hidden(batch.tokens.to(device), batch.positions.to(device))[0]
    labels_S = batch.labels[0].to(device)
    answer = labels_S != IGNORED
    logits_AV = model.head_logits(hidden_SD[answer]).float()
    right = (logits_AV.argmax(-1) == labels_S[answer]).sum()
    loss = F.cross_entropy(logits_AV, labels_S[answer], reduction="sum")
    return torch.stack([right.double(), loss.double()])


def _tokens(tokenizer: Vocabulary, text: str) -> list[int]:
    """The tokens of a text that stands by itself."""
    tokens: list[int] = next(tokenizer.encode_arrays([text])).tolist()
    return tokens


def _after(tokenizer: Vocabulary, before: str, text: str) -> list[int]:
    """The tokens of ``text`` where it follows ``before``.

    Not those of ``text`` alone: many tokenizers begin every text with a space or a token of its
    own.
    """
    pairs = zip_longest(_tokens(tokenizer, before + text), _tokens(tokenizer, before))
    after = dropwhile(lambda pair: pair[0] == pair[1], pairs)
    return [token for token, _ in after if token is not None]
