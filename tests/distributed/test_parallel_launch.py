"""launch/: one machine, two machines, Slurm and Kubernetes.

Two machines are two network namespaces with a cable between them, and one file system.
"""

import base64
import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from processes import run as run_in_processes
from torch.distributed import TCPStore

from mst_train.__main__ import main

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPT = LAUNCH / "torchrun.sh"
TIMEOUT = 600

CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(
        ("CUDA_", "MASTER_", "NODE", "PROCESSES", "SLURM_", "CONDA_", "VIRTUAL_")
    )
} | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture
def arguments(corpus, cache):
    return [
        f"data.source={corpus}",
        f"data.cache_dir={cache}",
        "data.sequence_length=64",
        "data.tokenizer_vocab_size=512",
        "model.vocab_size=512",
        "model.hidden_size=32",
        "model.intermediate_size=88",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "train.steps=4",
        "train.eval_every=0",
        "parallel.sequence_parallel=2",
        "logging.wandb.mode=disabled",
    ]


@contextlib.contextmanager
def started(*arguments, folder, prefix=(), script=SCRIPT, **environment):
    """The script, running in ``folder``; it and what it has started are gone in the end."""
    with (folder / f"log {len(list(folder.iterdir()))}").open("w+") as log:
        process = subprocess.Popen(
            [*prefix, script, *arguments],
            cwd=folder,
            env=CLEAN | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        process.log = Path(log.name)
        workers = set()
        try:
            yield process
        finally:
            if process.poll() is None:
                workers = children(process.pid)
                process.kill()
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            process.wait()


def children(pid):
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def ended(process):
    """Its exit status and what it has written."""
    status = process.wait(TIMEOUT)
    return status, process.log.read_text()


def launch(*arguments, folder, **environment):
    with started(*arguments, folder=folder, **environment) as process:
        return ended(process)


def without_launcher(processes, *arguments, folder):
    """The same command in as many processes of one machine; what the first of them has written."""
    logs = folder / "logs"
    statuses = run_in_processes(main, processes, logs, cwd=folder, arguments=[*arguments])
    assert statuses == [0] * processes
    return (logs / "0.log").read_text()


def wait_for_step(run, step):
    def reached():
        with contextlib.suppress(FileNotFoundError):
            return len((run / "metrics.jsonl").read_text().splitlines()) > step

    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


@pytest.mark.slow
def test_one_machine_from_any_folder(arguments, tmp_path):
    """The script finds the interpreter beside it, and two runs find a port each."""
    if not (LAUNCH.parent / ".venv/bin/python").exists():
        pytest.skip("there is no .venv beside the scripts")
    with started(
        *arguments, "run.dir=first", folder=tmp_path, PROCESSES="2", PYTHON="", PATH=os.defpath
    ) as first:
        status, log = launch(
            *arguments, "run.dir=second run", folder=tmp_path, PROCESSES="2", VIRTUAL_ENV=sys.prefix
        )
        assert status == 0, log
        status, log = ended(first)
    assert status == 0, log
    assert "error" not in log
    assert [step for step, _ in losses(tmp_path / "first")] == [1, 2, 3, 4]
    assert losses(tmp_path / "first") == losses(tmp_path / "second run")


def fake_python(folder):
    """An interpreter that has everything and does nothing but say what it is to do."""
    path = folder / "python"
    path.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$OMP_NUM_THREADS $@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NODES": "two"}, "NODES=two must be a whole number from 1"),
        ({"NODES": "08"}, "NODES=08 must be"),
        ({"NODES": "0"}, "NODES=0 must be"),
        ({"PROCESSES": "0"}, "PROCESSES=0 must be a whole number from 1"),
        ({"PROCESSES": "-1"}, "PROCESSES=-1 must be"),
        ({"RESTARTS": "x[$(touch injected)]"}, "RESTARTS=x[$(touch injected)] must be"),
        ({"STOP_SECONDS": "5m"}, "STOP_SECONDS=5m must be"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be a whole number from 1 to 65535"),
        ({"NODES": "2", "MASTER_ADDR": "10.0.0.1"}, "NODES=2 needs NODE_RANK"),
        ({"NODES": "2", "NODE_RANK": "0"}, "NODES=2 needs MASTER_ADDR"),
        ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 must be"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 is for several machines"),
        ({"PYTHON": "/nowhere/python"}, "there is no /nowhere/python"),
        ({"PYTHON": "false"}, "false does not find torch and mst_train"),
    ],
)
def test_what_cannot_be(environment, message, tmp_path):
    status, log = launch(folder=tmp_path, **{"PYTHON": fake_python(tmp_path)} | environment)
    assert status == 2
    assert log.startswith(f"error: {message}")
    assert log.count("\n") == 1
    assert not (tmp_path / "injected").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "torchrun.py 1 0 127.0.0.1 0 1 0 600 "),
        ({"CUDA_VISIBLE_DEVICES": ""}, " 127.0.0.1 0 1 0 600 "),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, " 127.0.0.1 0 2 0 600 "),
        ({"PATH": "{folder}:" + os.defpath}, " 127.0.0.1 0 4 0 600 "),
        ({"PATH": "{folder}:" + os.defpath, "CUDA_VISIBLE_DEVICES": "5"}, " 127.0.0.1 0 1 0 600 "),
        ({"MASTER_PORT": "4242"}, " 127.0.0.1 4242 1 0 600 "),
        # The address of an enclosing job is not this one's.
        ({"MASTER_ADDR": "10.0.0.1"}, " 127.0.0.1 0 1 0 600 "),
        (
            {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "RESTARTS": "3"},
            "torchrun.py 2 1 10.0.0.1 29500 1 3 600 ",
        ),
    ],
)
def test_what_the_environment_becomes(environment, expected, tmp_path):
    listing = "\\n".join(f"GPU {i}: some (UUID: {i})" for i in range(4))
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\nprintf "{listing}\\n"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {key: value.format(folder=tmp_path) for key, value in environment.items()}
    environment = {"PYTHON": fake_python(tmp_path), "PATH": os.defpath} | environment
    status, log = launch("train.steps=3", "run.name=a b", folder=tmp_path, **environment)
    assert status == 0
    assert expected in log
    assert log.endswith("-m mst_train train.steps=3 run.name=a b\n")


def test_processes_share_the_cores(tmp_path):
    """Only where nothing else is said."""
    python = fake_python(tmp_path)
    _, log = launch(folder=tmp_path, PYTHON=python, PROCESSES="1024", OMP_NUM_THREADS="")
    assert log.startswith("1 ")
    _, log = launch(folder=tmp_path, PYTHON=python, PROCESSES="1024", OMP_NUM_THREADS="7")
    assert log.startswith("7 ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("SIGTERM", 143), pytest.param("SIGUSR1", 138, marks=pytest.mark.exhaustive)],
)
def test_a_signal_reaches_the_processes(name, expected, arguments, tmp_path):
    arguments += ["train.steps=100000", "checkpoint.every=100000", "run.dir=run"]
    run = tmp_path / "run"
    with started(*arguments, folder=tmp_path, PROCESSES="2") as process:
        wait_for_step(run, 2)
        process.send_signal(getattr(signal, name))
        status, log = ended(process)
    assert status == expected, log
    assert f"stopped: {name} came" in log
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped"] == name
    latest = (run / "checkpoints/latest").read_text().strip()
    assert latest == f"step_{summary['step']:08d}"


@pytest.mark.slow
def test_what_cannot_be_is_told_by_the_status(arguments, tmp_path):
    status, log = launch(*arguments, "parallel.sequence_parallel=4", folder=tmp_path, PROCESSES="2")
    assert status == 2, log
    assert "parallel.sequence_parallel=4 does not divide the number of processes, 2" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train.stepz=3"], "train.stepz is not a setting"),
        (["train.seed=1,2"], "a sweep starts each of its runs by itself"),
        (["--help", "optimiser"], "--help optimiser: did you mean optimizer?"),
        (["--config-dir", "nowhere"], "--config-dir nowhere (or MST_CONFIG_DIR) is not a folder"),
    ],
)
def test_a_setting_that_cannot_be_is_said_once(given, message, arguments, tmp_path):
    """Before the processes have joined, too."""
    if given[0] != "--help":
        given = [*arguments, *given]
    status, log = launch(*given, folder=tmp_path, PROCESSES="2")
    assert status == 2, log
    assert log.startswith(f"error: {message}")
    assert log.count(message) == 1
    others = [line for line in log.splitlines()[1:] if not line.startswith("  ")]
    ends = re.compile(r"process \d was the first to end, with status 2")
    assert all(ends.fullmatch(line) for line in others), log  # none of torch's own, which bury it


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_process_that_dies(restarts, arguments, tmp_path):
    """The others do not wait for it; with RESTARTS all of them go on from the last checkpoint."""
    arguments += ["train.steps=60", "checkpoint.every=20", "run.dir=run"]
    run = tmp_path / "run"
    environment = {"PROCESSES": "2", "RESTARTS": str(restarts)}
    with started(*arguments, folder=tmp_path, **environment) as process:
        wait_for_step(run, 24)
        os.kill(max(children(process.pid)), signal.SIGKILL)
        status, log = ended(process)
    if restarts:
        assert status == 0, log
        steps = [step for step, _ in losses(run)]
        assert sorted(set(steps)) == list(range(1, 61))
        assert re.search(r"continuing from \S*step_000000[24]0", log)
    else:
        assert status in (1, 137), log  # of the one that died, or of the one that missed it
        assert "was the first to end" in log


DIES_IN_AN_EXCHANGE = """
import os, pathlib, signal
if os.environ.get("RANK") == "1":
    from mst_train.distributed.transport import GroupTransport
    carry = GroupTransport.carry
    after_checkpoint = []

    def carry_and_die(*arguments):
        wait = carry(*arguments)
        after_checkpoint.extend([1] * pathlib.Path("run/checkpoints/latest").exists())
        if len(after_checkpoint) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return wait

    GroupTransport.carry = carry_and_die
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "processes"),
    [
        ("keys", 2),
        *(pytest.param(*c, marks=pytest.mark.exhaustive) for c in [("heads", 2), ("both", 4)]),
    ],
)
def test_a_process_that_dies_in_an_exchange(exchange, processes, arguments, tmp_path):
    """The others do not wait for what it would have sent, and the run goes on as if nothing was."""
    arguments += ["train.steps=12", "checkpoint.every=4", "parallel.timeout_minutes=600"]
    arguments += [f"parallel.sequence_parallel={processes}"]
    arguments += [f"parallel.sequence_exchange={exchange}"]
    (tmp_path / "dies").mkdir()
    (tmp_path / "dies/sitecustomize.py").write_text(DIES_IN_AN_EXCHANGE)
    path = os.pathsep.join([str(tmp_path / "dies"), os.environ.get("PYTHONPATH", "")])
    environment = {"PROCESSES": str(processes), "PYTHONPATH": path}
    status, log = launch(*arguments, "run.dir=run", folder=tmp_path, **environment)
    assert status in (1, 137), log  # of the one that died, or of one that missed it
    assert 4 <= len(losses(tmp_path / "run")) < 12
    status, log = launch(*arguments, "run.dir=run", folder=tmp_path, PROCESSES=str(processes))
    assert status == 0, log
    without_launcher(processes, *arguments, "run.dir=whole", folder=tmp_path)
    assert dict(losses(tmp_path / "run")) == dict(losses(tmp_path / "whole"))
    assert [step for step, _ in losses(tmp_path / "whole")] == list(range(1, 13))


def everyone(pid):
    """A process and all that it has started, and these."""
    return {pid}.union(*(everyone(child) for child in children(pid)))


def doors(*processes):
    """Where processes listen: addresses and ports."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                sockets.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{processes[0]}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:  # it listens
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
    return found


def attack(address, port, witness):
    """What torchrun's own rendezvous unpickles, under every name that there is in the store."""
    pickle = f"cos\nsystem\n(S'touch {witness}'\ntR.".encode()
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
    for key in {*store.list_keys(), "torch.rendezvous.attempt_0", "torch.rendezvous.none"}:
        if b"rendezvous" in key.encode():
            store.set(key, base64.b64encode(pickle))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_no_door_beyond_this_machine(processes, arguments, tmp_path):
    """Not even to its other addresses; and what gets in is not run."""
    arguments += ["train.steps=100000", "checkpoint.every=100000", "run.dir=run"]
    arguments += [f"parallel.sequence_parallel={processes}"]
    witness = tmp_path / "the attack came through"
    with started(*arguments, folder=tmp_path, PROCESSES=str(processes)) as process:
        wait_for_step(tmp_path / "run", 2)
        found = doors(*everyone(process.pid))
        assert len(found) >= processes
        assert {address for address, _ in found} == {"127.0.0.1"}
        ((_, own),) = doors(process.pid)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", own), timeout=5)
        attack("127.0.0.1", own, witness)
        done = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
        wait_for_step(tmp_path / "run", done + 40)
        process.send_signal(signal.SIGTERM)
        status, log = ended(process)
    assert status == 143, log
    assert not witness.exists()


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_training(arguments, tmp_path):
    arguments += ["train.steps=100000", "checkpoint.every=100000", "run.dir=run"]
    with started(*arguments, folder=tmp_path, PROCESSES="2") as process:
        wait_for_step(tmp_path / "run", 2)
        workers = children(process.pid)
        assert len(workers) == 2
        process.kill()
        process.wait(TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        while any(running(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [worker for worker in workers if running(worker)]
        for worker in left:
            os.kill(worker, signal.SIGKILL)
        assert not left


def running(pid):
    """Whether a process is there, and more than what its parent has not asked about yet."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def shell(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """The names of two network namespaces: 10.77.0.1 on device cable0, 10.77.0.2 on cable1."""
    names = [f"mst_test_{os.getpid()}_{i}" for i in range(2)]
    try:
        try:
            for name in names:
                shell("ip", "netns", "add", name)
            ends = ["cable0", "netns", names[0], "type", "veth", "peer", "cable1"]
            shell("ip", "link", "add", *ends, "netns", names[1])
            for i, name in enumerate(names):
                within = ("ip", "-n", name)
                shell(*within, "address", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
                shell(*within, "link", "set", f"cable{i}", "up")
                shell(*within, "link", "set", "lo", "up")
        except FileNotFoundError:
            pytest.skip("network namespaces need the command ip")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def outsider(machines):
    """A third namespace, 10.78.0.2, on a network of its own with machine 0, which is 10.78.0.1."""
    name = f"mst_test_{os.getpid()}_outside"
    try:
        shell("ip", "netns", "add", name)
        ends = ["out0", "netns", machines[0], "type", "veth", "peer", "out1", "netns", name]
        shell("ip", "link", "add", *ends)
        for i, (namespace, device) in enumerate(((machines[0], "out0"), (name, "out1"))):
            shell("ip", "-n", namespace, "address", "add", f"10.78.0.{i + 1}/24", "dev", device)
            shell("ip", "-n", namespace, "link", "set", device, "up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def on_both(machines, *arguments, folder, second=(), **environment):
    """The script on each machine, with one process if nothing else is said; more arguments on the
    second one."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    *arguments,
                    *(second if i else ()),
                    folder=folder,
                    prefix=("ip", "netns", "exec", name),
                    NODES="2",
                    NODE_RANK=str(i),
                    MASTER_ADDR="10.77.0.1",
                    GLOO_SOCKET_IFNAME=f"cable{i}",
                    **{"PROCESSES": "1"} | environment,
                )
            )
            for i, name in enumerate(machines)
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("each", "exchange"), [pytest.param(1, "keys", marks=pytest.mark.exhaustive), (2, "both")]
)
def test_two_machines(each, exchange, machines, arguments, tmp_path):
    """They give the losses of as many processes on one."""
    arguments += [f"parallel.sequence_parallel={2 * each}"]
    arguments += [f"parallel.sequence_exchange={exchange}"]
    log = without_launcher(2 * each, *arguments, "run.dir=one", folder=tmp_path)
    assert ("heads in nodes of 2 and keys between nodes" in log) == (exchange == "both")
    with on_both(
        machines, *arguments, "run.dir=two", folder=tmp_path, PROCESSES=str(each)
    ) as processes:
        for process in reversed(processes):
            status, log = ended(process)
            assert status == 0, log
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.slow
def test_what_another_network_reaches(machines, outsider, arguments, tmp_path):
    """Nothing at machine 0's address there; and by a route to the other, which a firewall has to
    close, nothing that is run."""
    arguments += ["train.steps=100000", "checkpoint.every=100000", "run.dir=run"]
    witness = tmp_path / "the attack came through"
    within = ("ip", "netns", "exec", outsider, sys.executable, "-c")
    with on_both(machines, *arguments, folder=tmp_path) as processes:
        wait_for_step(tmp_path / "run", 2)
        found = doors(*everyone(processes[0].pid))
        assert {address for address, _ in found} == {"10.77.0.1"}
        for _, port in found:
            connect = f"import socket; socket.create_connection(('10.78.0.1', {port}), 5)"
            tried = subprocess.run([*within, connect], capture_output=True, text=True)
            assert "ConnectionRefusedError" in tried.stderr
        shell("ip", "-n", outsider, "route", "add", "10.77.0.0/24", "via", "10.78.0.1")
        strike = f"import test_parallel_launch as t; t.attack('10.77.0.1', 29500, {str(witness)!r})"
        found_there = os.pathsep.join(map(str, Path(__file__).parents[:2]))
        environment = os.environ | {"PYTHONPATH": found_there}
        subprocess.run([*within, strike], check=True, env=environment)
        done = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
        wait_for_step(tmp_path / "run", done + 40)
        processes[0].send_signal(signal.SIGTERM)
        for process in processes:
            status, log = ended(process)
            assert status == 143, log
    assert not witness.exists()


@pytest.mark.slow
def test_what_cannot_be_on_one_machine_ends_both(machines, arguments, tmp_path):
    """The first, which was told nothing wrong, does not wait for the other."""
    with on_both(machines, *arguments, folder=tmp_path, second=["train.steps=x"]) as processes:
        (first, told), (second, other_told) = (ended(process) for process in processes)
    assert (first, second) == (2, 2), told + other_told
    assert "error: what was given to another machine cannot be, as its own message says" in told
    assert other_told.count("train.steps=x") == 1
    assert "Traceback" not in told + other_told


@pytest.mark.slow
def test_a_process_of_another_machine_dies(machines, arguments, tmp_path):
    """Both machines meet again."""
    arguments += ["train.steps=40", "checkpoint.every=10", "run.dir=run"]
    with on_both(machines, *arguments, folder=tmp_path, RESTARTS="1") as processes:
        wait_for_step(tmp_path / "run", 14)
        os.kill(*children(processes[1].pid), signal.SIGKILL)
        logs = []
        for process in processes:
            status, log = ended(process)
            assert status == 0, log
            logs.append(log)
    assert sorted({step for step, _ in losses(tmp_path / "run")}) == list(range(1, 41))
    assert all("starting again (1 of 1)" in log for log in logs)
    assert "by SIGKILL" in logs[1]


@pytest.mark.slow
def test_a_signal_to_one_machine_stops_both(machines, arguments, tmp_path):
    """The other one, which was not signalled, ends with the same status and does not restart."""
    arguments += ["train.steps=100000", "checkpoint.every=100000", "run.dir=run"]
    with on_both(machines, *arguments, folder=tmp_path, RESTARTS="1") as processes:
        wait_for_step(tmp_path / "run", 2)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            status, log = ended(process)
            assert status == 143, log
    step = json.loads((tmp_path / "run/summary.json").read_text())["step"]
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert latest == f"step_{step:08d}"


def slurm(folder, status, **environment):
    """Run slurm.sbatch where srun starts two tasks and ends with ``status``."""
    commands = {
        "scontrol": 'case "$1" in show) printf "nodea\\nnodeb\\n" ;; *) echo "scontrol $@" ;; esac',
        "srun": 'echo "$@"; while [ "$1" != bash ]; do shift; done; '
        'SLURM_NODEID=0 "$@"; SLURM_NODEID=1 "$@"; exit ' + str(status),
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PYTHON": fake_python(folder),
        "PATH": f"{folder}:{os.defpath}",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_JOB_ID": "81234",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[a-b]",
        "PROCESSES": "8",
    } | environment
    prefix = ("bash", LAUNCH / "slurm.sbatch")
    with started("run.name=a b", folder=folder, prefix=prefix, script="x=1", **environment) as job:
        return ended(job)


def test_slurm_starts_each_node_under_its_number(tmp_path):
    status, log = slurm(tmp_path, 0)
    assert status == 0
    options, first, second = log.splitlines()
    assert "--kill-on-bad-exit=0 --wait=570" in options
    for rank, line in enumerate((first, second)):
        assert line.endswith(
            f"torchrun.py 2 {rank} nodea 21234 8 0 570 -m mst_train x=1 run.name=a b"
        )


@pytest.mark.parametrize(
    ("status", "requeued"), [(138, True), (143, False), (1, False), (2, False)]
)
def test_slurm_requeues_what_ran_out_of_time(status, requeued, tmp_path):
    found, log = slurm(tmp_path, status)
    assert found == status
    assert ("scontrol requeue 81234" in log) == requeued


def test_slurm_from_another_folder(tmp_path):
    status, log = slurm(tmp_path, 0, SLURM_SUBMIT_DIR=str(tmp_path))
    assert status == 2
    assert "has no launch/torchrun.sh" in log


def test_slurm_signals_early_enough():
    text = (LAUNCH / "slurm.sbatch").read_text()
    (early,) = re.findall(r"^#SBATCH --signal=USR1@(\d+)$", text, re.MULTILINE)
    (enough,) = re.findall(r"STOP_SECONDS:-(\d+)", text)
    assert int(enough) < int(early)


def test_kubernetes_fits_the_script():
    service, policy, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    described = set(re.findall(r"^#   ([A-Z_]+) ", SCRIPT.read_text(), re.MULTILINE))
    assert {"NODES", "NODE_RANK", "MASTER_ADDR", "STOP_SECONDS"} <= set(variables) <= described

    assert container["command"] == ["launch/torchrun.sh"]
    assert os.access(LAUNCH.parent / "launch/torchrun.sh", os.X_OK)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["NODES"])
    assert pod["terminationGracePeriodSeconds"] > int(variables["STOP_SECONDS"])

    # A pod's name is the job's and its index; the service that has its subdomain's name finds it.
    name, label = job["metadata"]["name"], job["spec"]["template"]["metadata"]["labels"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == label
    assert service["spec"]["clusterIP"] == "None"

    # Nobody but the pods themselves reaches them.
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["podSelector"]["matchLabels"] == label
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": label}}]}]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }

    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["shm"] == "/dev/shm"
    (run,) = (a for a in container["args"] if a.startswith("run.dir="))
    assert run.removeprefix("run.dir=").startswith(mounts["runs"])


def test_kubernetes_settings_compose():
    from mst_train.cli.compose import compose

    *_, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    config = compose(container["args"])
    processes = job["spec"]["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert processes % config.parallel.sequence_parallel == 0
