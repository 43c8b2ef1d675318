"""What takes the place of a device's own code in a simulated step.

Each takes the memory that what it stands for takes, at the same moments, and computes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mst_train.attention.layouts import heads_first
from mst_train.attention.select import Attention, KernelAttention, SdpaAttention
from mst_train.config import Config
from mst_train.distributed.exchange import Exchange, busiest
from mst_train.memory.counter import StepCounter, attention_flops
from mst_train.mst import Documents, Scores
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, AttentionKernel
from mst_train.mst.sharing import SharedSequence, Transport
from mst_train.mst.sharing.transport import Addressed
from mst_train.optim import HostOptimizer


class SimulatedHostOptimizer(HostOptimizer):
    """The host's AdamW by torch, which works on tensors without data as CPUAdam does not."""

    def _build_adamw(self, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [w]} for w in weights], fused=True)

    def set_learning_rate(self, rate: float) -> None:
        pass

    def _state(self, weight: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
        return super()._state(weight, saved) | {"step": saved["step"]}


def without_data(attention: Attention, counter: StepCounter) -> Attention:
    """An attention of torch's own operations as it is, on tensors that have only shapes.

    Its kernel runs the largest of its tiles alone, so what it computes is counted by the formula;
    and what torch would choose for real tensors is taken in its place.
    """

    def of(scores: Scores) -> Attention:
        return without_data(attention.of(scores), counter)

    if isinstance(attention, SdpaAttention):
        return SimulatedSdpa(attention.scores, of)
    assert isinstance(attention, KernelAttention)
    return KernelAttention(CountedKernel(attention.kernel, counter), of)


class CountedKernel:
    """A kernel, its operations counted by the formula rather than one by one."""

    def __init__(self, kernel: AttentionKernel, counter: StepCounter) -> None:
        self.scores = kernel.scores
        self.keys_at_once = kernel.keys_at_once
        self._kernel = kernel
        self._counter = counter

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        flops = attention_flops(q, k, causal, self.scores.window)
        self._counter.work["attention_forward_flops"] += flops
        with self._counter.counted_elsewhere():
            return self._kernel.forward(q, k, v, documents, causal)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flops = attention_flops(q, k, causal, self.scores.window)
        self._counter.work["attention_backward_flops"] += 2.5 * flops
        with self._counter.counted_elsewhere():
            return self._kernel.backward(dout, q, k, v, out, lse, documents, causal)


class SimulatedSdpa(SdpaAttention):
    """Torch's ``scaled_dot_product_attention`` as it is with data: without, it takes the formula.

    What it takes on a CPU; on other devices that needs no less than theirs.
    """

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out_BHSE: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first(q, k, v), 0.0, True, scale=self.scores.scale
        )[0]
        return out_BHSE.transpose(1, 2)


class SimulatedKernel:
    """Attention on a GPU, as far as memory and work go.

    The backward's workspace is the kernel's own. All sum the queries' gradient in fp32 and have one
    number per query and head. Where query heads share keys and values, FlashAttention-2 and cuDNN
    hold the gradients of these once for every query head, and FlashAttention-3 and 4 in fp32. Which
    one "auto" will take is not known: the first need more.
    """

    def __init__(self, counter: "StepCounter", name: str, scores: Scores = PLAIN) -> None:
        self.scores = scores
        self.keys_at_once = KEYS_AT_ONCE
        self._counter = counter
        self._name = name
        self._sums_shared_heads_in_fp32 = name in ("flash_attn_3", "flash_attn_4")

    def of(self, scores: Scores) -> "SimulatedKernel":
        """The same with other scores."""
        return SimulatedKernel(self._counter, self._name, scores)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        flops = attention_flops(q, k, causal, self.scores.window)
        self._counter.work["attention_forward_flops"] += flops
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return out, _log_sum_exp(q)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flops = attention_flops(q, k, causal, self.scores.window)
        self._counter.work["attention_backward_flops"] += 2.5 * flops
        workspace = [torch.empty_like(q, dtype=torch.float32), _log_sum_exp(q)]
        if q.shape[2] != k.shape[2] and self._sums_shared_heads_in_fp32:
            workspace += [torch.empty_like(t, dtype=torch.float32) for t in (k, v)]
        elif q.shape[2] != k.shape[2]:
            workspace += [k.new_empty(*k.shape[:2], *q.shape[2:]) for _ in range(2)]
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        del workspace
        return dq, dk, dv


def _log_sum_exp(q_BSHE: Tensor) -> Tensor:
    batch, sequence, heads, _ = q_BSHE.shape
    return q_BSHE.new_empty(batch, heads, sequence, dtype=torch.float32)


@dataclass(frozen=True)
class SimulatedTransport(Transport):
    """``GroupTransport`` of one of several processes, to and from which nothing travels.

    machines: that of each process. own: the number of this one. counter: hears of what would
    travel.
    """

    machines: Sequence[int]
    own: int
    counter: "StepCounter"

    @property
    def processes(self) -> int:
        return len(self.machines)

    @property
    def rank(self) -> int:
        return self.own

    def carry(self, outgoing: Addressed, incoming: Addressed) -> Callable[[], None]:
        under_way = [outgoing, incoming]
        awaited = self.counter.exchange(
            *(max(self._bytes(tensors, here) for tensors in under_way) for here in (True, False))
        )

        def wait() -> None:
            awaited()
            under_way.clear()

        return wait

    def _bytes(self, tensors: Addressed, here: bool) -> int:
        """To or from the processes of this machine, or of others."""
        return sum(
            tensor.nbytes
            for process, tensor in tensors
            if (self.machines[process] == self.machines[self.own]) == here
        )


def simulated_sharing(config: Config, exchange: Exchange, counter: StepCounter) -> SharedSequence:
    """The part in shared sequences of the process that holds the most of others."""
    places = busiest(config, exchange)
    machines = [rank // exchange.per_machine for rank in range(places.processes)]
    first = places.node * places.heads
    return SharedSequence(
        places,
        SimulatedTransport(machines[first : first + places.heads], places.rank - first, counter),
        SimulatedTransport(machines[places.rank - first :: places.heads], places.node, counter),
        exchange.keys_at_once,
    )
