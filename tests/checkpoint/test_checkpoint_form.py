"""Checkpoints that something else has written: their sums are right, and what they hold is not."""

import io
import json
import math
import random
import zlib
from pathlib import Path

import pytest
import torch

from mst_train.checkpoint.files import MARKER, complete_checkpoints, first_undamaged, load_part
from mst_train.checkpoint.form import load_progress, load_states, load_weights
from mst_train.errors import UserError
from mst_train.export import export
from mst_train.model import build_model
from mst_train.run.random_state import random_state, restore_random_state
from mst_train.run.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of a checkpoint, by name."""
    return {}


@pytest.fixture
def checkpoint(small_config, trained):
    """A run's only checkpoint, after 2 steps."""
    folder = Path(small_config.run.dir, "checkpoints/step_00000002")
    if not trained:
        import dataclasses

        two = dataclasses.replace(small_config.train, steps=2)
        train(dataclasses.replace(small_config, train=two))
        trained |= {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in trained.items():
        (folder / name).write_bytes(content)
    return folder


def put(path, content):
    """Another file in the place of one that may be mapped."""
    path.unlink()
    path.write_bytes(content)


def rewrite(checkpoint, key, value):
    """Put another value in the place of a part, with its size and sum in the marker."""
    file = io.BytesIO()
    torch.save(value, file)
    put(checkpoint / f"{key}.pt", file.getvalue())
    relist(checkpoint, f"{key}.pt")


def relist(checkpoint, name):
    marker = json.loads((checkpoint / MARKER).read_text())
    content = (checkpoint / name).read_bytes()
    marker["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (checkpoint / MARKER).write_text(json.dumps(marker))


def changed(part, path, value):
    """``part`` with another value at ``path``; ``...`` removes what is there."""
    if not path:
        return value
    copy = dict(part)
    copy[path[0]] = changed(part.get(path[0]), path[1:], value)
    if copy[path[0]] is ...:
        del copy[path[0]]
    return copy


LOOP = []
LOOP.append(LOOP)

FOREIGN = [
    ("trainer", (), [1, 2]),
    ("trainer", (), torch.ones(2)),
    ("trainer", (), {}),
    ("trainer", ("step",), -5),
    ("trainer", ("step",), True),
    ("trainer", ("step",), math.inf),
    ("trainer", ("position",), -1),
    ("trainer", ("tokens",), None),
    ("trainer", ("corpus",), torch.ones(2)),
    ("trainer", ("config",), []),
    ("trainer", ("config",), {1: 2}),
    ("trainer", ("config", "model"), LOOP),
    ("trainer", ("attention",), ["cudnn"]),
    ("trainer", ("attention",), {"a square": 3}),
    ("trainer", ("summary",), ...),
    ("trainer", ("summary", "val_loss"), "low"),
    ("trainer", ("summary", "note"), torch.ones(2)),
    ("trainer", ("bad_steps",), 3),
    ("trainer", ("bad_steps", "losses"), None),
    ("trainer", ("bad_steps", "in_a_row"), "many"),
    ("model", (), {}),
    ("model", (), torch.ones(3)),
    ("model", ("norm.weight",), ...),
    ("model", ("norm.weight",), [1.0] * 32),
    ("model", ("norm.weight",), torch.ones(31)),
    ("model", ("norm.weight",), torch.ones(32, dtype=torch.int64)),
    ("model", ("norm.weight",), torch.ones(32, dtype=torch.complex64)),
    ("model", ("norm.weight",), torch.ones(32, device="meta")),
    ("model", ("norm.weight",), torch.ones(32).to_sparse()),
    ("model", (7,), torch.ones(3)),
    ("optimizer", (), []),
    ("optimizer", ("norm.weight",), None),
    ("optimizer", ("norm.weight", "step"), ...),
    ("optimizer", ("norm.weight", "step"), 2),
    ("optimizer", ("norm.weight", "step"), torch.tensor(-1.0)),
    ("optimizer", ("norm.weight", "exp_avg"), torch.zeros(5)),
    ("optimizer", ("norm.weight", "exp_avg_sq"), torch.zeros(32, dtype=torch.int8)),
    ("optimizer", ("norm.weight", "other"), torch.zeros(32)),
    ("optimizer", ("norm.weight", "master"), torch.zeros(32)),
    ("random", (), {}),
    ("random", ("python",), [3]),
    ("random", ("python",), [3, [2**40] * 625, None]),
    ("random", ("numpy",), 5),
    ("random", ("numpy",), ["MT19937", torch.zeros(624), 10**6, 0, 0.0]),
    ("random", ("torch",), torch.zeros(8)),
    ("random", ("cuda",), None),
]


def name_of(value):
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)[:20]


def parts(checkpoint, model):
    return (
        load_progress(checkpoint),
        load_weights(checkpoint, model),
        load_states(checkpoint, model),
        load_part(checkpoint, "random"),
    )


@pytest.fixture
def model(small_config):
    return build_model(small_config.model)


@pytest.mark.parametrize(("key", "path", "value"), FOREIGN, ids=name_of)
def test_what_a_run_has_not_saved_is_refused(model, checkpoint, key, path, value):
    rewrite(checkpoint, key, changed(load_part(checkpoint, key), path, value))
    with pytest.raises(UserError) as refused:
        *_, generators = parts(checkpoint, model)
        restore_random_state(generators)
    (problem,) = refused.value.problems
    assert f"{key}.pt" in problem


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("trainer", ("step",)),
        ("model", ("norm.weight",)),
        ("optimizer", ("norm.weight",)),
        ("random", ("torch",)),
    ],
)
def test_no_command_takes_it(small_config, checkpoint, tmp_path, key, path):
    rewrite(checkpoint, key, changed(load_part(checkpoint, key), path, "something else"))
    with pytest.raises(UserError, match=rf"{key}\.pt"):
        train(small_config)
    if key in ("trainer", "model"):
        with pytest.raises(UserError, match=rf"{key}\.pt"):
            export(checkpoint, tmp_path / "exported", tokenizer="null")
        assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("key", ["trainer", "model", "optimizer", "random"])
def test_a_part_that_is_not_there_is_missed(model, checkpoint, key):
    marker = json.loads((checkpoint / MARKER).read_text())
    del marker["files"][f"{key}.pt"]
    (checkpoint / MARKER).write_text(json.dumps(marker))
    with pytest.raises(UserError, match=rf"has no {key}\.pt"):
        parts(checkpoint, model)


def test_what_was_saved_is_taken_over(model, checkpoint):
    """What the refusals above are held against."""
    assert load_progress(checkpoint)["step"] == 2
    assert load_weights(checkpoint, model).keys() == model.state_dict().keys()
    assert load_states(checkpoint, model).keys() == dict(model.named_parameters()).keys()
    restore_random_state(load_part(checkpoint, "random"))
    assert random_state()["python"] == load_part(checkpoint, "random")["python"]


def damages(checkpoint, count):
    """``count`` kinds of damage, the same each time: flipped bits, cuts, bytes and files that come
    from elsewhere."""
    draw = random.Random(0)
    names = sorted(path.name for path in checkpoint.iterdir())
    for _ in range(count):
        name = draw.choice(names)
        content = bytearray((checkpoint / name).read_bytes())
        place = draw.randrange(len(content))
        kind = draw.choice(["bit", "cut", "zeros", "longer", "other"])
        if kind == "bit":
            content[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[place:]
        elif kind == "zeros":
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        elif kind == "longer":
            content += draw.randbytes(draw.randrange(1, 100))
        else:
            content = bytearray((checkpoint / draw.choice(names)).read_bytes())
        yield name, kind, place, bytes(content)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_no_damage_is_accepted(model, checkpoint, count=60):
    """Either what is read is what was written, or the checkpoint is passed over."""
    whole = parts(checkpoint, model)
    refused = 0
    for name, kind, place, content in damages(checkpoint, count):
        before = (checkpoint / name).read_bytes()
        put(checkpoint / name, content)
        try:
            found = first_undamaged(complete_checkpoints(checkpoint.parent))
        except UserError:
            found = None
        if found is None:
            refused += 1
        else:  # in the marker: a space for another, say
            assert name == MARKER or content == before, (name, kind, place)
            assert same(parts(found, model), whole), (name, kind, place)
        put(checkpoint / name, before)
    assert refused > count // 2


def test_no_damage_with_the_right_sum_is_a_traceback(model, checkpoint, count=40):
    """As if someone had written such a file: the reader of torch's archives meets it."""
    marker = (checkpoint / MARKER).read_bytes()
    for name, _, _, content in damages(checkpoint, count):
        if name == MARKER:
            continue
        before = (checkpoint / name).read_bytes()
        put(checkpoint / name, content)
        relist(checkpoint, name)
        state = random_state()
        try:
            *_, found = parts(checkpoint, model)
            restore_random_state(found)
        except UserError as error:
            assert len(error.problems) == 1
        restore_random_state(state)
        put(checkpoint / name, before)
        (checkpoint / MARKER).write_bytes(marker)
