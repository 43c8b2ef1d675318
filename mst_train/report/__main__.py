"""python -m mst_train.report run.dir=DIR [report.compare=[DIR,...]]: a run as an HTML page."""

import logging
import sys

from mst_train.cli.command import run_command, show_help
from mst_train.errors import TrainingError
from mst_train.files import expanded, replace_file

HELP = """\
python -m mst_train.report run.dir=DIR [report.compare=[DIR,...]]

Writes DIR/report.html: the run's curves, its loss by position, its memory beside the prediction,
its settings and versions, in one file that loads nothing. It can be made while the run goes on.
  --help           this page
  report.compare   folders of other runs, drawn in the same charts"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "nothing was written")


def _run(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        show_help(HELP)
        return 0
    from mst_train.cli.compose import warn_of_unused
    from mst_train.cli.run_folder import check_names_run, run_folder
    from mst_train.report.config import read

    check_names_run(arguments)
    config = read(arguments)
    warn_of_unused(arguments, ("run.", "report."))
    folder = run_folder(config.run.dir, arguments)
    others = [expanded(name) for name in config.report.compare]
    # torch is imported only now: a mistake in the command line is answered at once.
    from mst_train.report.read import read_runs
    from mst_train.report.tokenizers import warning

    runs = read_runs([folder, *others])
    if caution := warning(runs):
        logging.getLogger("mst_train.report").warning(caution)

    from mst_train.report.memory import over_lengths
    from mst_train.report.page import page

    file = folder / "report.html"
    text = page(runs, over_lengths(runs[0]))
    try:
        replace_file(file, text.encode("utf-8", "replace"))
    except OSError as error:
        raise TrainingError(
            f"{file} cannot be written ({error.strerror or error}): make room or give permission "
            f"there"
        ) from error
    print(f"The page: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
