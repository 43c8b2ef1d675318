"""The commands and programs in the pages, the docstrings and the workflow: known, and composed."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from mst_train.cli.compose import COMMANDS as COMMANDS_WITH_SETTINGS
from mst_train.cli.compose import compose
from mst_train.cli.sweep import points
from mst_train.evaluate.write_tasks import KEYS as WRITE_KEYS
from mst_train.export import KEYS
from mst_train.generate.__main__ import KEYS as GENERATE_KEYS
from mst_train.paper.__main__ import _parser

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("data/*.md"),
    *ROOT.glob("benchmarks/*.md"),
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PLACEHOLDERS = {  # what a page leaves to its reader, and something to compose with
    "+bench=NAME": "+bench=step",
    "+experiment=NAME": "+experiment=tiny",
    "+experiment=continue_pretraining": "+experiment=tiny",  # which needs a checkpoint
    "model.from_pretrained=FOLDER": "model.rope_scaling.original_length=8192",
    "...": "run.name=other",
    "PIECE": "longest",
    "{name}": "longest",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands():
    """The words of each line of shell in the pages, the docstrings and the workflow."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield shlex.split(line, comments=True)
        plain = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`((?:python -m|make|launch/)[^`]+)`", plain):
            yield shlex.split(code)
    for path in sorted(ROOT.glob("mst_train/**/*.py")):
        text = path.read_text()
        quoted = re.findall(r"`+(python -m [^`]+)`+", text)
        for code in quoted + re.findall(r'^(?:""")? *(python -m [^:"\n]+)', text, re.MULTILINE):
            yield shlex.split(code)
    for path in ROOT.glob(".github/workflows/*.yml"):
        for code in re.findall(r"- run: (.*)", path.read_text()):
            yield shlex.split(code)


def arguments(words):
    """A command's arguments, without what its reader may add ([key=value ...])."""
    kept = []
    for word in words:
        if word.startswith("[") or word in ("||", "&&", ";", "|", "<", "--help"):
            break
        kept.append(PLACEHOLDERS.get(word, word))
    return tuple(word for word in kept if word != "--config")


@functools.cache
def read(module, given):
    """The configuration that a command makes of its arguments."""
    if module.removeprefix("mst_train.") in COMMANDS_WITH_SETTINGS:
        return importlib.import_module(f"{module}.config").read(given)
    swept = points(given)
    return [point.config for point in swept] or compose(given)


def check(words):
    """Raises where a command is not one that this repository has."""
    words = words[next((n for n, word in enumerate(words) if "=" not in word), len(words)) :]
    if words[:1] == ["make"]:
        named = [word for word in words[1:] if "=" not in word]
        assert set(named) <= TARGETS, named
    elif words[:1] == ["launch/torchrun.sh"]:
        read("mst_train", arguments(words[1:]))
    elif "-m" in words and words[words.index("-m") + 1].startswith("mst_train"):
        at = words.index("-m") + 1
        assert importlib.util.find_spec(words[at]), words[at]
        given = arguments(words[at + 1 :])
        if words[at] == "mst_train.paper":
            _parser().parse_args(given)
        elif words[at] == "mst_train.export":
            assert {word.partition("=")[0] for word in given} <= set(KEYS)
        elif words[at].startswith(("mst_train.evaluate", "mst_train.generate")):
            # Nor the length in the checkpoint's place, which only a stretched one has.
            own = {
                "mst_train.generate": GENERATE_KEYS,
                "mst_train.evaluate.write_tasks": WRITE_KEYS,
            }
            others = (*own.get(words[at], ()), "model.rope_scaling.original_length")
            read(words[at], tuple(w for w in given if w.partition("=")[0] not in others))
        elif words[at] not in ("mst_train.bench.plot", "mst_train.plan.trial"):  # given a file
            read(words[at], given)
    elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words[1]
    elif words[:2] == ["sbatch", "--nodes=4"]:
        assert (ROOT / words[2]).is_file()
        read("mst_train", arguments(words[3:]))


COMMANDS = {" ".join(words): words for words in commands() if words}


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line):
    check(COMMANDS[line])


@pytest.mark.parametrize("start", ["make", "launch/torchrun.sh", "python -m mst_train.plan"])
def test_there_are_such_commands(start):
    """Or nothing would have been looked at."""
    assert any(line.startswith(f"{start} ") for line in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_shell_are_marked_as_such(page):
    """Or they would not be looked at."""
    for block in blocks(page, ""):
        assert not re.search(r"^(python -|make |launch/|pip |sbatch )", block, re.MULTILINE)


def defined(file):
    """The names that a module defines or hands on."""
    nodes = ast.parse(Path(file).read_text()).body
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_compile_and_their_imports_are_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("mst_"):
                names = {alias.name for alias in node.names}
                assert names <= defined(importlib.util.find_spec(node.module).origin)


def test_the_workflow_and_the_hooks_are_yaml():
    for path in (*ROOT.glob(".github/workflows/*.yml"), ROOT / ".pre-commit-config.yaml"):
        assert yaml.safe_load(path.read_text())
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"] == "1.2.0"
