"""The processes of one machine, for launch/torchrun.sh: torch's agent starts and watches them.

    torchrun.py NODES NODE_RANK ADDRESS PORT PROCESSES RESTARTS STOP_SECONDS ARGUMENT ...

What torchrun itself does otherwise: its store listens on all addresses, and with --standalone it
unpickles what anyone has written there; its exit status is always 1; it starts again what was
stopped on purpose; machines that were told different things go on together.

Here the store listens on ADDRESS alone, on machine 0, for as long as the launcher there runs. The
exit status is that of the process that failed first, 128 + N where signal N ended it, and 128 + N
where this launcher got signal N: it has then passed it on and waited for the processes,
STOP_SECONDS at most.
"""

import contextlib
import errno
import json
import logging
import os
import re
import socket
import sys
import time
import uuid
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mst_train.rendezvous import store
from mst_train.rendezvous.dist_env import LAUNCHER

FINAL = (0, 2, 130, 138, 143)
"""Success, something given that cannot be, a signal: nothing to start again for."""

PATIENCE = 900
"""Seconds for the machines to meet; a cluster may still be starting them."""

SILENCE = 5
"""Seconds after which one that waits says for what."""

GRACE = 10
"""Seconds that processes have to end by themselves after those of another machine were refused."""

NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9.])?")

ANSWER = timedelta(seconds=60)
"""How long the store may take to answer."""


class Refused(Exception):
    """Something given to this machine or another cannot be: status 2."""


class Lost(Exception):
    """The machines do not find each other: status 1."""


class Machine:
    """This machine among those of the job, and the store in which they meet."""

    def __init__(self, nodes: int, rank: int, address: str, port: int, restarts: int) -> None:
        self.nodes, self.rank = nodes, rank
        self._settings = {"NODES": nodes, "RESTARTS": restarts}
        self._since, self._said = time.monotonic(), ""
        self.address, self.port = self._resolve(address), port
        if rank == 0:
            listener = self._listen(address)
            self.port = listener.getsockname()[1]
            self.store: TCPStore = store.serve(listener, ANSWER)
            self.store.set("settings", json.dumps(self._settings))
        else:
            self.store = self._connect()
        self.store.add("come", 1)

    def meet(self, attempt: str) -> None:
        """Wait until all machines have come for this attempt and were told the same.

        Machine 0 decides, and all learn what. A machine that comes back, because its launcher was
        started again, takes its own place.
        """
        self._since = time.monotonic()
        while True:
            try:
                if self._admitted(PrefixStore(attempt, self.store)):
                    return
                problem = "machine 0 is in a job that has begun without this one"
            except DistError as error:
                problem = f"machine 0 has gone ({_reason(error)})"
            if attempt != _name(0):
                raise Lost(problem)
            self._wait(problem)  # for machine 0 to be started again, too
            self.store = self._connect()

    def refused(self) -> bool:
        """Whether the processes of a machine have found something that cannot be."""
        try:
            return self.store.check(["refused"])
        except DistError:  # machine 0 has ended: that the processes notice by themselves
            return False

    def leave(self, status: int) -> None:
        """Say how this machine ends. Machine 0 serves the store until others have heard of it."""
        if self.nodes == 1:
            return
        deadline = time.monotonic() + GRACE + 5
        try:
            if status == 2:
                self.store.set("refused", "")
            self.store.add("gone", 1)
            while self.rank == 0 and status == 2 and time.monotonic() < deadline:
                if self.store.add("gone", 0) >= self.store.add("come", 0):
                    break
                time.sleep(0.1)
        except DistError:
            pass

    def _resolve(self, given: str) -> str:
        """The address that a name stands for."""
        if not _is_address(given) and not NAME.fullmatch(given):
            raise Refused(
                f"MASTER_ADDR={given} is neither an address nor a machine's name: set it to those "
                f"of machine 0 (its port is MASTER_PORT)"
            )
        while True:
            try:
                found = socket.getaddrinfo(given, None, type=socket.SOCK_STREAM)
                return str(found[0][4][0])
            except (OSError, UnicodeError) as error:
                self._wait(f"MASTER_ADDR={given} is not known ({_reason(error)})")

    def _listen(self, given: str) -> socket.socket:
        own = ip_address(self.address)
        if self.nodes > 1 and own.is_loopback and given not in (self.address, "localhost"):
            raise Refused(
                f"MASTER_ADDR={given} is {self.address} here, which other machines do not reach: "
                f"set it to this machine's address in their network"
            )
        try:
            return store.listen(self.address, self.port)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise Refused(
                    f"MASTER_ADDR={given} is no address of this machine, which is machine 0 by "
                    f"NODE_RANK=0"
                ) from error
            raise Refused(
                f"MASTER_PORT={self.port} cannot be used at {self.address} ({error.strerror}): "
                f"set it to a free port, on all machines"
            ) from error

    def _connect(self) -> TCPStore:
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=5).close()
                return store.connect(self.address, self.port, ANSWER)
            except (OSError, DistError) as error:
                self._wait(f"nobody answers at {self.address}, port {self.port} ({_reason(error)})")

    def _admitted(self, attempt: PrefixStore) -> bool:
        """Whether machine 0 has taken this machine into the attempt."""
        first = json.loads(self._get(self.store, "settings", "machine 0 has"))
        own = {"name": socket.gethostname(), "visit": uuid.uuid4().hex}
        text, place = json.dumps(own), f"machine/{self.rank}"
        problems = [
            f"{name}={first[name]} on machine 0 and {name}={value} on machine {self.rank}"
            for name, value in self._settings.items()
            if value != first[name]
        ]
        if problems:  # said before its place is taken: machine 0 decides when all are
            attempt.set("problem", ", ".join(problems))
        other = json.loads(attempt.compare_set(place, "", text))
        if other["name"] != own["name"]:
            problems.append(f"NODE_RANK={self.rank} on both {other['name']} and {own['name']}")
        if problems:
            attempt.set("problem", ", ".join(problems))
        elif other != own:  # a launcher before this one
            attempt.set(place, text)
        if self.rank == 0:
            attempt.set("decision", json.dumps(self._decide(attempt)))
        try:
            decision = json.loads(self._get(attempt, "decision", "the others have"))
        except BaseException:  # whoever leaves before it is decided is not waited for by a place
            with contextlib.suppress(DistError):
                attempt.compare_set(place, text, "")
            raise
        if problems or "problem" in decision:
            problem = ", ".join(problems) or decision["problem"]
            raise Refused(f"{problem}: start all machines with the same")
        return decision["members"][self.rank] == own

    def _decide(self, attempt: PrefixStore) -> dict[str, Any]:
        """The members of the attempt, by rank; or the first problem that came."""
        places = [f"machine/{rank}" for rank in range(self.nodes)]
        while missing := [
            rank
            for rank, place in enumerate(places)
            if not attempt.check([place]) or not attempt.get(place)
        ]:
            if attempt.check(["problem"]):
                break
            self._wait(f"of {self.nodes} machines {', '.join(map(str, missing))} have not come")
        if attempt.check(["problem"]):
            return {"problem": attempt.get("problem").decode()}
        return {"members": [json.loads(attempt.get(place)) for place in places]}

    def _get(self, where: Store, key: str, who: str) -> str:
        while not where.check([key]):
            self._wait(f"{who} not come")
        return where.get(key).decode()

    def _wait(self, problem: str) -> None:
        waited = time.monotonic() - self._since
        if waited > PATIENCE:
            raise Lost(f"{problem} for {PATIENCE // 60} minutes")
        if waited > SILENCE and problem != self._said:
            self._said = problem
            _tell(f"waiting: {problem}")
        time.sleep(0.2)


class Meeting(RendezvousHandler):
    """One attempt's meeting of the machines, as torch's agent asks for it."""

    def __init__(self, machine: Machine, attempt: str) -> None:
        self._machine, self._attempt = machine, attempt
        self._asked = 0
        self._refused: float | None = None

    use_agent_store = True  # by the processes, too

    def next_rendezvous(self) -> RendezvousInfo:
        machine = self._machine
        machine.meet(self._attempt)
        return RendezvousInfo(
            PrefixStore(f"{self._attempt}/agents", machine.store),
            machine.rank,
            machine.nodes,
            RendezvousStoreInfo(machine.address, machine.port),
        )

    def num_nodes_waiting(self) -> int:
        """None, ever. The agent asks ten times a second, while its processes run."""
        self._asked += 1
        if self._machine.nodes > 1 and self._asked % 10 == 0:
            if self._refused is None and self._machine.refused():
                self._refused = time.monotonic()
            if self._refused is not None and time.monotonic() - self._refused > GRACE:
                raise Refused(
                    "what was given to another machine cannot be, as its own message says"
                )
        return 0

    def get_backend(self) -> str:
        return "meeting"

    def get_run_id(self) -> str:
        return self._attempt

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


def run(machine: Machine, processes: int, restarts: int, stop: int, arguments: list[str]) -> int:
    """Start the processes, and again where they fail; returns the exit status."""
    rendezvous_handler_registry.register(
        "meeting", lambda parameters: Meeting(machine, parameters.run_id)
    )
    status = 0
    for attempt in range(restarts + 1):
        if attempt:
            _tell(f"starting again ({attempt} of {restarts})")
        config = LaunchConfig(
            min_nodes=machine.nodes,
            max_nodes=machine.nodes,
            nproc_per_node=processes,
            rdzv_backend="meeting",
            run_id=_name(attempt),
            max_restarts=0,
            signals_to_handle="SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT",
            shutdown_timeout=stop,
        )
        try:
            elastic_launch(config, sys.executable)("-u", *arguments)
            return 0
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            status, ended = failure.exitcode, f"with status {failure.exitcode}"
            if status < 0:
                status, ended = 128 - status, f"by {failure.signal_name()}"
            _tell(f"process {rank} was the first to end, {ended}")
        if status in FINAL:
            break
    return status


def main(arguments: list[str]) -> int:
    nodes, rank = map(int, arguments[:2])
    address = arguments[2]
    port, processes, restarts, stop = map(int, arguments[3:7])
    os.environ[LAUNCHER] = str(os.getpid())
    agents = logging.getLogger("torch.distributed.elastic")
    agents.propagate = False  # lines of each signal and status, which bury what the processes say
    agents.addHandler(logging.NullHandler())
    machine = None
    try:
        machine = Machine(nodes, rank, address, port, restarts)
        status = run(machine, processes, restarts, stop, arguments[7:])
    except Refused as error:
        _tell(f"error: {error}")
        status = 2
    except (Lost, DistError) as error:
        _tell(f"error: the machines do not find each other: {_reason(error)}")
        status = 1
    except SignalException as stopped:
        status = 128 + stopped.sigval
    except KeyboardInterrupt:
        status = 130
    if machine is not None:
        machine.leave(status)
    return status


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _name(attempt: int) -> str:
    return f"attempt_{attempt}"


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
