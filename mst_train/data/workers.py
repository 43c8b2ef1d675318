"""Processes that make shards, and what becomes of them when one side is killed.

Each worker is connected with the process that started it by a pipe of its own. Where that process
dies, the pipe ends, and the worker stops at its next message, with the shard it was at unfinished.
Where a worker dies, its pipe ends too, and the command stops with a message.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from mst_train.data.shards import Progress, Task
from mst_train.errors import TrainingError, UserError

Make = Callable[[Task, Progress], object]
"""Makes one shard; is sent to the workers."""


def make_shards(make: Make, tasks: Iterator[Task], workers: int, progress: Progress) -> None:
    """Make the shards, in this process or in ``workers`` others.

    Raises:
        UserError: a piece of the source cannot be used.
        TrainingError: a worker was killed.
    """
    if workers > 1:
        _by_others(make, tasks, workers, progress)
        return
    for task in tasks:
        make(task, progress)


def _by_others(make: Make, tasks: Iterator[Task], workers: int, progress: Progress) -> None:
    # Forked from a fresh process that has imported everything: forking this one would copy the
    # locks that its other threads hold.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes: dict[Connection, Any] = {}
    busy: set[Connection] = set()

    def give_next(connection: Connection) -> None:
        task = next(tasks, None)
        if task is None:
            busy.discard(connection)
        else:
            busy.add(connection)
        try:
            connection.send(task)
        except OSError as error:
            raise _killed(processes[connection]) from error

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            give_next(ours)
        while busy:
            for connection in wait(busy):
                assert isinstance(connection, Connection)
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise _killed(processes[connection]) from error
                if kind == "progress":
                    progress(*content)
                elif kind == "done":
                    give_next(connection)
                elif kind == "problems":
                    raise UserError(content)
                elif kind == "os":
                    raise OSError(*content)
                else:
                    raise RuntimeError(f"a worker failed:\n{content}")
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join()


def _work(make: Make, connection: Connection) -> None:
    """A worker: make the shards of the tasks that come, until none comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command to handle
    try:
        while (task := connection.recv()) is not None:
            make(task, lambda *counts: connection.send(("progress", counts)))
            connection.send(("done", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the command is gone
    except UserError as error:
        connection.send(("problems", error.problems))
    except OSError as error:
        connection.send(("os", (error.errno, error.strerror, error.filename)))
    except Exception:
        connection.send(("bug", traceback.format_exc()))


def _killed(process: Any) -> TrainingError:
    process.join(1)
    code = process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
    return TrainingError(
        f"a worker was ended from outside ({how}; 9 is often the system, out of memory): run the "
        f"same command again, it continues; fewer prepare.workers need less memory"
    )
