"""Other implementations of the head and the MLP."""

import importlib.util

import pytest
import torch

from mst_train.bench import peers
from mst_train.bench.config import BenchConfig

NO_COMPILER = (
    "bench.variants=["
    + ",".join(name for name in (*peers.HEAD, peers.MATCHED) if name != "cut_cross_entropy")
    + "]"
)  # its compiled code takes half a minute to compile


@pytest.mark.slow
def test_gradients_are_held_to_float64(run_bench, by_variant):
    report, _ = run_bench("peers", NO_COMPILER, "bench.lengths=[300]")
    for work, names in (("head", peers.HEAD), ("mlp", peers.MLP)):
        rows = by_variant(report, work)
        assert set(rows) == {*names, peers.MATCHED} - {"cut_cross_entropy"}
        for row in rows.values():
            if row["problem"] is None:
                assert max(row["gradient_errors"].values()) < 1e-5
    if importlib.util.find_spec("deepspeed") is None:
        assert "not installed" in by_variant(report, "mlp")["deepspeed"]["problem"]
    if not torch.cuda.is_available():
        assert by_variant(report, "head")["liger_fused"]["problem"] == "not run: needs CUDA"


@pytest.mark.slow
def test_matched_stays_within_the_leanest_peers_peak_and_close_to_it(run_bench, by_variant):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")
    report, _ = run_bench("peers", NO_COMPILER, "bench.lengths=[1024]")
    rows = by_variant(report, "head")
    leanest = min(rows[name]["peak_bytes"] for name in peers.CHUNKED if rows[name]["peak_bytes"])
    assert 0.85 * leanest < rows["mst_matched"]["peak_bytes"] <= leanest
    assert "tokens in a chunk" in rows["mst_matched"]["note"]


def test_the_truth_is_autograds(change):
    config = change(BenchConfig(), **{"model.vocab_size": 50, "model.hidden_size": 16})
    work = peers.head(config, 600, torch.device("cpu"))
    hidden, weight = (work.tensors[n].detach().double().requires_grad_() for n in work.truth)
    generator = torch.Generator().manual_seed(0)
    torch.randn((600, 16), generator=generator), torch.randn((50, 16), generator=generator)
    labels = torch.randint(50, (600,), generator=generator)
    torch.nn.functional.cross_entropy(hidden @ weight.t(), labels).backward()
    torch.testing.assert_close(hidden.grad, work.truth["hidden"])
    torch.testing.assert_close(weight.grad, work.truth["weight"])


def test_a_wrong_gradient_shows(change):
    config = change(BenchConfig(), **{"model.hidden_size": 16, "model.intermediate_size": 24})
    work = peers.mlp(config, 40, torch.device("cpu"))
    work.ours(8).backward()
    gradient = work.tensors["down"].grad
    assert peers._relative_error(gradient, work.truth["down"]) < 1e-6
    assert peers._relative_error(gradient * 1.1, work.truth["down"]) == pytest.approx(0.1, 1e-3)


def test_a_torch_without_linear_cross_entropy_is_a_reason(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    found = peers._torch_linear_cross_entropy(*(torch.ones(1, 1),) * 3)
    assert len(found) == 3 and all("has no linear_cross_entropy" in v for v in found.values())


@pytest.mark.slow
def test_the_preset_for_gpus_runs_here_with_small_dimensions(run_bench, by_variant):
    report, _ = run_bench("peers_gpu", "bench.variants=[torch,mst]", "bench.lengths=[64]")
    for work in ("head", "mlp"):
        rows = by_variant(report, work)
        for row in rows.values():
            assert row["problem"] is None
            assert 1e-4 < max(row["gradient_errors"].values()) < 2e-2
