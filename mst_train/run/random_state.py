"""The state of every random number generator, set from a seed or carried over in a checkpoint."""

import random
from typing import Any

import numpy as np
import torch

from mst_train.errors import UserError


def seed_everything(seed: int) -> None:
    """Start Python's, NumPy's and torch's generators (all devices') from ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The generators' states, in types that a checkpoint can hold."""
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from ``state``; the GPUs' states only where there are as many GPUs as then.

    Raises UserError where it is none that ``random_state`` has given.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        algorithm, keys, position, *rest = state["numpy"]
        if not 0 <= position <= len(keys):  # NumPy would read what is there
            raise ValueError(f"NumPy's place is {position} of {len(keys)}")
        np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, *rest))
        torch.set_rng_state(state["torch"].clone())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise UserError(
            f"the checkpoint's random.pt is not the state of random number generators ({e}): start "
            f"anew with another run.dir"
        ) from e
