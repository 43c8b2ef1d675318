"""Joining the processes that torchrun has started, and leaving them."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from mst_train.config import Config, leaves
from mst_train.distributed.guard import check_same, together
from mst_train.distributed.topology import Topology, check_degree, exchange_timeout, grid
from mst_train.environment import code_fingerprint
from mst_train.errors import Ending, LostContact, TrainingError, UserError
from mst_train.rendezvous.dist_env import (
    local_rank,
    local_world_size,
    on_one_machine,
    rank,
    world_size,
)
from mst_train.rendezvous.store import connect, listen, serve

LEAVING = timedelta(hours=6)
"""How long they wait for the first to finish the run's records, which W&B may have to upload."""

MEETING = timedelta(minutes=15)
"""How long processes wait for each other to start."""

REFUSAL = timedelta(seconds=10)
"""How long one that has nothing to start with waits for the others to be as badly off."""


@contextmanager
def init_distributed(config: Config) -> Iterator[Topology]:
    """Join the processes that torchrun has started, and leave them at the end.

    Communication is NCCL's on GPUs, one GPU for each process of a machine, and gloo's elsewhere. A
    process that is alone joins nobody.

    Raises UserError where the processes differ in their settings or their code, or cannot share the
    work as configured; TrainingError where one waits in vain for another, longer than
    parallel.timeout_minutes or because that one has gone.
    """
    world, device = world_size(), _device()
    if world == 1:
        check_degree(config, world)
        yield Topology(device=device)
        return
    timeout, in_contact = exchange_timeout(config), True
    try:
        store = _store(world, MEETING)
        if on_one_machine():
            for library in ("GLOO", "NCCL"):
                os.environ[f"{library}_SOCKET_IFNAME"] = "lo"
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank(),
            world_size=world,
            timeout=timeout,
            device_id=device if on_gpu else None,  # or NCCL would guess at it
        )
    except ValueError as error:
        raise UserError(f"the processes cannot be joined as told: {_reason(error)}") from error
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"the {world} processes do not find each other ({_reason(error)}): see that all "
            f"machines have started theirs, with the same first machine and port"
        ) from error
    try:
        objects = dist.new_group(backend="gloo", timeout=timeout)
        processes = Topology(rank(), world, device=device, object_group=objects)
        leaving = processes.with_timeout(LEAVING)
        settings = {key: str(value) for key, value in leaves(asdict(config))}
        code = {"mst_train's code": code_fingerprint(), "torch": torch.__version__}
        check_same(processes, settings | code)
        with together(processes):
            check_degree(config, world)
        yield grid(processes, config)
        leaving.gather(None)
    except Ending as ending:
        if ending.shared:
            # torchrun ends all as soon as one has failed, and the first has to finish the records.
            with contextlib.suppress(RuntimeError):
                leaving.gather(None)
        raise
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        in_contact = False
        raise LostContact(
            f"another process has failed, or has not answered for parallel.timeout_minutes="
            f"{config.parallel.timeout_minutes:g} ({_reason(error)}): its own message says more. "
            f"The same command continues from the last checkpoint"
        ) from error
    finally:
        if in_contact:  # or this would wait for the one that does not answer
            dist.destroy_process_group()


def told_together(error: UserError) -> UserError:
    """``error``, which ends this process before it could join the others.

    Where all of them have the same, it has no message but on the first. They find each other in the
    launcher's store; where they do not, each tells its own.
    """
    everyone = [f"refused/{process}" for process in range(world_size())]
    own = json.dumps(error.problems)
    with contextlib.suppress(OSError, RuntimeError, UserError):
        store = _store(world_size(), REFUSAL)
        store.set(everyone[rank()], own)
        store.wait(everyone, REFUSAL)
        if rank() == 0:
            store.set("told", "")
        elif all(store.get(process).decode() == own for process in everyone):
            store.wait(["told"], REFUSAL)  # the launcher ends all as soon as one has gone
            error.problems = []
    return error


def _store(world: int, timeout: timedelta) -> Store:
    """Where processes leave each other their addresses: the launcher's, else the first one's."""
    unset = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if unset:
        raise UserError(
            f"WORLD_SIZE={world} is set without {unset[0]}, which torchrun sets too: start several "
            f"processes with launch/torchrun.sh, or one without WORLD_SIZE"
        )
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    found: Store
    if rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        found = serve(listen(address, port), timeout)
    else:
        found = connect(address, port, timeout)
    # A launcher's store outlives the processes that it starts again; those before left addresses.
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"{launch}/{attempt}", found)


def _device() -> torch.device:
    """This process's own GPU where there are GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"{local_world_size()} processes were started on this machine, which has "
            f"{torch.cuda.device_count()} GPUs: start one for each (PROCESSES=N launch/torchrun.sh)"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


def lost_contact(error: Exception) -> bool:
    """Whether an exchange has failed, which torch tells by the class of the error on GPUs alone.

    gloo's messages name its source file, but for one.
    """
    told = ("gloo", "Application timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in told)


def _reason(error: Exception) -> str:
    """What an error says, without the place in gloo's sources before and its advice after it."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[\S+\] ?", "", line).partition(". ")[0].rstrip(".")
