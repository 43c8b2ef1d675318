"""The direction of imports, read from the syntax trees (imports inside functions included)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("mst_train/**/*.py"), *ROOT.glob("kernels/mst_kernels/**/*.py")])

FORBIDDEN = {
    "mst_kernels": ("mst_train",),
    "mst_train.errors": ("mst_train", "torch"),
    "mst_train.environment": ("mst_train",),
    "mst_train.config": ("mst_train", "torch", "hydra", "omegaconf"),
    "mst_train.mst": (
        "mst_train.model",
        "mst_train.run.train",
        "mst_train.data",
        "mst_train.optim",
    ),
    "mst_train.model": ("mst_train.run.train", "mst_train.data", "mst_train.optim"),
    "mst_train.data": ("mst_train.model", "mst_train.run.train", "mst_train.mst"),
    "mst_train.optim": ("mst_train.model", "mst_train.run.train"),
    "mst_train.checkpoint.files": ("mst_train.model", "mst_train.run.train"),
    "mst_train.checkpoint.form": ("mst_train.model", "mst_train.run.train"),
    "mst_train.checkpoint.writer": ("mst_train.model", "mst_train.run.train"),
    "mst_train.files": ("mst_train.checkpoint.files", "mst_train.tracking.metrics", "torch"),
    "mst_train.cli.signals": ("mst_train", "torch"),
    "mst_train.tracking.metrics": ("mst_train.model", "mst_train.run.train"),
    "mst_train.tracking.wandb_run": ("mst_train.model", "mst_train.run.train"),
    "mst_train.evaluate": ("mst_train.run.train", "mst_train.plan", "mst_train.report"),
    "mst_train.report": ("mst_train.run.train", "mst_train.evaluate", "mst_train.bench"),
    "mst_train.distributed": (
        "mst_train.model",
        "mst_train.run.train",
        "mst_train.engine.step",
        "mst_train.plan",
        "mst_train.cli.compose",
    ),
    "mst_train.engine.step": ("mst_train.run.train", "mst_train.plan", "mst_train.cli.compose"),
    "mst_train.memory": ("mst_train.run.train", "mst_train.plan", "mst_train.cli.compose"),
    "mst_train.plan": ("mst_train.run.train", "mst_train.bench"),
    "mst_train.run.train": ("mst_train.__main__", "mst_train.cli.compose", "mst_train.bench"),
    "mst_train.paper": ("mst_train.__main__", "mst_train.run.train"),
}

HOMES = {
    "hydra": ("mst_train.cli.compose",),
    "wandb": ("mst_train.tracking.wandb_run",),
    "datasets": ("mst_train.data.huggingface",),
    "flash_attn": ("mst_train.attention.cuda",),
    "safetensors": ("mst_train.model.hf.weights",),
    "huggingface_hub": ("mst_train.model.hf.weights",),
    "sentencepiece": ("mst_train.data.tokenizer",),
    "triton": ("mst_kernels",),
    "deepspeed": (
        "mst_train.optim",
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
        "mst_train.bench.plot",
        "mst_train.plan.plot",
        "mst_train.data.statistics",
        "mst_train.paper.plot",
        "mst_train.report.charts",
    ),
    "rich": ("mst_train.plan.show", "mst_train.evaluate.show"),
    "mst_train.bench": ("mst_train.bench",),
    "mst_train.paper": ("mst_train.paper",),
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(parts).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path):
    name = module_name(path)
    for package, forbidden in FORBIDDEN.items():
        if not within(name, package):
            continue
        for imported in imports(path):
            wrong = [f for f in forbidden if within(imported, f) and not within(imported, package)]
            assert not wrong, f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_heavy_package_has_one_home(path):
    name = module_name(path)
    for package, homes in HOMES.items():
        if any(within(name, home) for home in homes):
            continue
        assert not any(within(imported, package) for imported in imports(path)), name


def test_config_needs_the_standard_library_alone():
    import sys

    found = {i.partition(".")[0] for i in imports(ROOT / "mst_train/config.py")}
    assert found <= set(sys.stdlib_module_names)
