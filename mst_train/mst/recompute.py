"""Block recomputation that recomputes only what the backward reads.

``recompute_block`` runs a decoder block and keeps its input; in the backward the block runs again,
to rebuild what autograd had saved (Chen et al. 2016). Plain recomputation runs all of it. Here

- attention may keep its result and log-sum-exp, and hand them over instead of computing them again
  (``keep_attention``; mst/attention.py);
- the re-run ends as soon as the last tensor that autograd had saved is there again;
- so an MLP that comes last has only its input to rebuild, and its products are not computed again
  (mst/mlp.py: autograd saves what the backward reads before the result is computed).

A Llama block then costs 11 MLP products and 3.5 attention forwards a step (the backward counting
2.5), where plain recomputation costs 12 and 4.5.

How: saved-tensor hooks replace each tensor that autograd saves in the forward by a handle. The
first handle that the backward opens triggers the re-run, in which the same hooks collect the same
tensors in the same order. A tensor lives as long as its handle, that is until the backward of the
operation that saved it.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mst_train.mst.attention import KeptResults, keeping
from mst_train.mst.autocast import Autocast
from mst_train.mst.offload import Offload, Stored


# A compiled graph would trace the hooks away. The block itself may be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def recompute_block(
    block: Callable[..., Tensor],
    x: Tensor,
    *arguments: Any,
    keep_attention: bool = True,
    offload: Offload | None = None,
) -> Tensor:
    """``block(x, *arguments)``, keeping for the backward only what is named below.

    Exact: the result is that of calling the block, and so are all gradients. The block must save
    the same tensors in the same order when it runs again: no random numbers, no state that changes.

    Args:
        block: the block, as a function of x and the other arguments.
        x: [..., D], its input.
        arguments: whatever else it takes. Tensors among them stay where they are.
        keep_attention: keep what ``mst.attention.attend`` computed.
        offload: where the kept tensors wait; None: on their device.

    Memory: x, and with ``keep_attention`` attention's result and log-sum-exp. Recomputation: the
    block's forward without its last MLP, and with ``keep_attention`` without attention.

    Raises:
        RuntimeError: in the backward, where the block saved other tensors when it ran again, or
            where x was changed in place in between.
    """
    if not torch.is_grad_enabled():
        return block(x, *arguments)
    frame = Frame(block, x, arguments, keep_attention)
    with keeping(frame.results), saved_tensors_hooks(frame.record, frame.open):
        y = block(x, *arguments)
    frame.forward_done(offload)
    return y


class _Handle:
    """Stands for a saved tensor between forward and backward."""

    __slots__ = ("__weakref__",)


class _Rebuilt(BaseException):
    """Everything that autograd had saved is there again: not an error for a block to handle."""


class Frame:
    """One block between its forward and the end of its backward."""

    def __init__(
        self,
        block: Callable[..., Tensor],
        x: Tensor,
        arguments: tuple[Any, ...],
        keep_attention: bool,
    ) -> None:
        self._block = block
        self._arguments = arguments
        self._x = x.detach()
        self._x_requires_grad = x.requires_grad
        self._x_version = x._version
        self._autocast = Autocast.here(x.device)
        self._kept = KeptResults()
        self.results = self._kept if keep_attention else None
        self._stored: Stored | None = None
        self._handles: list[weakref.ref[_Handle]] = []
        self._forms: list[tuple[torch.Size, torch.dtype]] = []
        self._tensors: weakref.WeakKeyDictionary[_Handle, Tensor] = weakref.WeakKeyDictionary()
        self._replaying = False
        self._replayed = 0

    def record(self, tensor: Tensor) -> _Handle:
        """In the forward: a handle in place of a tensor that autograd saves."""
        handle = _Handle()
        self._handles.append(weakref.ref(handle))
        self._forms.append((tensor.shape, tensor.dtype))
        return handle

    def forward_done(self, offload: Offload | None) -> None:
        """Send what is kept to where it waits."""
        if offload is not None:
            self._stored = offload.store([self._x, *self._kept.tensors])
            del self._x, self._kept.tensors

    def open(self, handle: _Handle) -> Tensor:
        """In the backward: the tensor that a handle stands for."""
        if not self._replaying:
            self._rerun()
        return self._tensors[handle]

    def _rerun(self) -> None:
        self._replaying = self._kept.running_again = True
        if self._stored is not None:
            (self._x, *self._kept.tensors), self._stored = self._stored.load(), None
        elif self._x._version != self._x_version:
            raise RuntimeError(
                "the input of recompute_block was changed in place between its forward and its "
                "backward: give it a tensor that stays as it is"
            )
        x = self._x.detach().requires_grad_(self._x_requires_grad)
        del self._x
        try:
            hooks = saved_tensors_hooks(self._collect, self.open)
            with torch.enable_grad(), self._autocast.restored(), keeping(self.results), hooks:
                self._block(x, *self._arguments)
        except _Rebuilt:
            return
        raise self._changed("fewer tensors")

    def _changed(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"the block under recompute_block saved {what} when it ran again in the backward: it "
            f"must do the same both times"
        )

    def _collect(self, tensor: Tensor) -> None:
        """In the re-run: the next saved tensor, kept for as long as its handle is."""
        if (tensor.shape, tensor.dtype) != self._forms[self._replayed]:
            raise self._changed("other tensors")
        handle = self._handles[self._replayed]()
        if handle is not None:
            self._tensors[handle] = tensor.detach()
        self._replayed += 1
        if self._replayed == len(self._handles):
            raise _Rebuilt
