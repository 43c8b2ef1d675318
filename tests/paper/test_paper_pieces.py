"""What the pieces predict, and for which settings."""

import json
from dataclasses import replace

import pytest

from mst_train.memory.extrapolate import with_length
from mst_train.paper import __main__ as command
from mst_train.paper import pieces, predicted
from mst_train.paper.reported import MODELS, SEVERAL_GPUS, K
from mst_train.plan.baseline import transformers_baseline
from mst_train.plan.choose import longest as longest_that_fits
from mst_train.plan.config import configured_target, read
from mst_train.plan.predict import predict

SMALL = ("+experiment=tiny", "precision=bf16", "plan.device=a100_80gb")
QUIET = lambda _: None  # noqa: E731


@pytest.fixture
def asked(monkeypatch, at):
    """What the pieces ask of the search; it answers 16K."""
    calls = []

    class Found:
        def report(self):
            return at(16)

    def record(config, target, advance=QUIET, *, build=None, step=1024):
        calls.append((config, target, build, step))
        return Found()

    monkeypatch.setattr(predicted, "longest", record)
    monkeypatch.setattr(predicted, "predict", lambda config, target: Found())
    return calls


def test_each_model_is_searched_in_each_way(asked):
    pytest.importorskip("transformers")
    report = predicted.longest_sequences(QUIET, MODELS[:2])
    for config, target, build, step in asked:
        assert (target.device.name, target.gpus) == ("a100_80gb", 1)
        assert (config.precision, config.optimizer.in_backward) == ("bf16", True)
        assert step == (256 if build else 1024)
    ours = [config.memory for config, _, build, _ in asked if build is None]
    assert {(m.policy, m.keep.attention) for m in ours} == {("mst", 0)}
    baselines = [build.args for _, _, build, _ in asked if build]
    assert baselines == [(False,), (True,)] * 2
    offloaded = [m for m in ours if m.offload == "host"]
    assert [m.host_budget_gib for m in offloaded] == [512]
    assert [list(row["predicted"]) for row in report["rows"]] == [
        ["vanilla", "recompute", "mst", "offload"],
        ["vanilla", "recompute", "mst"],
    ]


def test_experiments_have_the_reported_lengths():
    for model in MODELS:
        config = read([f"+experiment={model.experiment}"])
        assert config.data.sequence_length == model.mst * K
    alone = {"Llama3-8B": 60 * K, "Llama2-7B": 80 * K}
    for (model, gpus), experiment in SEVERAL_GPUS.items():
        config = read([f"+experiment={experiment}"])
        assert config.parallel.sequence_parallel == gpus
        assert config.data.sequence_length == gpus * alone[model]


def test_several_gpus_share_a_sequence(asked):
    report = predicted.several_gpus(QUIET)
    found = [(row["model"], row["gpus"], row["reported_tokens"]) for row in report["rows"]]
    assert found[2] == ("Llama3-8B", 8, 480 * K)
    assert [target.gpus for _, target, _, _ in asked] == [2, 4, 8, 2, 4, 8]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_search_can_have_another_model_and_another_step(checkpointing):
    pytest.importorskip("transformers")
    config = read([*SMALL, "memory.device_budget_gib=2"])
    target = configured_target(config)
    build = transformers_baseline(gradient_checkpointing=checkpointing)
    found = longest_that_fits(config, target, build=build, step=256)
    length = found.config.data.sequence_length
    assert length % 256 == 0
    assert found.simulation.peak_bytes == predict(found.config, target, build).simulation.peak_bytes
    assert not predict(with_length(config, length + 256), target, build).fits


def test_the_policies_are_compared_over_the_same_lengths():
    found = [read(settings) for settings in predicted.WAYS.values()]
    assert [(c.memory.policy, c.memory.keep.attention) for c in found[2:]] == [
        ("mst", "all"),
        ("mst", 0),
    ]
    assert [c.memory.policy for c in found[:2]] == ["vanilla", "recompute"]
    first = found[0]
    alike = [replace(c, memory=first.memory, run=first.run) for c in found]
    assert [replace(c, plan=replace(c.plan, dir="")) for c in alike] == [
        replace(first, plan=replace(first.plan, dir=""))
    ] * 4
    assert first.plan.sweep[0] == 1 * K and first.plan.sweep[-1] == 80 * K


def test_memory_over_lengths():
    ways = {policy: (*SMALL, f"memory={policy}") for policy in ("vanilla", "mst")}
    found = predicted.over_all_lengths(QUIET, ways, [1 * K, 32 * K])["ways"]
    assert [row["sequence_length"] for row in found["mst"]] == [1 * K, 32 * K]
    assert found["vanilla"][1]["peak_bytes"] > found["mst"][1]["peak_bytes"]
    assert found["vanilla"][1]["policy"] == "vanilla"


@pytest.mark.parametrize(
    ("kind", "experiment"), [("head", "ablation_head_chunks_8"), ("block", "ablation_mlp_chunks_8")]
)
def test_ablations_are_the_experiments(kind, experiment):
    ours = read([*predicted.CUT, *predicted.cut_settings(kind, 8, 16 * K)])
    theirs = read([f"+experiment={experiment}"])
    assert ours.memory == theirs.memory
    assert replace(ours, run=theirs.run, plan=theirs.plan) == theirs


def test_numbers_of_chunks(monkeypatch):
    monkeypatch.setattr(predicted, "COUNTS", {"head": (1, 8), "mlp": (4,), "block": (4,)})
    rows = predicted.number_of_chunks(QUIET, [8 * K], SMALL)["rows"]
    one, eight, mlp, block = rows
    assert (one["head_chunk_tokens"], eight["head_chunk_tokens"]) == (8 * K, 1 * K)
    assert one["peak_bytes"] > eight["peak_bytes"]
    assert (mlp["mlp_chunk_tokens"], mlp["block_chunk_tokens"]) == (2 * K, 8 * K)
    assert (block["mlp_chunk_tokens"], block["block_chunk_tokens"]) == (2 * K, 2 * K)


def test_one_piece_is_made_and_the_others_stay(monkeypatch, tmp_path, reports, capsys):
    (tmp_path / "longest.json").write_text(json.dumps(reports["longest"]))
    heard = []

    def compute(advance):
        advance("something")
        heard.append("computed")
        return {"rows": reports["several"]["rows"]}

    monkeypatch.setitem(pieces.PIECES, "several", pieces.Piece(compute, None))
    assert command.main(["--output", str(tmp_path), "--only", "several"]) == 0
    made = json.loads((tmp_path / "several.json").read_text())
    assert heard == ["computed"]
    assert made["command"] == "python -m mst_train.paper --only several"
    assert made["assumed"]["device"] == "a100_80gb"
    assert made["seconds"] >= 0
    text = (tmp_path / "README.md").read_text()
    assert "**104K**" in text and "**90K**" in text
    assert str(tmp_path) not in text
    assert capsys.readouterr().out == f"The page: {tmp_path / 'README.md'}\n"


def test_a_piece_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--only", "shortest"])
    assert stopped.value.code == 2
    assert "longest" in capsys.readouterr().err
