"""What --help and docs/settings.md say of settings."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mst_train.bench.config import BenchConfig
from mst_train.cli.reference import as_markdown, as_text, entries
from mst_train.cli.settings import Settings
from mst_train.config import Config
from mst_train.config.schema import choice
from mst_train.plan.config import PlanConfig
from mst_train.prepare.config import PrepareConfig
from mst_train.report.config import ReportConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("schema", [Config, BenchConfig, PlanConfig, PrepareConfig, ReportConfig])
def test_every_setting_has_a_meaning(schema):
    found = list(entries(schema))
    assert sorted(entry.key for entry in found) == sorted(Settings(schema))
    assert [entry.key for entry in found if not entry.meaning] == []


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    depth: int | str = "auto"
    """How | deep."""


@dataclass(frozen=True)
class Outer:
    """What is outside."""

    inner: Inner = field(default_factory=Inner)
    kinds: list[str] = field(default_factory=lambda: ["a"], metadata={"choices": ("a", "b")})
    """Which of
    them."""
    size: float | None = None
    """In GiB."""
    mode: str = choice("on", ("on", "off"))
    """Whether."""


def test_settings_as_text():
    assert as_text(Outer).splitlines() == [
        "What is outside.",
        "  kinds=[a]   (list of a, b)",
        "      Which of them.",
        "  size=null   (number or null)",
        "      In GiB.",
        "  mode=on   (on, off)",
        "      Whether.",
        "",
        "inner: What is inside.",
        "  inner.depth=auto   (whole number or auto)",
        "      How | deep.",
    ]
    assert as_text(Outer, "inner") == "\n".join(as_text(Outer).splitlines()[-3:])


def test_settings_as_tables():
    assert as_markdown(Outer, ["inner"]).splitlines()[2:] == [
        "What is inside.",
        "",
        "| setting | default | values | meaning |",
        "|---|---|---|---|",
        r"| `inner.depth` | `auto` | whole number or auto | How \| deep. |",
    ]


def test_the_page_is_what_the_definitions_say():
    made = runpy.run_path(str(DOCS / "settings.py"))["page"]()
    assert (DOCS / "settings.md").read_text() == made, "write it anew: python docs/settings.py"
