"""Muon for the blocks' matrices: torch's own numbers, states, memory, what is refused."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from mst_train.config import ModelConfig, OptimizerConfig
from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.optim import MUON_STATES, InBackwardOptimizer, Optimizer

CONFIG = OptimizerConfig(name="muon", beta2=0.99, weight_decay=0.2, muon_momentum=0.9)
ADAMW = dataclasses.replace(CONFIG, name="adamw")
STEPS = 10
TOKENS = 40
EXPERTS = {"num_experts": 5, "experts_per_token": 2}
PLACES = {"after": Optimizer, "in_backward": InBackwardOptimizer}


def make_decoder(dtype=torch.float64, **settings):
    """With all kinds of parameters: biases, norms of heads, more and fewer rows than columns."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "qkv_bias": True,
        "qk_norm": "head",
    }
    sizes |= EXPERTS if settings.pop("experts", False) else {}
    model = ModelConfig(**{**sizes, **settings})
    return build_model(model, policy=Policy(True, True, 16, 24), dtype=dtype)


def batches(step, accumulation=1):
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(60, (1, TOKENS + 1), generator=generator) for _ in range(accumulation)]


def backward(model, step, accumulation=1):
    for batch in batches(step, accumulation):
        loss_sum, _ = model(batch[:, :-1], batch[:, 1:])
        (loss_sum / TOKENS / accumulation).backward()


def run(model, optimizer, steps, accumulation=1, clip=None):
    for step in steps:
        optimizer.set_learning_rate(0.01 / (step + 1))
        backward(model, step, accumulation)
        norm = optimizer.gradient_norm()
        if clip is not None:
            optimizer.clip(clip, norm)
        optimizer.step()


def torchs_own(model, steps, accumulation=1, clip=None):
    """The same steps as a user of torch would write them."""
    weights = [p for p in model.blocks.parameters() if p.ndim > 1]
    inside = {id(p) for p in weights}
    stacked = {p: p.detach().unbind() for p in weights if p.ndim == 3}
    matrices = [matrix for p in weights for matrix in stacked.get(p, [p])]
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices,
        weight_decay=CONFIG.weight_decay,
        momentum=CONFIG.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": CONFIG.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.epsilon,
        fused=True,
    )
    for step in steps:
        backward(model, step, accumulation)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for weight, experts in stacked.items():
            for matrix, gradient in zip(experts, weight.grad, strict=True):
                matrix.grad = gradient
            weight.grad = None
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()


def assert_equal(model, other):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"tie_embeddings": True}, marks=pytest.mark.slow), {"experts": True}],
)
@pytest.mark.parametrize(
    ("place", "accumulation", "clip"),
    [("after", 1, None), ("in_backward", 1, None), ("after", 3, None), ("after", 2, 0.5)],
)
def test_ten_steps_are_those_of_torchs_own(place, accumulation, clip, settings):
    """Bit for bit: Muon rounds to bf16, which can make much of a difference in a last digit."""
    model, reference = (make_decoder(**settings) for _ in range(2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = PLACES[place](model, CONFIG, master_weights=False)
    run(model, optimizer, range(STEPS), accumulation, clip)
    torchs_own(reference, range(STEPS), accumulation, clip)
    assert_equal(model, reference)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_muon_has_the_blocks_matrices_and_adamw_the_rest(tied):
    model = make_decoder(tie_embeddings=tied)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    optimizer = Optimizer(model, CONFIG, master_weights=False)
    run(model, optimizer, range(1))
    states = optimizer.state_dict()
    of_muon = {name for name, state in states.items() if tuple(state) == MUON_STATES}
    assert of_muon == {
        f"blocks.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            *(f"attention.{n}" for n in ("query", "key", "value", "output")),
            *(f"mlp.{n}" for n in ("gate", "up", "down")),
        )
    } - {"blocks.0.mlp.up.weight"}
    for name in states.keys() - of_muon:
        assert states[name].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_muon_has_the_experts_matrices():
    model = make_decoder(experts=True)
    optimizer = Optimizer(model, CONFIG, master_weights=False)
    run(model, optimizer, range(1))
    states = optimizer.state_dict()
    for name in ("gate", "up", "down", "router.weight"):
        assert tuple(states[f"blocks.1.mlp.{name}"]) == MUON_STATES
    assert states["blocks.1.mlp.down"]["momentum_buffer"].shape == (5, 32, 48)


@pytest.mark.parametrize("master_weights", [False, True])
def test_in_the_backward_bf16_is_the_same_bit_for_bit(master_weights):
    found = []
    for kind in PLACES.values():
        model = make_decoder(torch.bfloat16)
        optimizer = kind(model, CONFIG, master_weights=master_weights)
        run(model, optimizer, range(4))
        state = optimizer.state_dict()["blocks.1.mlp.gate.weight"]
        dtype = torch.float32 if master_weights else torch.bfloat16
        assert {t.dtype for t in state.values()} == {dtype}
        assert ("master" in state) == master_weights
        found.append(([*model.parameters()], optimizer.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("experts", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("before", "after"), [*itertools.product(PLACES, PLACES)])
@pytest.mark.parametrize("precision", ["fp64", "bf16", "bf16_master"])
def test_a_state_goes_on_bit_for_bit(before, after, precision, experts, tmp_path):
    def make(place):
        dtype = torch.float64 if precision == "fp64" else torch.bfloat16
        model = make_decoder(dtype, experts=experts)
        masters = precision == "bf16_master"
        return model, PLACES[place](model, CONFIG, master_weights=masters)

    whole = make(before)
    run(*whole, range(6))
    model, optimizer = make(before)
    run(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    weights, states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make(after)
    resumed[0].load_state_dict(weights)
    resumed[1].load_state_dict(states)
    run(*resumed, range(3, 6))
    assert_equal(resumed[0], whole[0])


@pytest.mark.parametrize(("saved", "loaded"), [(CONFIG, ADAMW), (ADAMW, CONFIG)])
def test_another_optimizers_state_is_refused(saved, loaded):
    model = make_decoder()
    optimizer = Optimizer(model, saved, master_weights=False)
    run(model, optimizer, range(1))
    other = Optimizer(make_decoder(), loaded, master_weights=False)
    with pytest.raises(UserError, match="or another optimizer than this run's"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("experts", [False, True])
def test_muon_keeps_one_state_in_the_place_of_two(experts):
    kept = []
    for config in (ADAMW, CONFIG):
        with MemoryTracker() as tracker:
            model = make_decoder(torch.float32, experts=experts)
            optimizer = Optimizer(model, config, master_weights=False)
            run(model, optimizer, range(2))
        kept.append(tracker.live_bytes)
    matrices = sum(p.nbytes for p in model.blocks.parameters() if p.ndim > 1)
    steps = 4 * sum(p.ndim > 1 for p in model.blocks.parameters())
    assert kept[0] - kept[1] == matrices + steps
