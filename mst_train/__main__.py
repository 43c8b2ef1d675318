"""python -m mst_train [+experiment=NAME] [key=value ...]: train."""

import logging
import sys

from mst_train.errors import TrainingError, UserError

HELP = """\
python -m mst_train [+experiment=NAME] [GROUP=NAME ...] [key=value ...]

Trains a language model. With no arguments: a small one on Python's own source files.
  --help     this page
  --config   print the configuration that the arguments make, and stop

{groups}

Settings and their defaults:
{settings}"""

log = logging.getLogger("mst_train")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        return _run(arguments)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: the same command continues from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        return 130


def _run(arguments: list[str]) -> int:
    from mst_train.compose import compose, describe

    if "--help" in arguments or "-h" in arguments:
        print(_help())
        return 0
    config = compose([a for a in arguments if a != "--config"])
    if "--config" in arguments:
        print(describe(config), end="")
        return 0
    # torch is imported only now: a mistake in the command line is answered at once.
    from mst_train.train import train

    summary = train(config)
    validation = summary["val_loss"]
    print(
        f"{config.run.name}: {summary['step']} steps, {summary['tokens']:,} tokens, "
        f"loss {summary['loss']:.4f}"
        + (f", validation loss {validation:.4f}" if validation is not None else "")
        + f"\nThe run's folder: {summary['run_dir']}"
    )
    return 0


def _help() -> str:
    from mst_train.compose import choices, config_folder, describe
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
