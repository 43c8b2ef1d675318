"""What a run says of itself before its first step."""

import re
from types import SimpleNamespace

import pytest

from mst_train.cli.compose import compose
from mst_train.memory.devices import DEVICES
from mst_train.plan.predict import make_target, predict
from mst_train.run.header import header

SMALL = ["data.sequence_length=512", "model.num_layers=1", "memory.block_chunk_tokens=128"]
TOKENIZER = SimpleNamespace(vocab_size=4096)
DATA = SimpleNamespace(training=range(40), validation=range(3), tokenizer=TOKENIZER)


def lines(*arguments, gpus=1, data=DATA, step=0):
    config = compose([*SMALL, "train.steps=100", *arguments])
    prediction = predict(config, make_target(config, DEVICES["h200"], gpus, here=False))
    found = list(header(config, prediction, data, step))
    return found, prediction


def test_what_a_run_is():
    found, prediction = lines("memory.head_chunk_tokens=64", step=20)
    seconds = prediction.seconds
    assert seconds is not None
    assert found[:4] == [
        "tiny: 2,835,200 parameters in fp32 on one h200",
        "memory: mst; mini-sequences of 128 tokens in blocks and 64 in the head",
        "data: stdlib; 40 sequences of 512 tokens in an epoch, 3 held out",
        "run: steps 21 to 100 of 512 tokens: 40,960 tokens, 2 epochs; a checkpoint every 20 steps",
    ]
    peak = f"{prediction.simulation.peak_bytes / 2**30:.2f} of 139.72 GiB"
    assert found[4].startswith(f"predicted: {peak}; ")
    step, run = re.findall(r"([\d.]+) ms", found[4])
    assert float(run) == pytest.approx(80 * float(step), rel=1e-2)
    assert float(step) == pytest.approx(seconds * 1000, rel=1e-2)


def test_parameters_that_a_token_uses():
    found, _ = lines("model.num_experts=4", "model.experts_per_token=1")
    # In the one layer 3 experts more than in a dense one, and the router's 4 * 256.
    assert found[0].startswith(
        f"tiny: {2_835_200 + 3 * 3 * 256 * 704 + 1024:,} parameters, {2_835_200 + 1024:,} of them "
        f"for each token, in fp32 on "
    )


def test_what_is_shared_and_kept_on_the_host():
    mixture = "data.mixture=[{source: a}, {source: b}]"
    found, _ = lines(
        mixture, "parallel.sequence_parallel=2", "memory.offload=host", "run.name=x", gpus=4
    )
    assert found[0].endswith("on 4 x h200, 2 for each sequence, which exchange keys")
    assert found[1].startswith("memory: mst, offloaded to the host; mini-sequences of ")
    assert found[2].startswith("data: a, b; 40 ")
    assert "of 1,024 tokens: 102,400 tokens, 5 epochs" in found[3]
    assert "GiB of the host" in found[4]


def test_without_mini_sequences_and_validation():
    data = SimpleNamespace(training=range(40), validation=None, tokenizer=TOKENIZER)
    found, _ = lines("memory.policy=vanilla", "precision=bf16", data=data)
    assert "in bf16 on one h200" in found[0]
    assert found[1] == "memory: vanilla; no mini-sequences"
    assert found[2].endswith("0 held out")


def test_ids_of_the_model_that_the_tokenizer_leaves_unused():
    found, _ = lines("model.vocab_size=5000")
    assert found[2].endswith("held out; it uses 4,096 of the model's 5,000 token ids")
