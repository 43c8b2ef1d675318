"""The pieces of the page, each of them a computation, a JSON file and a picture."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mst_train.environment import describe
from mst_train.files import write_json
from mst_train.memory import simulate
from mst_train.memory.devices import DEVICES
from mst_train.paper import plot, plot_measured, predicted
from mst_train.paper.convergence import converge
from mst_train.paper.predicted import Advance
from mst_train.paper.reach import how_far_back
from mst_train.plan.rates import rates

Report = dict[str, Any]

DEVICE = DEVICES["a100_80gb"]
"""What the experiments are planned for (configs/experiment/paper_base.yaml)."""


class Piece(NamedTuple):
    """draw: None where there is no picture. predicted: for a device that is not here."""

    compute: Callable[[Advance], Report]
    draw: Callable[[Report, Path], None] | None
    predicted: bool = True


PIECES = {
    "longest": Piece(predicted.longest_sequences, plot.draw_longest),
    "several": Piece(predicted.several_gpus, None),
    "lengths": Piece(predicted.over_all_lengths, plot.draw_lengths),
    "ablations": Piece(predicted.number_of_chunks, plot.draw_ablations),
    "reach": Piece(how_far_back, plot_measured.draw_reach, predicted=False),
    "convergence": Piece(converge, plot_measured.draw_convergence, predicted=False),
}


def make(name: str, folder: Path, advance: Advance) -> Report:
    """Compute a piece, write its JSON and draw it."""
    piece = PIECES[name]
    report: Report = describe(torch.device("cpu"), "mst_train.paper")
    # The piece is the same wherever it is written, and whatever else was made with it.
    report["command"] = f"python -m mst_train.paper --only {name}"
    if piece.predicted:
        report["assumed"] = assumed()
    started = time.perf_counter()
    report |= piece.compute(advance)
    report["seconds"] = time.perf_counter() - started
    write_json(folder / f"{name}.json", report)
    if piece.draw is not None:
        piece.draw(report, folder / f"{name}.png")
    return report


def assumed() -> Report:
    """What predictions add to what they count."""
    found = rates(DEVICE, torch.bfloat16)
    return {
        "device": DEVICE.name,
        "device_bytes": DEVICE.memory_bytes,
        "context_bytes": simulate.CUDA_CONTEXT_BYTES,
        "workspace_bytes": simulate.CUBLAS_WORKSPACE_BYTES,
        "unusable_share": simulate.UNUSABLE_SHARE,
        "communication_bytes": simulate.NCCL_BYTES
        + simulate.COMMUNICATION_BUFFERS * simulate.BUCKET_BYTES,
        "rates": found and found.source,
    }
