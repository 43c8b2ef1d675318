"""python -m mst_train.paper [--output FOLDER] [--only PIECE]: the paper's experiments as a page."""

import argparse
import logging
import sys
from pathlib import Path

from mst_train.cli.command import run_command

NAMES = ("longest", "several", "lengths", "ablations", "reach", "convergence")
OUTPUT = Path("docs", "paper")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "the pieces that were finished are in the folder")


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    # Imported only now: a mistake in the command line is answered at once.
    from tqdm import tqdm

    from mst_train.paper import page
    from mst_train.paper.pieces import make

    names = options.only or NAMES
    options.output.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("mst_train.paper")
    with tqdm(names, unit=" piece", disable=None, dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_description_str(name)
            report = make(name, options.output, bar.set_postfix_str)
            path = page.write(options.output)
            if bar.disable:
                log.info("%s: %.0f s", name, report["seconds"])
    print(f"The page: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mst_train.paper",
        description="Predicts and measures what the paper reports, and writes a page about it.",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the folder ({OUTPUT})")
    parser.add_argument(
        "--only", choices=NAMES, action="append", help="make this piece alone; can be repeated"
    )
    parser.add_argument("--version", action="store_true", help="print the version, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
