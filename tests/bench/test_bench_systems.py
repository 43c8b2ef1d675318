"""Other implementations of whole steps."""

import pytest
import torch

from mst_train.bench import systems
from mst_train.bench.config import BenchConfig
from mst_train.bench.workload import build, random_batch

HERE = ("mst", "transformers", "transformers_checkpointing", "alst")


def test_losses_and_gradients_agree(run_bench, by_variant):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    report, folder = run_bench(
        "systems", "model.rope_theta=500000", "bench.loss_tile_mib=1", "bench.lengths=[80]"
    )
    rows = by_variant(report)
    assert set(rows) == set(systems.NEEDED)
    for name in HERE:
        assert rows[name]["problem"] is None
        assert rows[name]["loss"] == pytest.approx(rows["mst"]["loss"], rel=1e-6)
        assert set(rows[name]["gradient_errors"]) == set(systems.COMPARED)
        assert max(rows[name]["gradient_errors"].values()) < 1e-5
    assert rows["transformers_checkpointing"]["peak_bytes"] < rows["transformers"]["peak_bytes"]
    if not torch.cuda.is_available():
        assert rows["liger"]["problem"] == "not run: needs CUDA"
    assert "not run: needs CUDA" in (folder / "results.md").read_text()


@pytest.mark.slow
def test_several_tiles_agree(run_bench, by_variant, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setattr(systems, "loss_tiles", lambda tokens, config: 5)
    report, _ = run_bench("systems", "bench.variants=[transformers,alst]")
    rows = by_variant(report)
    assert max(rows["alst"]["gradient_errors"].values()) < 1e-5


def test_gradients_that_disagree_fail_it(run_bench, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from mst_train.model import transformer

    def wrong(x, gate, up, down, **_):
        return x * gate.mean() * up.mean() * down.mean()

    monkeypatch.setattr(transformer, "mini_sequence_mlp", wrong)
    report, _ = run_bench("systems", "bench.variants=[transformers,mst]", status=1)
    assert any("gradient of first gate" in problem for problem in report["problems"])


def test_a_missing_package_is_a_reason(run_bench, by_variant, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report, _ = run_bench("systems")
    rows = by_variant(report)
    assert rows["alst"]["problem"] == "not run: transformers and deepspeed not installed"
    assert rows["transformers"]["problem"] == "not run: transformers not installed"
    assert len(rows["mst"]["seconds"]) == 1


@pytest.mark.slow
def test_the_preset_for_gpus_runs_here_with_small_dimensions(run_bench, by_variant):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    report, _ = run_bench("systems_gpu")
    assert report["settings"]["precision"] == "bf16"
    assert all(by_variant(report)[name]["problem"] is None for name in HERE)


def test_transformers_uses_our_parameters(change):
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = change(
        BenchConfig(), **{"model.vocab_size": 64, "model.num_layers": 2, "bench.lengths": [16]}
    )
    cpu = torch.device("cpu")
    ours = build(config, cpu)
    theirs = systems._transformers_model(config, ours, cpu)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}


def test_liger_leaves_transformers_as_it_was(change):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    config = change(BenchConfig(), **{"model.vocab_size": 64, "bench.lengths": [16]})
    cpu = torch.device("cpu")
    model, rope = systems._liger_model(config, build(config, cpu), cpu)
    assert vars(modeling_llama) == before
    assert rope is not modeling_llama.apply_rotary_pos_emb
    assert "forward" in vars(model)


def test_tiles_are_as_many_as_the_bytes_ask_for(change):
    config = change(BenchConfig(), **{"model.vocab_size": 128256, "bench.loss_tile_mib": 1024})
    assert systems.loss_tiles(61440, config) == 30
    assert systems.loss_tiles(10, config) == 1
    assert systems.mlp_tiles(61440, 4096) == 15


def test_labels_are_shifted(change):
    batch = random_batch(BenchConfig(), 9, torch.device("cpu"))
    assert batch.labels[0, :-1].tolist() == batch.tokens[0, 1:].tolist()
    assert batch.labels[0, -1] == -100 and batch.valid_tokens == 8


def test_mixtures_of_experts_agree(run_bench, by_variant):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    report, _ = run_bench("systems_experts", "bench.loss_tile_mib=1", "bench.lengths=[80]")
    rows = by_variant(report)
    for name in HERE:
        assert rows[name]["problem"] is None
        assert rows[name]["loss"] == pytest.approx(rows["mst"]["loss"], rel=1e-6)
        assert max(rows[name]["gradient_errors"].values()) < 1e-5
    assert rows["liger"]["problem"] == "not run: mixtures of experts have no kernels of Liger's"
