"""Twelve steps by several processes give the weights of one process."""

import math

import pytest
import torch
from processes import run
from training import STEPS, forget_and_refuse, save_and_continue, train_alone, train_together

from mst_train.config import Config, OptimizerConfig, ParallelConfig
from mst_train.distributed import Topology
from mst_train.engine import build_engine
from mst_train.errors import UserError
from mst_train.model import build_model

STAGES = (0, 1, 2, 3)
EXCHANGES = [
    (2, 1, "auto"),
    (2, 2, "heads"),
    (2, 2, "keys"),
    (4, 1, "auto"),
    (4, 2, "heads"),
    (4, 2, "keys"),
    (4, 4, "heads"),
    (4, 4, "keys"),
    (4, 4, "both"),
]
"""Processes, how many of them share a sequence, and what these exchange."""
FEWER = {"steps": STEPS // 2}
"""For what is not the exchange: these share the code of a step with those of all steps."""
ENOUGH = {"steps": 8}
"""For a norm that would be clipped, and for Muon to be far from AdamW."""
MASTERS = [{"degree": 1, "stage": stage, "precision": "bf16_master", **FEWER} for stage in STAGES]
TIED = [
    {"degree": 1, "stage": 3, "policy": policy, "tied": True, **FEWER}
    for policy in ("vanilla", "recompute", "mst")
]

ON_HOST = [
    {"degree": degree, "stage": stage, "precision": precision, "offload": "host", **FEWER}
    for degree, stage, precision in (
        (2, 1, "fp32"),
        (1, 2, "fp32"),
        (1, 3, "fp32"),
        (1, 1, "bf16_master"),
        (1, 3, "bf16_master"),
    )
]
EXPERTS = [
    {"degree": degree, "stage": stage, "experts": 3, **others, **FEWER}
    for degree, stage, others in (
        (1, 2, {}),
        (2, 3, {}),
        (1, 3, {"policy": "recompute"}),
        (1, 0, {"in_backward": True}),
    )
]
SINKS = [
    {"degree": degree, "stage": stage, "exchange": exchange, "sinks": True, **FEWER}
    for degree, stage, exchange in ((1, 3, "auto"), (2, 3, "heads"), (2, 2, "keys"))
]
UNCLIPPED = [{"degree": 1, "stage": stage, "max_grad_norm": None, **ENOUGH} for stage in (1, 2, 3)]
IN_BACKWARD = [{"degree": degree, "stage": 0, "in_backward": True, **FEWER} for degree in (1, 2)]
MUON = [
    {"degree": degree, "stage": 0, "optimizer": "muon", "in_backward": in_backward, **ENOUGH}
    for degree in (1, 2)
    for in_backward in (False, True)
]


@pytest.fixture(scope="module")
def alone():
    return train_alone()


@pytest.fixture(scope="module")
def two_together(tmp_path_factory):
    """What else two processes train, in one start of them."""
    runs = [*MASTERS, *TIED, *IN_BACKWARD, *MUON, *ON_HOST, *UNCLIPPED, *EXPERTS, *SINKS]
    return train_all(2, runs, tmp_path_factory.mktemp("two"), timeout=600)


def train_all(world, runs, folder, timeout):
    """What each of these runs gives, which all processes agree about."""
    first, *others = run(train_together, world, folder, timeout=timeout, world=world, runs=runs)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            for key in ("losses", "norms"):
                assert torch.equal(mine[key], theirs[key])
            assert mine["validation"] == theirs["validation"]
    return [(settings, found) for settings, found in zip(runs, first, strict=True)]


def those_of(together, runs):
    return [found for settings, found in together if settings in runs]


def check_equal(expected, found, tolerance):
    """Losses, norms, and each parameter by its relative error over the whole tensor."""
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=tolerance, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=tolerance, atol=0)
    assert found["validation"] == pytest.approx(expected["validation"], rel=tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        error = (found["weights"][name] - weight).norm() / weight.norm()
        assert error < tolerance, (name, error)


def test_two_processes(alone, tmp_path):
    runs = [
        {"degree": 2, "exchange": exchange, "stage": stage}
        for exchange, stage in (("heads", 3), ("keys", 1))
    ]
    for _, found in train_all(2, runs, tmp_path, timeout=600):
        check_equal(alone, found, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_exchange_with_a_stage(alone, world, tmp_path):
    of_world = [exchange[1:] for exchange in EXCHANGES if exchange[0] == world]
    runs = [
        {"degree": degree, "exchange": exchange, "stage": STAGES[-1 - place % len(STAGES)]}
        for place, (degree, exchange) in enumerate(of_world)
    ]
    for settings, found in train_all(world, runs, tmp_path, timeout=600):
        print(settings)
        check_equal(alone, found, 1e-5)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "degree", "exchange"), EXCHANGES)
def test_every_exchange_and_stage(alone, world, degree, exchange, tmp_path):
    runs = [{"degree": degree, "exchange": exchange, "stage": stage} for stage in STAGES]
    for settings, found in train_all(world, runs, tmp_path, timeout=800):
        print(settings)
        check_equal(alone, found, 1e-5)


def test_the_comparison_would_notice_a_wrong_scale(alone):
    wrong = alone | {"norms": alone["norms"] * (1 + 2e-5)}
    with pytest.raises(AssertionError):
        check_equal(alone, wrong, 1e-5)
    assert (alone["norms"] > 0.3).all()  # so that clipping has something to do
    assert len(alone["losses"]) == STEPS


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(alone, tmp_path):
    """Two processes under ZeRO-2 and then ZeRO-3, four under ZeRO-1, then one."""
    two = [
        {"degree": 2, "stage": 2, "first": 0, "last": 3},
        {"degree": 1, "stage": 3, "first": 3, "last": 6},
    ]
    four = [{"degree": 2, "stage": 1, "first": 6, "last": 9}]
    for world, legs in ((2, two), (4, four)):
        folder = tmp_path / str(world)
        run(save_and_continue, world, folder, world=world, legs=legs, states=str(tmp_path))
    found = train_alone(saved=torch.load(tmp_path / "9.pt"))
    for key in ("losses", "norms"):
        torch.testing.assert_close(found[key], alone[key][9:], rtol=1e-5, atol=0)
    for name, weight in alone["weights"].items():
        assert (found["weights"][name] - weight).norm() / weight.norm() < 1e-5, name


def errors(found, truth):
    """The relative error of each fp32 master weight."""
    return {
        name: ((parts["master"] - truth[name]).norm() / truth[name].norm()).item()
        for name, parts in found["state"].items()
    }


@pytest.mark.slow
def test_fp32_masters_of_bf16_weights(two_together):
    """As near to what fp32 gives as one process is."""
    truth = train_alone(rounded=True, **FEWER)["weights"]
    expected = train_alone(precision="bf16_master", **FEWER)
    allowed = errors(expected, truth)
    results = those_of(two_together, MASTERS)
    assert len(results) == len(STAGES)
    for one in results:
        # AdamW takes no notice of the gradient's scale: the norms would tell of a wrong one.
        torch.testing.assert_close(one["losses"], expected["losses"], rtol=5e-4, atol=0)
        torch.testing.assert_close(one["norms"], expected["norms"], rtol=5e-3, atol=0)
        for name, error in errors(one, truth).items():
            assert error < 1.5 * allowed[name] + 1e-4, name
            assert one["weights"][name].dtype == torch.bfloat16


@pytest.mark.slow
def test_other_policies_and_tied_embeddings_with_shared_weights(two_together):
    expected = train_alone(tied=True, **FEWER)
    results = those_of(two_together, TIED)
    assert len(results) == 3
    for one in results:
        check_equal(expected, one, 1e-5)


@pytest.mark.slow
def test_the_optimizer_in_the_backward(two_together):
    expected = train_alone(in_backward=True, **FEWER)
    results = those_of(two_together, IN_BACKWARD)
    assert len(results) == 2
    for one in results:
        check_equal(expected, one, 1e-5)


@pytest.mark.slow
def test_muon_without_zero(two_together):
    """It rounds sums that differ in a last digit to bf16: its weights differ by a share of that of
    an update. AdamW's differ from them by more than 0.01, and the losses by 0.4%."""
    for settings in MUON:
        (found,) = those_of(two_together, [settings])
        expected = train_alone(optimizer="muon", in_backward=settings["in_backward"], **ENOUGH)
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=5e-5, atol=0)
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=5e-4, atol=0)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_mixtures_of_experts(two_together):
    for settings in EXPERTS:
        (found,) = those_of(two_together, [settings])
        in_backward = settings.get("in_backward", False)
        check_equal(train_alone(experts=3, in_backward=in_backward, **FEWER), found, 1e-5)


@pytest.mark.slow
def test_attention_sinks(two_together):
    """Of which each process has part of the gradient: of its heads, or of its queries."""
    expected = train_alone(sinks=True, **FEWER)
    for settings in SINKS:
        (found,) = those_of(two_together, [settings])
        check_equal(expected, found, 1e-5)


@pytest.mark.slow
def test_without_clipping_nothing_is_clipped(two_together):
    expected = train_alone(max_grad_norm=None, **ENOUGH)
    assert (expected["norms"] > 1.01).any()  # DeepSpeed would clip to 1 by default
    for found in those_of(two_together, UNCLIPPED):
        check_equal(expected, found, 1e-5)


@pytest.mark.slow
def test_parts_of_the_optimizer_on_the_host(two_together):
    in_fp32, in_bf16 = (train_alone(precision=p, **FEWER) for p in ("fp32", "bf16_master"))
    for settings in ON_HOST:
        (found,) = those_of(two_together, [settings])
        if settings["precision"] == "fp32":
            check_equal(in_fp32, found, 1e-5)
        else:
            torch.testing.assert_close(found["losses"], in_bf16["losses"], rtol=5e-4, atol=0)
            torch.testing.assert_close(found["norms"], in_bf16["norms"], rtol=5e-3, atol=0)


@pytest.mark.slow
def test_a_forgotten_step_leaves_no_trace(tmp_path):
    runs = [{"stage": stage} for stage in STAGES]
    runs += [{"stage": stage, "offload": "host"} for stage in (1, 2, 3)]
    first, second = run(forget_and_refuse, 2, tmp_path, timeout=600, world=2, runs=runs)
    for mine, theirs in zip(first, second, strict=True):
        whole, bad, again, once_more = mine["norms"]
        assert again == once_more == pytest.approx(whole, rel=1e-6)
        assert math.isnan(bad)
        assert mine["norms"][:1] + mine["norms"][2:] == theirs["norms"][:1] + theirs["norms"][2:]
    whole = first[0]["held"]
    assert [one["held"] for one in first] == [whole, whole, whole, 0, whole, whole, 0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {
                "optimizer": OptimizerConfig(in_backward=True),
                "parallel": ParallelConfig(zero_stage=1),
            },
            "optimizer.in_backward=true",
        ),
        ({"optimizer": OptimizerConfig(offload="host")}, "optimizer.offload=host"),
        ({"parallel": ParallelConfig(zero_stage=1), "precision": "bf16"}, "precision=bf16 "),
    ],
)
def test_what_several_processes_cannot_do(changes, problem):
    config = Config(**changes)
    model = build_model(config.model, device="meta")
    with pytest.raises(UserError, match=problem):
        build_engine(model, config, Topology(world=2))
