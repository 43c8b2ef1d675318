"""The direction of imports, read from the syntax trees (imports inside functions included)."""

import ast
import functools
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("mst_train/**/*.py"), *ROOT.glob("kernels/mst_kernels/**/*.py")])

LAYERS = (
    ("mst_kernels", "bar", "config", "environment", "errors", "ranges", "rendezvous", "units"),
    ("deepspeed_adapter", "files", "mst", "precision"),
    ("attention", "data", "optim"),
    ("distributed", "model"),
    ("cli", "engine", "integrations"),
    ("checkpoint", "memory", "prepare"),
    ("evaluate", "export", "generate", "plan", "tracking"),
    ("bench", "paper", "report", "run"),
    ("__main__",),
)
"""Packages of mst_train and modules beside them, lowest first: each imports from lower ones."""

LEAN = {
    "mst_train.mst": {"mst_kernels", "mst_train", "torch"},
    "mst_train.config": {"mst_train"},
    "mst_train.errors": set(),
    "mst_train.files": {"mst_train"},
    "mst_kernels": {"mst_kernels", "torch", "triton"},
}
"""What these packages import besides the standard library."""

HOMES = {
    "hydra": ("mst_train.cli.compose", "mst_train.cli.sweep"),
    "wandb": ("mst_train.tracking.wandb_run",),
    "datasets": ("mst_train.data.huggingface",),
    "flash_attn": ("mst_train.attention.cuda",),
    "safetensors": ("mst_train.model.hf.weights",),
    "huggingface_hub": ("mst_train.model.hf.weights", "mst_train.data.huggingface"),
    "sentencepiece": ("mst_train.data.tokenizer",),
    "triton": ("mst_kernels",),
    "deepspeed": (
        "mst_train.deepspeed_adapter",
        "mst_train.engine.zero",
        "mst_train.bench.systems",
        "mst_train.bench.peers",
    ),
    "transformers": (
        "mst_train.bench.systems",
        "mst_train.plan.baseline",
        "mst_train.integrations",
    ),
    "liger_kernel": ("mst_train.bench.systems", "mst_train.bench.peers"),
    "cut_cross_entropy": ("mst_train.bench.peers",),
    "matplotlib": (
        "mst_train.plan.plot",
        "mst_train.data.statistics",
        "mst_train.evaluate.plot",
        "mst_train.paper.plot",
        "mst_train.report.charts",
    ),
    "rich": ("mst_train.plan.show", "mst_train.evaluate.show"),
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(parts).removesuffix(".__init__")


@functools.cache
def imports(path):
    """The modules, and the names within them, that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def within(name, package):
    return name == package or name.startswith(package + ".")


def place(name):
    """The package of mst_train, or the module beside them, that a module belongs to."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "mst_train" else first


def layer(name):
    """Where a module stands, 0 the lowest; None for what is not ours."""
    return next((n for n, places in enumerate(LAYERS) if place(name) in places), None)


def test_every_package_has_a_layer():
    places = {place(module_name(path)) for path in FILES} - {""}
    assert places == {name for names in LAYERS for name in names}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path):
    name = module_name(path)
    for imported in imports(path):
        own = within(imported, "mst_train") or within(imported, "mst_kernels")
        if not own or place(imported) in ("", "__version__", place(name)):
            continue
        assert layer(imported) < layer(name), f"{name} imports {imported}"


def test_the_method_stands_alone():
    for path in FILES:
        if within(module_name(path), "mst_train.mst"):
            ours = {i for i in imports(path) if within(i, "mst_train")}
            assert all(within(i, "mst_train.mst") or within(i, "mst_train.ranges") for i in ours)


def test_no_modules_import_each_other_in_a_circle():
    modules = {module_name(path): path for path in FILES}
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    graph = {
        name: {i for i in imports(path) if i in modules and i != name and i not in packages}
        for name, path in modules.items()
        if name not in packages  # they hand on the names of what is inside them
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name == "__init__.py"], ids=module_name
)
def test_packages_hand_names_on_and_nothing_else(path):
    for node in ast.parse(path.read_text()).body:
        names = [t.id for t in node.targets] if isinstance(node, ast.Assign) else []
        documented = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert (
            documented or isinstance(node, ast.ImportFrom) or names[0] in ("__all__", "__version__")
        )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_lean_packages_stay_lean(path):
    name = module_name(path)
    for package, allowed in LEAN.items():
        if within(name, package):
            found = {imported.partition(".")[0] for imported in imports(path)}
            assert found <= {*allowed, *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_heavy_package_has_one_home(path):
    name = module_name(path)
    for package, homes in HOMES.items():
        if any(within(name, home) for home in homes):
            continue
        assert not any(within(imported, package) for imported in imports(path)), name
