"""Where a result was made: command, date, commit, machine and versions."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PEERS = ("transformers", "deepspeed", "liger-kernel", "cut-cross-entropy", "flash-attn")


def describe(device: torch.device, module: str) -> dict[str, Any]:
    """What to know of what ``python -m module`` gave: command, date, commit, hardware, versions."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "hardware": _hardware(device),
        "versions": _versions(),
    }


@functools.cache
def code_fingerprint() -> str:
    """Stands for the source files of mst_train and its kernels, wherever they are installed."""
    sources = {}
    for package in ("mst_train", "mst_kernels"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        for path in folder.rglob("*.py"):
            sources[f"{package}/{path.relative_to(folder)}"] = path.read_bytes()
    summed = hashlib.sha256()
    for name in sorted(sources):
        summed.update(f"{name}\0{len(sources[name])}\0".encode() + sources[name])
    return summed.hexdigest()[:12]


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


@functools.cache
def _git_commit() -> str | None:
    """The commit of the code, "-dirty" added where files have changed since.

    Asked once, so that results a command writes into the repository do not count as changes.
    """
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
