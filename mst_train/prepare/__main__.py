"""python -m mst_train.prepare prepare.output=DIR data.source=... [key=value ...]: tokenise."""

import sys

from mst_train.cli.command import run_command, show_help

HELP = """\
python -m mst_train.prepare prepare.output=DIR data.source=... [key=value ...]

Tokenises a source into a folder that training reads as data.source=DIR, by several processes. The
same command continues after an interruption. data/README.md describes sources and folders.
  --help     this page
  --config   print the configuration that the arguments make, and stop

Settings:

{settings}"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "the same command continues")


def _run(arguments: list[str]) -> int:
    from mst_train.cli.compose import describe, warn_of_unused
    from mst_train.cli.reference import as_text
    from mst_train.prepare.config import PrepareConfig, read

    if "--help" in arguments or "-h" in arguments:
        groups = [as_text(PrepareConfig, group) for group in ("prepare", "data")]
        show_help(HELP.format(settings="\n\n".join(groups)))
        return 0
    config = read([a for a in arguments if a != "--config"])
    if "--config" in arguments:
        print(describe(config), end="")
        return 0
    warn_of_unused(arguments, ("data", "prepare.", "model.from_pretrained"))
    from mst_train.prepare.folder import prepare

    prepare(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
