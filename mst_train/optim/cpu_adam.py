"""DeepSpeed's AdamW for the host's processors, compiled where it is first asked for."""

import fcntl
import importlib.util
import logging
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mst_train.errors import UserError

log = logging.getLogger(__name__)


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

        with _building_alone("cpu_adam"):
            return DeepSpeedCPUAdam(groups, **options)
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        raise UserError(
            f"optimizer.offload=host cannot be used, because DeepSpeed cannot build its CPUAdam "
            f"here ({cause[0] if cause else type(error).__name__}): install a C++ compiler and "
            f"ninja, or set optimizer.offload=none"
        ) from error


@contextmanager
def _building_alone(name: str) -> Iterator[None]:
    """Around what makes torch build the extension ``name``, if it is not there yet.

    Torch waits for ever for a file that a process leaves when it is killed in a build. This lock
    ends with its process: while it is held, such a file, in a folder of mst_train's, is nobody's.
    """
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    python = sysconfig.get_config_var("SOABI")
    root = Path(given or get_default_build_root()) / f"mst_train-{python}-{torch.__version__}"
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
