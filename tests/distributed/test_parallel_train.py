"""The training command in several processes: the curve of one, whatever becomes of them."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SETTINGS, several
from processes import free_port, run

from mst_train.__main__ import main
from mst_train.config import ModelConfig
from mst_train.model import build_model
from mst_train.model.hf.weights import save_pretrained

pytestmark = pytest.mark.slow

STEPS = 6
TRAINED = [f"train.steps={STEPS}", "train.eval_every=3", "checkpoint.every=2", "checkpoint.keep=9"]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """By step; and of the validations, by "val" and step."""
    found = {}
    for record in records(folder):
        if "loss" in record:
            found[record["step"]] = record["loss"]
        elif "val_loss" in record:
            found["val", record["step"]] = record["val_loss"]
    return found


@pytest.fixture(scope="module")
def place(corpus, cache):
    return [f"data.source={corpus}", f"data.cache_dir={cache}"]


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """The losses of one process, whose steps have two micro-batches of four sequences."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    batch = ["train.micro_batch_size=4", "train.accumulation_steps=2"]
    assert main([*SETTINGS, *place, *TRAINED, *batch, f"run.dir={folder}"]) == 0
    return losses(folder)


def train_in(world, groups, place, folder, *arguments):
    """A run of so many processes and data groups with the sequences of ``alone`` in a step."""
    batch = [f"train.micro_batch_size={4 // groups}", "train.accumulation_steps=2"]
    one = {
        "world": world,
        "port": free_port(),
        "arguments": [*place, *TRAINED, *batch, f"run.dir={folder}", *arguments],
    }
    results = run(several, world, folder.with_suffix(".logs"), timeout=600, runs=[one])
    assert [status for ((status, _),) in results] == [0] * world


def test_runs_go_on_with_other_processes(alone, place, tmp_path):
    """Two processes under ZeRO-1, and from its checkpoints one process, and four under ZeRO-3."""
    two, one, four = (tmp_path / name for name in ("two", "one", "four"))
    early, late = (f"run.resume={two}/checkpoints/step_0000000{step}" for step in (2, 4))
    train_in(2, 2, place, two, "parallel.zero_stage=1")
    train_in(1, 1, place, one, early)
    sharing = ["parallel.sequence_parallel=2", "parallel.zero_stage=3"]
    train_in(4, 2, place, four, late, *sharing)
    everything = losses(two)
    assert everything.keys() == alone.keys()
    assert losses(one).keys() == {k for k in alone if k not in {1, 2, ("val", 0)}}
    assert losses(four).keys() == {k for k in alone if k in {5, 6, ("val", 6)}}
    for found in (everything, losses(one), losses(four)):
        assert found == pytest.approx({key: alone[key] for key in found}, rel=1e-5)
    files = {path.name for path in (two / "checkpoints/step_00000002").iterdir()}
    assert {"model.pt", "model-0001.pt", "optimizer-0001.pt"} < files


@pytest.mark.parametrize("stage", [1, 3])
def test_hidden_states_wait_on_the_host_under_zero(stage, alone, place, tmp_path):
    chunks = ["memory.policy=mst", "memory.offload=host", "memory.block_chunk_tokens=32"]
    train_in(2, 2, place, tmp_path / "two", f"parallel.zero_stage={stage}", *chunks)
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=1e-5)


def test_two_processes_train_the_tokens_that_one_has_left(place, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    batch = ["train.micro_batch_size=2", "train.accumulation_steps=2"]  # of 64 tokens
    assert main([*SETTINGS, *place, *batch, "train.tokens=1000", f"run.dir={one}"]) == 0
    both = {
        "world": 2,
        "port": free_port(),
        "arguments": [*place, *batch, "train.tokens=2000", f"run.dir={two}", f"run.resume={one}"],
    }
    results = run(several, 2, tmp_path / "processes", timeout=600, runs=[both])
    assert [status for ((status, _),) in results] == [0, 0]
    tokens = [[r["tokens"] for r in records(folder) if "tokens" in r] for folder in (one, two)]
    assert tokens == [[256, 512, 768, 1024], [1536, 2048]]
    assert "  steps: 6\n" in (two / "config.yaml").read_text()


GPT_OSS = {
    "num_experts": 3,
    "expert_bias": True,
    "activation": "clamped_swiglu",
    "attention_sinks": True,
    "qkv_bias": True,
    "output_bias": True,
}


@pytest.mark.parametrize("form", [{}, {"num_experts": 3}, GPT_OSS], ids=["", "3", "gpt-oss"])
def test_shared_weights_are_those_of_a_checkpoint(form, place, tmp_path):
    settings = ModelConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_positions=64,
        **form,
    )
    save_pretrained(build_model(settings, seed=5), tmp_path / "weights")
    start = [f"model.from_pretrained={tmp_path / 'weights'}", "data.tokenizer=null"]
    one, two = tmp_path / "one", tmp_path / "two"
    batch = ["train.micro_batch_size=4", "train.accumulation_steps=2"]
    assert main([*SETTINGS, *place, *TRAINED, *batch, *start, f"run.dir={one}"]) == 0
    train_in(2, 2, place, two, "parallel.zero_stage=3", *start)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_misuse_is_told_once(place, corpus, tmp_path):
    """By the first process, before anything is written, and nobody waits."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "texts").mkdir(parents=True)
    for path in sorted(corpus.iterdir())[1:]:  # one text less than on the first machine
        (elsewhere / "texts" / path.name).symlink_to(path)
    (tmp_path / "texts").symlink_to(corpus)
    folder = tmp_path / "run"
    cases = [
        ([], {"second": ["train.seed=9"]}, "train.seed is not the same everywhere: process 1 on"),
        (["parallel.sequence_parallel=4"], {}, "does not divide the number of processes, 2"),
        (["optimizer.offload=host"], {}, "optimizer.offload=host in several processes needs"),
        (["parallel.zero_stage=1"], {"missing": ["deepspeed"]}, "pip install 'mst-train"),
        (["run.dir=shared"], {"second_in": str(elsewhere)}, "on storage that all machines share"),
        (["data.source=texts"], {"second_in": str(elsewhere)}, "what data.source holds is not"),
    ]
    runs = [
        {
            "world": 2,
            "port": free_port(),
            "arguments": [*place, "train.steps=1", f"run.dir={folder}", *arguments],
            **extra,
        }
        for arguments, extra, _ in cases
    ]
    first, second = run(several, 2, tmp_path / "processes", cwd=tmp_path, runs=runs)
    for (_, _, message), (status, told), (other_status, other_told) in zip(
        cases, first, second, strict=True
    ):
        assert (status, other_status) == (2, 2)
        assert message in told
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert other_told == ""
    assert not folder.exists()


def command(folder, place, *arguments):
    endless = ["train.steps=2000", "checkpoint.every=5", f"run.dir={folder}"]
    batch = ["train.micro_batch_size=2", "train.accumulation_steps=1"]
    return [*SETTINGS, *place, *batch, *endless, "parallel.sequence_parallel=2", *arguments]


def torchrun(arguments, largest_file=None):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *(f"--master_port={free_port()}", "-m", "mst_train", *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit if largest_file else None,
    )


def wait_for_records(folder, count, seconds=600):
    path, deadline = Path(folder) / "metrics.jsonl", time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(job):
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def test_a_killed_process_ends_the_job_and_nothing_is_lost(place, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = torchrun(command(killed, place))
    wait_for_records(killed, 12)
    os.kill(workers(job)[1], signal.SIGKILL)
    _, told = job.communicate(timeout=600)
    assert job.returncode != 0
    assert all(r["communication_share"] > 0 for r in records(killed) if "loss" in r)
    assert all(r["peak_memory_process"] in (0, 1) for r in records(killed) if "loss" in r)
    assert "another process has failed" in told
    reached = max(step for step in losses(killed) if isinstance(step, int))
    checkpoints = sorted((killed / "checkpoints").glob("step_*/COMPLETE"))
    saved = int(checkpoints[-1].parent.name.removeprefix("step_"))
    assert reached - saved <= 5 + 1  # one may have been on its way
    last = f"train.steps={saved + 4}"
    schedule = "optimizer.min_learning_rate_ratio=1.0"
    arguments = command(killed, place, last, schedule)
    assert run(main, 2, tmp_path / "processes", arguments=arguments) == [0, 0]
    assert main([*command(whole, place, last, schedule, "parallel.sequence_parallel=1")]) == 0
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-5)


def test_a_process_that_hangs_ends_the_job(place, tmp_path):
    """The others, that is: then torchrun ends it, after 30 s."""
    port = free_port()
    arguments = command(tmp_path, place, "parallel.timeout_minutes=0.5")
    first, second = (
        subprocess.Popen(
            [sys.executable, "-m", "mst_train", *arguments],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    try:
        wait_for_records(tmp_path, 7)
        second.send_signal(signal.SIGSTOP)
        _, told = first.communicate(timeout=600)
    finally:
        first.kill()
        second.kill()
        second.communicate()
    assert first.returncode == 1
    assert "has not answered for parallel.timeout_minutes=0.5" in told
    assert "Traceback" not in told


def test_a_signal_saves_on_all_processes(place, tmp_path):
    job = torchrun(command(tmp_path, place))
    wait_for_records(tmp_path, 7)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate(timeout=600)
    assert told.count("stopped: SIGTERM came, and everything up to step") == 1
    step = json.loads((tmp_path / "summary.json").read_text())["step"]
    assert (tmp_path / f"checkpoints/step_{step:08d}/COMPLETE").exists()


def test_weights_are_written_once(place, tmp_path):
    """By the two processes together, though ZeRO's are views of one large array."""
    one, two = tmp_path / "one", tmp_path / "two"
    batch = ["train.steps=1", "train.eval_every=0", "train.micro_batch_size=2"]
    assert main([*SETTINGS, *place, *batch, f"run.dir={one}"]) == 0
    settings = ["train.steps=1", "train.eval_every=0", "parallel.zero_stage=2"]
    train_in(2, 2, place, two, *settings)
    sizes = [
        sum(file.stat().st_size for file in folder.glob("checkpoints/step_00000001/model*.pt"))
        for folder in (one, two)
    ]
    assert sizes[1] < 1.1 * sizes[0]


def test_a_full_disk_is_told_once_by_the_first(place, tmp_path):
    """The other one, which tells nothing, does not leave before."""
    folder = tmp_path / "run"
    settings = ["train.steps=40", "checkpoint.every=4", f"run.dir={folder}"]
    job = torchrun([*SETTINGS, *place, *settings, "parallel.timeout_minutes=0.5"], 110_000)
    _, told = job.communicate(timeout=600)
    assert job.returncode == 1
    (line,) = [line for line in told.splitlines() if "error: " in line and "cannot" in line]
    assert line.startswith("error: cannot write the checkpoint")
    assert "File too large" in line
    assert "process 1 on" not in told


def test_a_record_that_finds_no_room_is_made_by_the_same_command(place, tmp_path):
    """That of a step with a checkpoint after it, and that of the last."""
    folder = tmp_path / "run"
    settings = ["train.steps=4", "checkpoint.every=2", f"run.dir={folder}"]
    one = {"world": 2, "arguments": [*place, *settings]}
    runs = [{**one, "port": free_port(), "no_room_at": step} for step in (2, 4, None)]
    first, second = run(several, 2, tmp_path / "processes", timeout=200, runs=runs)
    assert [status for status, _ in first] == [status for status, _ in second] == [1, 1, 0]
    assert all("no room for a record" in told for _, told in first[:2])
    assert all(told == "" for _, told in second)
    assert [r["step"] for r in records(folder) if "loss" in r] == [1, 2, 3, 4]
