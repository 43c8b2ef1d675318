"""What is measured, in sections: a table, a picture and what to know of them."""

import statistics
from collections.abc import Sequence
from typing import Any

from mst_train.paper.sections import prose
from mst_train.plan.show import markdown
from mst_train.units import duration

Report = dict[str, Any]

REACH = """
    Measured on {corpus}: an n-gram model counts {training:,} tokens of the training text and, of a
    held-out text, the last so many tokens before the one that it predicts. The losses are in nats
    per token, over {scored:,} held-out tokens that all have {longest:,} tokens before them.
    Beyond the last {short:,} tokens lie {beyond_short:.0%} of what the text's own past is worth to
    it and {of_loss:.0%} of the loss; beyond {middle:,}, {beyond_middle:.0%}. A trained model can
    use more than n-grams that come again, and less than all of them: this estimates what there is,
    and bounds nothing.
"""
TRAINING = """
    Measured in fp32 on {cpu} (threads: {threads}): a Llama of {parameters:,} parameters on
    {corpus}. Each model begins on pieces of {short:,} tokens, {sequences_a_step} in each of
    {start_steps:,} steps. From its weights the runs go on for {steps} steps of
    {tokens_per_step:,} tokens, {millions:.2f} million in all, and see the same tokens at each,
    those on {short:,} cut into pieces. Losses are in nats per token over {sequences} held-out
    sequences, means of {seeds} seeds; times are medians.
"""
SAME = """
    **The method against vanilla.** From the same weights on the same sequences, the losses of all
    seeds differ by at most {fp32:.1e} of the loss in {steps} steps: fp32's rounding, which
    training amplifies, and Muon most, whose updates are rounded to bf16. In float64 by AdamW they
    differ by at most {float64:.1e} in {exact_steps} steps.
"""
LONG_AND_SHORT = """
    **Long against short**, after the same tokens, in nats: what the models lose that were trained
    on {long:,}, minus what those lose that were trained on {short:,}, on the same held-out text;
    the interval is Student's for the mean of {seeds} seeds.
"""
VERDICT = """
    Each with the context of its own training, the long one's loss is {own}.
    From the first {short:,} positions to the last, the loss of the models trained on {long:,} goes
    from {first:.3f} to {last:.3f}; with {short:,} tokens of context instead of {long:,}, the last
    cost them {last_short:.3f}. Their steps take {slower:.1f} times as long: in a model this
    narrow, most of a long step is attention.
"""


def reach(report: Report) -> list[str]:
    losses = {row["window"]: row["loss"] for row in report["losses"]}
    windows = sorted(losses)
    short, middle, longest = windows[-3:]
    gain = losses[0] - losses[longest]
    lines = [
        (f"{at:,}", f"{losses[at]:.3f}", "" if last is None else f"{losses[last] - losses[at]:.3f}")
        for last, at in zip([None, *windows[:-1]], windows, strict=True)
    ]
    about = prose(
        REACH,
        corpus=report["text"],
        training=report["training_tokens"],
        scored=report["scored_tokens"],
        longest=longest,
        short=short,
        middle=middle,
        beyond_short=(losses[short] - losses[longest]) / gain,
        of_loss=(losses[short] - losses[longest]) / losses[short],
        beyond_middle=(losses[middle] - losses[longest]) / gain,
    )
    header = ("tokens of its own past", "loss", "lower by")
    return ["![What tells the next token](reach.png)", markdown(header, lines), about]


def convergence(report: Report) -> list[str]:
    seeds, long, short = report["seeds"], report["long"], report["short"]
    steps = len(seeds[0]["runs"]["mst"]["losses"])
    header = (
        "trained on",
        "time of a step",
        f"loss at {long:,}",
        f"first {short:,} of these",
        f"last {short:,}",
        f"loss on pieces of {short:,}",
    )
    lines = [
        (
            f"{length:,} tokens",
            duration(_seconds(seeds, name)),
            *(f"{_mean(seeds, name, *path):.3f}" for path in COLUMNS),
        )
        for name, length in (("mst", long), ("short", short))
    ]
    about = prose(
        TRAINING,
        **report["hardware"],
        corpus=report["text"],
        parameters=report["parameters"],
        sequences_a_step=report["start"]["sequences"],
        start_steps=len(seeds[0]["start"]["losses"]),
        steps=steps,
        tokens_per_step=report["tokens_per_step"],
        millions=steps * report["tokens_per_step"] / 1e6,
        short=short,
        sequences=seeds[0]["final_sequences"],
        seeds=len(seeds),
    )
    compared = [
        (
            name,
            f"{found['mean']:+.4f} ± {found['half_interval']:.4f}",
            ", ".join(f"{value:+.4f}" for value in found["values"]),
        )
        for name, found in report["long_minus_short"].items()
    ]
    verdict = prose(
        VERDICT,
        own=_lower(report["long_minus_short"]["each with its own context"]["values"]),
        long=long,
        short=short,
        first=_mean(seeds, "mst", "by_position", "long", 0),
        last=_mean(seeds, "mst", "by_position", "long", -1),
        last_short=_mean(seeds, "mst", "by_position", "short", -1),
        slower=_seconds(seeds, "mst") / _seconds(seeds, "short"),
    )
    return [
        "![Training](convergence.png)",
        markdown(header, lines),
        about,
        prose(
            SAME,
            **report["relative_difference"],
            steps=steps,
            exact_steps=report["exact_steps"],
        ),
        prose(LONG_AND_SHORT, long=long, short=short, seeds=len(seeds)),
        markdown(("", "mean, 95% interval", "each seed"), compared),
        verdict,
    ]


COLUMNS = (
    ("mean", "long"),
    ("by_position", "long", 0),
    ("by_position", "long", -1),
    ("mean", "short"),
)


def _mean(seeds: Sequence[Report], name: str, *path: str | int) -> float:
    """Of what is at ``path`` in the final losses of a run, over seeds."""

    def at(found: Any) -> float:
        for key in path:
            found = found[key]
        return float(found)

    return statistics.fmean(at(one["final"][name]) for one in seeds)


def _seconds(seeds: Sequence[Report], name: str) -> float:
    return statistics.fmean(one["runs"][name]["median_step_seconds"] for one in seeds)


def _lower(values: Sequence[float]) -> str:
    """How often a difference is below zero, in words."""
    lower = sum(value < 0 for value in values)
    if lower in (0, len(values)):
        return f"{'lower' if lower else 'higher'} in all seeds"
    return f"lower in {lower} of {len(values)} seeds"
