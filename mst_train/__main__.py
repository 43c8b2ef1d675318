"""python -m mst_train [+experiment=NAME] [key=value ...]: train."""

import difflib
import logging
import sys
import textwrap
from importlib.util import find_spec

from mst_train.cli.command import run_command, show, show_help, told_once
from mst_train.errors import UserError
from mst_train.files import expanded
from mst_train.rendezvous.dist_env import rank

HELP = """\
python -m mst_train [+experiment=NAME] [GROUP=NAME ...] [key=value ...]

Trains a language model. With no arguments: a small one on Python's own source files.
  key=a,b          a run for each value, one after the other
  --help [GROUP]   this page, or a group of settings alone, such as optimizer
  --config         print the configuration that the arguments make, and stop
  --config-dir DIR use files of your own too: DIR/model/mine.yaml is model=mine (or MST_CONFIG_DIR)

Other commands, python -m mst_train.NAME, each with its own --help:
  {commands}

Files of settings, GROUP=NAME; +experiment=NAME and +bench=NAME set those of several groups:
{files}

Settings, key=VALUE, with their defaults:

{settings}"""

log = logging.getLogger("mst_train")

COMMANDS = ("plan", "prepare", "evaluate", "generate", "report", "export", "bench")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    interrupted = "the same command continues from the last checkpoint, if there is one"
    return run_command(_run, arguments, interrupted)


def _run(arguments: list[str]) -> int:
    from mst_train.cli.compose import compose, describe
    from mst_train.cli.sweep import points, run_all
    from mst_train.data import check_sources

    with told_once():
        if "--help" in arguments or "-h" in arguments:
            show_help(_help([a for a in arguments if a not in ("--help", "-h")]))
            return 0
        swept = points([a for a in arguments if a != "--config"])
        if swept and "--config" not in arguments:
            return run_all(swept)
        config = compose([a for a in arguments if a != "--config"])
        for bench in (a for a in arguments if a.lstrip("+").startswith("bench=")):
            log.warning("%s: this trains; python -m mst_train.bench %s measures", bench, bench)
        if "--config" in arguments:
            show(describe(config).rstrip("\n"))
            return 0
        if not expanded(config.run.dir).exists():  # a run that is finished needs no data
            check_sources(config.data, config.model.vocab_size)
    # torch is imported only now: a mistake in the command line is answered at once.
    from mst_train.run.train import train

    summary = train(config)
    if rank() != 0:
        return 0
    loss, validation = summary.get("loss"), summary["val_loss"]
    print(
        f"{config.run.name}: {summary['step']} steps, {summary['tokens']:,} tokens, "
        + (f"loss {loss:.4f}" if loss is not None else "none of which was good")
        + (f", validation loss {validation:.4f}" if validation is not None else "")
        + f"\nThe run's folder: {summary['run_dir']}"
    )
    return 0


def _help(groups: list[str]) -> str:
    from mst_train.cli.config_folders import choices, config_folders
    from mst_train.cli.config_folders import groups as folder_groups
    from mst_train.cli.reference import as_text, titles
    from mst_train.config import Config

    known = {group.rpartition(".")[2]: group for group in titles(Config) if group}
    known |= {group: group for group in known.values()}
    for group in groups:
        if group not in known:
            close = difflib.get_close_matches(group, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"--help {group}: {hint}")
    if groups:
        return "\n\n".join(as_text(Config, known[group]) for group in groups)
    files = [
        textwrap.fill(
            ", ".join(choices(group)),
            100,
            initial_indent=f"  {group:<11} ",
            subsequent_indent=" " * 14,
            break_on_hyphens=False,
        )
        for group in folder_groups(config_folders())
    ]
    made = [name for name in COMMANDS if find_spec(f"mst_train.{name}")]
    settings = as_text(Config)
    return HELP.format(commands=", ".join(made), files="\n".join(files), settings=settings)


if __name__ == "__main__":
    sys.exit(main())
