"""Several processes on this machine for one test, and no test that waits for ever.

They are forked from one that has imported what they need, so that they start at once.
"""

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import torch

IMPORTED = ["torch", "torch._dynamo", "mst_train.run.train", "deepspeed"]
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one, and says so

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(IMPORTED)


def run(function, world, folder, /, timeout=600, cwd=None, **arguments):
    """What ``function(**arguments)`` returns in each of ``world`` processes, by rank.

    Their environment is as torchrun makes it. If one fails, or time is up, all are ended and the
    test fails with what they wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "LOCAL_WORLD_SIZE": str(world),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        FORKING.Process(
            target=_one,
            args=(function, arguments, rank, folder, environment, cwd or Path.cwd()),
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            failed = any(process.exitcode for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        in_time = not any(process.is_alive() for process in processes)
        for process in processes:
            with contextlib.suppress(ValueError, AttributeError):  # one that was never started
                process.kill()
                process.join()
    if not in_time or any(process.exitcode for process in processes):
        outputs = [
            f"--- rank {rank}, exit status {process.exitcode}\n"
            + (folder / f"{rank}.log").read_text()[-3000:]
            for rank, process in enumerate(processes)
        ]
        raise AssertionError("\n".join(["processes failed or ran out of time", *outputs]))
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _one(function, arguments, rank, folder, environment, cwd):
    """What one of the processes does."""
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(cwd)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before is no garbage: to look through it is to copy it
    torch.save(function(**arguments), folder / f"{rank}.pt")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
