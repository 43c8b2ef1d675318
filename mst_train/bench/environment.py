"""Where a measurement was made: machine, versions, commit; and the device made ready for it."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mst_kernels import set_backend
from mst_train.config import Config
from mst_train.errors import UserError

PEERS = ("transformers", "deepspeed", "liger-kernel", "cut-cross-entropy", "flash-attn")


def prepare_device(config: Config) -> torch.device:
    """The device to measure on, with the threads and kernels that are configured."""
    if config.bench.threads is not None:
        torch.set_num_threads(config.bench.threads)
    try:
        set_backend(config.kernel.backend)
    except ValueError as error:
        raise UserError(
            f"kernel.backend={config.kernel.backend} cannot be used: {error}"
        ) from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(config: Config) -> torch.dtype:
    """The type of weights and activations."""
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def describe(device: torch.device) -> dict[str, Any]:
    """What to know of a measurement: command, date, commit, hardware and versions."""
    return {
        "command": shlex.join(["python", "-m", "mst_train.bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "hardware": _hardware(device),
        "versions": _versions(),
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_bytes"] = properties.total_memory
    return hardware


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    for package in ("mst-train", "triton", *PEERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    """The commit of the code, "-dirty" added where files have changed since."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
