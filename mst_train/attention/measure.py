"""The fastest of several attention kernels, measured where it will run.

Which one that is depends on the device, the packages' versions and the heads. So it is found out at
the first call, when all of that is known: the kernels that can compute the case take turns at a
small problem of the same heads, types and scores, forward and backward, and the median time
decides. Each must first give the formula's numbers on a smaller problem still.

    who is left out    whatever raises, runs out of memory or computes something else
    time               ROUNDS turns, or SECONDS, whichever ends first, after a first call of each;
                       kernels that are compiled when first called add what that takes
    memory             a batch of one sequence of at most TOKENS: no more than the call itself wants
                       where it is as long, and nothing after the choice
    repetition         once per process for each kind of problem
    several processes  the slowest one's times count, so that all choose the same; they must make
                       their first call together, as they do in training

Times decide, so two runs may choose differently where kernels are equally fast, and then differ in
rounding: name one in kernel.attention to rule that out.

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from mst_train.attention.reference import ReferenceKernel
from mst_train.errors import UserError
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, AttentionKernel, Documents, Scores

log = logging.getLogger(__name__)

TOKENS = 4096
TOKENS_CHECKED = 256
ROUNDS = 5
SECONDS = 0.5
LARGEST_ERROR = 0.05
"""Relative, of a whole tensor; bf16's own rounding stays below 0.01."""

Seconds = Callable[[Callable[[], object]], float]
"""How long some work takes on the device that it is for."""


def cuda_seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Problem:
    """What kernels are compared on: a batch of one, in documents or whole."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    scores: Scores
    documents: bool

    @classmethod
    def like(cls, q: Tensor, k: Tensor, scores: Scores, documents: Documents | None) -> "Problem":
        """The problem of a call with these tensors, shortened to TOKENS."""
        _, sequence, heads, size = q.shape
        tokens = min(sequence, TOKENS)
        rest = (heads, k.shape[2], size, scores, documents is not None)
        return cls(q.device, q.dtype, tokens, *rest)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Documents | None]:
        """q, k, v, the gradient of the result and four documents; no random state is touched."""
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v, dout = (
            torch.randn(
                (1, tokens, heads, self.head_size),
                generator=generator,
                device=self.device,
                dtype=self.dtype,
            )
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        if not self.documents:
            return q, k, v, dout, None
        cu_seqlens = sorted({tokens * quarter // 4 for quarter in range(5)})
        return q, k, v, dout, Documents(torch.tensor(cu_seqlens, dtype=torch.int32))

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens of {self.dtype} on {self.device}, {self.heads} heads and "
            f"{self.kv_heads} key-value heads of {self.head_size}, {self.scores}"
            f"{', documents' if self.documents else ''}"
        )


_fastest: dict[tuple[Problem, tuple[str, ...]], str] = {}


@dataclass(eq=False)
class MeasuredKernel:
    """The fastest of some kernels, which it is from its first call on.

    candidates: kernels of the same scores by their names; none has to work.

    Raises UserError at the first call where none works.
    """

    keys_at_once: ClassVar[int] = KEYS_AT_ONCE
    candidates: Mapping[str, AttentionKernel]
    scores: Scores = PLAIN
    seconds: Seconds = cuda_seconds
    _chosen: AttentionKernel | None = field(init=False, default=None)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        return self._kernel(q, k, documents).forward(q, k, v, documents, causal)

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
        kernel = self._kernel(q, k, documents)
        return kernel.backward(dout, q, k, v, out, lse, documents, causal)

    def _kernel(self, q: Tensor, k: Tensor, documents: Documents | None) -> AttentionKernel:
        if self._chosen is None:
            problem = Problem.like(q, k, self.scores, documents)
            key = (problem, tuple(self.candidates))
            if key not in _fastest:
                _fastest[key] = fastest(self.candidates, problem, self.seconds)
            self._chosen = self.candidates[_fastest[key]]
        return self._chosen


@torch.no_grad()
def fastest(
    candidates: Mapping[str, AttentionKernel], problem: Problem, seconds: Seconds = cuda_seconds
) -> str:
    """The name of the kernel that is the fastest at a problem, said in the log with all times.

    Raises UserError where none can compute it; OutOfMemoryError where memory was what one lacked.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    left_out: dict[str, Exception] = {}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        if name in left_out:
            return None
        try:
            return work()
        except Exception as error:  # packages raise all kinds of them
            left_out[name] = error.with_traceback(None)  # whose frames hold tensors
            return None

    inputs = problem.inputs(problem.tokens)
    for name, kernel in candidates.items():
        attempt(name, partial(_check, kernel, problem))
        attempt(name, partial(_both_passes, kernel, *inputs))
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for name, kernel in candidates.items():
            taken = attempt(name, partial(seconds, partial(_both_passes, kernel, *inputs)))
            times[name].append(math.inf if taken is None else taken)
        if time.perf_counter() - began > SECONDS:
            break
    medians = _of_the_slowest_process(
        {n: math.inf if n in left_out else statistics.median(times[n]) for n in candidates},
        problem.device,
    )
    chosen = min(medians, key=medians.__getitem__)
    reasons = "".join(f"; without {name}: {_reason(e)}" for name, e in left_out.items())
    if math.isinf(medians[chosen]):
        for error in left_out.values():
            if isinstance(error, torch.OutOfMemoryError):
                raise error
        raise UserError(
            f"kernel.attention=auto found no kernel for {problem}{reasons}: set "
            f"kernel.attention=tiled, which works everywhere"
        )
    measured = ", ".join(f"{n} {t * 1000:.3g} ms" for n, t in medians.items() if math.isfinite(t))
    log.info("attention auto: %s for %s (%s%s)", chosen, problem, measured, reasons)
    return chosen


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def _both_passes(
    kernel: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    documents: Documents | None,
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv)."""
    out, lse = kernel.forward(q, k, v, documents)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, documents)


def _check(kernel: AttentionKernel, problem: Problem) -> None:
    """Raises ArithmeticError where a kernel's results are not the formula's."""
    inputs = problem.inputs(TOKENS_CHECKED)
    results, expected = (
        [t.double() for t in _both_passes(one, *inputs)]
        for one in (kernel, ReferenceKernel(problem.scores))
    )
    # A window of one key leaves queries and keys without gradients, so all are compared together.
    for what, part in {"result": slice(1), "lse": slice(1, 2), "gradient": slice(2, 5)}.items():
        actual, truth = (torch.cat([t.flatten() for t in ts[part]]) for ts in (results, expected))
        error = ((actual - truth).norm() / truth.norm()).item()
        if not error <= LARGEST_ERROR:
            raise ArithmeticError(f"its {what} is off by {error:.0%} of the formula's")


def _of_the_slowest_process(medians: dict[str, float], device: torch.device) -> dict[str, float]:
    if not (dist.is_available() and dist.is_initialized()):
        return medians
    times = torch.tensor(list(medians.values()), dtype=torch.float64, device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return dict(zip(medians, times.tolist(), strict=True))
