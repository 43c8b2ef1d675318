"""python -m mst_train.plan [key=value ...]: what a run will take, before it starts."""

import json
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from mst_train.cli.command import has_expandable_segments, run_command, show_help
from mst_train.config import AUTO
from mst_train.files import expanded, make_folder

if TYPE_CHECKING:
    from mst_train.plan.config import PlanConfig

HELP = """\
python -m mst_train.plan [the arguments of a training command] [plan.KEY=VALUE ...]

Predicts the memory and the time of a training step, without the device and without the weights: the
step itself runs on tensors that have only shapes.
  --help     this page
  --config   print the configuration that the arguments make, and stop

Devices: {devices};
auto (this machine's), cpu, or a size in GiB such as 80.

Settings; those of training (python -m mst_train --help) hold too:

{settings}"""


WIDTH = 100
"""Of what is printed, in characters."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "nothing was written")


def _run(arguments: list[str]) -> int:
    from mst_train.cli.compose import describe
    from mst_train.cli.reference import as_text
    from mst_train.plan.config import PlanConfig, read

    if "--help" in arguments or "-h" in arguments:
        from mst_train.memory.devices import DEVICES

        show_help(HELP.format(devices=", ".join(DEVICES), settings=as_text(PlanConfig, "plan")))
        return 0
    config = read([a for a in arguments if a != "--config"])
    if "--config" in arguments:
        print(describe(config), end="")
        return 0
    report, text = _plan(config)
    print(json.dumps(report) if config.plan.output == "json" else text)
    return 0


def _plan(config: "PlanConfig") -> tuple[dict[str, Any], str]:
    """The report and what to show of it."""
    from mst_train.memory.extrapolate import with_length
    from mst_train.plan import buckets
    from mst_train.plan.before import advice, announce
    from mst_train.plan.choose import choose, described, longest, over_lengths
    from mst_train.plan.config import configured_target
    from mst_train.plan.predict import predict, with_reserved
    from mst_train.plan.progress import predicting

    target = configured_target(config)
    if config.plan.sweep:
        make_folder(expanded(config.plan.dir), "plan.dir")
    announce(with_length(config, max(config.plan.sweep, default=config.data.sequence_length)))
    notes: list[str] = []
    with predicting() as advance:
        if config.plan.sweep:
            predictions = over_lengths(config, config.plan.sweep, target, advance)
        elif config.memory.policy == AUTO:
            choice = choose(config, target, advance)
            predictions = [choice.chosen]
            notes += ["", *choice.reason.splitlines()]
        else:
            predictions = [predict(config, target)]
            if not predictions[0].fits:
                enough = buckets.that_fits(config, target, predictions[0].shortage_bytes)
                fits = None if enough is None else f"It fits with {enough[0]}"
                notes += ["", *_lines(fits or advice(predictions[0]))]
        if not config.plan.sweep:
            advance("the allocator")
            predictions = [with_reserved(predictions[0], expandable=has_expandable_segments())]
        best = longest(config, target, advance) if config.plan.search else None
    report = predictions[0].report()
    if config.plan.sweep:
        report = {"sweep": [p.report() for p in predictions]}
        notes += ["", *_write_sweep(config, predictions)]
    if config.plan.search:
        report["max_sequence_length"] = best.config.data.sequence_length if best else 0
        note = "No sequence of 1,024 tokens or more fits"
        if best:
            length = report["max_sequence_length"]
            note = f"The longest sequence that fits: {length:,} tokens ({described(best)})"
        notes += ["", *_lines(note)]
    if config.plan.output == "json":
        return report, ""
    from mst_train.plan.show import render

    return report, render(predictions, notes, WIDTH)


def _lines(text: str) -> list[str]:
    """As wide as the table, and settings whole."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _write_sweep(config: "PlanConfig", predictions: list[Any]) -> list[str]:
    from mst_train.plan import plot, show

    folder = expanded(config.plan.dir)
    table, image, data = (folder / f"sweep.{end}" for end in ("md", "png", "json"))
    table.write_text(show.markdown(show.COLUMNS, show.rows(predictions)))
    data.write_text(json.dumps([p.report() for p in predictions], indent=1) + "\n")
    plot.draw_memory(predictions, image, config.run.name)
    return [f"Written: {table}, {data}, {image}"]


if __name__ == "__main__":
    sys.exit(main())
