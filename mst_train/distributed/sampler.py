"""Which samples a process reads.

A step of one process reads its micro-batches one after the other. With D data groups, each reads
every D-th of them, so that a step of D groups sees the samples that one process sees in D times as
many micro-batches, and a run may go on with another number of processes.

    micro-batches   0  1  2  3  4  5
    data index      0  1  0  1  0  1
"""

from mst_train.data import Sequences
from mst_train.data.packing import Sequence
from mst_train.distributed.topology import Topology


class SharedSequences(Sequences):
    """Training sequences as one data group's loader sees them: its own micro-batches alone.

    Args:
        sequences: all of them.
        micro_batch_size: sequences in a micro-batch, as the loader takes them.
        position: sequences that all groups have consumed before. The loader itself starts at 0.
    """

    def __init__(
        self, sequences: Sequences, topology: Topology, micro_batch_size: int, position: int
    ) -> None:
        self.sequence_length = sequences.sequence_length
        self._sequences = sequences
        self._groups, self._own = topology.data_parallel, topology.data_index
        self._micro_batch_size = micro_batch_size
        self._start = position

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self._sequences[index]

    def drawn(self, position: int, seed: int) -> int:
        micro_batch, row = divmod(position, self._micro_batch_size)
        micro_batch = micro_batch * self._groups + self._own
        return self._sequences.drawn(self._start + micro_batch * self._micro_batch_size + row, seed)

    def position(self, consumed: int) -> int:
        """Sequences that all groups have consumed when this one's loader says ``consumed``."""
        return self._start + consumed * self._groups
