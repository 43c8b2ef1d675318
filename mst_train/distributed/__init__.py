"""Several processes: who does what, what they have to agree about, and attention over sequences
that they share.

1. ``init``: joining the others and leaving them.
2. ``topology``: the processes as a grid of data and sequence; each one's part of a batch.
3. ``guard``: errors that all of them have to hear of; ``comm_timer``: how long they wait for each
   other.
4. ``sampler``: which samples each process reads.
5. ``exchange``: what the processes that share a sequence exchange; ``transport``: what carries it.
"""

from mst_train.distributed.comm_timer import WAITING
from mst_train.distributed.guard import Guard, check_same, together, told_once
from mst_train.distributed.init import init_distributed, lost_contact
from mst_train.distributed.sampler import SharedSequences
from mst_train.distributed.topology import Topology, check_degree, grid

__all__ = [
    "WAITING",
    "Guard",
    "SharedSequences",
    "Topology",
    "check_degree",
    "check_same",
    "grid",
    "init_distributed",
    "lost_contact",
    "together",
    "told_once",
]
