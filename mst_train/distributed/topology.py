"""Processes as a grid: world = data x sequence.

The processes of a sequence group read the same samples, and each keeps its own part of them; the
data groups read different samples. The ranks of a sequence group follow each other, so that they
exchange over the fast links inside a machine where the machine has them all.

    world 4, sequence 2     rank             0  1  2  3
                            data index       0  0  1  1
                            place in it      0  1  0  1

Weights are the same everywhere, so gradients are summed over all processes, whatever the grid.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mst_train.config import Config
from mst_train.data import IGNORED, Batch
from mst_train.distributed.comm_timer import WAITING
from mst_train.distributed.exchange import choose_exchange
from mst_train.distributed.transport import GroupTransport
from mst_train.errors import UserError
from mst_train.mst.sharing import Places, SharedSequence
from mst_train.rendezvous.dist_env import local_world_size

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """One process's place among all.

    sharing: its part in the sequences that it shares; None where it has them to itself.
    object_group: all processes, for what is not a tensor; None where it is alone.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharing: SharedSequence | None = None
    object_group: "dist.ProcessGroup | None" = None

    @property
    def sequence_parallel(self) -> int:
        """Processes that share a sequence."""
        return 1 if self.sharing is None else self.sharing.places.processes

    @property
    def length_multiple(self) -> int:
        """What the length of sequences has to be a multiple of."""
        return 1 if self.sharing is None else self.sharing.places.multiple

    @property
    def data_parallel(self) -> int:
        """Groups that read different samples."""
        return self.world // self.sequence_parallel

    @property
    def data_index(self) -> int:
        """Which of these groups this process belongs to."""
        return self.rank // self.sequence_parallel

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def part_of(self, batch: Batch) -> Batch:
        """This process's part of a batch's sequences, [B, S] -> [B, L] each.

        Labels were shifted before, so a last token's label is the token that another process has.
        Document boundaries stay those of the whole sequences, which attention sees.

        Raises UserError where the length is not a multiple of ``length_multiple``.
        """
        if self.sharing is None:
            return batch
        length = batch.tokens.shape[1]
        if length % self.length_multiple:
            raise UserError(
                f"a sequence of {length} tokens cannot be shared by parallel.sequence_parallel="
                f"{self.sequence_parallel} processes: set data.sequence_length to a multiple of "
                f"{self.length_multiple}"
            )
        return replace(
            batch,
            tokens=self.sharing.own(batch.tokens),
            labels=self.sharing.own(batch.labels),
            positions=self.sharing.own(batch.positions),
        )

    def shared(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This process's part of the batches of its data group, which takes every D-th one.

        All processes get equally many, as exchanges need: a group for which none is left gets one
        of another group without labels.
        """
        batches = iter(batches)
        while turn := list(islice(batches, self.data_parallel)):
            if self.data_index < len(turn):
                yield self.part_of(turn[self.data_index])
            else:
                labels = torch.full_like(turn[0].labels, IGNORED)
                yield self.part_of(replace(turn[0], labels=labels))

    def from_first(self, value: T) -> T:
        """What the first process has given, as ``gather`` gives it."""
        return self.gather(value if self.is_rank_zero else None)[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """What every process has given, by rank.

        It travels as JSON, whose tuples are lists: a pickle would run what anyone sends who gets
        between the processes.
        """
        if self.world == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([own.numel()]), group=self.object_group)
        longest = max(size.item() for size in sizes)
        texts = [torch.empty(int(longest), dtype=torch.uint8) for _ in range(self.world)]
        own = functional.pad(own, (0, int(longest) - own.numel()))
        dist.all_gather(texts, own, group=self.object_group)
        return [
            json.loads(text[: int(size)].numpy().tobytes())
            for text, size in zip(texts, sizes, strict=True)
        ]

    def with_timeout(self, longest: timedelta) -> "Topology":
        """The same processes with another connection for objects, on which they wait longer for
        each other, and which a thread may use for itself. All processes call this together.
        """
        if self.world == 1:
            return self
        return replace(self, object_group=dist.new_group(backend="gloo", timeout=longest))

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums of these numbers over all processes, in fp64."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with WAITING.measured(self.device):
            dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world > 1:
            with WAITING.measured(self.device):
                works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
                for work in works:
                    work.wait()


def check_degree(config: Config, world: int) -> None:
    """Whether ``world`` processes are whole groups that share sequences; UserError where not."""
    degree = config.parallel.sequence_parallel
    if degree < 1 or world % degree:
        raise UserError(
            f"parallel.sequence_parallel={degree} does not divide the number of processes, "
            f"{world}: start a multiple of it (PROCESSES=N launch/torchrun.sh), or change it"
        )


def grid(processes: Topology, config: Config) -> Topology:
    """The processes with the sequence groups that ``config`` asks for; all call this together."""
    degree = config.parallel.sequence_parallel
    if degree == 1:
        return replace(processes, sharing=None)
    exchange = choose_exchange(config, local_world_size(), processes.device.type)
    heads, keys = range(exchange.heads), range(exchange.keys)
    own: dict[str, dist.ProcessGroup | None] = {"heads": None, "keys": None}
    for first in range(0, processes.world, degree):
        nodes = [[first + node * exchange.heads + place for place in heads] for node in keys]
        of_keys = [list(ranks) for ranks in zip(*nodes, strict=True)]
        for name, groups in (("heads", nodes), ("keys", of_keys)):
            for ranks in groups if len(groups[0]) > 1 else ():
                group = dist.new_group(ranks, timeout=exchange_timeout(config))
                own[name] = group if processes.rank in ranks else own[name]
    sharing = SharedSequence(
        Places(exchange.heads, exchange.keys, processes.rank % degree),
        GroupTransport(own["heads"]),
        GroupTransport(own["keys"]),
        exchange.keys_at_once,
    )
    return replace(processes, sharing=sharing)


def exchange_timeout(config: Config) -> timedelta:
    """How long an exchange between processes may take."""
    return timedelta(minutes=config.parallel.timeout_minutes)
