"""Every setting of a run: one frozen dataclass per configuration group.

The dataclasses hold names, types and defaults; files under ``configs/`` hold presets and
experiments; ``validate`` holds the rules that a type cannot express. Nothing outside the standard
library is imported here, so that every part of the project can.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

POLICIES = ("vanilla", "recompute", "mst")
PRECISIONS = ("fp32", "bf16", "bf16_master")
ATTENTION_BACKENDS = (
    "auto",
    "cpu",
    "torch_flash",
    "cudnn",
    "flash_attn",
    "sdpa",
    "reference",
)
KERNEL_BACKENDS = ("auto", "triton", "torch")
OFFLOADS = ("none", "host")
DATA_ATTENTIONS = ("stream", "documents")
WANDB_MODES = ("offline", "online", "disabled")
BENCHES = ("none", "step", "systems", "peers", "short")
BENCH_OUTPUTS = ("table", "json")
AUTO = "auto"


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and whether it continues what is there."""

    name: str = "tiny"
    dir: str = "runs/${run.name}"
    resume: str = AUTO
    """auto: continue from the newest whole checkpoint, if any. never: refuse a used folder.
    Anything else: a checkpoint folder, or a run's folder, to start from where run.dir has no
    checkpoint of its own yet."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    seed: int = 0
    micro_batch_size: int = 1
    """Sequences in one forward and backward."""
    accumulation_steps: int = 1
    """Micro-batches in one optimizer step."""
    eval_every: int = 100
    """Steps between validations; 0: never."""
    eval_sequences: int = 16
    """Validation sequences used each time (all of them where there are fewer)."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """stdlib (Python's own source files), a folder or glob of .txt, .jsonl and .parquet files, or
    the name of a Hugging Face data set."""
    sequence_length: int = 1024
    attention: str = "stream"
    """What a token in a packed sequence sees. stream: all that is before it, other documents too.
    documents: its own document alone, with positions from 0."""
    text_field: str = "text"
    """The field that holds a document in .jsonl, .parquet and data set rows."""
    split: str = "train"
    """The split of a Hugging Face data set."""
    validation_fraction: float = 0.01
    """The share of the tokens that is held out for validation; 0: none."""
    tokenizer: str | None = None
    """A sentencepiece .model file; none: one is trained on the source, once."""
    tokenizer_vocab_size: int = 4096
    """The vocabulary of a tokenizer trained here."""
    cache_dir: str | None = None
    """Where tokenizers and tokens are kept; none: mst_train in $XDG_CACHE_HOME or ~/.cache."""


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions of a Llama decoder."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int | None = None
    """None: hidden_size / num_heads."""
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    initializer_std: float = 0.02

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.head_size or self.hidden_size // self.num_heads


@dataclass(frozen=True)
class MemoryConfig:
    policy: str = "mst"
    """vanilla: keep every intermediate. recompute: keep each block's input, recompute the rest in
    the backward. mst: MLP and LM head in mini-sequences, and recompute only what is read."""
    mlp_chunk_tokens: int | str = AUTO
    head_chunk_tokens: int | str = AUTO
    block_chunk_tokens: int | str = AUTO
    keep_attention: bool = True
    """Under mst: keep attention's result and log-sum-exp rather than compute them again."""
    offload: str = "none"
    """Under mst, where the kept tensors wait. none: on the device. host: in host memory."""
    device_budget_gib: float | None = None
    """Memory the run may use on its device; none: all of it."""
    host_budget_gib: float | None = None
    """Host memory that offload may take; none: no bound."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, linear warm-up and cosine decay."""

    learning_rate: float = 3e-4
    min_learning_rate_ratio: float = 0.1
    """The last step's learning rate, as a share of the highest."""
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices alone: one-dimensional parameters (norms, biases) have none."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this global norm; none: no clipping."""
    in_backward: bool = False
    """Update each parameter in the backward and free its gradient, so that all gradients never
    exist together; without clipping and accumulation."""
    offload: str = "none"
    """Where AdamW's states, master weights and gradients are and the update is computed. none: on
    the device. host: in host memory, by DeepSpeed's CPUAdam."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints; the last step of a run has one too."""
    keep: int = 2
    """How many of the newest checkpoints to keep."""


@dataclass(frozen=True)
class WandbConfig:
    mode: str = "offline"
    project: str = "mst_train"


@dataclass(frozen=True)
class LoggingConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class KernelConfig:
    backend: str = AUTO
    """What computes activations, losses, norms and rotary embeddings. auto: triton on CUDA where it
    is installed, torch elsewhere."""
    attention: str = AUTO
    """auto: the fastest that works here; the others are described in model/attention.py."""


@dataclass(frozen=True)
class BenchConfig:
    """What python -m mst_train.bench measures; dimensions and type are the model's settings."""

    kind: str = "none"
    """step: memory policies. systems: other implementations of whole steps. peers: other
    implementations of the head and the MLP. short: what the method costs where it is not needed."""
    name: str = "${bench.kind}"
    dir: str = "runs/bench/${bench.name}"
    output: str = "table"
    """What is printed. table: a readable one. json: one JSON object."""
    lengths: list[int] = field(default_factory=list)
    """Tokens in a sequence (peers: tokens), each measured; none: data.sequence_length."""
    variants: list[str] = field(default_factory=list)
    """What to compare, by the names in the results; none: everything."""
    repetitions: int = 3
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    optimizer: bool = False
    """Make AdamW's step (at a learning rate of zero) part of the step."""
    loss_tile_mib: int = 1024
    """DeepSpeed's tiled loss: MiB of fp32 logits in a tile (ArcticTraining's: 1024)."""


@dataclass(frozen=True)
class Config:
    precision: str = "fp32"
    """fp32; bf16: weights, gradients and optimizer states in bf16; bf16_master: bf16 weights with
    fp32 master weights and fp32 optimizer states."""
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)


def validate(config: Config) -> list[str]:
    """Every problem of a configuration, one line each; an empty list where there is none."""
    return [
        *_run_problems(config),
        *_model_problems(config.model),
        *_data_problems(config.data),
        *_memory_problems(config.memory),
        *_optimizer_problems(config.optimizer),
        *_update_problems(config),
        *_bench_problems(config.bench),
    ]


def _run_problems(config: Config) -> Iterator[str]:
    train, checkpoint = config.train, config.checkpoint
    yield from _one_of("precision", config.precision, PRECISIONS)
    yield from _one_of("kernel.attention", config.kernel.attention, ATTENTION_BACKENDS)
    yield from _one_of("kernel.backend", config.kernel.backend, KERNEL_BACKENDS)
    yield from _one_of("logging.wandb.mode", config.logging.wandb.mode, WANDB_MODES)
    for key, text in (
        ("run.name", config.run.name),
        ("run.dir", config.run.dir),
        ("run.resume", config.run.resume),
        ("logging.wandb.project", config.logging.wandb.project),
    ):
        if not text.strip():
            yield f"{key} is empty: give it a value"
    yield from _at_least("train.steps", train.steps, 1)
    yield from _at_least("train.seed", train.seed, 0)
    if train.seed >= 2**63:
        yield f"train.seed={train.seed} must be below 2^63"
    yield from _at_least("train.micro_batch_size", train.micro_batch_size, 1)
    yield from _at_least("train.accumulation_steps", train.accumulation_steps, 1)
    yield from _at_least("train.eval_every", train.eval_every, 0)
    yield from _at_least("train.eval_sequences", train.eval_sequences, 1)
    yield from _at_least("checkpoint.every", checkpoint.every, 1)
    yield from _at_least("checkpoint.keep", checkpoint.keep, 1)


def _model_problems(model: ModelConfig) -> Iterator[str]:
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
    problems = [
        line for name, size in sizes.items() for line in _at_least(f"model.{name}", size, 1)
    ]
    yield from problems
    yield from _positive("model.rope_theta", model.rope_theta)
    yield from _positive("model.norm_epsilon", model.norm_epsilon)
    yield from _positive("model.initializer_std", model.initializer_std)
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


def _data_problems(data: DataConfig) -> Iterator[str]:
    yield from _at_least("data.sequence_length", data.sequence_length, 1)
    yield from _at_least("data.tokenizer_vocab_size", data.tokenizer_vocab_size, 300)
    yield from _one_of("data.attention", data.attention, DATA_ATTENTIONS)
    if not data.source.strip():
        yield "data.source is empty: name stdlib, a folder, a glob or a Hugging Face data set"
    if not 0 <= data.validation_fraction < 1:
        yield (
            f"data.validation_fraction={data.validation_fraction} must be at least 0 and below 1 "
            f"(0: no validation)"
        )


def _memory_problems(memory: MemoryConfig) -> Iterator[str]:
    yield from _one_of("memory.policy", memory.policy, POLICIES)
    for name in ("mlp_chunk_tokens", "head_chunk_tokens", "block_chunk_tokens"):
        tokens = getattr(memory, name)
        if isinstance(tokens, str) and tokens != AUTO:
            yield f"memory.{name}={tokens} must be a number of tokens, at least 1, or {AUTO}"
        elif isinstance(tokens, int):
            yield from _at_least(f"memory.{name}", tokens, 1)
    yield from _one_of("memory.offload", memory.offload, OFFLOADS)
    if memory.offload != "none" and memory.policy != "mst":
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
    yield from _at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    for name in ("beta1", "beta2"):
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


def _bench_problems(bench: BenchConfig) -> Iterator[str]:
    yield from _one_of("bench.kind", bench.kind, BENCHES)
    yield from _one_of("bench.output", bench.output, BENCH_OUTPUTS)
    yield from _at_least("bench.repetitions", bench.repetitions, 1)
    yield from _at_least("bench.loss_tile_mib", bench.loss_tile_mib, 1)
    if bench.threads is not None:
        yield from _at_least("bench.threads", bench.threads, 1)
    for length in bench.lengths:
        yield from _at_least("bench.lengths", length, 2)
    if not bench.dir.strip():
        yield "bench.dir is empty: give it a value"


def _update_problems(config: Config) -> Iterator[str]:
    """Where and when weights are updated, against what else is asked for."""
    optimizer, accumulation_steps = config.optimizer, config.train.accumulation_steps
    yield from _one_of("optimizer.offload", optimizer.offload, OFFLOADS)
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
    if optimizer.offload == "host" and config.precision == "bf16":
        yield (
            "optimizer.offload=host keeps fp32 weights and states on the host, and precision=bf16 "
            "asks for bf16: set precision=bf16_master or optimizer.offload=none"
        )


def _one_of(key: str, value: str, choices: Sequence[str]) -> Iterator[str]:
    if value not in choices:
        yield f"{key}={value} is not one of {', '.join(choices)}"


def _at_least(key: str, value: int, smallest: int) -> Iterator[str]:
    if value < smallest:
        yield f"{key}={value} must be at least {smallest}"


def _positive(key: str, value: float) -> Iterator[str]:
    if not 0 < value < 1e12:
        yield f"{key}={value} must be greater than 0 and below 10^12"
