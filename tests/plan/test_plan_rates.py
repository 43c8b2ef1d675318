"""Rates of devices: measured here, from a file, or assumed."""

import json
from dataclasses import asdict

import pytest
import torch

from mst_train.errors import UserError
from mst_train.memory.devices import DEVICES, Device
from mst_train.plan import trial
from mst_train.plan.rates import FILE_VARIABLE, rates
from mst_train.plan.trial import FEW_TOKENS, Rates, measure

BF16 = torch.bfloat16
MEASURED = Rates(6e14, 5e14, 4e14, 2.7e12, 5.2e10, None, "measured on such a device")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """What a machine with an H100 has written, and is to be read."""
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"NVIDIA H100 80GB HBM3": {"rates": asdict(MEASURED)}}))
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    return path


def test_a_device_in_the_file_is_as_it_was_measured(file):
    here = Device("NVIDIA H100 80GB HBM3", "cuda", 85 * 10**9)
    assert rates(DEVICES["h100_80gb"], BF16) == rates(here, BF16) == MEASURED
    assert rates(DEVICES["h100_pcie_80gb"], BF16).source.startswith("assumed: 70% of the bf16 peak")


def test_without_a_file_rates_are_assumed(monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    assert rates(DEVICES["h100_80gb"], BF16).source.startswith("assumed: ")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"NVIDIA H100": 3}',
        '{"NVIDIA H100": {"rates": {"products": 1e14}}}',
        json.dumps({"NVIDIA H100": {"rates": asdict(MEASURED) | {"memory": 0.0}}}),
        json.dumps({"NVIDIA H100": {"rates": asdict(MEASURED) | {"memory": float("nan")}}}),
        json.dumps({"NVIDIA H100": {"rates": asdict(MEASURED) | {"memory": "fast"}}}),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, monkeypatch, content):
    path = tmp_path / "rates.json"
    path.write_text(content)
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    with pytest.raises(UserError, match=r"rates\.json has no rates of devices \(.*: have python"):
        rates(DEVICES["h100_80gb"], BF16)
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"MST_TRAIN_RATES=.*none cannot be read"):
        rates(DEVICES["h100_80gb"], BF16)


def test_the_command_writes_what_is_read(monkeypatch, tmp_path, capsys):
    assert trial.main([]) == 2
    assert "name one file to write" in capsys.readouterr().err
    path = tmp_path / "rates.json"
    assert trial.main([str(path)]) == 0
    (name, written), *_ = json.loads(path.read_text()).items()
    assert name == "cpu"
    assert written["rates"]["products"] > 0
    assert {"date", "git_commit", "hardware", "versions"} < written.keys()
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    assert rates(DEVICES["h100_80gb"], BF16).source.startswith("assumed: ")


def test_a_gpu_is_measured_at_a_chunk_of_llama3_8b(monkeypatch, tmp_path):
    """The command on a GPU, whose place the CPU takes."""
    measured = []

    def on_cpu(device, dtype, sizes):
        measured.append((device.type, dtype, sizes.tokens, sizes.features))
        return measure(torch.device("cpu"), torch.float32, FEW_TOKENS)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(trial, "measure", on_cpu)
    monkeypatch.setattr(trial, "describe", lambda device, module: {"command": module})
    path = tmp_path / "rates.json"
    assert trial.main([str(path)]) == 0
    assert measured == [("cuda", BF16, 8192, 14336)]
    assert json.loads(path.read_text())["NVIDIA H200"]["command"] == "mst_train.plan.trial"
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    written = json.loads(path.read_text())["NVIDIA H200"]["rates"]
    assert rates(DEVICES["h200"], BF16).products == written["products"] > 0
