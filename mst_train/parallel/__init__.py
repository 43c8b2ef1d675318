"""Several processes: who does what, attention over shared sequences, and the update of the weights.

1. ``topology``: the processes as a grid of data and sequence; each one's rows of a batch.
   ``join``: joining and leaving them; ``together``: what they have to agree about; ``waiting``: how
   long they wait for each other.
2. ``share``: which samples each process reads.
3. ``ulysses``: attention over sequences that several processes share.
4. ``engine``: one optimizer step, by one process or by all of them; ``zero``: the same with states,
   gradients and weights shared out (ZeRO, by DeepSpeed).
"""

from mst_train.parallel.engine import (
    Engine,
    NativeEngine,
    build_engine,
    check_engine,
    partition,
    whole_parameters,
)
from mst_train.parallel.join import joined, lost_contact
from mst_train.parallel.share import SharedSequences
from mst_train.parallel.together import Guard, check_same, together, told_once
from mst_train.parallel.topology import Topology, check_degree, grid
from mst_train.parallel.ulysses import UlyssesAttention
from mst_train.parallel.waiting import WAITING

__all__ = [
    "WAITING",
    "Engine",
    "Guard",
    "NativeEngine",
    "SharedSequences",
    "Topology",
    "UlyssesAttention",
    "build_engine",
    "check_degree",
    "check_engine",
    "check_same",
    "grid",
    "joined",
    "lost_contact",
    "partition",
    "together",
    "told_once",
    "whole_parameters",
]
