"""Block recomputation that recomputes only what the backward reads.

``recompute_block`` runs a decoder block and keeps its input; in the backward the block runs again,
to rebuild what autograd had saved (Chen et al. 2016). Plain recomputation runs all of it. Here

- what is in ``keep`` is kept, and handed over instead of being computed again (mst/kept.py);
- the re-run ends as soon as the last tensor that autograd had saved is there again;
- so an MLP that comes last has only its input to rebuild, and its products are not computed again
  (mst/mlp.py: autograd saves what the backward reads before the result is computed).

A Llama block then costs 11 MLP products and 3.5 attention forwards a step (the backward counting
2.5), where plain recomputation costs 12 and 4.5.

How: saved-tensor hooks replace each tensor that autograd saves in the forward by a handle. The
first handle that the backward opens triggers the re-run, in which the same hooks collect the same
tensors in the same order. A tensor lives as long as its handle, that is until the backward of the
operation that saved it.

``torch.utils.checkpoint`` does as much work in as much memory, but does not see that a tensor was
changed in place after it was saved, and its gradients are then wrong (docs/log.md).
"""

import weakref
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from mst_train.mst.kept import ATTENTION, KeptResults, checked_pieces
from mst_train.mst.offload import Offload, Stored
from mst_train.mst.rerun import (
    Rerun,
    leaves,
    owner,
    tensors_of,
    uncached_parametrizations,
    version,
)


# A compiled graph would trace the hooks away. The block itself may be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def recompute_block(
    block: Callable[..., Tensor],
    x: Tensor,
    *arguments: Any,
    keep: Collection[str] = (ATTENTION,),
    offload: Offload | None = None,
) -> Tensor:
    """``block(x, *arguments)``, keeping for the backward only what is named below.

    Exact: the result is that of calling the block, and so are all gradients. The block must do the
    same when it runs again: no state that changes. Random numbers of torch's default generators, as
    dropout's, are drawn again. Changes in place are seen of x, the arguments, the tensors that get
    gradients, those that autograd saves, and where the block is a module or a method of one, its
    buffers and frozen parameters.

    Args:
        block: the block, as a function of x and the other arguments.
        x: [..., D], its input.
        arguments: whatever else it takes. Tensors among them stay where they are.
        keep: names of what else to keep (mst/kept.py) where the block computes it by this package's
            ``attend``, ``linear`` and ``mini_sequence_mlp``.
        offload: where the kept tensors wait; None: on their device.

    Memory: x, and what is in ``keep``. Recomputation: the block's forward without its last MLP, and
    without what is in ``keep``.

    Raises:
        ValueError: an unknown name in ``keep``.
        RuntimeError: where the block changes a tensor in place that it reads. In the backward,
            where one was changed in between, or the block saved other tensors when it ran again.
    """
    if not torch.is_grad_enabled():
        return block(x, *arguments)
    frame = _Frame(block, x, arguments, checked_pieces(keep))
    with uncached_parametrizations(), frame.kept.first(), frame.hooks(frame.record):
        y = block(x, *arguments)
    frame.forward_done(y, offload)
    return y


class _Handle:
    """Stands for a tensor that autograd saved, and holds it from the re-run on."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.version = 0


class _Saved(NamedTuple):
    """What was saved in the forward, for the re-run to do the same."""

    handle: weakref.ref[_Handle]
    shape: torch.Size
    dtype: torch.dtype


class _Rebuilt(BaseException):
    """Everything that autograd had saved is there again: not an error for a block to handle."""


class _Frame:
    """One block between its forward and the end of its backward."""

    def __init__(
        self,
        block: Callable[..., Tensor],
        x: Tensor,
        arguments: tuple[Any, ...],
        keep: frozenset[str],
    ) -> None:
        self._block = block
        self._arguments = arguments
        self._x = x.detach()
        self._x_requires_grad = x.requires_grad
        self._rerun = Rerun("recompute_block", x.device)
        self._rerun.watch("x", self._x)
        self._inputs = _tensors_in((x, arguments))
        for tensor in self._inputs[1:]:
            self._rerun.watch("an argument", tensor)
        module = getattr(block, "__self__", block)
        for name, tensor in tensors_of(module.modules() if isinstance(module, nn.Module) else ()):
            # Others' gradients may come, and they be updated, before this block runs again.
            if not tensor.requires_grad:
                self._rerun.watch(name, tensor)
        self.kept = KeptResults(keep, self._rerun.watch)
        self._kept_tensors: list[Tensor] = []
        self._stored: Stored | None = None
        self._saved: list[_Saved] = []
        self._rebuilt = 0

    def hooks(self, save: Callable[[Tensor], Any]) -> saved_tensors_hooks:
        """The context of a run, forward or again; ``save`` gets what autograd would save."""
        return saved_tensors_hooks(save, self.open)

    def record(self, tensor: Tensor) -> _Handle:
        """In the forward: a handle in place of a tensor that autograd saves."""
        self._rerun.watch("a tensor that autograd saved", owner(tensor))
        handle = _Handle()
        self._saved.append(_Saved(weakref.ref(handle), tensor.shape, tensor.dtype))
        return handle

    def forward_done(self, y: Any, offload: Offload | None) -> None:
        """Send what is kept to where it waits; ``y`` is the block's result."""
        if not self._saved:  # nothing will run again
            return
        self._rerun.forward_done()
        for leaf in leaves(_tensors_in(y), after=self._inputs):
            self._rerun.watch("a tensor that gets a gradient", leaf)
        del self._inputs
        self._kept_tensors = self.kept.take()
        if offload is not None:
            self._stored = offload.store([self._x, *self._kept_tensors])
            del self._x, self._kept_tensors

    def open(self, handle: _Handle) -> Tensor:
        """In the backward: the tensor that a handle stands for."""
        if handle.tensor is None:
            self._run_again()
        tensor = handle.tensor
        assert tensor is not None
        if version(tensor) != handle.version:
            raise RuntimeError(
                f"a tensor {tuple(tensor.shape)} that autograd saved in the block under "
                f"recompute_block was changed in place after that: its gradient would be wrong"
            )
        return tensor

    def _run_again(self) -> None:
        with self._rerun.again(), torch.enable_grad(), self.hooks(self._collect):
            if self._stored is not None:
                (self._x, *self._kept_tensors), self._stored = self._stored.load(), None
            x = self._x.detach().requires_grad_(self._x_requires_grad)
            kept = self._kept_tensors
            del self._x, self._kept_tensors
            try:
                with self.kept.again(kept):
                    self._block(x, *self._arguments)
            except _Rebuilt:
                return
        raise _changed("fewer tensors")

    def _collect(self, tensor: Tensor) -> None:
        """In the re-run: the next saved tensor, kept for as long as its handle is."""
        saved = self._saved[self._rebuilt]
        if (tensor.shape, tensor.dtype) != (saved.shape, saved.dtype):
            raise _changed("other tensors")
        handle = saved.handle()
        if handle is not None:
            handle.tensor, handle.version = tensor.detach(), version(tensor)
        self._rebuilt += 1
        if self._rebuilt == len(self._saved):
            raise _Rebuilt


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        f"the block under recompute_block saved {what} when it ran again in the backward: it "
        f"must do the same both times"
    )


def _tensors_in(values: Any) -> list[Tensor]:
    """The tensors in lists, tuples and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
