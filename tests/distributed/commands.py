"""The training command in the processes of a test."""

import contextlib
import importlib.util
import io
import os
import pickle
from unittest.mock import patch

from torch.distributed import distributed_c10d

from mst_train.__main__ import main
from mst_train.errors import TrainingError
from mst_train.tracking.metrics import Metrics

log = Metrics.log

SETTINGS = [
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "data.tokenizer_vocab_size=512",
    "data.sequence_length=64",
    "data.attention=documents",
    "optimizer.warmup_steps=2",
    "memory.mlp_chunk_tokens=24",
    "memory.head_chunk_tokens=24",
    "logging.wandb.mode=disabled",
    "train.eval_sequences=6",
]


def own_process(rank):
    """Whether this is the process of that rank."""
    return int(os.environ["RANK"]) == rank


def log_unless(step):
    """``Metrics.log`` on a disk that is full when the record of ``step`` comes."""

    def without_room(metrics, record):
        if "loss" in record and record["step"] == step and own_process(0):
            raise TrainingError("no room for a record")
        log(metrics, record)

    return without_room


def unpickling(*_):
    raise AssertionError("something was unpickled")


def several(runs):
    """Exit status and standard error of one run of the command after the other.

    Each of ``runs``: how many of the processes take part (``world``), on which ``port`` they meet,
    their ``arguments``; more arguments and another working folder for the second one; packages that
    are as if they were not installed; the step whose record finds no room.

    None of them may unpickle what has come over a connection.
    """
    pickle.loads = distributed_c10d._unpickler = unpickling
    results = []
    find = importlib.util.find_spec
    for one in runs:
        if int(os.environ["RANK"]) >= one["world"]:
            results.append(None)
            continue
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(one["world"])
        os.environ["MASTER_PORT"] = str(one["port"])
        arguments = [*SETTINGS, *one["arguments"]]
        if own_process(1):
            arguments += one.get("second", [])
            os.chdir(one.get("second_in", "."))
        missing = one.get("missing", [])
        importlib.util.find_spec = lambda name, *rest, m=missing: (
            None if name in m else find(name, *rest)
        )
        step = one.get("no_room_at")
        told = io.StringIO()
        with patch.object(Metrics, "log", log_unless(step)), contextlib.redirect_stderr(told):
            status = main(arguments)
        results.append((status, told.getvalue()))
    return results
