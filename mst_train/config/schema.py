"""Every setting of a run: one frozen dataclass per configuration group.

The dataclasses hold names, types and defaults; files under ``configs/`` hold presets and
experiments; ``validate`` holds the rules that a type cannot express. Nothing outside the standard
library is imported here, so that every part of the project can.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

POLICIES = ("auto", "vanilla", "recompute", "mst")
PRECISIONS = ("fp32", "bf16", "bf16_master")
ATTENTION_BACKENDS = (
    "auto",
    "cpu",
    "torch_flash",
    "cudnn",
    "flash_attn",
    "flash_attn_3",
    "flash_attn_4",
    "tiled",
    "sdpa",
    "reference",
)
KERNEL_BACKENDS = ("auto", "triton", "torch")
ACTIVATIONS = ("silu", "gelu_tanh")
NORM_PLACEMENTS = ("before", "around", "after")
QK_NORMS = ("none", "head", "projection")
ATTENTION_SPANS = ("sliding", "full")
ROPE_SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")
DECIDED = {
    "train_batch_size": "train.micro_batch_size and train.accumulation_steps",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "the optimizer's settings",
    "scheduler": "optimizer.warmup_steps and its neighbours",
    "fp16": "precision",
    "bf16": "precision",
    "data_types": "precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "optimizer.offload",
}
"""DeepSpeed's settings that would change a step's result, or have a setting of ours."""

OFFLOADS = ("none", "host")
DATA_ATTENTIONS = ("stream", "documents")
DATA_DOCUMENTS = ("file", "repository")
PACKINGS = ("stream", "best_fit")
MALFORMED = ("fail", "skip")
WANDB_MODES = ("offline", "online", "disabled")
BAD_STEPS = ("stop", "skip")
WANDB_ARTIFACTS = ("none", "last", "all")
BENCHES = ("none", "step", "systems", "peers", "short", "max_sequence")
OUTPUTS = ("table", "json")
ZERO_STAGES = (0, 1, 2, 3)
AUTO = "auto"
MOST_TOKENS = 2**31
"""In a step: one process holds their ids on the host, and kernels count them in 32 bits."""

NOT_IN_PROJECTS = "/\\#?%:"
LONGEST_PROJECT = 128
"""What W&B refuses in a project's name."""

MOST_MINUTES = 525_600
"""A year: the longest wait. Collectives count nanoseconds in 64 bits."""

MOST_PROCESSES = 4096
"""And threads: more than any machine has cores."""


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
    bad_step: str = "stop"
    """What follows a bad step: a loss or gradient that is not finite, or a spike. stop: the run
    ends, with its weights as they were before the step. skip: the step is left out, its data are
    used up, and the weights stay as they were. With optimizer.in_backward a gradient that is not
    finite always stops."""
    max_skipped_steps: int = 10
    """Bad steps in a row that are left out; at one more the run ends."""
    spike_factor: float | None = None
    """A step whose loss is above this multiple of the median of the last good steps' is a spike;
    none: no step is."""
    spike_window: int = 50
    """Good steps whose losses that median is taken of; before there are so many, no step is a
    spike."""


@dataclass(frozen=True)
class MixtureConfig:
    """One source of a mixture."""

    source: str = ""
    """As data.source."""
    weight: float = 1.0
    """Its share of the sequences is this by the sum of all weights."""
    min_document_tokens: int = 0
    """Documents with fewer tokens are left out of training."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """stdlib (Python's own source files), a folder that mst_train.prepare has written, a folder or
    glob of .txt, .jsonl, .parquet and .idx files, or the name of a Hugging Face data set."""
    mixture: list[MixtureConfig] = field(default_factory=list)
    """Several sources, drawn from by weight; none: data.source alone."""
    sequence_length: int = 1024
    packing: str = "stream"
    """How documents fill sequences. stream: one after the other, cut where a sequence ends.
    best_fit: no document that fits into a sequence is cut; the rest of a sequence is padded."""
    attention: str = "stream"
    """What a token in a packed sequence sees. stream: all that is before it, other documents too.
    documents: its own document alone, with positions from 0."""
    text_field: str = "text"
    """The field that holds a document in .jsonl, .parquet and data set rows."""
    text_suffixes: list[str] = field(default_factory=lambda: [".txt"])
    """Ends of the names of files that are text as they are (data=code: those of source code)."""
    documents: str = "file"
    """What one document is where files are text. file: a file. repository: all files of a folder
    directly below data.source, one after the other, each after a line with its path."""
    split: str = "train"
    """The split of a Hugging Face data set."""
    streaming: bool = False
    """Read a Hugging Face data set from where it is, without a copy here."""
    validation_fraction: float = 0.01
    """The share of the tokens that is held out for validation; 0: none."""
    tokenizer: str | None = None
    """A sentencepiece .model file, a tokenizer.json, or a folder with one of them; none: one is
    trained on the source, once."""
    tokenizer_vocab_size: int = 4096
    """The vocabulary of a tokenizer trained here."""
    cache_dir: str | None = None
    """Where tokenizers and tokens are kept; none: mst_train in $XDG_CACHE_HOME or ~/.cache."""


@dataclass(frozen=True)
class PrepareConfig:
    """What python -m mst_train.prepare writes; what it reads are the settings of data."""

    output: str | None = None
    """The folder to write to; as data.source, it is what training reads."""
    workers: int | None = None
    """Processes that tokenise; none: one for each CPU core."""
    shard: str = "1/1"
    """i/N: the i-th of N jobs, which can run at the same time; the last one joins the result."""
    shard_mib: int = 256
    """About how much text goes into a file of tokens (MiB); smaller where a source has less."""
    malformed: str = "fail"
    """Lines, rows and files that hold no text. fail: stop at the first. skip: leave them out and
    list them in malformed.jsonl."""
    verify: bool = False
    """Compare everything in prepare.output with its checksums, and write nothing."""
    vocab_size: int | None = None
    """.idx files without data.tokenizer: the number of token ids."""
    end_of_document: int | None = None
    """.idx files without data.tokenizer: the id that ends a document."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary embeddings reach positions beyond those a model was trained on."""

    type: str = "none"
    """linear: all positions divided by the factor. ntk: theta raised, so that the slowest frequency
    is divided by the factor and the fastest stays. yarn, llama3: slow frequencies divided by the
    factor, fast ones kept, a ramp in between."""
    factor: float = 1.0
    original_length: int | None = None
    """yarn, llama3: the sequence length that the model was trained on before."""
    low_frequency_factor: float = 1.0
    """llama3: frequencies with fewer turns than this in original_length are divided by factor."""
    high_frequency_factor: float = 4.0
    """llama3: frequencies with more turns than this in original_length stay."""
    beta_fast: float = 32.0
    """yarn: frequencies with more turns than this in original_length stay."""
    beta_slow: float = 1.0
    """yarn: frequencies with fewer turns than this in original_length are divided by factor."""
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines; none: 0.1 ln(factor) + 1."""


@dataclass(frozen=True)
class ModelConfig:
    """The form of a decoder: Llama's where nothing else is said."""

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
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    max_positions: int | None = None
    """The longest sequence the model is meant for, as exported checkpoints state it; none: not
    known. It decides nothing here."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections (Qwen2)."""
    qk_norm: str = "none"
    """Norms of queries and keys before their rotation. head: each head by itself (Qwen3).
    projection: all heads of a token together (OLMo-2)."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself and the ones before it; none: all of them."""
    sliding_window_pattern: list[str] = field(default_factory=lambda: ["sliding"])
    """Which layers have the window, from the first on and repeated: sliding or full."""
    attention_scale: float | None = None
    """What attention's scores are multiplied by; none: 1 / sqrt(head size)."""
    attention_softcap: float | None = None
    """Bounds attention's scores: softcap * tanh(score / softcap) (Gemma-2)."""
    logit_softcap: float | None = None
    """Bounds the logits in the same way (Gemma-2)."""
    activation: str = "silu"
    """The gate's in the MLP: silu, or gelu_tanh (Gemma)."""
    norm_placement: str = "before"
    """Where attention and MLP have their norms. before: on what they read (Llama). after: on their
    result, before it is added (OLMo-2). around: both (Gemma-2)."""
    norm_offset: bool = False
    """Norms multiply by 1 + weight rather than weight (Gemma)."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by sqrt(hidden_size), rounded to their type (Gemma)."""
    from_pretrained: str | None = None
    """A checkpoint in Hugging Face's format to start from (a folder, or owner/name on the Hub). All
    other settings of the model then are the checkpoint's, unless the command line has them, and so
    is data.tokenizer; none: weights start at random."""

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.head_size or self.hidden_size // self.num_heads

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None where a query sees everything before it."""
        pattern = self.sliding_window_pattern
        return self.sliding_window if pattern[layer % len(pattern)] == "sliding" else None


@dataclass(frozen=True)
class MemoryConfig:
    policy: str = "mst"
    """vanilla: keep every intermediate. recompute: keep each block's input, recompute the rest in
    the backward. mst: blocks and LM head in mini-sequences, and recompute only what is read. auto:
    the fastest of these that fits, as predicted, and with it keep_attention, offload and
    optimizer.in_backward."""
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
class ParallelConfig:
    """How several processes share the work."""

    sequence_parallel: int = 1
    """Processes that share one sequence."""
    zero_stage: int = 0
    """What processes share out instead of holding a copy each. 1: optimizer states. 2: gradients
    too. 3: weights too."""
    timeout_minutes: float = 10
    """How long a process waits for another in a step before the run ends with an error."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed settings, by their own names, to add to those made from the settings above: for
    ZeRO. For example {zero_optimization: {reduce_bucket_size: 100000000}}."""


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
    background: bool = True
    """Copy the state to host memory and write the copy while training goes on: until it is written,
    the host holds weights and optimizer states once more. False: training waits."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated besides the validation loss."""

    passkey_every: int = 0
    """Steps between passkey retrievals: a number hidden in a long text, asked for at its end. 0:
    never."""
    passkey_lengths: list[int] = field(default_factory=list)
    """Tokens in a passkey's text, each tried; none: data.sequence_length."""
    passkey_depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where the number is hidden, from 0 (the beginning) to 1 (the end), each tried."""


@dataclass(frozen=True)
class ReportConfig:
    """What python -m mst_train.report shows beside the run in run.dir."""

    compare: list[str] = field(default_factory=list)
    """Folders of other runs, drawn in the same charts."""


@dataclass(frozen=True)
class WandbConfig:
    mode: str = "offline"
    project: str = "mst_train"
    artifacts: str = "none"
    """Checkpoints that go to W&B. last: the newest one when the run ends. all: each as it is
    written; W&B keeps a copy of it on disk until it is sent."""


@dataclass(frozen=True)
class LoggingConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class KernelConfig:
    backend: str = AUTO
    """What computes activations, losses, norms and rotary embeddings. auto: triton on CUDA where it
    is installed, torch elsewhere."""
    attention: str = AUTO
    """auto: on CUDA the fastest that works here, measured at the first step; the others are
    described in attention/select.py. flash_attn, flash_attn_3 and flash_attn_4 need their
    packages."""


@dataclass(frozen=True)
class BenchConfig:
    """What python -m mst_train.bench measures; dimensions and type are the model's settings."""

    kind: str = "none"
    """step: memory policies. systems: other implementations of whole steps. peers: other
    implementations of the head and the MLP. short: what the method costs where it is not needed.
    max_sequence: the longest sequences that fit, and what was predicted."""
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
class PlanConfig:
    """What python -m mst_train.plan predicts; the run it is about are all other settings."""

    device: str = AUTO
    """A device's name (a100_80gb, h100_80gb, h200, rtx4090_24gb, ...), a size in GiB such as 80,
    cpu, or auto: this machine's."""
    gpus: int | None = None
    """How many devices share the run; none: parallel.sequence_parallel."""
    search: bool = False
    """Find the longest sequence that fits, in multiples of 1024."""
    sweep: list[int] = field(default_factory=list)
    """Sequence lengths to predict, for a table and a plot of memory against length."""
    dir: str = "runs/plan/${run.name}"
    """Where a sweep's table and plot go."""
    output: str = "table"
    """What is printed. table: a readable one. json: one JSON object."""


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a tree of groups, by its whole key."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def validate(config: Config) -> list[str]:
    """Every problem of a configuration, one line each; an empty list where there is none."""
    return [
        *_empty_texts("", asdict(config)),
        *_run_problems(config),
        *model_problems(config.model),
        *_data_problems(config.data),
        *_mixture_problems(config.data.mixture),
        *_prepare_problems(config.prepare),
        *_memory_problems(config.memory),
        *_optimizer_problems(config.optimizer),
        *_update_problems(config),
        *_bench_problems(config.bench),
        *_parallel_problems(config),
        *_plan_problems(config),
        *_evaluation_problems(config),
    ]


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
    yield from _one_of("precision", config.precision, PRECISIONS)
    yield from _one_of("kernel.attention", config.kernel.attention, ATTENTION_BACKENDS)
    yield from _one_of("kernel.backend", config.kernel.backend, KERNEL_BACKENDS)
    yield from _one_of("logging.wandb.mode", config.logging.wandb.mode, WANDB_MODES)
    yield from _project_problems(config.logging.wandb)
    yield from _one_of("logging.wandb.artifacts", config.logging.wandb.artifacts, WANDB_ARTIFACTS)
    yield from _at_least("train.steps", train.steps, 1)
    yield from _at_least("train.seed", train.seed, 0)
    yield from _at_least("train.micro_batch_size", train.micro_batch_size, 1)
    yield from _at_least("train.accumulation_steps", train.accumulation_steps, 1)
    sequences = train.micro_batch_size * train.accumulation_steps
    if sequences * config.data.sequence_length >= MOST_TOKENS:
        yield (
            f"train.micro_batch_size={train.micro_batch_size}, train.accumulation_steps="
            f"{train.accumulation_steps} and data.sequence_length={config.data.sequence_length} "
            f"make {sequences * config.data.sequence_length:,} tokens a step: they must be below "
            f"2^31"
        )
    yield from _at_least("train.eval_every", train.eval_every, 0)
    yield from _at_least("train.eval_sequences", train.eval_sequences, 1)
    yield from _one_of("train.bad_step", train.bad_step, BAD_STEPS)
    yield from _at_least("train.max_skipped_steps", train.max_skipped_steps, 1)
    yield from _at_least("train.spike_window", train.spike_window, 1)
    if train.spike_factor is not None and not 1 < train.spike_factor < 1e12:
        yield f"train.spike_factor={train.spike_factor} must be greater than 1 and below 10^12"
    yield from _at_least("checkpoint.every", checkpoint.every, 1)
    yield from _at_least("checkpoint.keep", checkpoint.keep, 1)


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
    problems = [
        line for name, size in sizes.items() for line in _at_least(f"model.{name}", size, 1)
    ]
    yield from problems
    yield from _positive("model.rope_theta", model.rope_theta)
    yield from _positive("model.norm_epsilon", model.norm_epsilon)
    yield from _positive("model.initializer_std", model.initializer_std)
    yield from _one_of("model.activation", model.activation, ACTIVATIONS)
    yield from _one_of("model.norm_placement", model.norm_placement, NORM_PLACEMENTS)
    yield from _one_of("model.qk_norm", model.qk_norm, QK_NORMS)
    for name in ("attention_scale", "attention_softcap", "logit_softcap"):
        value = getattr(model, name)
        if value is not None:
            yield from _positive(f"model.{name}", value)
    if model.max_positions is not None:
        yield from _at_least("model.max_positions", model.max_positions, 1)
    yield from _window_problems(model)
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
    for span in dict.fromkeys(pattern):
        yield from _one_of("model.sliding_window_pattern", span, ATTENTION_SPANS)
    if model.sliding_window is not None:
        yield from _at_least("model.sliding_window", model.sliding_window, 1)
        if pattern and "sliding" not in pattern:
            yield (
                f"model.sliding_window={model.sliding_window} is used by no layer of "
                f"model.sliding_window_pattern: set one of them to sliding, or the window to null"
            )


def _rope_scaling_problems(scaling: RopeScalingConfig) -> Iterator[str]:
    key = "model.rope_scaling"
    yield from _one_of(f"{key}.type", scaling.type, ROPE_SCALINGS)
    if not 1 <= scaling.factor < 1e6:
        yield f"{key}.factor={scaling.factor} must be at least 1 and below 10^6"
    elif scaling.type == "none" and scaling.factor != 1:
        yield f"{key}.factor={scaling.factor} does nothing with {key}.type=none: set the type too"
    if scaling.original_length is not None:
        yield from _at_least(f"{key}.original_length", scaling.original_length, 1)
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
    if scaling.attention_factor is not None:
        yield from _positive(f"{key}.attention_factor", scaling.attention_factor)
        if scaling.type != "yarn":
            yield (
                f"{key}.attention_factor is not used with {key}.type={scaling.type}: set it to null"
            )


def _data_problems(data: DataConfig) -> Iterator[str]:
    yield from _at_least("data.sequence_length", data.sequence_length, 1)
    yield from _at_least("data.tokenizer_vocab_size", data.tokenizer_vocab_size, 300, 2**31 - 1)
    yield from _one_of("data.attention", data.attention, DATA_ATTENTIONS)
    yield from _one_of("data.documents", data.documents, DATA_DOCUMENTS)
    yield from _one_of("data.packing", data.packing, PACKINGS)
    if not 0 <= data.validation_fraction < 1:
        yield (
            f"data.validation_fraction={data.validation_fraction} must be at least 0 and below 1 "
            f"(0: no validation)"
        )


def _mixture_problems(mixture: Sequence[MixtureConfig]) -> Iterator[str]:
    for index, part in enumerate(mixture):
        key = f"data.mixture[{index}]"
        yield from _positive(f"{key}.weight", part.weight)
        yield from _at_least(f"{key}.min_document_tokens", part.min_document_tokens, 0)


def _prepare_problems(prepare: PrepareConfig) -> Iterator[str]:
    yield from _one_of("prepare.malformed", prepare.malformed, MALFORMED)
    yield from _at_least("prepare.shard_mib", prepare.shard_mib, 1, 2**20)
    if prepare.workers is not None:
        yield from _at_least("prepare.workers", prepare.workers, 1, MOST_PROCESSES)
    first, _, count = prepare.shard.partition("/")
    numbers = first.isdecimal() and count.isdecimal() and len(prepare.shard) <= 16
    if not (numbers and 1 <= int(first) <= int(count) <= MOST_PROCESSES):
        yield (
            f"prepare.shard={prepare.shard:.40} must be i/N with i from 1 to N: the i-th of N "
            f"jobs, {MOST_PROCESSES} at most"
        )
    if (prepare.vocab_size is None) != (prepare.end_of_document is None):
        yield (
            "prepare.vocab_size and prepare.end_of_document describe tokens without a tokenizer: "
            "give both or neither"
        )
    elif prepare.vocab_size is not None and prepare.end_of_document is not None:
        yield from _at_least("prepare.vocab_size", prepare.vocab_size, 1)
        if not 0 <= prepare.end_of_document < prepare.vocab_size < 2**31:
            yield (
                f"prepare.end_of_document={prepare.end_of_document} must be an id from 0 to "
                f"prepare.vocab_size - 1, and prepare.vocab_size={prepare.vocab_size} below 2^31"
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
    yield from _one_of("bench.output", bench.output, OUTPUTS)
    yield from _at_least("bench.repetitions", bench.repetitions, 1)
    yield from _at_least("bench.loss_tile_mib", bench.loss_tile_mib, 1)
    if bench.threads is not None:
        yield from _at_least("bench.threads", bench.threads, 1, MOST_PROCESSES)
    for length in bench.lengths:
        yield from _at_least("bench.lengths", length, 2, MOST_TOKENS - 1)


def _parallel_problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    degree = parallel.sequence_parallel
    yield from _at_least("parallel.sequence_parallel", degree, 1)
    yield from _one_of("parallel.zero_stage", parallel.zero_stage, ZERO_STAGES)
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
    if config.model.num_heads % degree:
        yield (
            f"parallel.sequence_parallel={degree} does not divide model.num_heads="
            f"{config.model.num_heads}: in attention each process has some of the heads"
        )
    if config.data.sequence_length % degree:
        yield (
            f"data.sequence_length={config.data.sequence_length} is not a multiple of "
            f"parallel.sequence_parallel={degree}"
        )


def _plan_problems(config: Config) -> Iterator[str]:
    plan = config.plan
    yield from _one_of("plan.output", plan.output, OUTPUTS)
    for length in plan.sweep:
        yield from _at_least("plan.sweep", length, 2, MOST_TOKENS - 1)
    if plan.gpus is not None:
        yield from _at_least("plan.gpus", plan.gpus, 1)
        if plan.gpus % config.parallel.sequence_parallel:
            yield (
                f"plan.gpus={plan.gpus} is not a multiple of parallel.sequence_parallel="
                f"{config.parallel.sequence_parallel}"
            )


def _evaluation_problems(config: Config) -> Iterator[str]:
    evaluation, longest = config.evaluation, config.data.sequence_length
    yield from _at_least("evaluation.passkey_every", evaluation.passkey_every, 0)
    for length in evaluation.passkey_lengths:
        yield from _at_least("evaluation.passkey_lengths", length, 2)
        if length > longest:
            yield (
                f"evaluation.passkey_lengths={length} is longer than data.sequence_length="
                f"{longest}, which is what the run has memory for"
            )
    if not evaluation.passkey_depths:
        yield "evaluation.passkey_depths is empty: name at least one, from 0 to 1"
    for depth in evaluation.passkey_depths:
        if not 0 <= depth <= 1:
            yield f"evaluation.passkey_depths={depth} must be from 0 (the beginning) to 1 (the end)"


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


def _one_of(key: str, value: object, choices: Sequence[object]) -> Iterator[str]:
    if value not in choices:
        yield f"{key}={value} is not one of {', '.join(map(str, choices))}"


def _at_least(key: str, value: int, smallest: int, largest: int | None = None) -> Iterator[str]:
    if value < smallest or (largest is not None and value > largest):
        limit = "" if largest is None else f" and at most {largest}"
        yield f"{key}={value} must be at least {smallest}{limit}"


def _positive(key: str, value: float) -> Iterator[str]:
    if not 0 < value < 1e12:
        yield f"{key}={value} must be greater than 0 and below 10^12"
