"""Processes that share a sequence compute what one computes, loss and gradients in fp64."""

import itertools

import pytest
import torch
from exact import LENGTH, POLICIES, largest_differences, traffic
from processes import run

from mst_train.attention.select import CpuKernel
from mst_train.mst.sharing import Places, SharedSequence, Transport
from mst_train.mst.sharing.attention import SharedAttention
from mst_train.mst.sharing.heads import Heads
from mst_train.mst.sharing.keys import KeyMap

SLOW = {"marks": pytest.mark.slow}

PLAIN = {}
WINDOWS = {
    "sliding_window": 7,
    "sliding_window_pattern": ["sliding", "full"],
    "attention_softcap": 20.0,
}
EXPERTS = {"num_experts": 5, "balance_loss": 0.3, "router_z_loss": 0.2}
SINKS = {"attention_sinks": True, "output_bias": True, "initializer_std": 0.5}
EXCHANGES = {2: ("heads", "keys"), 3: ("heads", "keys"), 4: ("heads", "keys", "both")}
HEADS = [(12, 12), (12, 4), (12, 2), (12, 1), (12, 3), (12, 6)]
"""Query and key-value heads: for 4 processes enough, fewer, one, and numbers that do not divide."""


def cases(exchange):
    """Documents and windows reach over the processes' borders; a batch has two rows."""
    for policy, packed in itertools.product(POLICIES, (False, True)):
        yield {"policy": policy, "packed": packed, "heads": 12, "keys": 2, "options": PLAIN}
    for heads, keys in HEADS:
        yield {"policy": "mst", "packed": True, "heads": heads, "keys": keys, "options": PLAIN}
    for policy, packed in itertools.product(("vanilla", "mst"), (False, True)):
        yield {"policy": policy, "packed": packed, "heads": 12, "keys": 2, "options": WINDOWS}
    for policy in ("vanilla", "recompute", "mst"):
        yield {"policy": policy, "packed": True, "heads": 12, "keys": 2, "options": EXPERTS}
    grouped = {"policy": "mst, attention twice", "heads": 12, "keys": 12, "packed": True}
    for at_once, options in itertools.product((1, 2), (PLAIN, WINDOWS)):
        yield {"at_once": at_once, "options": options, **grouped}
    for policy in POLICIES:
        yield {"policy": policy, "packed": True, "heads": 12, "keys": 2, "options": SINKS}
    for keys in (1, 3, 6):
        yield {"policy": "mst", "packed": False, "heads": 12, "keys": keys, "options": SINKS}
    yield {"at_once": 1, "options": SINKS | WINDOWS, **grouped}
    if exchange == "keys":  # heads that no number of processes divides
        for options in (PLAIN, WINDOWS, SINKS):
            yield {"policy": "mst", "packed": True, "heads": 7, "keys": 1, "options": options}


@pytest.mark.parametrize("degree", [2, pytest.param(3, **SLOW), pytest.param(4, **SLOW)])
def test_loss_and_gradients(degree, tmp_path):
    expected = [
        {"exchange": exchange, **case} for exchange in EXCHANGES[degree] for case in cases(exchange)
    ]
    results = run(largest_differences, degree, tmp_path, degree=degree, cases=expected)
    for differences in results:
        for case, difference in zip(expected, differences, strict=True):
            assert difference < 1e-11, case


def traffic_cases(degree):
    for exchange, at_once in itertools.product(EXCHANGES[degree], ("auto", 1)):
        for heads, keys, options in [(12, 4, PLAIN), (12, 12, WINDOWS), (12, 3, PLAIN)]:
            shape = {"heads": heads, "keys": keys, "options": options}
            yield {"exchange": exchange, "at_once": at_once, **shape}


@pytest.mark.slow
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_what_is_sent_and_computed(degree, tmp_path):
    expected = list(traffic_cases(degree))
    results = run(traffic, degree, tmp_path, degree=degree, cases=expected)
    for case, *found in zip(expected, *results, strict=True):
        for formula, counted, _ in found:
            assert counted == formula > 0, case
        if case["options"] is PLAIN:  # a window's first queries see fewer keys
            assert len({computed for _, _, computed in found}) == 1, case


@pytest.mark.parametrize(("heads", "keys"), [(1, 1), (4, 1), (1, 4), (2, 3), (3, 2), (1, 3)])
def test_every_position_has_one_process(heads, keys):
    all_places = [Places(heads, keys, rank) for rank in range(heads * keys)]
    length = 5 * all_places[0].multiple
    owned = [[n for part in p.own(length) for n in range(length)[part]] for p in all_places]
    assert sorted(itertools.chain(*owned)) == list(range(length))
    assert {len(own) for own in owned} == {length // (heads * keys)}
    assert all(own == sorted(own) for own in owned)
    seen = [
        sum(position + 1 for part in places.pieces(length, places.node) for position in _of(part))
        for places in all_places
    ]
    assert len(set(seen)) == 1


def _of(part):
    return range(part.start, part.stop)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 7, 30])
def test_a_node_gets_the_keys_that_it_sees(window):
    """And of a window no more than what lies before its two pieces."""
    keys, length = 4, 32
    for node in range(keys):
        places = Places(1, keys, node)
        key_map, pieces = KeyMap(places, length, window), places.pieces(length, node)
        queries = [position for piece in pieces for position in _of(piece)]
        oldest = {q: 0 if window is None else max(q - window + 1, 0) for q in queries}
        wanted = {key for q in queries for key in range(oldest[q], q + 1)}
        held = [position for span in key_map.spans for position in _of(span)]
        assert len(held) == len(set(held))
        assert set(held) == wanted
        assert key_map.received == len(wanted - set(queries))
        for piece, (rows, span, chunk) in zip(pieces, key_map.seen, strict=True):
            assert [queries[n] for n in _of(rows)] == list(_of(piece))
            assert piece.start - key_map.spans[span].start == chunk.start
            assert piece.stop - piece.start == chunk.stop - chunk.start
    maps = [KeyMap(Places(1, keys, node), length, window) for node in range(keys)]
    assert sum(one.sent for one in maps) == sum(one.received for one in maps)


class NotingTransport(Transport):
    """The first of so many processes; notes what it is asked for, and carries nothing."""

    notes = []  # noqa: RUF012
    rank = 0
    processes = None

    def __init__(self, processes):
        self.processes = processes

    def start(self, sent, into):
        self.notes.append("start")
        wait = super().start(sent, into)

        def finish():
            self.notes.append("there")
            return wait()

        return finish

    def carry(self, outgoing, incoming):
        return lambda: None


class NotingKernel(CpuKernel):
    def forward(self, *arguments, **options):
        if NotingTransport.notes[-1] != "attend":
            NotingTransport.notes.append("attend")
        return super().forward(*arguments, **options)


@pytest.mark.parametrize(("heads", "keys"), [(2, 1), (1, 2)])
def test_the_next_group_is_on_its_way(heads, keys):
    """Before one is attended with, in which nobody waits for it."""
    NotingTransport.notes.clear()
    sharing = SharedSequence(
        Places(heads, keys),
        NotingTransport(heads),
        NotingTransport(keys),
        keys_at_once=1,
    )
    q, k, v = (torch.randn(1, LENGTH, 4 * heads, 8) for _ in range(3))
    attention = SharedAttention.of(NotingKernel(), sharing, None, q, k)
    attention.forward(q, k, v)
    text = " ".join(NotingTransport.notes)
    assert text.count("attend") == 4
    if keys > 1:
        assert text == "start " + "there start attend " * 3 + "there attend"
    else:  # whose results are on their way back while the next one is computed
        first = "start there start attend start "
        assert text.startswith(first + "there start attend there start there start attend")


def test_heads_of_each_process():
    heads = Heads(queries=12, keys=3, processes=4)
    shares = [heads.share(process) for process in range(4)]
    assert [share.queries for share in shares] == [slice(p, p + 3) for p in (0, 3, 6, 9)]
    assert [share.keys for share in shares] == [
        slice(0, 1),
        slice(0, 2),
        slice(1, 3),
        slice(2, 3),
    ]
    assert [heads.readers(p) for p in range(4)] == [None, [0, 1, 1], [0, 0, 1], None]
    assert heads.groups(1) == [shares]  # key-value heads that serve unequally many stay together


def test_groups_of_heads():
    first, second = Heads(queries=24, keys=6, processes=2).groups(2)
    assert [tuple(share) for share in first] == [
        (slice(0, 8), slice(0, 2)),
        (slice(12, 20), slice(3, 5)),
    ]
    assert [tuple(share) for share in second] == [
        (slice(8, 12), slice(2, 3)),
        (slice(20, 24), slice(5, 6)),
    ]


@pytest.mark.parametrize(("queries", "keys", "processes"), [(4, 2, 8), (6, 2, 4), (6, 4, 2)])
def test_heads_that_cannot_be_shared(queries, keys, processes):
    with pytest.raises(ValueError, match=f"{queries} query heads"):
        Heads(queries, keys, processes)
