"""Whether runs that are compared have one tokenizer, without which their losses mean other things.

A loss is per token, and a tokenizer with longer tokens has fewer of them in the same text, each
harder to predict.
"""

from collections.abc import Sequence
from typing import Any

from mst_train.report.read import Run, group

DIFFERENT = (
    "These runs have different tokenizers: their losses are per token and cannot be compared, as "
    "a token of one is not a token of the other."
)
UNCERTAIN = (
    "These runs may have different tokenizers, as they differ in {settings}: their losses are per "
    "token and can be compared only where the tokenizer is the same."
)


def warning(runs: Sequence[Run]) -> str:
    """What to know before comparing the losses of ``runs``; empty where one tokenizer is certain.

    A run's environment.json says which it has; of runs that were made before it did, the settings
    that decide it are compared.
    """
    known = [run.environment.get("tokenizer") for run in runs]
    if len({one for one in known if one is not None}) > 1:
        return DIFFERENT
    if None not in known:
        return ""
    deciding = [_deciding(run.settings) for run in runs if run.settings]
    differing = [
        key
        for key in dict.fromkeys(key for settings in deciding for key in settings)
        if any(settings.get(key) != deciding[0].get(key) for settings in deciding)
    ]
    return UNCERTAIN.format(settings=", ".join(differing)) if differing else ""


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that say which tokenizer a run has."""
    data = group(settings, "data")
    found = {"data.tokenizer": data.get("tokenizer")}
    if found["data.tokenizer"] is None:  # it is that of the source, or trained on it
        source = "mixture" if data.get("mixture") else "source"
        found |= {f"data.{key}": data.get(key) for key in (source, "tokenizer_vocab_size")}
    return found | {"model.vocab_size": group(settings, "model").get("vocab_size")}
