"""Settings of a run that starts from a checkpoint in Hugging Face's format.

``model.from_pretrained`` names it. The settings are resolved before anything else looks at them, so
that checks, the planner and the run's config.yaml see the model that will be trained.
"""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mst_train.config import RopeScalingConfig, lookup
from mst_train.data.corpus import prepared_folder
from mst_train.data.tokenizer_file import FILE_NAMES, tokenizer_file
from mst_train.errors import UserError
from mst_train.model.hf.weights import pretrained_config, pretrained_folder

SCALING = "model.rope_scaling"


def with_pretrained(tree: dict[str, Any], name: str, given: Collection[str]) -> dict[str, Any]:
    """A tree of settings, with those of the checkpoint in ``model`` and its tokenizer in ``data``.

    Args:
        tree: groups of settings.
        name: the checkpoint, which tree["model"]["from_pretrained"] stands for.
        given: keys whose values in ``tree`` hold, such as "model.rope_scaling.type".

    Where rotary embeddings are stretched by a type that was given, the checkpoint's own stretching
    does not count, and the length that it was trained on is what it says of itself.

    Raises:
        UserError: the model is not supported, a preset of model is given as well, or its tokenizer
            cannot be read here and none is given.
    """
    if "model" in given:
        raise UserError(
            f"model=NAME and model.from_pretrained={name} both say what the model is: leave one out"
        )
    folder = pretrained_folder(name)
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"model.from_pretrained={name} is a run: run.init_from={name} starts with its weights, "
            f"and python -m mst_train.export checkpoint={name} output=FOLDER makes a checkpoint "
            f"for others of it"
        )
    settings = {**asdict(pretrained_config(folder)), "from_pretrained": name}
    if f"{SCALING}.type" in given:
        own = settings["rope_scaling"]
        settings["rope_scaling"] = asdict(RopeScalingConfig())
        if lookup(tree, f"{SCALING}.type") in ("yarn", "llama3"):
            length = own["original_length"] or settings["max_positions"]
            settings["rope_scaling"]["original_length"] = length
    model = _merged(settings, tree["model"], "model", given)
    return {**tree, "model": model, "data": _data(tree.get("data") or {}, folder, given)}


def _merged(settings: Any, values: Any, key: str, given: Collection[str]) -> Any:
    """``settings``, with what was given, and what is unknown, from ``values``."""
    if key in given or not isinstance(settings, dict):
        return values if key in given else settings
    if not isinstance(values, dict):
        values = {}
    unknown = {name: value for name, value in values.items() if name not in settings}
    merged = {
        name: _merged(setting, values.get(name, setting), f"{key}.{name}", given)
        for name, setting in settings.items()
    }
    return merged | unknown  # for one message about all of them


def _data(data: dict[str, Any], folder: Path, given: Collection[str]) -> dict[str, Any]:
    """The settings of ``data``, with the checkpoint's tokenizer where none was given."""
    if "data.tokenizer" in given or data.get("tokenizer") is not None:
        return data
    file = tokenizer_file(folder)
    if file is not None:
        return {**data, "tokenizer": str(file)}
    sources = [part.get("source", "") for part in data.get("mixture") or []]
    if all(prepared_folder(str(source)) for source in sources or [data.get("source", "")]):
        return data  # tokens already
    raise UserError(
        f"model.from_pretrained={folder} has neither {' nor '.join(FILE_NAMES)}: "
        f"give data.tokenizer=FILE that its weights know, a data.source that is prepared "
        f"with its tokens, or for training data.tokenizer=null, which trains a new tokenizer"
    )
