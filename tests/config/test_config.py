"""Every rule of the configuration refuses what breaks it, by name."""

import itertools

import pytest

from mst_train.config import ACTIVATIONS, PRECISIONS, Config, validate


def test_defaults_are_valid():
    assert validate(Config()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("parallel.deepspeed", {"comms_logger": {}}, "parallel.deepspeed is read with ZeRO alone"),
        ("precision", "fp64", "precision=fp64 is not one of fp32, bf16, bf16_master"),
        ("run.name", " ", "run.name is empty"),
        ("run.dir", "", "run.dir is empty"),
        ("train.steps", 0, "train.steps=0 must be at least 1"),
        ("train.tokens", 0, "train.tokens=0 must be at least 1"),
        ("train.seed", -1, "train.seed=-1 must be at least 0"),
        ("train.micro_batch_size", 0, "train.micro_batch_size=0 must be at least 1"),
        ("train.accumulation_steps", 0, "train.accumulation_steps=0 must be at least 1"),
        ("train.eval_every", -1, "train.eval_every=-1 must be at least 0"),
        ("train.bad_step", "ignore", "train.bad_step=ignore is not one of stop, skip"),
        ("train.max_skipped_steps", 0, "train.max_skipped_steps=0 must be at least 1"),
        ("train.spike_factor", 1.0, "train.spike_factor=1.0 must be greater than 1"),
        ("train.spike_factor", float("nan"), "train.spike_factor=nan must be greater than 1"),
        ("train.spike_window", 0, "train.spike_window=0 must be at least 1"),
        ("data.sequence_length", 0, "data.sequence_length=0 must be at least 1"),
        ("data.validation_fraction", 1.0, "data.validation_fraction=1.0 must be"),
        ("data.source", "", "data.source is empty"),
        ("model.num_kv_heads", 3, "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        ("model.hidden_size", 250, "model.hidden_size=250 is not a multiple of"),
        ("model.head_size", 7, "the head size is 7"),
        ("model.num_kv_heads", 0, "model.num_kv_heads=0 must be at least 1"),
        ("model.norm_epsilon", 0.0, "model.norm_epsilon=0.0 must be greater than 0"),
        (
            "memory.policy",
            "magic",
            "memory.policy=magic is not one of auto, vanilla, ",
        ),
        ("memory.mlp_chunk_tokens", "many", "memory.mlp_chunk_tokens=many must be a number"),
        ("memory.head_chunk_tokens", 0, "memory.head_chunk_tokens=0 must be at least 1"),
        ("memory.offload", "disk", "memory.offload=disk is not one of none, host"),
        ("memory.host_budget_gib", 0.0, "memory.host_budget_gib=0.0 must be greater"),
        ("kernel.backend", "cuda", "kernel.backend=cuda is not one of auto, triton, torch"),
        ("memory.device_budget_gib", -1.0, "memory.device_budget_gib=-1.0 must be greater"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan must be greater"),
        ("optimizer.schedule", "line", "optimizer.schedule=line is not one of cosine, wsd, const"),
        ("optimizer.decay_steps", 5, "optimizer.decay_steps is not used with optimizer.schedule=c"),
        ("optimizer.beta2", 1.0, "optimizer.beta2=1.0 must be at least 0 and below 1"),
        ("optimizer.max_grad_norm", 0.0, "optimizer.max_grad_norm=0.0 must be greater than 0"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay=-0.1 must be 0 or more"),
        ("optimizer.offload", "disk", "optimizer.offload=disk is not one of none, host"),
        ("checkpoint.every", 0, "checkpoint.every=0 must be at least 1"),
        ("checkpoint.keep", 0, "checkpoint.keep=0 must be at least 1"),
        ("kernel.attention", "fast", "kernel.attention=fast is not one of"),
        ("logging.wandb.mode", "on", "logging.wandb.mode=on is not one of"),
        ("logging.wandb.artifacts", "some", "logging.wandb.artifacts=some is not one of none, la"),
        ("evaluation.every", -1, "evaluation.every=-1 must be at least 0"),
        ("evaluation.samples", 0, "evaluation.samples=0 must be at least 1"),
        ("evaluation.tasks", [], "evaluation.tasks is empty"),
        ("evaluation.tasks", ["vt", "vt"], "evaluation.tasks has vt twice: leave one out"),
        ("evaluation.tasks", ["qa"], "evaluation.tasks=qa is not one of passkey, niah_single"),
        ("evaluation.lengths", [0], "evaluation.lengths=0 must be at least 2"),
        ("evaluation.depths", [], "evaluation.depths is empty"),
        ("evaluation.depths", [1.5], "evaluation.depths=1.5 must be from 0"),
        ("evaluation.ruler.digits", 16, "evaluation.ruler.digits=16 must be at least 1 and at"),
        ("evaluation.ruler.needles", 51, "evaluation.ruler.needles=51 must be at least 1 and at"),
        ("evaluation.ruler.hops", 100, "evaluation.ruler.chains=1 with evaluation.ruler.hops"),
        ("evaluation.ruler.common_words", 21, "evaluation.ruler.common_words=21 must be at least"),
        ("evaluation.ruler.frequent_words", 0, "evaluation.ruler.frequent_words=0 must be at"),
        ("evaluation.ruler.alpha", 0.5, "evaluation.ruler.alpha=0.5 must be from 1 to 4"),
        ("parallel.timeout_minutes", 1e11, "parallel.timeout_minutes=100000000000.0 must be gre"),
        ("logging.wandb.project", "a/b", "logging.wandb.project=a/b cannot be a project of W&B"),
        ("logging.wandb.project", "x" * 129, "logging.wandb.project=xxxx"),
    ],
)
def test_what_is_refused(change, key, value, message):
    problems = validate(change(Config(), **{key: value}))
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_a_run_has_memory_for_its_own_length(change):
    config = change(Config(), **{"evaluation.lengths": [1025], "data.sequence_length": 1024})
    assert validate(config) == []
    (problem,) = validate(change(config, **{"evaluation.every": 10}))
    assert problem.startswith("evaluation.lengths=1025 is longer than data.sequence_length=1024")
    ruler = {"evaluation.ruler.digits": 1, "evaluation.ruler.needles": 11}
    (problem,) = validate(change(config, **ruler))
    assert problem.startswith("evaluation.ruler.needles=11 is more than there are numbers of")


def test_the_decay_of_wsd(change):
    config = change(Config(), **{"optimizer.schedule": "wsd"})
    assert validate(config) == []
    assert validate(change(config, **{"optimizer.decay_steps": 1})) == []
    (problem,) = validate(change(config, **{"optimizer.decay_steps": 0}))
    assert problem == "optimizer.decay_steps=0 must be at least 1"


def test_offload_needs_the_method(change):
    config = change(Config(), **{"memory.policy": "recompute", "memory.offload": "host"})
    assert "memory.offload=host works with memory.policy=mst alone" in validate(config)[0]


@pytest.mark.parametrize(
    ("settings", "key", "ours"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "parallel.zero_stage"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "optimizer.max_grad_norm"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "precision"),
    ],
)
def test_what_deepspeed_does_not_decide(change, settings, key, ours):
    config = change(Config(), **{"parallel.zero_stage": 2, "parallel.deepspeed": settings})
    (problem,) = validate(config)
    assert problem == f"parallel.deepspeed.{key} is not DeepSpeed's to decide: set {ours} instead"


@pytest.mark.parametrize(
    ("settings", "both", "way_out"),
    [
        (
            {"optimizer.in_backward": True},
            ("optimizer.in_backward=true", "optimizer.max_grad_norm=1.0"),
            "set optimizer.max_grad_norm=null",
        ),
        (
            {
                "optimizer.in_backward": True,
                "optimizer.max_grad_norm": None,
                "train.accumulation_steps": 2,
            },
            ("optimizer.in_backward=true", "train.accumulation_steps=2"),
            "set train.accumulation_steps=1",
        ),
        (
            {
                "optimizer.in_backward": True,
                "optimizer.max_grad_norm": None,
                "optimizer.offload": "host",
            },
            ("optimizer.offload=host", "optimizer.in_backward=false"),
            "set optimizer.in_backward=false",
        ),
        (
            {"optimizer.offload": "host", "precision": "bf16"},
            ("optimizer.offload=host", "precision=bf16"),
            "set precision=bf16_master",
        ),
        (
            {"optimizer.name": "muon", "optimizer.offload": "host"},
            ("optimizer.name=muon", "optimizer.offload=host"),
            "set optimizer.offload=none",
        ),
        (
            {"optimizer.name": "muon", "parallel.zero_stage": 2},
            ("optimizer.name=muon", "parallel.zero_stage=2"),
            "set parallel.zero_stage=0",
        ),
    ],
)
def test_what_the_optimizers_cannot_do(change, settings, both, way_out):
    (problem,) = validate(change(Config(), **settings))
    assert all(key in problem for key in both)
    assert way_out in problem


def test_what_the_optimizers_can_do(change):
    in_backward = change(
        Config(), **{"optimizer.in_backward": True, "optimizer.max_grad_norm": None}
    )
    for precision, name in itertools.product(PRECISIONS, ("adamw", "muon")):
        settings = {"precision": precision, "optimizer.name": name}
        assert validate(change(in_backward, **settings)) == []
    offload = change(Config(), **{"optimizer.offload": "host", "train.accumulation_steps": 2})
    assert validate(offload) == []
    assert validate(change(offload, precision="bf16_master")) == []


def test_all_problems_are_listed_at_once(change):
    wrong = {"precision": "fp8", "train.steps": -3, "model.num_heads": 0, "memory.policy": "x"}
    assert len(validate(change(Config(), **wrong))) == 4


def test_all_know_the_same_activations():
    from mst_kernels import glu
    from mst_train.model.hf import families

    fixed = {f.fixed["activation"] for f in families.FAMILIES.values() if "activation" in f.fixed}
    assert set(ACTIVATIONS) == set(glu.ACTIVATIONS) == {*families.ACTIVATIONS.values(), *fixed}
