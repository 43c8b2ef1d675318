"""How the processes that share a sequence exchange what attention needs (``mst.sharing``).

``parallel.sequence_exchange`` names it: heads (all P processes exchange heads), keys (each is a
node by itself, and they exchange keys and values), both (heads within nodes of several processes,
keys between nodes). auto takes of all that are possible the one that sends the least, what goes
from machine to machine counting BETWEEN_MACHINES times; on a GPU of those alone whose smallest
group of heads is not larger than MOST_GROUP_BYTES, if there are any.
"""

import math
from collections import Counter
from dataclasses import dataclass

from mst_train.config import AUTO, Config, ModelConfig
from mst_train.mst.sharing import Places
from mst_train.mst.sharing.heads import Heads
from mst_train.mst.sharing.keys import KeyMap
from mst_train.precision import weight_type
from mst_train.units import GIB

BETWEEN_MACHINES = 9
"""What a byte between machines costs, where one inside a machine costs 1: NVLink's 450 GB/s beside
a GPU's 400 Gbit/s of network, each way."""

GROUP_BYTES = {"cpu": None, "cuda": 2 * GIB}
"""What a group of heads is to take in the backward, by device type; None: one group is all."""

MOST_GROUP_BYTES = 8 * GIB
"""What a group of one key-value head may take on a GPU where another exchange takes less."""


@dataclass(frozen=True)
class Exchange:
    """heads, keys: as in ``Places``. keys_at_once: as in ``SharedSequence``. per_machine: processes
    on each machine.
    """

    heads: int = 1
    keys: int = 1
    keys_at_once: int | None = None
    per_machine: int = 1

    @property
    def name(self) -> str:
        """As ``parallel.sequence_exchange`` names it."""
        return Places(self.heads, self.keys).exchange


ALONE = Exchange()
"""Of a process that shares its sequences with nobody."""


def choose_exchange(config: Config, per_machine: int, device_type: str) -> Exchange:
    """The exchange of a run with so many processes on each machine; the rules of ``config`` leave
    at least one."""
    degree, wanted = config.parallel.sequence_parallel, config.parallel.sequence_exchange
    if degree == 1:
        return ALONE
    model, length = config.model, config.data.sequence_length
    possible = [
        places
        for heads in range(1, degree + 1)
        if degree % heads == 0 and model.num_heads % heads == 0
        for places in [Places(heads, degree // heads)]
        if length % places.multiple == 0 and wanted in (AUTO, places.exchange)
    ]
    smallest = min(_head_bytes(config, places) for places in possible)
    bound = math.inf if device_type == "cpu" else max(MOST_GROUP_BYTES, smallest)
    possible = [places for places in possible if _head_bytes(config, places) <= bound]
    places = min(possible, key=lambda places: (_cost(config, places, per_machine), -places.heads))
    at_once = _keys_at_once(config, places, device_type)
    return Exchange(places.heads, places.keys, at_once, per_machine)


def busiest(config: Config, exchange: Exchange) -> Places:
    """The place of the process that holds the most of others' heads and keys."""
    model, length = config.model, config.data.sequence_length
    heads = Heads(model.num_heads, model.num_kv_heads, exchange.heads)
    windows = set(map(model.window, range(model.num_layers)))

    def held(places: Places) -> tuple[int, int]:
        keys = heads.share(places.rank % places.heads).keys
        spans = [span for window in windows for span in KeyMap(places, length, window).spans]
        return sum(span.stop - span.start for span in spans), keys.stop - keys.start

    processes = exchange.heads * exchange.keys
    return max((Places(exchange.heads, exchange.keys, n) for n in range(processes)), key=held)


def sent_bytes(config: Config, places: Places) -> tuple[int, int]:
    """What a process sends in a step, for heads and for keys and values.

    In the forward and the backward of all layers, where attention's result is kept; of the process
    of ``places.rank``.
    """
    train = config.train
    steps = train.micro_batch_size * train.accumulation_steps
    heads = keys = 0
    for window, layers in Counter(map(config.model.window, range(config.model.num_layers))).items():
        by_heads, by_keys = _layer_bytes(config, places, window)
        heads, keys = heads + layers * by_heads, keys + layers * by_keys
    return steps * heads, steps * keys


def _layer_bytes(config: Config, places: Places, window: int | None) -> tuple[int, int]:
    """Of one layer and one sequence."""
    model, length = config.model, config.data.sequence_length
    size = weight_type(config.precision).itemsize
    row = model.head_dim * size
    others = [n for n in range(places.heads) if n != places.rank % places.heads]
    heads = Heads(model.num_heads, model.num_kv_heads, places.heads)
    own = heads.share(places.rank % places.heads)
    queries, keys = (part.stop - part.start for part in own)
    of_others = [heads.share(process).keys for process in others]
    keys_of_others = sum(part.stop - part.start for part in of_others)
    # Queries, keys and values there, result back; the result back; queries and its gradient, keys
    # and values there, their gradients back.
    there, back = 3 * queries * len(others) + 4 * keys_of_others, 3 * queries + 2 * keys
    by_heads = length // places.processes * row * (there + back * len(others))
    key_map = KeyMap(places, length, window)
    # Twice as they are, and their gradients back in fp32 at least.
    positions_sent = 2 * key_map.sent * size + key_map.received * max(size, 4)
    return by_heads, 2 * positions_sent * keys * model.head_dim


def _cost(config: Config, places: Places, per_machine: int) -> float:
    """What the process that sends the most sends, bytes between machines counting more."""
    within_node = per_machine % places.heads == 0
    within_machine = places.processes <= per_machine
    return max(
        heads * (1 if within_node else BETWEEN_MACHINES)
        + keys * (1 if within_machine else BETWEEN_MACHINES)
        for rank in range(places.processes)
        for heads, keys in [sent_bytes(config, Places(places.heads, places.keys, rank))]
    )


def _keys_at_once(config: Config, places: Places, device_type: str) -> int | None:
    """Key-value heads in a group, as even as they come."""
    wanted, bound = config.parallel.exchange_heads, GROUP_BYTES.get(device_type)
    if wanted != AUTO:
        return int(wanted)
    if bound is None:
        return None
    count = _key_heads(config.model, places)
    groups = -(-count // max(bound // _head_bytes(config, places), 1))
    return -(-count // groups)


def _head_bytes(config: Config, places: Places) -> int:
    """What a key-value head of a process takes while it is attended with, in the backward."""
    model, length = config.model, config.data.sequence_length
    size = weight_type(config.precision).itemsize
    queries = -(-model.num_heads // (places.heads * _key_heads(model, places)))
    # Queries, result and its gradient, keys and values; keys and values seen, and their gradients.
    elements = length // places.keys * (3 * queries + 2) * size
    if places.keys > 1:
        elements += length * 2 * (size + max(size, 4))
    return config.train.micro_batch_size * elements * model.head_dim


def _key_heads(model: ModelConfig, places: Places) -> int:
    """Of a process that has the fewest."""
    return max(model.num_kv_heads // places.heads, 1)
