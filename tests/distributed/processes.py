"""Several processes on this machine for one test, and no test that waits for ever.

Run as a script, this is one of the processes: ``processes.py MODULE FUNCTION FOLDER``.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def run(function, world, folder, /, timeout=600, cwd=None, **arguments):
    """What ``function(**arguments)`` returns in each of ``world`` processes, by rank.

    They are started as torchrun starts them. If one fails, or time is up, all are ended and the
    test fails with what they wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    port = free_port()
    processes = [start(function, rank, world, port, folder, cwd) for rank in range(world)]
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        in_time = all(process.poll() is not None for process in processes)
        for process in processes:
            process.kill()
            process.wait()
    if not in_time or any(process.returncode for process in processes):
        outputs = [
            f"--- rank {rank}, exit status {process.returncode}\n"
            + (folder / f"{rank}.log").read_text()[-3000:]
            for rank, process in enumerate(processes)
        ]
        raise AssertionError("\n".join(["processes failed or ran out of time", *outputs]))
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def start(function, rank, world, port, folder, cwd=None):
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, function.__module__, function.__name__, str(folder)]
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=cwd
        )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main():
    module, function, folder = sys.argv[1:]
    sys.path.insert(0, str(HERE))
    torch.set_num_threads(1)
    arguments = json.loads((Path(folder) / "arguments.json").read_text())
    result = getattr(importlib.import_module(module), function)(**arguments)
    torch.save(result, Path(folder) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
