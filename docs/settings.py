"""Writes settings.md from where settings are defined: python docs/settings.py"""

from pathlib import Path

from mst_train.bench.config import BenchConfig
from mst_train.cli.reference import as_markdown
from mst_train.config import Config
from mst_train.plan.config import PlanConfig
from mst_train.prepare.config import PrepareConfig
from mst_train.report.config import ReportConfig

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Settings

Every setting, as `key=value` on the command line, with its default before a preset or an experiment
changes it. `python -m mst_train --help` prints the same, `--help GROUP` one group of it. Written by
`python docs/settings.py`.
"""


def page() -> str:
    """The page's text."""
    commands = {"plan": PlanConfig, "prepare": PrepareConfig, "bench": BenchConfig}
    commands["report"] = ReportConfig
    tables = [as_markdown(Config), *(as_markdown(made, [name]) for name, made in commands.items())]
    return "\n".join([HEAD, *tables])


if __name__ == "__main__":
    PAGE.write_text(page())
