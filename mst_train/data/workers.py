"""Processes that make shards, and what becomes of them when one side is killed.

Each worker is connected with the process that started it by a pipe of its own. Where that process
dies, the pipe ends, and the worker stops at its next message, with the shard it was at unfinished.
Where a worker dies, its pipe ends too, and the command stops with a message.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mst_train.data.pieces import Reader
from mst_train.data.shards import Progress, Record, Task, make_shard
from mst_train.data.tokenizer import Vocabulary
from mst_train.errors import TrainingError, UserError


@dataclass(frozen=True)
class Job:
    """What making a shard takes besides its task."""

    folder: Path
    reader: Reader
    tokenizer: Callable[[], Vocabulary]
    skip_malformed: bool


def make_shards(
    job: Job, tasks: Iterable[Task], workers: int, progress: Progress
) -> Iterator[tuple[Task, Record]]:
    """Make the shards, in this process or in ``workers`` others; each as soon as it is there.

    Raises:
        UserError: a piece of the source cannot be used.
        TrainingError: a worker was killed.
    """
    if workers > 1:
        yield from _by_others(job, iter(tasks), workers, progress)
        return
    tokenizer = job.tokenizer()
    for task in tasks:
        yield (
            task,
            make_shard(task, job.reader, tokenizer, job.folder, job.skip_malformed, progress),
        )


def _by_others(
    job: Job, tasks: Iterator[Task], workers: int, progress: Progress
) -> Iterator[tuple[Task, Record]]:
    # Forked from a fresh process that has imported everything: forking this one would copy the
    # locks that its other threads hold.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes: dict[Connection, Any] = {}
    at: dict[Connection, Task] = {}

    def give_next(connection: Connection) -> None:
        at.pop(connection, None)
        task = next(tasks, None)
        if task is not None:
            at[connection] = task
        try:
            connection.send(task)
        except OSError as error:
            raise _killed(processes[connection]) from error

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            give_next(ours)
        while at:
            for connection in wait(list(at)):
                assert isinstance(connection, Connection)
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise _killed(processes[connection]) from error
                if kind == "progress":
                    progress(*content)
                elif kind == "shard":
                    task = at[connection]
                    give_next(connection)
                    yield task, content
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


def _work(job: Job, connection: Connection) -> None:
    """A worker: make the shards of the tasks that come, until none comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command to handle
    try:
        tokenizer = job.tokenizer()
        while (task := connection.recv()) is not None:

            def progress(size: int, tokens: int) -> None:
                connection.send(("progress", (size, tokens)))

            record = make_shard(
                task, job.reader, tokenizer, job.folder, job.skip_malformed, progress
            )
            connection.send(("shard", record))
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
