"""launch/torchrun.sh: the environment becomes torchrun's arguments."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/torchrun.sh"


def launch(folder, **environment):
    echo = folder / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n')
    echo.chmod(0o755)
    return subprocess.run(
        [SCRIPT, "train.steps=3", "run.name=a b"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(echo), **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NPROC_PER_NODE": "4"}, "--nnodes 1 --node_rank 0 --nproc_per_node 4 "),
        (
            {
                "NPROC_PER_NODE": "8",
                "NNODES": "2",
                "NODE_RANK": "1",
                "MASTER_ADDR": "10.0.0.1",
                "MASTER_PORT": "4242",
            },
            "--nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr 10.0.0.1 "
            "--master_port 4242 ",
        ),
    ],
)
def test_arguments(environment, expected, tmp_path):
    done = launch(tmp_path, **environment)
    assert done.returncode == 0
    assert done.stdout.startswith("-m torch.distributed.run " + expected)
    assert done.stdout.endswith("-m mst_train train.steps=3 run.name=a b\n")


@pytest.mark.parametrize(
    ("environment", "missing"),
    [({"NODE_RANK": "0"}, "MASTER_ADDR"), ({"MASTER_ADDR": "10.0.0.1"}, "NODE_RANK")],
)
def test_what_several_nodes_need(environment, missing, tmp_path):
    done = launch(tmp_path, NNODES="2", **environment)
    assert done.returncode == 2
    assert missing in done.stderr


def test_one_process_where_there_is_no_gpu(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = launch(tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert "--nproc_per_node 1 " in done.stdout
