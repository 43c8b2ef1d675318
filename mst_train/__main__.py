"""python -m mst_train [+experiment=NAME] [key=value ...]: train."""

import sys

from mst_train.cli.command import run_command
from mst_train.rendezvous.dist_env import rank

HELP = """\
python -m mst_train [+experiment=NAME] [GROUP=NAME ...] [key=value ...]

Trains a language model. With no arguments: a small one on Python's own source files.
  --help     this page
  --config   print the configuration that the arguments make, and stop

{groups}

Settings and their defaults:
{settings}"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    interrupted = "the same command continues from the last checkpoint, if there is one"
    return run_command(_run, arguments, interrupted)


def _run(arguments: list[str]) -> int:
    from mst_train.cli.compose import compose, describe

    if "--help" in arguments or "-h" in arguments:
        print(_help())
        return 0
    config = compose([a for a in arguments if a != "--config"])
    if "--config" in arguments:
        print(describe(config), end="")
        return 0
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


def _help() -> str:
    from mst_train.cli.compose import choices, config_folder, describe
    from mst_train.config import Config

    groups = "\n".join(
        f"  {path.name:<11} {', '.join(choices(path.name))}"
        for path in sorted(config_folder().iterdir())
        if path.is_dir()
    )
    settings = "\n".join(f"  {line}" for line in describe(Config()).splitlines())
    return HELP.format(groups=f"Groups:\n{groups}", settings=settings)


if __name__ == "__main__":
    sys.exit(main())
