"""Which token follows, and what text tokens are."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mst_train.data import load_data
from mst_train.errors import UserError
from mst_train.generate.sample import Sampler
from mst_train.generate.text import INCOMPLETE, TextStream

PROBABILITIES = [0.2, 0.5, 0.0, 0.3]
LOGITS = torch.tensor([math.log(p) if p else -100.0 for p in PROBABILITIES]) + 7
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=INCOMPLETE))


@pytest.fixture
def ours(small_config):
    return load_data(small_config.data).tokenizer


def shares(sampler, draws=2000):
    counts = torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(draws)]), minlength=4)
    return (counts / draws).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "vocab_size", "expected"),
    [
        (1.0, 1.0, 4, PROBABILITIES),
        (0.5, 1.0, 4, [0.04 / 0.38, 0.25 / 0.38, 0.0, 0.09 / 0.38]),
        (1.0, 0.79, 4, [0.0, 0.625, 0.0, 0.375]),
        (1.0, 0.49, 4, [0.0, 1.0, 0.0, 0.0]),
        (1.0, 0.0, 4, [0.0, 1.0, 0.0, 0.0]),
        (1e-309, 1.0, 4, [0.0, 1.0, 0.0, 0.0]),
        (0.0, 1.0, 4, [0.0, 1.0, 0.0, 0.0]),
        (0.0, 1.0, 1, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_probable_as_they_are(temperature, top_p, vocab_size, expected):
    found = shares(Sampler(temperature, top_p, 0, vocab_size))
    assert found == pytest.approx(expected, abs=0.03)
    assert [share == 0 for share in found] == [p == 0 for p in expected]


def test_the_seed_decides():
    drawn = [
        [sampler(LOGITS) for _ in range(50)]
        for sampler in (Sampler(1.0, 1.0, 5, 4), Sampler(1.0, 1.0, 5, 4), Sampler(1.0, 1.0, 6, 4))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature):
    with pytest.raises(UserError, match="not finite"):
        Sampler(temperature, 1.0, 0, 4)(torch.tensor([0.0, math.nan, 1.0, 2.0]))


@pytest.mark.parametrize("which", ["ours", "like_llama", "bytes_with_bos"])
@settings(
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(prompt=TEXTS, text=TEXTS)
def test_text_comes_whole_and_in_whole_characters(which, request, prompt, text):
    tokenizer = request.getfixturevalue(which)
    before = tokenizer.encode([prompt])[0] or [tokenizer.eod]
    after = next(tokenizer.encode_arrays([text], continuing=[0])).tolist()
    stream = TextStream(tokenizer, before)
    pieces = [stream.add(token) for token in after]
    assert not stream.rest()
    assert INCOMPLETE not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(before + after)[len(tokenizer.decode(before)) :]
    if which == "ours":
        assert "".join(pieces) == text


def test_bytes_of_a_character_wait_for_each_other(ours):
    tokens = ours.encode(["\N{SNOWMAN}"])[0]
    assert len(tokens) == 3
    stream = TextStream(ours, [ours.eod])
    assert [stream.add(token) for token in tokens] == ["", "", "\N{SNOWMAN}"]
    assert stream.add(tokens[0]) == ""
    assert stream.rest() == INCOMPLETE
