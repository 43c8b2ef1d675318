"""What is read cannot run code or lead out of its folder, and what is written holds no secret."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mst_train.checkpoint.files import (
    MARKER,
    complete_checkpoints,
    find_checkpoint,
    save_checkpoint,
)
from mst_train.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for folder in ("mst_train", "kernels/mst_kernels", "examples")
    for path in ROOT.glob(f"{folder}/**/*.py")
)

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


def problems(tree):
    """Everything in a syntax tree that could run what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules.append(node.module or "")
            for module in modules:
                if module.partition(".")[0] in UNPICKLERS:
                    yield f"line {node.lineno} imports {module}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if "allow_pickle" in given and given["allow_pickle"] != "False":
                yield f"line {node.lineno}: allow_pickle"
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield f"line {node.lineno}: {name}"
            if name in RUNNERS:
                yield f"line {node.lineno}: {name}"
            if given.get("trust_remote_code") not in (None, "False"):
                yield f"line {node.lineno}: trust_remote_code"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    assert list(problems(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import load",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(code):
    assert len(list(problems(ast.parse(code)))) >= 1


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/hostname", "..", ".", "sub/../../x"])
def test_a_marker_that_names_files_elsewhere_is_refused(tmp_path, caplog, name):
    folder = tmp_path / "checkpoints"
    path = save_checkpoint(folder, 5, {"model": {"w": torch.ones(3)}}, 2)
    (folder / "outside.pt").write_bytes(b"x")
    marker = json.loads((path / MARKER).read_text())
    marker["files"][name] = {"bytes": 1, "crc32": 0}
    (path / MARKER).write_text(json.dumps(marker))
    assert complete_checkpoints(folder) == []
    assert f"names {name!r}, which is no file of one" in caplog.text
    with pytest.raises(UserError, match=r"is not whole: .* which is no file of one"):
        find_checkpoint(path)


SECRETS = {"WANDB_API_KEY": "f" * 30 + "0123456789", "HF_TOKEN": "hf_abcdefghijklmnop"}


@pytest.mark.slow
def test_secrets_are_written_nowhere(tmp_path, corpus, cache):
    """Not in records, settings, checkpoints, W&B's files or messages."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mst_train", "train.steps=2", "run.dir=run"),
            *(f"data.source={corpus}", f"data.cache_dir={cache}", "data.sequence_length=64"),
            *("data.tokenizer_vocab_size=512", "model.vocab_size=512", "model.hidden_size=32"),
            *("model.intermediate_size=88", "model.num_layers=2"),
        ],
        cwd=tmp_path,
        env={**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr.decode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    contents = [result.stdout, result.stderr, *(path.read_bytes() for path in files)]
    for secret in SECRETS.values():
        assert not any(secret.encode() in content for content in contents)
