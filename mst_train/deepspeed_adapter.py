"""DeepSpeed, as far as it is used here: ZeRO's parts, and AdamW for the host's processors.

Whatever is read of its insides is read in this file alone, as DeepSpeed 0.19 has it: where each
process keeps its parts of states, gradients and fp32 weights, which no function of its gives.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.errors import UserError

log = logging.getLogger(__name__)

INSIDES = {
    "zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "micro_step_id",
        "averaged_gradients",
        "all_grad_tensors",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
    ),
    "bf16_optimizer.BF16_Optimizer": (
        "fp32_groups_gradient_flat_partition",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
    ),
    "zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "averaged_gradients",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "set_local_hp_param",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
}
"""What is used of its optimizers, by their classes in ``deepspeed.runtime``."""


def load(device: torch.device) -> Any:
    """The package, without its messages, for processes that compute on such a device."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Old names of torch's exchanges, which it uses.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # It logs at every step of its start, on every process.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A faster exchange for CPUs, which it would compile at the first start, silently for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroParts:
    """This process's parts of the states, gradients and fp32 weights of an engine of DeepSpeed's.

    Args:
        engine: what ``deepspeed.initialize`` gives, over AdamW.
        shares_weights: whether it is stage 3.
        on_host: whether the parts are on the host.
    """

    def __init__(self, engine: Any, *, shares_weights: bool, on_host: bool) -> None:
        self._optimizer = engine.optimizer
        self._adamw = engine.basic_optimizer
        self._shares_weights = shares_weights
        self._on_host = on_host

    def flat_weights(self) -> Iterator[Tensor]:
        """What AdamW updates: the part of each group of parameters."""
        if self._shares_weights:
            yield from self._optimizer.fp32_partitioned_groups_flat
            return
        for group in self._adamw.param_groups:
            yield from group["params"]

    def gradients(self) -> Iterator[Tensor]:
        """The part of the summed gradient, between the last backward and the step."""
        if self._on_host:
            yield from (flat.grad for flat in self.flat_weights() if flat.grad is not None)
        elif hasattr(self._optimizer, "averaged_gradients"):
            for parts in self._optimizer.averaged_gradients.values():
                yield from parts or ()
        else:  # bf16 weights in stage 1 have another optimizer in DeepSpeed
            yield from self._optimizer.fp32_groups_gradient_flat_partition

    def forget_gradients(self) -> None:
        """Before a step whose micro-batches are not all there is left out."""
        self._optimizer.zero_grad()
        if not self._shares_weights:
            self._optimizer.micro_step_id = (
                -1
            )  # the next micro-batch replaces gradients on the host
        for name in ("averaged_gradients", "all_grad_tensors"):
            parts: dict[int, Any] = getattr(self._optimizer, name, {})
            parts.update(dict.fromkeys(parts))

    def step_count(self) -> float | None:
        """AdamW's; None before its first step."""
        steps = [float(state["step"]) for state in self._adamw.state.values()]
        return steps[0] if steps else None

    def make_states(self, step: float, names: tuple[str, ...]) -> None:
        """States of zeros, for ``set`` to fill."""
        for flat in self.flat_weights():
            self._adamw.state[flat] = {
                "step": torch.tensor(step, device=flat.device),
                **{name: torch.zeros_like(flat) for name in names},
            }

    def link_states(self) -> None:
        """Tell each parameter where its states are.

        DeepSpeed does so once the first group of parameters has states, and forgets the others.
        """
        if not self._shares_weights:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def set(self, parameter: nn.Parameter, value: Tensor, state: str | None, rank: int) -> None:
        """Put a whole tensor where its parts belong: a state, or without its name the weights."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._shares_weights:
            size = parameter.partition_numel()  # type: ignore[attr-defined]
            part = value.flatten()[rank * size :][:size]
            padded = nn.functional.pad(part, (0, size - part.numel()))
            self._optimizer.set_local_hp_param(padded, parameter, state)
        elif state is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, state)

    def round_weights(self) -> None:
        """Stage 3: bring the model's weights up to date with the fp32 ones."""
        for group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape, wherever its parts are."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def cpu_adam(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's CPUAdam, compiled the first time (about a minute)."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "optimizer.offload=host needs the package deepspeed, which is not installed: "
            "pip install 'mst-train[distributed]', or set optimizer.offload=none"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with _building_alone("cpu_adam"), _without_symbols():
            optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **options)
            return optimizer
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        raise UserError(
            f"optimizer.offload=host cannot be used, because DeepSpeed cannot build its CPUAdam "
            f"here ({cause[0] if cause else type(error).__name__}): install a C++ compiler and "
            f"ninja, or set optimizer.offload=none"
        ) from error


@contextmanager
def _without_symbols() -> Iterator[None]:
    """DeepSpeed compiles with a debugger's symbols, which nearly doubles the time it takes."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    given = CPUAdamBuilder.cxx_args
    CPUAdamBuilder.cxx_args = lambda self: [*given(self), "-g0"]
    try:
        yield
    finally:
        CPUAdamBuilder.cxx_args = given


@contextmanager
def _building_alone(name: str) -> Iterator[None]:
    """Around what makes torch build the extension ``name``, if it is not there yet.

    Torch waits for ever for a file that a process leaves when it is killed in a build. This lock
    ends with its process: while it is held, such a file, in a folder of mst_train's, is nobody's.
    """
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    python = sysconfig.get_config_var("SOABI")
    home = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]  # others have headers elsewhere
    kind = f"mst_train-{python}-{torch.__version__}-{home}"
    root = Path(given or get_default_build_root()) / kind
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        if not (folder / f"{name}.so").exists():
            log.info("building DeepSpeed's %s, once: about a minute", name)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
        try:
            yield
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if given is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = given
