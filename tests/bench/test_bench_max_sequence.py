"""The longest sequence that really fits, and the prediction of it."""

import json

import pytest
import torch

from mst_train.bench import max_sequence
from mst_train.bench.__main__ import main

ARGUMENTS = ["+bench=max_sequence", "bench.variants=[recompute,mst]", "kernel.attention=cpu"]


@pytest.mark.slow
def test_the_limit_is_found_and_was_predicted(tmp_path):
    assert main([*ARGUMENTS, f"bench.dir={tmp_path}"]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    rows = {row["variant"]: row for row in report["rows"]}
    assert not report["problems"]
    assert rows["mst"]["tokens"] > rows["recompute"]["tokens"] >= 1024
    budget = report["settings"]["memory"]["device_budget_gib"] * 2**30
    for row in rows.values():
        assert row["tokens"] == row["predicted_tokens"]
        assert row["peak_bytes"] <= budget
        beyond = [p for p in row["points"] if p["measured_bytes"] > budget]
        assert row["tokens"] + 1024 in {p["tokens"] for p in beyond}
        for point in row["points"]:
            assert point["predicted_bytes"] == pytest.approx(point["measured_bytes"], rel=0.02)
    assert (tmp_path / "results.png").exists()


@pytest.mark.slow
def test_running_out_of_memory_is_recovered_from(tmp_path, monkeypatch):
    """As on a GPU: a length that does not fit raises, and the next one runs as if nothing had."""
    real = max_sequence.train_step

    def limited(engine, batches, *arguments):
        model = engine.model
        if batches[0].tokens.shape[1] > 3000:
            model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
            raise torch.OutOfMemoryError("no memory left")
        assert all(p.grad is None for p in model.parameters())
        return real(engine, batches, *arguments)

    monkeypatch.setattr(max_sequence, "train_step", limited)
    only = ["bench.variants=[mst]", "memory.device_budget_gib=0.05"]
    monkeypatch.setattr(max_sequence, "_start", lambda _: (1024, 4096))
    assert main(["+bench=max_sequence", *only, f"bench.dir={tmp_path}"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["tokens"] == 2048
    assert next(p["measured_bytes"] for p in row["points"] if p["tokens"] > 3000) is None


def test_a_cpu_needs_a_limit(tmp_path, capsys):
    arguments = ["+bench=max_sequence", "memory.device_budget_gib=null", f"bench.dir={tmp_path}"]
    assert main(arguments) == 2
    assert "set memory.device_budget_gib" in capsys.readouterr().err
