"""The run as a whole: the same curve under every policy, resuming, refusing."""

import json
import logging
import os
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

import mst_train.run.train as training
from mst_train.attention import measure
from mst_train.cli.command import run_command
from mst_train.data import Batch
from mst_train.distributed import Topology, together
from mst_train.engine import NativeEngine
from mst_train.engine.step import BadStep, evaluate, train_step
from mst_train.errors import InUse, TrainingError, UserError
from mst_train.model import Policy, build_model
from mst_train.optim import InBackwardOptimizer, Optimizer
from mst_train.prepare.__main__ import main as prepare
from mst_train.run.folder import check_beginning, check_continuation
from mst_train.run.train import train


def records(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(config):
    return {r["step"]: r["loss"] for r in records(config) if "loss" in r}


def test_a_run_leaves_what_it_promises(small_config):
    summary = train(small_config)
    folder = Path(small_config.run.dir)
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 6
    steps = [r for r in records(small_config) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "model_flops_utilization",
        "peak_memory_bytes",
    }
    assert [r["tokens"] for r in steps] == [100, 200, 300, 400, 500, 600]
    assert steps[0]["learning_rate"] == pytest.approx(1.5e-3)
    assert steps[0]["peak_memory_bytes"] > 10e6
    validations = [r for r in records(small_config) if "val_loss" in r]
    assert [r["step"] for r in validations] == [0, 3, 6]
    assert all(set(r) == {"step", "val_loss", "val_loss_by_position"} for r in validations)
    assert summary["val_loss_by_position"] == validations[-1]["val_loss_by_position"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["val_loss"] == validations[-1]["val_loss"]
    assert (folder / "checkpoints/latest").read_text().strip() == "step_00000006"
    kept = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000006"]


def test_it_learns(small_config, change):
    config = change(small_config, **{"train.steps": 60, "checkpoint.every": 60})
    train(config)
    curve = losses(config)
    assert curve[60] < curve[1] - 1.0
    validations = [r["val_loss"] for r in records(config) if "val_loss" in r]
    assert validations[-1] < validations[0] - 1.0


@pytest.mark.slow
def test_every_policy_gives_the_same_curve(small_config, change):
    """50 steps in fp32: vanilla, recompute and mst with several chunk sizes, one ragged."""
    curves = {}
    for name, memory in {
        "vanilla": {"memory.policy": "vanilla"},
        "recompute": {"memory.policy": "recompute"},
        "mst 25": {"memory.mlp_chunk_tokens": 25, "memory.head_chunk_tokens": 50},
        "mst 33": {"memory.mlp_chunk_tokens": 33, "memory.head_chunk_tokens": 7},
        "mst offloaded": {"memory.offload": "host"},
        "mst without keeping attention": {"memory.keep.attention": 0},
        "recompute, confined": {"memory.policy": "recompute", "data.attention": "documents"},
        "mst, confined": {"data.attention": "documents"},
        "mst auto": {"memory.mlp_chunk_tokens": "auto", "memory.head_chunk_tokens": "auto"},
    }.items():
        config = change(small_config, **memory)
        config = change(config, **{"run.dir": f"{small_config.run.dir} {name}"})
        config = change(config, **{"train.steps": 50, "checkpoint.every": 50})
        train(config)
        curves[name] = losses(config)
    reference = curves.pop("vanilla")
    assert len(reference) == 50
    confined, also_confined = curves.pop("recompute, confined"), curves.pop("mst, confined")
    assert max(abs(confined[s] / also_confined[s] - 1) for s in confined) < 1e-5
    assert max(abs(confined[s] / reference[s] - 1) for s in confined) > 1e-3
    for name, curve in curves.items():
        worst = max(abs(curve[s] - reference[s]) / reference[s] for s in reference)
        assert worst < 1e-5, name


IN_BACKWARD = {"optimizer.in_backward": True, "optimizer.max_grad_norm": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"train.accumulation_steps": 2},
        {"train.accumulation_steps": 2, "optimizer.name": "muon"},
        IN_BACKWARD,
        IN_BACKWARD | {"optimizer.name": "muon"},
        {"model.attention_sinks": True, "model.output_bias": True},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
def test_resuming_continues_bit_for_bit(small_config, change, precision, settings):
    whole = change(small_config, precision=precision, **settings)
    train(whole)
    cut = change(whole, **{"run.dir": small_config.run.dir + "_cut"})
    with pytest.MonkeyPatch.context() as patch:
        step = training.train_step

        def stop_at_four(*arguments):
            if len(losses(cut)) == 4:
                raise KeyboardInterrupt
            return step(*arguments)

        patch.setattr(training, "train_step", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    torch.manual_seed(12345)
    train(cut)
    assert losses(cut) == losses(whole)
    a, b = (torch.load(Path(c.run.dir, "checkpoints/step_00000006/model.pt")) for c in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_deterministic_algorithms_are_asked_for_before_the_first_product(
    small_config, change, monkeypatch
):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    class Reached(Exception):
        pass

    def no_model(*arguments, **settings):
        raise Reached

    with monkeypatch.context() as patch, pytest.raises(Reached):
        patch.setattr("mst_train.run.setup.build_model", no_model)
        train(change(small_config, **{"train.deterministic": True}))
    assert asked == [True]
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    train(small_config)
    assert asked == [True]
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_the_kernels_that_were_chosen_stay_with_the_run(small_config, change, monkeypatch):
    monkeypatch.setattr(measure, "_chosen", {"squares": "cudnn"})
    train(small_config)
    monkeypatch.setattr(measure, "_chosen", {"rectangles": "flash_attn"})
    train(change(small_config, **{"train.steps": 8}))
    assert measure.choices() == {"squares": "cudnn", "rectangles": "flash_attn"}


def test_a_run_may_change_when_its_weights_are_updated(small_config, change):
    """In fp32 without clipping it makes no difference, not even to the last digit."""
    whole = change(
        small_config,
        **{
            "optimizer.max_grad_norm": None,
            "optimizer.min_learning_rate_ratio": 1.0,  # another length is not another schedule
            "train.steps": 8,
        },
    )
    train(whole)
    parts = change(whole, **{"run.dir": small_config.run.dir + "_parts"})
    for steps, in_backward in ((2, True), (4, False), (6, True), (8, False)):
        train(change(parts, **{"train.steps": steps, "optimizer.in_backward": in_backward}))
    assert losses(parts) == losses(whole)


def test_records_of_lost_work_are_replaced(small_config, change):
    """Steps done after the last checkpoint are done again, and counted once."""
    train(small_config)
    expected = losses(small_config)
    folder = Path(small_config.run.dir)
    (folder / "checkpoints/step_00000006/COMPLETE").unlink()
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(small_config)
    assert [r["step"] for r in records(small_config) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert losses(small_config) == expected


def test_a_finished_run_says_so(small_config, caplog):
    summary = train(small_config)
    before = (Path(small_config.run.dir) / "metrics.jsonl").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "mst_train"):
        assert train(small_config) == summary
    assert "is finished" in caplog.text
    assert (Path(small_config.run.dir) / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_finished_run_goes_on_with_more_steps(small_config, change):
    train(small_config)
    train(change(small_config, **{"train.steps": 8}))
    assert list(losses(small_config)) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_finished_run_does_not_answer_for_another(small_config, change):
    train(small_config)
    with pytest.raises(UserError, match=r"model\.num_layers=1, but .* was made with 2"):
        train(change(small_config, **{"model.num_layers": 1}))


def test_a_run_cut_off_before_its_summary(small_config):
    """The last checkpoint holds all that the summary says."""
    summary = train(small_config)
    path = Path(small_config.run.dir, "summary.json")
    path.unlink()
    assert train(small_config) == summary
    assert json.loads(path.read_text()) == summary


def test_a_damaged_checkpoint_costs_the_work_since_the_one_before(small_config, caplog):
    train(small_config)
    expected = losses(small_config)
    file = Path(small_config.run.dir, "checkpoints/step_00000006/optimizer.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    train(small_config)
    assert "step_00000006 is damaged" in caplog.text
    assert losses(small_config) == expected


def test_resume_never_refuses_a_used_folder(small_config, change):
    config = change(small_config, **{"run.resume": "never"})
    train(config)
    with pytest.raises(UserError, match=r"holds a run already.*choose another run\.dir"):
        train(config)


def test_resume_from_another_run(small_config, change):
    train(small_config)
    other = change(
        small_config,
        **{
            "run.dir": small_config.run.dir + "_other",
            "run.resume": small_config.run.dir + "/checkpoints/step_00000004",
        },
    )
    train(other)
    first = losses(small_config)
    assert losses(other) == {5: first[5], 6: first[6]}
    # Once it has checkpoints of its own, the same command continues from those.
    more = change(other, **{"train.steps": 8})
    train(more)
    assert list(losses(more)) == [5, 6, 7, 8]


@pytest.mark.parametrize("planned", [6, 100])
@pytest.mark.parametrize("before", ["the same run", "another run"])
def test_a_decay_begins_at_a_checkpoint_of_a_stable_run(
    small_config, change, caplog, monkeypatch, planned, before
):
    """A wsd run goes on with another length as if it had had that from the start."""
    wsd = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 2}
    whole = change(small_config, **wsd, **{"train.steps": 8})
    train(whole)
    stable = change(whole, **{"train.steps": planned, "run.dir": f"{whole.run.dir}_stable"})
    step = training.train_step

    def stop_after_four(*arguments):
        if len(losses(stable)) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", stop_after_four)
        train(stable)
    if before == "the same run":
        goes_on = change(stable, **{"train.steps": 8})
    else:
        other = {"run.dir": f"{whole.run.dir}_decay", "run.resume": stable.run.dir}
        goes_on = change(whole, **other)
    train(goes_on)
    assert f"train.steps is 8 now and was {planned} at" in caplog.text

    def exact(config):
        return {r["step"]: (r["loss"], r["learning_rate"]) for r in records(config) if "loss" in r}

    assert exact(stable) | exact(goes_on) == exact(whole)
    highest, lowest = 3e-3, 3e-3 * 0.1
    ends = [highest, pytest.approx((highest + lowest) / 2), lowest]
    assert [exact(goes_on)[step][1] for step in (6, 7, 8)] == ends


def test_the_schedule_may_change_when_a_run_goes_on(small_config, change, caplog):
    train(change(small_config, **{"optimizer.schedule": "constant"}))
    wsd = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 2, "train.steps": 8}
    train(change(small_config, **wsd))
    assert "optimizer.schedule is wsd now and was constant at" in caplog.text
    assert "optimizer.decay_steps is 2 now and was None at" in caplog.text
    rates = [r["learning_rate"] for r in records(small_config) if "loss" in r]
    assert rates[1:6] == [3e-3] * 5
    assert rates[6:] == pytest.approx([1.65e-3, 3e-4])


def test_a_warm_up_longer_than_the_run_is_warned_of(small_config, change, caplog):
    train(small_config)
    assert "does not get to" not in caplog.text
    train(change(small_config, **{"optimizer.warmup_steps": 9, "train.steps": 8}))
    assert "the run's 8 steps are fewer than optimizer.warmup_steps=9" in caplog.text


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model.num_layers", 3),
        ("data.sequence_length", 50),
        ("precision", "bf16"),
        ("optimizer.name", "muon"),
    ],
)
def test_resuming_as_another_run_is_refused(small_config, change, setting, value):
    train(change(small_config, **{"train.steps": 2}))
    with pytest.raises(UserError, match=f"{setting}={value}, but .* was made with"):
        train(change(small_config, **{setting: value}))


def test_a_checkpoint_from_before_a_setting_has_its_default(small_config, change, caplog):
    before = asdict(small_config)
    del before["optimizer"]["name"], before["model"]["attention_sinks"], before["memory"]["keep"]
    check_continuation(before, small_config, Path("checkpoint"))
    check_beginning(before, small_config, Path("checkpoint"))
    assert caplog.text == ""
    muon = change(small_config, **{"optimizer.name": "muon"})
    sinks = change(small_config, **{"model.attention_sinks": True})
    for check in (check_continuation, check_beginning):
        with pytest.raises(UserError, match="was made with adamw"):
            check(before, muon, Path("checkpoint"))
        with pytest.raises(UserError, match=r"attention_sinks=True, but .* was made with False"):
            check(before, sinks, Path("checkpoint"))


def test_a_prepared_folder_may_move(small_config, change, corpus, tmp_path, caplog):
    def prepared(name, source, tokenizer):
        folder = tmp_path / name
        arguments = [f"data.source={source}", tokenizer, "prepare.workers=1"]
        assert prepare([*arguments, f"prepare.output={folder}"]) == 0
        return folder

    first = prepared("first", corpus, "data.tokenizer_vocab_size=512")
    config = change(small_config, **{"data.source": str(first)})
    train(change(config, **{"train.steps": 2}))
    moved = first.rename(tmp_path / "second")
    train(change(config, **{"data.source": str(moved), "train.steps": 4}))
    assert list(losses(config)) == [1, 2, 3, 4]
    assert f"data.source is {moved} now and was {first}" in caplog.text
    (tmp_path / "text.txt").write_text("other words " * 2000)
    other = prepared("other", tmp_path / "text.txt", f"data.tokenizer={moved}")
    with pytest.raises(
        UserError, match=r"data\.source holds other documents.*run\.init_from=\S+step_"
    ):
        train(change(config, **{"data.source": str(other), "train.steps": 6}))


def test_a_harmless_change_is_a_warning(small_config, change, caplog):
    train(change(small_config, **{"train.steps": 2}))
    train(change(small_config, **{"train.steps": 4, "memory.policy": "recompute"}))
    assert "memory.policy is recompute now and was mst" in caplog.text


def test_other_documents_are_refused(small_config, change, tmp_path):
    import shutil

    source = tmp_path / "documents"
    shutil.copytree(small_config.data.source, source)
    config = change(small_config, **{"data.source": str(source), "train.steps": 2})
    train(config)
    (source / "document_00.txt").write_text("something else entirely " * 500)
    with pytest.raises(UserError, match=r"data\.source holds other documents.*or another version"):
        train(change(config, **{"train.steps": 4}))


def test_two_processes_do_not_share_a_folder(small_config):
    from mst_train.run.folder import RunFolder

    first, second = RunFolder(small_config), RunFolder(small_config)
    first.open()
    with pytest.raises(InUse, match="in use by another process"):
        second.open()
    first.require_shared(first.lock)  # which the second one has not touched
    first.close()
    second.open()
    second.close()


@pytest.mark.parametrize("_", range(10))
def test_of_two_that_start_at_once_one_runs(small_config, _):
    from mst_train.run.folder import RunFolder

    barrier = threading.Barrier(2)

    def start(folder):
        barrier.wait()
        try:
            folder.open()
            return folder
        except InUse:
            return None

    folders = [RunFolder(small_config) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        (winner,) = filter(None, threads.map(start, folders))
    winner.require_shared(winner.lock)
    winner.close()


def test_one_that_another_has_just_been_in_is_in_use(small_config, change):
    from mst_train.run.folder import RunFolder

    late = RunFolder(small_config)
    train(change(small_config, **{"train.steps": 2}))
    with pytest.raises(InUse, match="another process has just worked in"):
        late.open()


def test_the_run_that_another_goes_on_from_may_go_on_meanwhile(small_config, change):
    from mst_train.run.folder import RunFolder

    train(change(small_config, **{"train.steps": 2}))
    before = small_config.run.dir
    other = RunFolder(change(small_config, **{"run.dir": f"{before}_2", "run.resume": before}))
    train(small_config)
    other.open()
    other.close()
    assert [checkpoint.name for checkpoint in other.candidates] == ["step_00000002"]


def test_in_use_is_a_status_that_is_tried_again(monkeypatch):
    """Of several processes too: the first finds the folder in use, and all end with that."""

    def in_use(_):
        with together(Topology(world=2)):
            raise InUse("run.dir=x is in use")

    monkeypatch.setattr(Topology, "gather", lambda self, value: [value, (None, None)])
    assert run_command(in_use, [], "") == 75
    launcher = runpy.run_path(str(Path(__file__).parents[2] / "launch/torchrun.py"))
    assert 75 not in launcher["FINAL"]


AUTO_CHUNKS = {"memory.mlp_chunk_tokens": "auto", "memory.head_chunk_tokens": "auto"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.vocab_size": 100}, r"model\.vocab_size=100 is smaller than the tokenizer's"),
        ({"data.source": "/nowhere/at/all.txt"}, "/nowhere/at/all.txt"),
        ({"data.sequence_length": 10**5, **AUTO_CHUNKS}, "data.sequence_length"),
        ({"kernel.attention": "cudnn"}, "kernel.attention=cudnn cannot be used"),
        ({"kernel.backend": "triton"}, "kernel.backend=triton cannot be used: .* needs CUDA"),
        ({"memory.device_budget_gib": 1e-5}, "memory.device_budget_gib allows"),
    ],
)
def test_a_refused_run_leaves_no_folder(small_config, change, settings, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=message):
        train(change(small_config, **settings))
    assert not Path(small_config.run.dir).exists()


def make_step(small_config, dtype=torch.float64, policy=None, kind=Optimizer):
    model = build_model(small_config.model, policy=policy, dtype=dtype)
    optimizer = kind(model, small_config.optimizer, master_weights=False)
    tokens = torch.randint(512, (4, 41), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[0, :30] = -100
    labels[1] = -100
    positions = torch.arange(40).expand(4, -1)
    return model, NativeEngine(model, optimizer), Batch(tokens[:, :-1], labels, positions)


def rows(batch, *which):
    return [Batch(batch.tokens[r], batch.labels[r], batch.positions[r]) for r in which]


@pytest.mark.parametrize("policy", [None, Policy(True, True, 16, 24)])
def test_the_step_does_not_depend_on_its_micro_batches(small_config, policy):
    """Rows with 10, 0, 40 and 40 valid tokens: a mean of means would differ."""
    updated = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)], [slice(i, i + 1) for i in range(4)]):
        model, engine, batch = make_step(small_config, policy=policy)
        loss, norm, tokens = train_step(engine, rows(batch, *parts), 1e-3, 0.5)
        assert tokens == 160
        updated.append([loss, norm, *(p.detach() for p in model.parameters())])
    for other in updated[1:]:
        assert other[:2] == pytest.approx(updated[0][:2], rel=1e-12)
        torch.testing.assert_close(other[2:], updated[0][2:], rtol=1e-10, atol=1e-13)


def test_the_loss_is_the_mean_over_valid_tokens(small_config):
    model, engine, batch = make_step(small_config)
    logits = model.logits(batch.tokens).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels.flatten()).item()
    assert evaluate(model, [batch]).mean == pytest.approx(expected, rel=1e-12)
    parts = rows(batch, slice(0, 3), slice(3, 4))
    assert evaluate(model, parts).mean == pytest.approx(expected)
    loss, _, _ = train_step(engine, [batch], 1e-3, None)
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [Optimizer, InBackwardOptimizer])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(small_config, kind):
    model, engine, batch = make_step(small_config, kind=kind)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match=r"the loss is nan: the weights were not updated"):
        train_step(engine, [batch], 1e-3, None)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new.detach()) or old.isnan().any()


def test_a_step_and_a_validation_without_labels_say_so(small_config):
    model, engine, batch = make_step(small_config)
    before = [p.detach().clone() for p in model.parameters()]
    (unlabelled,) = rows(batch, slice(1, 2))
    with pytest.raises(BadStep, match=r"none of the step's 40 tokens has a label") as caught:
        train_step(engine, [unlabelled], 1e-3, None)
    assert caught.value.can_skip
    assert "learning_rate" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(TrainingError, match="none of the validation data's tokens has a label"):
        evaluate(model, [unlabelled])


def spoil_the_gradient(model):
    """The loss stays as it is; the gradient of the first block's query weights is infinite."""
    model.blocks[0].attention.query.weight.register_hook(lambda gradient: gradient / 0)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(small_config):
    model, engine, batch = make_step(small_config)
    spoil_the_gradient(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match=r"the gradient's norm is inf: the weights were not"):
        train_step(engine, [batch], 1e-3, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weights_damaged_in_the_backward_are_not_saved(small_config, change, monkeypatch):
    config = change(small_config, **IN_BACKWARD, **{"checkpoint.every": 1})
    whole = change(config, **{"run.dir": small_config.run.dir + "_whole"})
    train(whole)

    step = training.train_step

    def spoiled_at_four(engine, *arguments):
        if len(losses(config)) == 3:
            spoil_the_gradient(engine.model)
        return step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", spoiled_at_four)
        with pytest.raises(TrainingError) as caught:
            train(config)
    assert "this step's weights are damaged; the last checkpoint is whole" in str(caught.value)
    assert "optimizer.in_backward=false" in str(caught.value)
    checkpoints = Path(config.run.dir, "checkpoints")
    assert (checkpoints / "latest").read_text().strip() == "step_00000003"
    assert not (checkpoints / "step_00000004").exists()
    train(config)  # goes on from step 3
    assert losses(config) == losses(whole)


def test_running_out_of_memory_is_explained(small_config, change, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "train_step", exhausted)
    with pytest.raises(TrainingError, match=r"length=100.*policy=recompute .*: try memory"):
        train(change(small_config, **{"memory.policy": "recompute"}))
