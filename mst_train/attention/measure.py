"""The fastest of several attention kernels, measured where and at the lengths at which it runs.

Which one that is depends on the device, the packages' versions, the heads and the lengths: squares
of queries and keys, which whole sequences and chunks are, and rectangles, which a chunk's queries
and the keys before them are. So the kernels take turns at each kind of call when it first comes,
forward and backward, and the median time decides. Each must first give the formula's numbers on a
small problem.

    kinds of calls     heads, types and scores, and lengths up to the power of two above them
    who is left out    whatever raises, runs out of memory or computes something else; with packed
                       documents, whose lengths are always others, what plans for each length
    time               ROUNDS turns, or SECONDS, whichever ends first, after a first call of each;
                       kernels that are compiled when first called add what that takes
    memory             no more than the call itself and its backward, in the forward, where there
                       is more than enough
    repetition         once per process for each kind of call; a checkpoint has the choices, so
                       that a run goes on with them on a machine like the one that made them
    several processes  each for itself: what they choose differs in rounding alone

Times decide, so two runs may choose differently where kernels are equally fast, and then differ in
rounding. With train.deterministic nothing is measured: the first kernel in the order of
preference that can compute the case is taken.

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

import functools
import importlib.metadata
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mst_train.attention.reference import ReferenceKernel
from mst_train.errors import UserError
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, AttentionKernel, Documents, Scores

log = logging.getLogger(__name__)

TOKENS = 8192
"""The most queries of a measured call, and keys in a square."""

SHORT = 1024
"""Calls with fewer queries or keys are of one kind."""

TOKENS_CHECKED = 256
ROUNDS = 5
SECONDS = 0.3
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
    """What kernels are compared on.

    causal: a square, or with a window the last queries of the keys; else a rectangle. packed:
    whether there are documents, whose lengths vary.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_size: int
    scores: Scores
    causal: bool = True
    packed: bool = False

    @classmethod
    def like(cls, q: Tensor, k: Tensor, scores: Scores, causal: bool, packed: bool) -> "Problem":
        """The problem of a call with these queries and keys."""
        batch, queries, heads, size = q.shape
        heads_and_scores = (heads, k.shape[2], size, scores)
        return cls(q.device, q.dtype, batch, queries, k.shape[1], *heads_and_scores, causal, packed)

    @property
    def kind(self) -> tuple[object, ...]:
        """What it has in common with the problems that it stands for."""
        lengths = [(max(n, SHORT) - 1).bit_length() for n in (self.queries, self.keys)]
        others = (self.heads, self.kv_heads, self.head_size, self.scores, self.causal, self.packed)
        return (self.device.type, self.dtype, self.batch, *lengths, *others)

    def shortened(self, queries: int, keys: int) -> "Problem":
        """The same with so many queries and keys at most, the keys of a square as many."""
        queries, keys = min(self.queries, queries), min(self.keys, keys)
        if self.causal and self.scores.window is None:
            keys = queries
        return replace(self, queries=queries, keys=max(queries, keys))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Documents | None, bool]:
        """q, k, v, the gradient of the result, four documents if packed, and whether it is causal;
        no random state is touched.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        queries, keys = (self.queries, self.heads), (self.keys, self.kv_heads)
        q, k, v, dout = (
            torch.randn(
                (self.batch, *shape, self.head_size),
                generator=generator,
                device=self.device,
                dtype=self.dtype,
            )
            for shape in (queries, keys, keys, queries)
        )
        if not (self.packed and self.causal and self.queries == self.keys):
            return q, k, v, dout, None, self.causal
        tokens = self.batch * self.queries
        ends = {tokens * quarter // 4 for quarter in range(5)}
        ends |= {row * self.queries for row in range(self.batch)}
        documents = Documents(torch.tensor(sorted(ends), dtype=torch.int32))
        return q, k, v, dout, documents, True

    def __str__(self) -> str:
        return (
            f"{self.batch} x {self.queries} queries and {self.keys} keys of {self.dtype} on "
            f"{self.device}, {self.heads} heads and {self.kv_heads} key-value heads of "
            f"{self.head_size}, {self.scores}{'' if self.causal else ', all pairs'}"
            f"{', documents' if self.packed else ''}"
        )


_chosen: dict[str, str] = {}
"""The kernels that this process has chosen, by kinds of calls."""


def choices() -> dict[str, str]:
    """What this process has chosen, for ``keep_to`` in another one."""
    return dict(_chosen)


def keep_to(chosen: Mapping[str, str]) -> None:
    """Choose as another process did, where device and packages are as they were there."""
    _chosen.update(chosen)


@functools.cache
def _installed(device: torch.device) -> str:
    """What tells a device and its packages from others."""
    if device.type != "cuda":
        return f"torch {torch.__version__}"
    found = [torch.cuda.get_device_name(device), f"torch {torch.__version__}"]
    found.append(f"cudnn {torch.backends.cudnn.version()}")
    for package in ("flash-attn", "flash-attn-3", "flash-attn-4"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


@dataclass(eq=False)
class MeasuredKernel:
    """For each kind of call the fastest of some kernels.

    candidates: kernels of the same scores by their names, the preferred first; none has to work.
    for_few_lengths: those that take long for each new length.

    Raises UserError at a call for which none works.
    """

    keys_at_once: ClassVar[int] = KEYS_AT_ONCE
    candidates: Mapping[str, AttentionKernel]
    scores: Scores = PLAIN
    seconds: Seconds = cuda_seconds
    for_few_lengths: Collection[str] = ()
    _packed: bool = field(init=False, default=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        return self._kernel(q, k, documents, causal).forward(q, k, v, documents, causal)

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
        kernel = self._kernel(q, k, documents, causal)
        return kernel.backward(dout, q, k, v, out, lse, documents, causal)

    def _kernel(
        self, q: Tensor, k: Tensor, documents: Documents | None, causal: bool
    ) -> AttentionKernel:
        # Rectangles are given none, and come after the squares that are.
        self._packed |= documents is not None
        problem = Problem.like(q, k, self.scores, causal, self._packed)
        key = f"{problem.kind} {_installed(q.device)}"
        name = _chosen.get(key, "")
        if name not in self.candidates:
            left_out = self.for_few_lengths if self._packed else ()
            candidates = {n: c for n, c in self.candidates.items() if n not in left_out}
            measured = problem.shortened(TOKENS, KEYS_AT_ONCE)
            name = _chosen[key] = fastest(candidates, measured, self.seconds)
        return self.candidates[name]


@torch.no_grad()
def fastest(
    candidates: Mapping[str, AttentionKernel], problem: Problem, seconds: Seconds = cuda_seconds
) -> str:
    """The name of the kernel that is the fastest at a problem, said in the log with all times.

    Under torch's deterministic algorithms that of the first that can compute it.

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

    inputs = problem.inputs()
    for name, kernel in candidates.items():
        attempt(name, partial(_check, kernel, problem))
        attempt(name, partial(_both_passes, kernel, *inputs))
    by_order = torch.are_deterministic_algorithms_enabled()
    began = time.perf_counter()
    for _ in range(0 if by_order else ROUNDS):
        for name, kernel in candidates.items():
            taken = attempt(name, partial(seconds, partial(_both_passes, kernel, *inputs)))
            times[name].append(math.inf if taken is None else taken)
        if time.perf_counter() - began > SECONDS:
            break
    working = [name for name in candidates if name not in left_out]
    reasons = "".join(f"; without {name}: {_reason(e)}" for name, e in left_out.items())
    if not working:
        for error in left_out.values():
            if isinstance(error, torch.OutOfMemoryError):
                raise error
        raise UserError(
            f"kernel.attention=auto found no kernel for {problem}{reasons}: set "
            f"kernel.attention=tiled, which works everywhere"
        )
    if by_order:
        chosen, why = working[0], "the first in order, as train.deterministic asks"
    else:
        medians = {name: statistics.median(times[name]) for name in working}
        chosen = min(medians, key=medians.__getitem__)
        why = ", ".join(f"{name} {median * 1000:.3g} ms" for name, median in medians.items())
    log.info("attention auto: %s for %s (%s%s)", chosen, problem, why, reasons)
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
    causal: bool,
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv)."""
    out, lse = kernel.forward(q, k, v, documents, causal)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, documents, causal)


def _check(kernel: AttentionKernel, problem: Problem) -> None:
    """Raises ArithmeticError where a kernel's results are not the formula's."""
    inputs = problem.shortened(TOKENS_CHECKED, TOKENS_CHECKED).inputs()
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
