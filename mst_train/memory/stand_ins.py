"""What takes the place of a device's own code in a simulated step.

Each takes the memory that what it stands for takes, at the same moments, and computes nothing.
"""

from typing import Any

import torch
from torch import Tensor

from mst_train.memory.counter import StepCounter, attention_flops
from mst_train.mst import Documents, Scores, attend
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN
from mst_train.optim import HostOptimizer


class SimulatedHostOptimizer(HostOptimizer):
    """The host's AdamW by torch, which works on tensors without data as CPUAdam does not."""

    def _build_adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [w]} for w in self._weights.values()], fused=True)

    def begin_step(self, rate: float) -> None:
        pass

    def _state(self, weight: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
        return super()._state(weight, saved) | {"step": saved["step"]}


class SimulatedKernel:
    """Attention on a GPU, as far as memory and work go.

    The backward's workspace is the kernel's own: FlashAttention-2 sums the queries' gradient in
    fp32, has one number per query and head, and holds the gradients of shared keys and values once
    for every query head. cuDNN is taken to need the first two.
    """

    def __init__(self, counter: "StepCounter", name: str, scores: Scores = PLAIN) -> None:
        self.scores = scores
        self.keys_at_once = KEYS_AT_ONCE
        self._counter = counter
        self._name = name
        self._expands_shared_heads = name in ("torch_flash", "flash_attn")

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
        self._counter.attention_forward_flops += flops
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
        self._counter.attention_backward_flops += 2.5 * flops
        workspace = [torch.empty_like(q, dtype=torch.float32), _log_sum_exp(q)]
        if self._expands_shared_heads and q.shape[2] != k.shape[2]:
            workspace += [k.new_empty(*k.shape[:2], *q.shape[2:]) for _ in range(2)]
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        del workspace
        return dq, dk, dv


def _log_sum_exp(q_BSHE: Tensor) -> Tensor:
    batch, sequence, heads, _ = q_BSHE.shape
    return q_BSHE.new_empty(batch, heads, sequence, dtype=torch.float32)


class SimulatedUlysses:
    """Sequence-parallel attention: each process has its rows of all heads, and exchanges them for
    all rows of its heads (DeepSpeed-Ulysses, Jacobs et al. 2023).

    Key-value heads fewer than processes are held by several of them. An exchange has a buffer to
    send from and one to receive in.
    """

    def __init__(self, kernel: SimulatedKernel, degree: int) -> None:
        self._kernel = kernel
        self._degree = degree

    def of(self, scores: Scores) -> "SimulatedUlysses":
        return SimulatedUlysses(self._kernel.of(scores), self._degree)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        q, k, v = (self._exchange(t, self._degree) for t in (q, k, v))
        out = attend(self._kernel, q, k, v)
        return self._exchange(out, 1 / self._degree)

    def _exchange(self, x_BSHE: Tensor, degree: float) -> Tensor:
        batch, sequence, heads, size = x_BSHE.shape
        shape = (batch, int(sequence * degree), max(int(heads / degree), 1), size)
        out: Tensor = _Exchange.apply(x_BSHE, shape)  # type: ignore[no-untyped-call]
        return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        sent = torch.empty_like(x)
        received = x.new_empty(shape)
        del sent
        return received

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        sent = torch.empty_like(dy)
        received = dy.new_empty(ctx.shape)
        del sent
        return received, None
