"""Processes as a grid: world = data x sequence.

The processes of a sequence group read the same samples, and each keeps its own rows of them; the
data groups read different samples. The ranks of a sequence group follow each other, so that they
exchange heads over the fast links inside a node where the node has them all.

    world 4, sequence 2     rank             0  1  2  3
                            data index       0  0  1  1
                            sequence index   0  1  0  1

Weights are the same everywhere, so gradients are summed over all processes, whatever the grid.

Legend: B batch, S sequence, T = S/P rows of a process, P processes that share a sequence.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from mst_train.config import Config
from mst_train.data import Batch
from mst_train.errors import UserError


@dataclass(frozen=True)
class Topology:
    """One process's place among all.

    sequence_group: the process group that shares its sequences; None where it is alone.
    """

    rank: int = 0
    world: int = 1
    sequence_parallel: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sequence_group: "dist.ProcessGroup | None" = None

    @property
    def data_parallel(self) -> int:
        """Groups that read different samples."""
        return self.world // self.sequence_parallel

    @property
    def data_index(self) -> int:
        """Which of these groups this process belongs to."""
        return self.rank // self.sequence_parallel

    @property
    def sequence_index(self) -> int:
        """Which rows of its group's sequences this process has."""
        return self.rank % self.sequence_parallel

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def rows_of(self, batch: Batch) -> Batch:
        """This process's rows of a batch, [B, S] -> [B, T] each.

        Labels were shifted before, so the last row's label is the token that the next process has
        first. Document boundaries stay those of the whole sequences, which attention sees.

        Raises UserError where the length is not a multiple of the degree.
        """
        if self.sequence_parallel == 1:
            return batch
        length = batch.tokens.shape[1]
        if length % self.sequence_parallel:
            raise UserError(
                f"a sequence of {length} tokens cannot be shared by parallel.sequence_parallel="
                f"{self.sequence_parallel} processes: set data.sequence_length to a multiple of it"
            )
        rows = length // self.sequence_parallel
        own = slice(self.sequence_index * rows, (self.sequence_index + 1) * rows)
        return replace(
            batch,
            tokens=batch.tokens[:, own].contiguous(),
            labels=batch.labels[:, own].contiguous(),
            positions=batch.positions[:, own].contiguous(),
        )

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums of these numbers over all processes, in fp64."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world > 1:
            works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in works:
                work.wait()


def check_degree(config: Config, world: int) -> None:
    """Whether ``world`` processes can share the work as configured.

    Key-value heads may be fewer than the processes that share a sequence; query heads may not.

    Raises UserError, with every problem, where they cannot.
    """
    degree, heads = config.parallel.sequence_parallel, config.model.num_heads
    problems = []
    if degree < 1 or world % degree:
        problems.append(
            f"parallel.sequence_parallel={degree} does not divide the number of processes, "
            f"{world}: start a multiple of it (torchrun --nproc_per_node), or change it"
        )
    if degree > 1 and heads % degree:
        problems.append(
            f"parallel.sequence_parallel={degree} does not divide model.num_heads={heads}: in "
            f"attention each process has some of the query heads, at least one"
        )
    if degree > 1 and config.data.sequence_length % degree:
        problems.append(
            f"data.sequence_length={config.data.sequence_length} is not a multiple of "
            f"parallel.sequence_parallel={degree}"
        )
    if problems:
        raise UserError(problems)


def world_size() -> int:
    """How many processes the launcher has started, as torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(config: Config) -> Iterator[Topology]:
    """Join the processes that torchrun has started, and leave them at the end.

    Communication is NCCL's on GPUs, one GPU for each process of a node, and gloo's elsewhere. A
    process that is alone joins nobody.

    Raises UserError where the processes cannot share the work as configured.
    """
    world = world_size()
    check_degree(config, world)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1:
        yield Topology(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield grid(dist.get_rank(), world, config.parallel.sequence_parallel, device)
        dist.barrier()  # nobody leaves while another still waits for it
    finally:
        dist.destroy_process_group()


def grid(rank: int, world: int, sequence_parallel: int, device: torch.device) -> Topology:
    """A process's place, once all have joined: every process calls this, in the same order."""
    own = None
    for first in range(0, world, sequence_parallel):
        ranks = list(range(first, first + sequence_parallel))
        group = dist.new_group(ranks) if sequence_parallel > 1 else None
        own = group if rank in ranks else own
    return Topology(rank, world, sequence_parallel, device, own)
