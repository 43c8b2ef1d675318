"""What python -m mst_train.report reads beside the settings of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mst_train.cli.compose import compose_as
from mst_train.config import Config


@dataclass(frozen=True)
class ReportSettings:
    """What python -m mst_train.report shows beside the run in run.dir."""

    compare: list[str] = field(default_factory=list)
    """Folders of other runs, drawn in the same charts."""


@dataclass(frozen=True)
class ReportConfig(Config):
    report: ReportSettings = field(default_factory=ReportSettings)


def read(arguments: Sequence[str]) -> ReportConfig:
    """The configuration that the arguments make; UserError with every problem found."""
    return compose_as(ReportConfig, arguments)
