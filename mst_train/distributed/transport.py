"""What carries the tensors of a shared sequence: torch's process groups."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from mst_train.distributed.comm_timer import WAITING
from mst_train.mst.sharing import Transport
from mst_train.mst.sharing.transport import Addressed


@dataclass(frozen=True)
class GroupTransport(Transport):
    """The processes of a group; one alone for None."""

    group: "dist.ProcessGroup | None"

    @property
    def processes(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def carry(self, outgoing: Addressed, incoming: Addressed) -> Callable[[], None]:
        group = self.group
        assert group is not None
        operations = [
            dist.P2POp(direction, tensor, dist.get_global_rank(group, process), group)
            for direction, tensors in ((dist.irecv, incoming), (dist.isend, outgoing))
            for process, tensor in tensors
            if tensor.numel()
        ]
        if not operations:
            return lambda: None
        device = operations[0].tensor.device
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            with WAITING.measured(device):
                for work in works:
                    work.wait()

        return wait
