"""What must hold of settings and between them, beyond their types: each rule in one place."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from mst_train.config.schema import (
    ALL,
    AUTO,
    DECIDED,
    LONGEST_PROJECT,
    MOST_MINUTES,
    MOST_TOKENS,
    NOT_IN_PROJECTS,
    TASK_WORDS,
    Config,
    DataConfig,
    MemoryConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScalingConfig,
    RulerConfig,
    ValidationSetConfig,
    WandbConfig,
    leaves,
)


def validate(config: Config) -> list[str]:
    """Every problem of a configuration, one line each; an empty list where there is none."""
    problems = [
        *_empty_texts("", asdict(config)),
        *choice_problems(config),
        *_run_problems(config),
        *model_problems(config.model),
        *_kept_experts(config.model, config.memory),
        *_data_problems(config.data),
        *_mixture_problems(config.data.mixture),
        *_validation_set_problems(config.data.validation_sets),
        *_memory_problems(config.memory),
        *_optimizer_problems(config.optimizer),
        *_update_problems(config),
        *_parallel_problems(config),
        *_evaluation_problems(config),
    ]
    return list(dict.fromkeys(problems))


def choice_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """Settings of a group, and of those in it, that are none of their choices."""
    for setting in fields(section):
        key, value = prefix + setting.name, getattr(section, setting.name)
        if is_dataclass(value):
            yield from choice_problems(value, f"{key}.")
        choices = setting.metadata.get("choices")
        if choices is None:
            continue
        for item in dict.fromkeys(value if isinstance(value, list) else [value]):
            if item not in choices:
                yield f"{key}={item} is not one of {', '.join(map(str, choices))}"


def _empty_texts(key: str, value: Any) -> Iterator[str]:
    """No setting means anything as a text without a character."""
    if isinstance(value, dict) and key != "parallel.deepspeed":
        for name, item in value.items():
            yield from _empty_texts(f"{key}.{name}" if key else name, item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _empty_texts(f"{key}[{index}]", item)
    elif isinstance(value, str) and not value.strip():
        yield f"{key} is empty: give it a value, or leave it out"


def _run_problems(config: Config) -> Iterator[str]:
    train, checkpoint = config.train, config.checkpoint
    yield from _project_problems(config.logging.wandb)
    if config.run.init_from is not None and config.run.resume not in (AUTO, "never"):
        yield (
            f"run.resume={config.run.resume} continues a run and run.init_from="
            f"{config.run.init_from} starts a new one: give one of them"
        )
    yield from at_least("train.steps", train.steps, 1)
    if train.tokens is not None:
        yield from at_least("train.tokens", train.tokens, 1)
    yield from at_least("train.seed", train.seed, 0)
    yield from at_least("train.micro_batch_size", train.micro_batch_size, 1)
    yield from at_least("train.accumulation_steps", train.accumulation_steps, 1)
    sequences = train.micro_batch_size * train.accumulation_steps
    if sequences * config.data.sequence_length >= MOST_TOKENS:
        yield (
            f"train.micro_batch_size={train.micro_batch_size}, train.accumulation_steps="
            f"{train.accumulation_steps} and data.sequence_length={config.data.sequence_length} "
            f"make {sequences * config.data.sequence_length:,} tokens a step: they must be below "
            f"2^31"
        )
    yield from at_least("train.eval_every", train.eval_every, 0)
    yield from at_least("train.eval_sequences", train.eval_sequences, 1)
    if train.profile and not (
        len(train.profile) == 2 and 1 <= train.profile[0] <= train.profile[1]
    ):
        yield (
            f"train.profile={train.profile} has to be [FROM,TO]: the first and the last step to "
            f"profile, from 1 on"
        )
    yield from at_least("train.max_skipped_steps", train.max_skipped_steps, 1)
    yield from at_least("train.spike_window", train.spike_window, 1)
    if train.spike_factor is not None and not 1 < train.spike_factor < 1e12:
        yield f"train.spike_factor={train.spike_factor} must be greater than 1 and below 10^12"
    yield from at_least("checkpoint.every", checkpoint.every, 1)
    yield from at_least("checkpoint.keep", checkpoint.keep, 1)


def _project_problems(wandb: WandbConfig) -> Iterator[str]:
    """What W&B's own check of a project's name would say, which ends its start."""
    found = [character for character in NOT_IN_PROJECTS if character in wandb.project]
    if wandb.mode != "disabled" and (found or len(wandb.project) > LONGEST_PROJECT):
        yield (
            f"logging.wandb.project={wandb.project:.40} cannot be a project of W&B: leave out "
            f"{' '.join(NOT_IN_PROJECTS)}, and use {LONGEST_PROJECT} characters at most"
        )


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Every problem of a model's form, one line each."""
    sizes = {
        name: getattr(model, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
        )
    }
    problems = [line for name, size in sizes.items() for line in at_least(f"model.{name}", size, 1)]
    yield from problems
    yield from choice_problems(model, "model.")
    yield from _positive("model.rope_theta", model.rope_theta)
    yield from _positive("model.norm_epsilon", model.norm_epsilon)
    yield from _positive("model.initializer_std", model.initializer_std)
    for name in ("attention_scale", "attention_softcap", "logit_softcap"):
        value = getattr(model, name)
        if value is not None:
            yield from _positive(f"model.{name}", value)
    if model.max_positions is not None:
        yield from at_least("model.max_positions", model.max_positions, 1)
    yield from _window_problems(model)
    yield from _expert_problems(model)
    yield from _rope_scaling_problems(model.rope_scaling)
    if problems:
        return
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads={model.num_heads} is not a multiple of "
            f"model.num_kv_heads={model.num_kv_heads}: each key-value head serves a whole number "
            f"of query heads"
        )
    if model.head_size is None and model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size={model.hidden_size} is not a multiple of "
            f"model.num_heads={model.num_heads}: change one of them or set model.head_size"
        )
    elif model.head_dim < 2 or model.head_dim % 2:
        yield (
            f"the head size is {model.head_dim}, but rotary embeddings turn pairs of features: "
            f"it must be even (model.head_size, or model.hidden_size / model.num_heads)"
        )
    elif model.rope_scaling.type == "ntk" and model.head_dim == 2:
        yield (
            "model.rope_scaling.type=ntk slows down all frequencies but the fastest, and heads of "
            "size 2 have no other: choose another type or larger heads"
        )


def _window_problems(model: ModelConfig) -> Iterator[str]:
    pattern = model.sliding_window_pattern
    if not pattern:
        yield (
            "model.sliding_window_pattern is empty: list sliding and full, as the first layers "
            "have them"
        )
    if model.sliding_window is not None:
        yield from at_least("model.sliding_window", model.sliding_window, 1)
        if pattern and "sliding" not in pattern:
            yield (
                f"model.sliding_window={model.sliding_window} is used by no layer of "
                f"model.sliding_window_pattern: set one of them to sliding, or the window to null"
            )


def _expert_problems(model: ModelConfig) -> Iterator[str]:
    experts, per_token = model.num_experts, model.experts_per_token
    yield from at_least("model.experts_per_token", per_token, 1)
    if experts is not None:
        yield from at_least("model.num_experts", experts, 1)
        if per_token > experts >= 1:
            yield (
                f"model.experts_per_token={per_token} is more than model.num_experts={experts}: "
                f"change one of them"
            )
    elif model.expert_bias:
        yield "model.expert_bias=true is of experts, and there are none: set model.num_experts"
    for name in ("balance_loss", "router_z_loss"):
        coefficient = getattr(model, name)
        if not 0 <= coefficient < 1e12:
            yield f"model.{name}={coefficient} must be at least 0 and below 10^12"
        elif coefficient and experts is None:
            yield (
                f"model.{name}={coefficient} is a loss of routers, and there are none: set "
                f"model.num_experts, or this to 0"
            )


def _kept_experts(model: ModelConfig, memory: MemoryConfig) -> Iterator[str]:
    if model.num_experts is not None and memory.keep.mlp not in (0, AUTO):
        yield (
            f"memory.keep.mlp={memory.keep.mlp} keeps the gate and up projections of an MLP, and "
            f"not those of model.num_experts={model.num_experts} experts: set it to 0 or {AUTO}"
        )


def _rope_scaling_problems(scaling: RopeScalingConfig) -> Iterator[str]:
    key = "model.rope_scaling"
    if not 1 <= scaling.factor < 1e6:
        yield f"{key}.factor={scaling.factor} must be at least 1 and below 10^6"
    elif scaling.type == "none" and scaling.factor != 1:
        yield f"{key}.factor={scaling.factor} does nothing with {key}.type=none: set the type too"
    if scaling.original_length is not None:
        yield from at_least(f"{key}.original_length", scaling.original_length, 1)
    needs_length = scaling.type in ("yarn", "llama3")
    if needs_length and scaling.original_length is None:
        yield (
            f"{key}.type={scaling.type} needs {key}.original_length: the sequence length that the "
            f"model was trained on before"
        )
    if scaling.original_length is not None and not needs_length:
        yield f"{key}.original_length is not used with {key}.type={scaling.type}: set it to null"
    for low, high in (
        ("low_frequency_factor", "high_frequency_factor"),
        ("beta_slow", "beta_fast"),
    ):
        slow, fast = getattr(scaling, low), getattr(scaling, high)
        yield from _positive(f"{key}.{low}", slow)
        if not slow < fast < 1e12:
            yield f"{key}.{high}={fast} must be greater than {key}.{low}={slow}"
    if not scaling.truncate and scaling.type != "yarn":
        yield f"{key}.truncate=false is not used with {key}.type={scaling.type}: set it to true"
    if scaling.attention_factor is not None:
        yield from _positive(f"{key}.attention_factor", scaling.attention_factor)
        if scaling.type != "yarn":
            yield (
                f"{key}.attention_factor is not used with {key}.type={scaling.type}: set it to null"
            )


def _data_problems(data: DataConfig) -> Iterator[str]:
    yield from at_least("data.sequence_length", data.sequence_length, 1)
    yield from at_least("data.tokenizer_vocab_size", data.tokenizer_vocab_size, 300, 2**31 - 1)
    if not 0 <= data.validation_fraction < 1:
        yield (
            f"data.validation_fraction={data.validation_fraction} must be at least 0 and below 1 "
            f"(0: no validation)"
        )


def _mixture_problems(mixture: Sequence[MixtureConfig]) -> Iterator[str]:
    for index, part in enumerate(mixture):
        key = f"data.mixture[{index}]"
        yield from _positive(f"{key}.weight", part.weight)
        yield from at_least(f"{key}.min_document_tokens", part.min_document_tokens, 0)


def _validation_set_problems(sets: Sequence[ValidationSetConfig]) -> Iterator[str]:
    names = [part.name for part in sets]
    for index, name in enumerate(names):
        key = f"data.validation_sets[{index}].name={name}"
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or name == "by_position":
            yield f"{key} cannot be a name: use letters, digits, _, . and -, at most 64"
        elif name in names[:index]:
            yield f"{key} is there twice: give each set a name of its own"


def _memory_problems(memory: MemoryConfig) -> Iterator[str]:
    for name in ("mlp_chunk_tokens", "head_chunk_tokens", "block_chunk_tokens"):
        tokens = getattr(memory, name)
        if isinstance(tokens, str) and tokens != AUTO:
            yield f"memory.{name}={tokens} must be a number of tokens, at least 1, or {AUTO}"
        elif isinstance(tokens, int):
            yield from at_least(f"memory.{name}", tokens, 1)
    for name, blocks in asdict(memory.keep).items():
        if isinstance(blocks, str) and blocks not in (ALL, AUTO):
            yield f"memory.keep.{name}={blocks} must be a number of blocks, {ALL}, or {AUTO}"
        elif isinstance(blocks, int):
            yield from at_least(f"memory.keep.{name}", blocks, 0)
    if memory.offload != "none" and memory.policy not in ("mst", AUTO):
        yield (
            f"memory.offload={memory.offload} works with memory.policy=mst alone, and it is "
            f"{memory.policy}: change one of them"
        )
    for name in ("device_budget_gib", "host_budget_gib"):
        budget = getattr(memory, name)
        if budget is not None:
            yield from _positive(f"memory.{name}", budget)


def _optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    yield from _positive("optimizer.learning_rate", optimizer.learning_rate)
    yield from _positive("optimizer.epsilon", optimizer.epsilon)
    yield from at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    if optimizer.decay_steps is not None:
        yield from at_least("optimizer.decay_steps", optimizer.decay_steps, 1)
        if optimizer.schedule in ("cosine", "constant"):
            yield (
                f"optimizer.decay_steps is not used with optimizer.schedule={optimizer.schedule}: "
                f"set it to null"
            )
    for name in ("beta1", "beta2", "muon_momentum"):
        beta = getattr(optimizer, name)
        if not 0 <= beta < 1:
            yield f"optimizer.{name}={beta} must be at least 0 and below 1"
    if not 0 <= optimizer.min_learning_rate_ratio <= 1:
        yield (
            f"optimizer.min_learning_rate_ratio={optimizer.min_learning_rate_ratio} must be "
            f"between 0 and 1"
        )
    if not (optimizer.weight_decay >= 0 and math.isfinite(optimizer.weight_decay)):
        yield f"optimizer.weight_decay={optimizer.weight_decay} must be 0 or more"
    if optimizer.max_grad_norm is not None:
        yield from _positive("optimizer.max_grad_norm", optimizer.max_grad_norm)


def _parallel_problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    degree = parallel.sequence_parallel
    yield from at_least("parallel.sequence_parallel", degree, 1)
    if not 0 < parallel.timeout_minutes <= MOST_MINUTES:
        yield (
            f"parallel.timeout_minutes={parallel.timeout_minutes} must be greater than 0 and at "
            f"most {MOST_MINUTES}, which is a year"
        )
    if parallel.deepspeed and parallel.zero_stage == 0:
        yield (
            "parallel.deepspeed is read with ZeRO alone: set parallel.zero_stage to 1, 2 or 3, or "
            "leave it out"
        )
    for key, _ in leaves(parallel.deepspeed if parallel.zero_stage else {}):
        for theirs, ours in DECIDED.items():
            if f"{key}.".startswith(f"{theirs}."):
                yield f"parallel.deepspeed.{key} is not DeepSpeed's to decide: set {ours} instead"
    if degree < 1:
        return
    if config.data.sequence_length % degree:
        yield (
            f"data.sequence_length={config.data.sequence_length} is not a multiple of "
            f"parallel.sequence_parallel={degree}"
        )
    elif degree > 1:
        yield from _exchange_problems(config)


def _exchange_problems(config: Config) -> Iterator[str]:
    parallel, heads = config.parallel, config.model.num_heads
    degree, name = parallel.sequence_parallel, parallel.sequence_exchange
    if config.kernel.attention == "sdpa":
        yield (
            f"kernel.attention=sdpa cannot attend to a part of the keys, as "
            f"parallel.sequence_parallel={degree} wants: set kernel.attention={AUTO}"
        )
    at_once = parallel.exchange_heads
    if at_once != AUTO and not (isinstance(at_once, int) and at_once > 0):
        yield f"parallel.exchange_heads={at_once} must be {AUTO} or an integer of at least 1"
    if name == "heads" and heads % degree:
        yield (
            f"parallel.sequence_exchange=heads gives each process some of the heads, and "
            f"parallel.sequence_parallel={degree} does not divide model.num_heads={heads}: set "
            f"parallel.sequence_exchange={AUTO}"
        )
    nodes = [n for n in range(2, degree) if degree % n == 0 and heads % n == 0]
    if name == "both" and not nodes:
        yield (
            f"parallel.sequence_exchange=both wants nodes of some of the processes, equally large, "
            f"whose number divides the heads, and parallel.sequence_parallel={degree} and "
            f"model.num_heads={heads} have none: set parallel.sequence_exchange={AUTO}"
        )
    in_pieces = name in ("keys", "both") or (name == AUTO and heads % degree)
    if in_pieces and config.data.sequence_length % (2 * degree):
        yield (
            f"data.sequence_length={config.data.sequence_length} is not a multiple of "
            f"{2 * degree}: where processes exchange keys each of parallel.sequence_parallel="
            f"{degree} has two pieces of the sequence"
        )


def _evaluation_problems(config: Config) -> Iterator[str]:
    evaluation, longest = config.evaluation, config.data.sequence_length
    yield from at_least("evaluation.every", evaluation.every, 0)
    yield from at_least("evaluation.samples", evaluation.samples, 1)
    if not evaluation.tasks:
        yield "evaluation.tasks is empty: name at least one"
    for task in dict.fromkeys(evaluation.tasks):
        if evaluation.tasks.count(task) > 1:
            yield f"evaluation.tasks has {task} twice: leave one out"
    for length in evaluation.lengths:
        yield from at_least("evaluation.lengths", length, 2)
        if evaluation.every and length > longest:
            yield (
                f"evaluation.lengths={length} is longer than data.sequence_length={longest}, which "
                f"is what the run has memory for: leave it to python -m mst_train.evaluate"
            )
    if not evaluation.depths:
        yield "evaluation.depths is empty: name at least one, from 0 to 1"
    for depth in evaluation.depths:
        if not 0 <= depth <= 1:
            yield f"evaluation.depths={depth} must be from 0 (the beginning) to 1 (the end)"
    yield from _ruler_problems(evaluation.ruler)


def _ruler_problems(ruler: RulerConfig) -> Iterator[str]:
    group = "evaluation.ruler"
    yield from at_least(f"{group}.digits", ruler.digits, 1, 15)
    yield from at_least(f"{group}.needles", ruler.needles, 1, TASK_WORDS // 2)
    yield from at_least(f"{group}.chains", ruler.chains, 1, TASK_WORDS)
    yield from at_least(f"{group}.hops", ruler.hops, 0, TASK_WORDS)
    yield from at_least(f"{group}.common_words", ruler.common_words, 1, TASK_WORDS // 5)
    yield from at_least(f"{group}.frequent_words", ruler.frequent_words, 1, TASK_WORDS // 10)
    if not 1 <= ruler.alpha <= 4:
        yield f"{group}.alpha={ruler.alpha} must be from 1 to 4"
    variables = ruler.chains * (ruler.hops + 1)
    if variables > TASK_WORDS:
        yield (
            f"{group}.chains={ruler.chains} with {group}.hops={ruler.hops} are {variables} "
            f"variables, and there are {TASK_WORDS} names for them: lower one"
        )
    for key, count in (("needles", ruler.needles), ("chains", ruler.chains)):
        if ruler.digits >= 1 and count > 10**ruler.digits:
            yield (
                f"{group}.{key}={count} is more than there are numbers of {group}.digits="
                f"{ruler.digits} digits: lower it, or raise that"
            )


def _update_problems(config: Config) -> Iterator[str]:
    """Where and when weights are updated, against what else is asked for."""
    optimizer, accumulation_steps = config.optimizer, config.train.accumulation_steps
    if optimizer.in_backward and optimizer.max_grad_norm is not None:
        yield (
            f"optimizer.in_backward=true updates weights before the gradient's global norm is "
            f"known, so optimizer.max_grad_norm={optimizer.max_grad_norm} cannot be kept: set "
            f"optimizer.max_grad_norm=null or optimizer.in_backward=false"
        )
    if optimizer.in_backward and accumulation_steps > 1:
        yield (
            f"optimizer.in_backward=true updates weights in every backward, so "
            f"train.accumulation_steps={accumulation_steps} gradients cannot add up: set "
            f"train.accumulation_steps=1 or optimizer.in_backward=false"
        )
    if optimizer.offload == "host" and optimizer.in_backward:
        yield (
            "optimizer.offload=host takes each gradient off the device in the backward already, "
            "and updates after it: set optimizer.in_backward=false or optimizer.offload=none"
        )
    if optimizer.name == "muon" and optimizer.offload == "host":
        yield (
            "optimizer.name=muon makes whole matrices orthogonal, which takes a host minutes where "
            "a GPU takes a second, so not with optimizer.offload=host: set optimizer.offload=none "
            "(optimizer.in_backward=true saves memory too), or optimizer.name=adamw"
        )
    stage = config.parallel.zero_stage
    if optimizer.name == "muon" and stage > 0:
        yield (
            f"optimizer.name=muon updates whole matrices, and parallel.zero_stage={stage} shares "
            f"them out in flat parts: set parallel.zero_stage=0, with which several processes "
            f"train too, or optimizer.name=adamw"
        )
    if optimizer.offload == "host" and config.precision == "bf16":
        yield (
            "optimizer.offload=host keeps fp32 weights and states on the host, and precision=bf16 "
            "asks for bf16: set precision=bf16_master or optimizer.offload=none"
        )


def at_least(key: str, value: int, smallest: int, largest: int | None = None) -> Iterator[str]:
    if value < smallest or (largest is not None and value > largest):
        limit = "" if largest is None else f" and at most {largest}"
        yield f"{key}={value} must be at least {smallest}{limit}"


def _positive(key: str, value: float) -> Iterator[str]:
    if not 0 < value < 1e12:
        yield f"{key}={value} must be greater than 0 and below 10^12"
