"""What the documents and docstrings say of the program's parts: all of them, and no others."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from test_layers import LAYERS

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    [*ROOT.glob("mst_train/**/__init__.py"), *ROOT.glob("kernels/mst_kernels/__init__.py")]
)
SOURCES = sorted([*ROOT.glob("mst_train/**/*.py"), *ROOT.glob("kernels/**/*.py")])
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]
    if page.name not in ("CHANGELOG.md", "log.md")  # which tell of what was
)
FILE = re.compile(r"[\w./]*\w\.(?:py|sh)\b")
ELSEWHERE = {  # these tell of others' sources
    "mst_train/attention/cuda/flash_attn_3.py",
    "mst_train/attention/cuda/flash_attn_4.py",
    "mst_train/memory/simulated_zero.py",
}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def files():
    """Every file's path from the root, as git lists them where there is git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return listed.stdout.split() or [relative(p) for p in ROOT.rglob("*") if p.is_file()]


def missing(text):
    """The names of files in a text that no file has."""
    known = [f"/{name}" for name in files()]
    names = {name.lstrip("./") for name in FILE.findall(text) if "NAME" not in name}
    return [name for name in names if not any(path.endswith(f"/{name}") for path in known)]


def test_architecture_names_every_part_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.search(r"\| part \|.*?\n\n", text, re.DOTALL)[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:] if line]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    parts = {path.stem for path in (ROOT / "mst_train").glob("*.py")} - {"__init__"}
    parts |= {path.parent.name for path in (ROOT / "mst_train").glob("*/__init__.py")}
    assert named == parts | {"mst_kernels"}


def test_architecture_draws_the_layers_of_imports():
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = text.partition("```\n")[2].partition("```")[0]
    lines = [line.partition("|")[0].split() for line in picture.splitlines()]
    assert [set(line) for line in reversed(lines)] == [set(layer) for layer in LAYERS]


@pytest.mark.parametrize("path", PACKAGES, ids=relative)
def test_a_package_lists_its_modules(path):
    words = set(re.findall(r"\w+", ast.get_docstring(ast.parse(path.read_text())) or ""))
    modules = {p.stem for p in path.parent.glob("*.py")} - {"__init__", "__main__"}
    modules |= {p.parent.name for p in path.parent.glob("*/__init__.py")}
    if path.parent != ROOT / "mst_train":  # whose parts are those of architecture.md
        assert {name.removesuffix("_triton") for name in modules} <= words


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_name_files_that_exist(page):
    text = page.read_text()
    assert not missing(re.sub(r"https?://\S+", "", text))
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_headings_that_exist(page):
    for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        lines = (page.parent / target if target else page).read_text().splitlines()
        titles = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
        slugs = {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}
        assert heading in slugs, f"{target}#{heading}"


def test_docstrings_name_files_that_exist():
    for path in SOURCES:
        if relative(path) in ELSEWHERE:
            continue
        constants = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Expr)]
        texts = [n.value.value for n in constants if isinstance(n.value, ast.Constant)]
        assert not missing(" ".join(t for t in texts if isinstance(t, str))), relative(path)
