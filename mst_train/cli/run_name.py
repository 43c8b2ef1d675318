"""What a run is called that is given no name: what it is, so that two do not meet in one folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mst_train.config import AUTO, lookup
from mst_train.files import name_of

LONGEST = 100


def run_name(tree: Mapping[str, Any], chosen: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """The name, of characters that every file system has.

    Args:
        tree: groups of settings.
        chosen: the file of each group that is chosen, such as "model".
        given: settings that were typed, by their keys.

    An experiment gives its own, and that of a checkpoint which it starts from; without one, the
    model's and the data's. What it goes on from, where that was typed, stands at the end.
    """
    name = "-".join(filter(None, _parts(tree, chosen, given)))
    return name[:LONGEST] or "run"


def _parts(
    tree: Mapping[str, Any], chosen: Mapping[str, str], given: Mapping[str, Any]
) -> Iterator[str]:
    experiment = chosen.get("experiment")
    pretrained = given.get("model.from_pretrained")
    if experiment is not None:
        yield experiment
        yield _last(pretrained)
    else:
        yield _last(pretrained) or chosen.get("model", "")
        mixture = lookup(dict(tree), "data.mixture") or [lookup(dict(tree), "data")]
        for part in mixture if isinstance(mixture, list) else []:
            yield _last(part.get("source") if isinstance(part, dict) else None)
    for key in ("run.init_from", "run.resume"):
        if given.get(key) not in (None, AUTO, "never"):
            yield f"from-{_last(given[key])}"


def _last(path: Any) -> str:
    """The last part of a path; of a checkpoint, its run's and its own."""
    if not isinstance(path, str) or not path.strip():
        return ""
    folder = Path(path).absolute()
    if folder.parent.name == "checkpoints":
        return f"{name_of(str(folder.parent.parent))}-{folder.name}"
    return name_of(path)
