"""How many of its probes a model answers.

The answer is given as well, and the model has to predict each of its tokens from what stands before
it (teacher forcing), so a probe costs one forward without gradients, and only the logits of the
answer are computed. Where all tokens are right, they are what the model would write by itself.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_train.data import IGNORED, Batch
from mst_train.distributed import Topology
from mst_train.evaluate.probe import Probe
from mst_train.model import Transformer


def probe_record(
    model: Transformer,
    probes: Sequence[Probe],
    topology: Topology | None = None,
    shown: Callable[[Sequence[Probe]], Iterable[Probe]] = iter,
) -> dict[str, Any]:
    """How a model does, for metrics.jsonl: of each task the means over all its probes, and a list
    of the means at each length and depth.

    accuracy: the share of the answer's tokens that the model would choose; exact: of whole answers;
    loss: the tokens'; chance, exact_chance: accuracy and exact without the text. Several processes
    share the work, and return the same. shown: shows how far they are.
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
            "accuracy": right / len(probe.answer),
            "exact": float(right == len(probe.answer)),
            "loss": loss / len(probe.answer),
            "chance": probe.chance,
            "exact_chance": probe.exact_chance,
        }
        for probe, (right, loss) in zip(probes, sums_PS[: len(probes)].tolist(), strict=True)
    ]
    record: dict[str, Any] = {}
    for task, some in groupby(zip(probes, scores, strict=True), lambda pair: pair[0].task):
        of_task = list(some)
        means = _means(of_task, ("accuracy", "exact", "loss", "chance", "exact_chance"))
        record |= {f"{task}_{key}": mean for key, mean in means.items()}
        record[task] = [
            _place(*place) | _means(list(there), ("accuracy", "exact", "loss"))
            for place, there in groupby(of_task, lambda pair: (pair[0].length, pair[0].depth))
        ]
    return record


def _place(length: int, depth: float | None) -> dict[str, Any]:
    return {"length": length} | ({} if depth is None else {"depth": depth})


def _means(
    scored: Sequence[tuple[Probe, dict[str, float]]], keys: Iterable[str]
) -> dict[str, float]:
    return {key: sum(score[key] for _, score in scored) / len(scored) for key in keys}


def _batch(probe: Probe, multiple: int) -> Batch:
    """A probe as a batch of one row, whose labels are the answer.

    Its length is made a multiple of ``multiple`` by tokens at its end, which no other one sees.
    """
    tokens_S = torch.tensor(probe.tokens[:-1])
    labels_S = torch.full_like(tokens_S, IGNORED)
    answer_A = torch.tensor(probe.answer)
    labels_S[answer_A - 1] = torch.tensor(probe.tokens)[answer_A]
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
