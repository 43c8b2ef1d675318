"""What a user has today: transformers' model, run through the same simulator.

The model is built from its configuration as ``from_pretrained`` would build it, with
FlashAttention-2's memory, its own loss (an fp32 copy of all logits), and with or without its
gradient checkpointing. Optimizer and precision are those of the run that is compared. The sequences
are not packed.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mst_train.config import Config
from mst_train.errors import UserError
from mst_train.memory.counter import StepCounter
from mst_train.memory.devices import Device
from mst_train.memory.fakes import SimulatedKernel
from mst_train.memory.simulated_step import Build
from mst_train.model import Policy
from mst_train.model.hf.config import write_config
from mst_train.mst import Documents, Scores, attend
from mst_train.ranges import BLOCK_RANGE

_ATTENTION = "mst_train_simulated"


def transformers_baseline(*, gradient_checkpointing: bool) -> Build:
    """Builds transformers' model for ``simulate``; raises UserError without the package."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "baselines need the package transformers, which is not installed: "
            "pip install 'mst-train[bench]'"
        ) from error
    return partial(_build, gradient_checkpointing)


def _build(
    gradient_checkpointing: bool,
    config: Config,
    policy: Policy,
    dtype: torch.dtype,
    device: Device,
    counter: StepCounter,
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    _register(counter)
    values = write_config(config.model, sequence_length=config.data.sequence_length)
    settings = AutoConfig.for_model(**values, attn_implementation=_ATTENTION, use_cache=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype).train()
    if gradient_checkpointing:
        enable_checkpointing(model)
    return Baseline(model)


def enable_checkpointing(model: Any) -> None:
    """Switch transformers' activation recomputation on; its method had another name once."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _register(counter: StepCounter) -> None:
    """Make the simulated FlashAttention known to transformers, counting into ``counter``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        kernel = SimulatedKernel(counter, "flash_attn", Scores(window=sliding_window))
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return attend(kernel, q, k, v), None

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)


class Baseline(nn.Module):
    """transformers' model as a training step takes it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        for block in self.blocks:
            block.register_forward_pre_hook(self._block_begins)
            block.register_forward_hook(self._block_ends)
        self._open: list[Any] = []
        self._outputs: Any = None

    @property
    def blocks(self) -> Any:
        """The decoder layers."""
        return self.model.model.layers

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, int]:
        """Its own loss of its own labels.

        What the model returns is held until the next step, as ``outputs`` is in the loops that its
        documentation shows: with the logits in it.
        """
        self._outputs = None
        self._outputs = self.model(input_ids=tokens, labels=tokens, position_ids=positions)
        return self._outputs.loss, 1

    def _block_begins(self, *_: Any) -> None:
        self._open.append(record_function(BLOCK_RANGE).__enter__())

    def _block_ends(self, *_: Any) -> None:
        self._open.pop().__exit__(None, None, None)
