"""What fills the memory at lengths from 1K to 80K, predicted for each memory policy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mst_train.plan.config import configured_target, read
from mst_train.plan.sweep import over_lengths

_MST = "+experiment=llama3_8b_lengths_mst"
WAYS = {
    "vanilla": ("+experiment=llama3_8b_lengths_vanilla",),
    "recompute": ("+experiment=llama3_8b_lengths_recompute",),
    "mst, keeping attention's result": (_MST, "memory.keep_attention=true"),
    "mst, computing attention again": (_MST, "memory.keep_attention=false"),
}


def over_all_lengths(
    advance: Callable[[str], None],
    ways: Mapping[str, Sequence[str]] = WAYS,
    lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """For each way the predictions over lengths; none given: the experiments' own."""
    found = {}
    for name, settings in ways.items():
        config = read(settings)
        chosen = lengths or config.plan.sweep
        predictions = over_lengths(config, chosen, configured_target(config), advance)
        found[name] = [prediction.report() for prediction in predictions]
    return {"ways": found}
