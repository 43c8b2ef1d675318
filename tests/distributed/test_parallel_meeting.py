"""How the launchers of several machines meet; here each is a thread."""

import importlib.util
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import free_port

PATH = Path(__file__).parents[2] / "launch/torchrun.py"
HERE = "127.0.0.1"


@pytest.fixture
def launcher(monkeypatch):
    spec = importlib.util.spec_from_file_location("launcher", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SILENCE", 0)
    return module


@pytest.fixture
def names(launcher, monkeypatch):
    """The name of each thread's machine."""
    own = threading.local()
    monkeypatch.setattr(launcher.socket, "gethostname", lambda: own.name)
    return own


@pytest.fixture
def meet(launcher, names):
    """What becomes of machines that were told this: None, or the message that ends them."""
    alive = []

    def one(told, port):
        names.name = told.get("name", f"node{told['rank']}")
        try:
            machine = launcher.Machine(
                told.get("nodes", 2), told["rank"], HERE, port, told.get("restarts", 0)
            )
            alive.append(machine)
            machine.meet("attempt_0")
        except (launcher.Refused, launcher.Lost) as error:
            machine.leave(2)
            return str(error)

    def all_of(*told):
        port = free_port()
        with ThreadPoolExecutor(len(told)) as threads:
            return list(threads.map(lambda machine: one(machine, port), told))

    return all_of


def test_machines_meet(meet):
    assert meet({"rank": 0}, {"rank": 1}) == [None, None]
    three = [{"rank": rank, "nodes": 3} for rank in range(3)]
    assert meet(*three) == [None] * 3


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        ([{"rank": 0}, {"rank": 1, "nodes": 3}], "NODES=2 on machine 0 and NODES=3 on machine 1"),
        # Machine 0 waits for a third one no longer.
        ([{"rank": 0, "nodes": 3}, {"rank": 1}], "NODES=3 on machine 0 and NODES=2 on machine 1"),
        ([{"rank": 0}, {"rank": 1, "restarts": 3}], "RESTARTS=0 on machine 0 and RESTARTS=3 on"),
        (
            [{"rank": 0, "nodes": 3}, *({"rank": 1, "nodes": 3, "name": name} for name in "ab")],
            "NODE_RANK=1 on both",
        ),
    ],
)
def test_what_was_told_differently_ends_all(machines, message, meet):
    for told in meet(*machines):
        assert told.startswith(message)
        assert told.endswith(": start all machines with the same")


def test_machine_0_decides_when_all_have_said_what_is_wrong(meet, launcher, monkeypatch):
    class Slow(launcher.PrefixStore):
        def set(self, key, value):
            if key == "problem":
                time.sleep(0.5)
            super().set(key, value)

    monkeypatch.setattr(launcher, "PrefixStore", Slow)
    for told in meet({"rank": 0}, {"rank": 1, "nodes": 3}):
        assert told.startswith("NODES=2 on machine 0 and NODES=3 on machine 1")


def test_a_machine_that_comes_again_takes_its_place(launcher, names, monkeypatch):
    """And one that comes too late waits for the next job."""
    port = free_port()

    def start(rank, patience):
        names.name = f"node{rank}"
        monkeypatch.setattr(launcher, "PATIENCE", patience)
        machine = launcher.Machine(3, rank, HERE, port, 0)
        try:
            machine.meet("attempt_0")
        except launcher.Lost as error:
            return machine, str(error)
        return machine, None

    first = launcher.Machine(3, 0, HERE, port, 0)
    _, told = start(1, 0)
    assert told.startswith("the others have not come")
    assert first.store.get("attempt_0/machine/1") == b""  # or the others would begin without it
    names.name = "node0"
    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(start, rank, 60) for rank in (1, 2)]
        first.meet("attempt_0")
        assert [other.result(60)[1] for other in others] == [None, None]
    _, told = start(1, 0)
    assert told.startswith("machine 0 is in a job that has begun without this one")


def test_a_refusal_reaches_the_other_machines(launcher, names, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE", 0)
    names.name = "node"
    port = free_port()
    first, second = (launcher.Machine(2, rank, HERE, port, 0) for rank in range(2))
    meeting = launcher.Meeting(first, "attempt_0")
    assert [meeting.num_nodes_waiting() for _ in range(20)] == [0] * 20
    second.leave(2)
    with pytest.raises(launcher.Refused, match="what was given to another machine cannot be"):
        for _ in range(20):
            meeting.num_nodes_waiting()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("10.0.0.1:29500", "MASTER_ADDR=10.0.0.1:29500 is neither an address nor"),
        ("10.0.0.300", "MASTER_ADDR=10.0.0.300 is neither"),
        ("two words", "MASTER_ADDR=two words is neither"),
        ("192.0.2.1", "MASTER_ADDR=192.0.2.1 is no address of this machine, which is machine 0"),
        ("myself", "MASTER_ADDR=myself is 127.0.1.1 here, which other machines do not reach"),
        (HERE, "cannot be used at 127.0.0.1 (Address already in use): set it to a free port"),
    ],
)
def test_addresses_that_cannot_be(address, message, launcher, capsys, monkeypatch):
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda name, *rest, **more: look_up(
            "127.0.1.1" if name == "myself" else name, *rest, **more
        ),
    )
    monkeypatch.setenv(launcher.LAUNCHER, "")
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        assert launcher.main(["2", "0", address, str(port), "1", "0", "600", "-m", "nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_machine_that_nobody_answers_says_so_and_ends(launcher, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "PATIENCE", 0.5)
    monkeypatch.setenv(launcher.LAUNCHER, "")
    port = free_port()
    assert launcher.main(["2", "1", HERE, str(port), "1", "0", "600", "-m", "nothing"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"waiting: nobody answers at 127.0.0.1, port {port} (")
    assert "error: the machines do not find each other: nobody answers" in told
