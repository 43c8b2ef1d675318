"""Whole steps under each policy."""

import pytest
import torch

from mst_train.bench import step
from mst_train.bench.__main__ import main
from mst_train.bench.config import read
from mst_train.memory.devices import Device


@pytest.mark.slow
def test_it_measures_every_policy_and_writes_its_files(run_bench, by_variant):
    report, folder = run_bench(
        "step",
        "memory.mlp_chunk_tokens=16",
        "memory.head_chunk_tokens=16",
        "bench.repetitions=2",
    )
    rows = by_variant(report)
    assert list(rows) == list(step.VARIANTS)
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["tokens_per_second"] > 0
        assert row["loss"] == pytest.approx(rows["vanilla"]["loss"], rel=1e-5)
    assert rows["mst"]["peak_bytes"] < rows["recompute"]["peak_bytes"]
    assert rows["recompute"]["peak_bytes"] < rows["vanilla"]["peak_bytes"]
    assert rows["mst_without_keeping"]["peak_bytes"] <= rows["mst"]["peak_bytes"]
    assert rows["mst_offload"]["host_bytes"] > 0 == rows["mst"]["host_bytes"]
    assert rows["mst_offload"]["peak_bytes"] <= rows["mst"]["peak_bytes"]
    assert {p.name for p in folder.iterdir()} >= {"results.json", "results.md"}
    assert report["versions"]["torch"] == torch.__version__
    assert report["hardware"]["threads"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
def test_the_optimizer_can_be_part_of_it(run_bench, by_variant, precision):
    report, _ = run_bench(
        "step", "bench.optimizer=true", f"precision={precision}", "bench.variants=[recompute,mst]"
    )
    rows = by_variant(report)
    assert list(rows) == ["recompute", "mst"]
    assert rows["mst"]["loss"] == pytest.approx(rows["recompute"]["loss"], rel=5e-3)


def test_losses_that_disagree_fail_it(run_bench, monkeypatch):
    from mst_train.model import transformer

    original = transformer.mini_sequence_cross_entropy

    def wrong(*arguments, **options):
        loss, valid = original(*arguments, **options)
        return loss * 1.01, valid

    monkeypatch.setattr(transformer, "mini_sequence_cross_entropy", wrong)
    report, folder = run_bench("step", "bench.variants=[recompute,mst]", status=1)
    assert any("the loss of mst" in problem for problem in report["problems"])
    assert "Problem" in (folder / "results.md").read_text()


def test_our_own_failure_fails_it(run_bench, monkeypatch, by_variant):
    from mst_train.model import transformer

    def broken(*arguments, **options):
        raise ValueError("broken")

    monkeypatch.setattr(transformer, "mini_sequence_mlp", broken)
    report, _ = run_bench("step", "bench.variants=[recompute,mst]", status=1)
    rows = by_variant(report)
    assert rows["mst"]["problem"] == "failed: ValueError: broken"
    assert len(rows["recompute"]["seconds"]) == 1


@pytest.mark.slow
def test_short_lengths_run_more_often(run_bench):
    report, _ = run_bench("short", "bench.lengths=[16,128]")
    counts = {(row["tokens"], row["variant"]): len(row["seconds"]) for row in report["rows"]}
    assert counts == {
        (tokens, variant): count
        for tokens, count in ((16, 4), (128, 1))
        for variant in ("vanilla", "recompute", "mst")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_gpu", "short_gpu"])
def test_the_presets_for_gpus_run_here_with_small_dimensions(run_bench, name):
    report, _ = run_bench(name)
    assert report["settings"]["precision"] == "bf16"
    assert all(row["problem"] is None for row in report["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["step", "short", "peers", "systems", "max_sequence"])
def test_a_bench_for_a_gpu_says_that_there_is_none(capsys, tmp_path, name):
    assert main([f"+bench={name}_gpu", f"bench.dir={tmp_path / 'results'}"]) == 2
    said = capsys.readouterr().err
    assert f"+bench={name}_gpu is for a GPU, and there is none here: +bench={name} is" in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("budget_gib", "gib"), [(None, 85.0), (2.5, 2.5)])
def test_a_variant_that_offloads_leaves_the_host_its_memory(monkeypatch, budget_gib, gib):
    config = read(["+bench=step", f"memory.host_budget_gib={budget_gib or 'null'}"])
    monkeypatch.setattr(step, "this_device", lambda device: Device("cpu", "cpu", 100 * 2**30))
    monkeypatch.setattr(step, "Offload", lambda device, budget_bytes: budget_bytes)
    assert step.host_offload(config, torch.device("cpu")) == gib * 2**30
