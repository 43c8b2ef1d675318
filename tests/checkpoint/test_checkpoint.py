"""Checkpoints are whole or not there."""

import json
import logging
import shutil

import pytest
import torch

from mst_train.checkpoint.files import (
    complete_checkpoints,
    find_checkpoint,
    first_undamaged,
    held,
    load_part,
    own_checkpoints,
    save_checkpoint,
)
from mst_train.errors import TrainingError, UserError


def save(folder, step, keep=10):
    state = {"model": {"w": torch.full((10,), float(step))}, "trainer": {"step": step}}
    return save_checkpoint(folder, step, state, keep)


def names(folder):
    return [path.name for path in complete_checkpoints(folder)]


def test_round_trip(tmp_path):
    path = save(tmp_path, 50)
    assert path.name == "step_00000050"
    assert (tmp_path / "latest").read_text().strip() == "step_00000050"
    assert torch.equal(load_part(path, "model")["w"], torch.full((10,), 50.0))
    assert load_part(path, "trainer") == {"step": 50}
    assert not list(tmp_path.glob(".writing*"))


def test_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    assert find_checkpoint(tmp_path).name == "step_00000005"


def test_overwrites_a_checkpoint_of_the_same_step(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "step_00000005" / "COMPLETE").unlink()
    save(tmp_path, 5)
    assert names(tmp_path) == ["step_00000005"]


def cut_marker(path):
    (path / "COMPLETE").unlink()


def cut_file(path):
    file = path / "model.pt"
    file.write_bytes(file.read_bytes()[:-100])


def lose_file(path):
    (path / "model.pt").unlink()


def garble_marker(path):
    (path / "COMPLETE").write_text('{"files": ')


def empty_marker(path):
    (path / "COMPLETE").write_text('{"files": {}}')


def list_in_marker(path):
    (path / "COMPLETE").write_text('{"files": []}')


@pytest.mark.parametrize(
    "damage", [cut_marker, cut_file, lose_file, garble_marker, empty_marker, list_in_marker]
)
def test_a_checkpoint_cut_off_is_ignored_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["step_00000010"]
    assert "ignoring the checkpoint" in caplog.text
    assert "step_00000020" in caplog.text


def test_changed_bytes_are_noticed(tmp_path, caplog):
    """Of the same size: the sums differ, and the checkpoint before is used."""
    paths = [save(tmp_path, 10), save(tmp_path, 20)]
    assert first_undamaged(paths[::-1]) == paths[1]
    file = paths[1] / "model.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert first_undamaged(paths[::-1]) == paths[0]
    assert "step_00000020 is damaged: model.pt has changed" in caplog.text
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        first_undamaged(paths[1:])
    assert first_undamaged([]) is None


def test_a_damaged_checkpoint_named_by_hand_is_refused(tmp_path):
    path = save(tmp_path, 10)
    lose_file(path)
    with pytest.raises(UserError, match=r"is not whole: model\.pt is missing"):
        find_checkpoint(path)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no place with a whole checkpoint, nor auto or never"):
        find_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("stage", ["first file", "marker", "latest"])
def test_a_write_cut_off_anywhere_leaves_the_one_before(tmp_path, monkeypatch, stage):
    """An interruption (here an exception nobody handles) at each stage of the writing."""
    save(tmp_path, 10)
    import mst_train.checkpoint.files as module

    class Killed(BaseException):
        pass

    def interrupt(*_):
        raise Killed

    if stage == "first file":
        monkeypatch.setattr(module.torch, "save", interrupt)
    else:
        replace = module.replace_text
        target = "COMPLETE" if stage == "marker" else "latest"
        monkeypatch.setattr(
            module, "replace_text", lambda p, t: interrupt() if p.name == target else replace(p, t)
        )
    with pytest.raises(Killed):
        save(tmp_path, 20)
    monkeypatch.undo()
    # With the marker written the checkpoint is whole, even where ``latest`` lags behind.
    expected = ["step_00000010"] + ["step_00000020"] * (stage == "latest")
    assert names(tmp_path) == expected
    save(tmp_path, 30)
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline]")]
)
def test_a_full_disk_is_reported_and_costs_nothing(tmp_path, monkeypatch, error):
    """torch's writer reports it in its own way."""
    save(tmp_path, 10)

    def full(*_):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"cannot write the checkpoint .*(No space left|fail)"):
        save(tmp_path, 20)
    assert names(tmp_path) == ["step_00000010"]
    assert not list(tmp_path.glob(".writing*"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = save(tmp_path, 10)
    torch.save(Payload(), path / "model.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_part(path, "model")
    assert not (tmp_path / "ran").exists()


def test_marker_lists_the_files(tmp_path):
    marker = json.loads((save(tmp_path, 10) / "COMPLETE").read_text())
    assert marker["step"] == 10
    assert set(marker["files"]) == {"model.pt", "trainer.pt"}


def test_a_file_that_the_marker_does_not_list_is_not_read(tmp_path):
    path = save(tmp_path, 10)
    torch.save({"v": torch.zeros(3)}, path / "model-0001.pt")
    assert list(load_part(path, "model")) == ["w"]


def test_a_checkpoint_from_before_formats_had_numbers_is_read(tmp_path):
    path = save(tmp_path, 10)
    marker = json.loads((path / "COMPLETE").read_text())
    assert marker.pop("format") == 1
    (path / "COMPLETE").write_text(json.dumps(marker, indent=1))
    assert first_undamaged(complete_checkpoints(tmp_path)) == path
    assert load_part(path, "trainer") == {"step": 10}


@pytest.mark.parametrize("version", [2, 0, "1", True, 1.0, None])
def test_another_format_is_not_guessed_at(tmp_path, caplog, version):
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    marker = json.loads((path / "COMPLETE").read_text())
    (path / "COMPLETE").write_text(json.dumps(marker | {"format": version}))
    assert names(tmp_path) == ["step_00000010"]
    assert f"it is of format {version!r}, and this version reads 1" in caplog.text
    with pytest.raises(UserError, match="it is of format"):
        find_checkpoint(path)
    with pytest.raises(UserError, match="it is of format"):
        load_part(path, "model")


@pytest.mark.parametrize(
    "marker",
    [
        '{"format": 1, "step": 20, "files": {"model.pt": {"bytes": Infinity, "crc32": 1}}}',
        '{"format": 1, "step": 20, "files": {"model.pt": {"bytes": -1, "crc32": NaN}}}',
        '{"format": 1, "step": 20, "files": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"format": 1, "step": 20, "files": {"model.pt": 9' + "9" * 5000 + "}}",
        '{"format": 1, "step": 30, "files": {"model.pt": {"bytes": 1, "crc32": 1}}}',
        '{"format": 1, "files": {"model.pt": {"bytes": 1, "crc32": 1}}}',
        '{"format": 1, "step": 20, "files": {"a\\u0000b.pt": {"bytes": 1, "crc32": 1}}}',
        "[]",
        "\\udc80",
    ],
)
def test_a_strange_marker_costs_its_checkpoint_alone(tmp_path, caplog, marker):
    save(tmp_path, 10)
    (save(tmp_path, 20) / "COMPLETE").write_text(marker)
    assert names(tmp_path) == ["step_00000010"]
    assert caplog.text.count("ignoring the checkpoint") == 1


def test_folders_of_other_names_are_left_alone(tmp_path):
    """A copy that someone has made is neither the newest nor deleted."""
    shutil.copytree(save(tmp_path, 10), tmp_path / "step_00000010_best")
    for step in (20, 30, 40):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_00000030", "step_00000040"]
    assert find_checkpoint(tmp_path / "step_00000010_best").name == "step_00000010_best"
    assert names(tmp_path) == ["step_00000030", "step_00000040"]


def test_half_deleted_checkpoints_go(tmp_path, monkeypatch, caplog):
    """Of a run that was killed while it deleted the oldest, and of one before that."""
    save(tmp_path, 5)
    lose_file(save(tmp_path, 10))
    save(tmp_path, 20)

    class Killed(BaseException):
        pass

    def killed(path, **_):
        next(path.iterdir()).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            save(tmp_path, 30, keep=2)
    caplog.clear()
    assert "step_00000020" in names(tmp_path)
    save(tmp_path, 40, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step_00000030",
        "step_00000040",
    ]


def test_work_that_was_lost_does_not_count(tmp_path):
    """A run that goes on from the one before a damaged checkpoint keeps what it writes."""
    save(tmp_path, 10)
    save(tmp_path, 30)  # damaged, as nothing but its sum tells
    path = save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step_00000020", "step_00000030"]
    assert (tmp_path / "latest").read_text().strip() == path.name


def test_a_checkpoint_that_is_read_is_not_deleted(tmp_path):
    save(tmp_path, 1, keep=1)

    def newest():
        return complete_checkpoints(tmp_path)[::-1]

    with held(newest) as checkpoint:
        for step in (2, 3, 4):
            save(tmp_path, step, keep=1)
        assert names(tmp_path) == ["step_00000001", "step_00000004"]
        assert load_part(checkpoint, "trainer") == {"step": 1}
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step_00000005"]


def test_one_that_has_just_been_deleted_is_looked_for_again(tmp_path):
    save(tmp_path, 1, keep=1)
    found = []

    def newest():
        found.append(complete_checkpoints(tmp_path)[::-1])
        if len(found) == 1:  # between looking and taking hold of it
            save(tmp_path, 2, keep=1)
        return found[-1]

    with held(newest) as checkpoint:
        assert checkpoint.name == "step_00000002"


def test_checkpoints_that_are_all_unusable_are_no_fresh_start(tmp_path):
    assert own_checkpoints(tmp_path) == []
    cut_marker(save(tmp_path, 10))
    assert own_checkpoints(tmp_path) == []  # the first was never finished
    garble_marker(save(tmp_path, 20))
    with pytest.raises(UserError, match="every checkpoint in"):
        own_checkpoints(tmp_path)


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(TrainingError, match=r"cannot write the checkpoint .*No such file"):
        save(tmp_path / "run" / "checkpoints", 10)
    assert not (tmp_path / "run").exists()
