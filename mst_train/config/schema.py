"""Every setting of a run: one frozen dataclass per configuration group.

The dataclasses hold names, types and defaults; files under ``configs/`` hold presets and
experiments. Nothing outside the standard library is imported here, so that every part of the
project can.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
NORM_PLACEMENTS = ("before", "around", "after")
QK_NORMS = ("none", "head", "projection")
DECIDED = {
    "train_batch_size": "train.micro_batch_size and train.accumulation_steps",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "the optimizer's settings",
    "scheduler": "optimizer.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "data_types": "precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "optimizer.offload",
}
"""DeepSpeed's settings that would change a step's result, or have a setting of ours."""

OFFLOADS = ("none", "host")
AUTO = "auto"
ALL = "all"
MOST_TOKENS = 2**31
"""In a step: one process holds their ids on the host, and kernels count them in 32 bits."""

NOT_IN_PROJECTS = "/\\#?%:"
LONGEST_PROJECT = 128
"""What W&B refuses in a project's name."""

DEPTH_TASKS = ("passkey", "niah_single", "niah_multikey")
"""Tasks that hide what they ask for in one place."""
TASKS = (*DEPTH_TASKS, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
TASK_WORDS = 100
"""How many words the tasks have for keys, variables and lists."""

MOST_MINUTES = 525_600
"""A year: the longest wait. Collectives count nanoseconds in 64 bits."""

MOST_PROCESSES = 4096
"""And threads: more than any machine has cores."""


def choice(default: Any, choices: Sequence[Any]) -> Any:
    """A setting that has one of a few values."""
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and whether it continues what is there."""

    name: str = "run"
    """What the run is called. Where it is not given: as the experiment and the checkpoint that it
    starts from, or as the model and the data."""
    dir: str = "runs/${run.name}"
    """The folder of everything that the run writes."""
    resume: str = AUTO
    """auto: continue from the newest whole checkpoint, if any. never: refuse a used folder.
    Anything else: a checkpoint folder, or a run's folder, to start from where run.dir has no
    checkpoint of its own yet."""
    init_from: str | None = None
    """A checkpoint folder, or a run's folder: a new run starts with the weights of its newest
    checkpoint, on other data, at another length, with another rope scaling, batch, schedule or
    number of processes. Where run.dir has a checkpoint of its own, that one is continued."""
    init_optimizer: bool = True
    """With init_from: its optimizer's states too; false: the optimizer starts anew."""


@dataclass(frozen=True)
class TrainConfig:
    """How long a run is and what a step is."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    tokens: int | None = None
    """The run's length in tokens, rounded up to whole steps, in place of steps; null: steps
    count."""
    seed: int = 0
    """Of the first weights and of the order of the data."""
    deterministic: bool = False
    """On a GPU too, the same numbers each time, to the last digit: sums in a fixed order, attention
    by the first kernel that works so. Slower: not yet measured. A CPU is so in any case."""
    micro_batch_size: int = 1
    """Sequences in one forward and backward."""
    accumulation_steps: int = 1
    """Micro-batches in one optimizer step."""
    eval_every: int = 100
    """Steps between validations; 0: never."""
    eval_sequences: int = 16
    """Validation sequences used each time (all of them where there are fewer)."""
    profile: list[int] = field(default_factory=list)
    """[FROM, TO]: torch's profile of these steps, in the run's folder as
    profile_FROM_TO_rankN.json.gz, for Perfetto or chrome://tracing; they take longer."""
    bad_step: str = choice("stop", ("stop", "skip"))
    """What follows a bad step: a loss or gradient that is not finite, or a spike. stop: the run
    ends, with its weights as they were before the step. skip: the step is left out, its data are
    used up, and the weights stay as they were. With optimizer.in_backward a gradient that is not
    finite always stops."""
    max_skipped_steps: int = 10
    """Bad steps in a row that are left out; at one more the run ends."""
    spike_factor: float | None = None
    """A step whose loss is above this multiple of the median of the last good steps' is a spike;
    null: no step is."""
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
class ValidationSetConfig:
    """Texts with a validation loss of their own."""

    name: str = ""
    """What the loss is called: val_loss_NAME."""
    source: str = ""
    """As data.source; all of it is for validation."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes sequences of tokens."""

    source: str = "stdlib"
    """stdlib (Python's own source files), a folder that mst_train.prepare has written, a folder or
    glob of .txt, .jsonl, .parquet and .idx files, or the name of a Hugging Face data set."""
    mixture: list[MixtureConfig] = field(default_factory=list)
    """Several sources, drawn from by weight; empty: data.source alone. Each has a validation loss
    of its own too, val_loss_SOURCE."""
    validation_sets: list[ValidationSetConfig] = field(default_factory=list)
    """Other texts whose loss every validation tells as well, for example
    [{name: books, source: books/}]; they need the same tokenizer."""
    sequence_length: int = 1024
    """Tokens in a sequence."""
    packing: str = choice("stream", ("stream", "best_fit"))
    """How documents fill sequences. stream: one after the other, cut where a sequence ends.
    best_fit: no document that fits into a sequence is cut; the rest of a sequence is padded."""
    attention: str = choice("stream", ("stream", "documents"))
    """What a token in a packed sequence sees. stream: all that is before it, other documents too.
    documents: its own document alone, with positions from 0."""
    text_field: str = "text"
    """The field that holds a document in .jsonl, .parquet and data set rows."""
    text_suffixes: list[str] = field(default_factory=lambda: [".txt"])
    """Ends of the names of files that are text as they are (data=code: those of source code)."""
    documents: str = choice("file", ("file", "repository"))
    """What one document is where files are text. file: a file. repository: all files of a folder
    directly below data.source, one after the other, each after a line with its path."""
    split: str = "train"
    """The split of a Hugging Face data set."""
    streaming: bool = False
    """Read a Hugging Face data set from where it is, without a copy here."""
    validation_fraction: float = 0.01
    """The share of the tokens that is held out for validation; 0: none."""
    tokenizer: str | None = None
    """A sentencepiece .model file, a tokenizer.json, or a folder with one of them; null: one is
    trained on the source, once."""
    tokenizer_vocab_size: int = 4096
    """The ids of a tokenizer trained here: at most model.vocab_size. Of a model that has more, the
    others are never used."""
    cache_dir: str | None = None
    """Where tokenizers and tokens are kept; null: mst_train in $XDG_CACHE_HOME or ~/.cache."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary embeddings reach positions beyond those a model was trained on."""

    type: str = choice("none", ("none", "linear", "ntk", "yarn", "llama3"))
    """none: not at all. linear: all positions divided by the factor. ntk: theta raised, so that the
    slowest frequency is divided by the factor and the fastest stays. yarn, llama3: slow frequencies
    divided by the factor, fast ones kept, a ramp in between."""
    factor: float = 1.0
    """How many times longer the sequences are than those of before."""
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
    """yarn: multiplies cosines and sines; null: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: the ramp begins and ends at whole features; false: where the betas say (gpt-oss)."""


@dataclass(frozen=True)
class ModelConfig:
    """The form of a decoder: Llama's where nothing else is said."""

    vocab_size: int = 4096
    """Rows of the embedding and of the LM head: at least the tokenizer's ids, which are
    data.tokenizer_vocab_size where it is trained here."""
    hidden_size: int = 256
    """Features of a token between layers."""
    intermediate_size: int = 704
    """Features inside the MLP, or inside one expert."""
    num_layers: int = 4
    """Decoder blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key and value heads, each for the same number of query heads."""
    head_size: int | None = None
    """Features of a head; null: hidden_size / num_heads."""
    rope_theta: float = 10000.0
    """The base of the rotary embeddings' frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside a norm's root."""
    tie_embeddings: bool = False
    """The LM head's weight is the embedding's."""
    initializer_std: float = 0.02
    """The standard deviation of matrices, and sinks, at the start."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    max_positions: int | None = None
    """The longest sequence the model is meant for, as exported checkpoints state it; null: not
    known. It decides nothing here."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections (Qwen2)."""
    output_bias: bool = False
    """A bias in attention's output projection (gpt-oss, beside qkv_bias)."""
    qk_norm: str = choice("none", QK_NORMS)
    """Norms of queries and keys before their rotation. head: each head by itself (Qwen3).
    projection: all heads of a token together (OLMo-2)."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself and the ones before it; null: all of them."""
    sliding_window_pattern: list[str] = field(
        default_factory=lambda: ["sliding"], metadata={"choices": ("sliding", "full")}
    )
    """Which layers have the window, from the first on and repeated: sliding or full."""
    attention_scale: float | None = None
    """What attention's scores are multiplied by; null: 1 / sqrt(head size)."""
    attention_softcap: float | None = None
    """Bounds attention's scores: softcap * tanh(score / softcap) (Gemma-2)."""
    attention_sinks: bool = False
    """Each query head has a learned logit that takes probability and gives no value (gpt-oss)."""
    logit_softcap: float | None = None
    """Bounds the logits in the same way (Gemma-2)."""
    activation: str = choice("silu", ACTIVATIONS)
    """The gate's in the MLP: silu, gelu_tanh (Gemma), or clamped_swiglu (gpt-oss)."""
    norm_placement: str = choice("before", NORM_PLACEMENTS)
    """Where attention and MLP have their norms. before: on what they read (Llama). after: on their
    result, before it is added (OLMo-2). around: both (Gemma-2)."""
    norm_offset: bool = False
    """Norms multiply by 1 + weight rather than weight (Gemma)."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by sqrt(hidden_size), rounded to their type (Gemma)."""
    num_experts: int | None = None
    """MLPs in each layer, of which each token goes through a few (Mixtral); null: one MLP."""
    experts_per_token: int = 2
    """With num_experts, how many a token goes through: those that the layer's router gives the
    largest probabilities."""
    expert_bias: bool = False
    """Biases in the router and in the experts' projections (gpt-oss)."""
    normalize_experts: bool = True
    """Their weights are their probabilities divided by the sum of these (Mixtral); false: the
    probabilities (OLMoE)."""
    balance_loss: float = 0.0
    """What the loss that keeps experts evenly used is multiplied by before it is added; 0: there is
    none."""
    router_z_loss: float = 0.0
    """What the loss that keeps routers' logits small is multiplied by before it is added; 0: there
    is none."""
    from_pretrained: str | None = None
    """A checkpoint in Hugging Face's format to start from (a folder, or owner/name on the Hub). All
    other settings of the model then are the checkpoint's, unless the command line has them, and so
    is data.tokenizer; null: weights start at random."""

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.head_size or self.hidden_size // self.num_heads

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None where a query sees everything before it."""
        pattern = self.sliding_window_pattern
        return self.sliding_window if pattern[layer % len(pattern)] == "sliding" else None


@dataclass(frozen=True)
class KeepConfig:
    """What blocks under mst keep for the backward beside their input, rather than compute it again:
    in how many of them, counted from the last."""

    attention: int | str = AUTO
    """How many blocks keep attention's result and log-sum-exp, the last ones, or "all"; auto: all,
    and under memory.policy=auto as many as fit."""
    keys: int | str = AUTO
    """How many keep the results of the key and value projections; auto: none, and under
    memory.policy=auto as many as fit, as below."""
    queries: int | str = AUTO
    """How many keep the query projection's results."""
    output: int | str = AUTO
    """How many keep the output projection's results."""
    mlp: int | str = AUTO
    """How many keep the results of the MLP's gate and up projections."""


@dataclass(frozen=True)
class MemoryConfig:
    """What exists between forward and backward, and where."""

    policy: str = choice("mst", POLICIES)
    """vanilla: keep every intermediate. recompute: keep each block's input, recompute the rest in
    the backward. mst: blocks and LM head in mini-sequences, and recompute only what is read. auto:
    the fastest of these that fits, as predicted, and with it keep, offload, optimizer.in_backward
    and, where nothing fits otherwise, optimizer.offload."""
    mlp_chunk_tokens: int | str = AUTO
    """Under mst, tokens of the MLP's mini-sequences where blocks are recomputed whole; auto: as
    many as bound its intermediates."""
    head_chunk_tokens: int | str = AUTO
    """Under mst, tokens of the LM head's and the loss's mini-sequences; auto: as many as bound the
    logits."""
    block_chunk_tokens: int | str = AUTO
    """Under mst, tokens of a block's mini-sequences; auto: as many as bound its intermediates."""
    keep: KeepConfig = KeepConfig()
    offload: str = choice("none", OFFLOADS)
    """Under mst, where the kept tensors wait. none: on the device. host: in host memory."""
    device_budget_gib: float | None = None
    """Memory the run may use on its device, in GiB; null: all of it."""
    host_budget_gib: float | None = None
    """Host memory that offload may take, in GiB; null: no bound."""


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share the work."""

    sequence_parallel: int = 1
    """Processes that share one sequence."""
    sequence_exchange: str = choice(AUTO, (AUTO, "heads", "keys", "both"))
    """What these exchange for attention. heads: each gets all tokens of some of the heads
    (DeepSpeed-Ulysses). keys: each gets the keys and values that its queries see. both: heads
    within nodes of several processes, keys between nodes. auto: what sends the least."""
    exchange_heads: int | str = AUTO
    """Key-value heads of a process that are exchanged and attended with at a time; auto: all of
    them on a CPU, and on a GPU as many as bound the memory that they take."""
    zero_stage: int = choice(0, (0, 1, 2, 3))
    """What processes share out instead of holding a copy each. 0: nothing. 1: optimizer states.
    2: gradients too. 3: weights too."""
    timeout_minutes: float = 10
    """How long a process waits for another in a step before the run ends with an error."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed settings, by their own names, to add to those made from the settings above: for
    ZeRO. For example {zero_optimization: {reduce_bucket_size: 100000000}}."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with decoupled weight decay, and the learning rate's schedule."""

    name: str = choice("adamw", ("adamw", "muon"))
    """adamw: for all parameters. muon: Muon (Jordan et al. 2024), with one state in the place of
    two, for the matrices of the blocks, those of each expert by themselves, and AdamW for
    embeddings, LM head, norms and biases. Both have one learning rate and weight decay: an
    orthogonal update is scaled to the size of AdamW's, by 0.2 sqrt(larger dimension) (Liu et al.
    2025, "Muon is Scalable for LLM Training")."""
    learning_rate: float = 3e-4
    """The highest."""
    schedule: str = choice("cosine", ("cosine", "wsd", "constant"))
    """What follows a linear warm-up. cosine: half a cosine down to the last step. wsd (warm-up,
    stable, decay): constant, and a linear decay in the last steps. constant: as it is."""
    min_learning_rate_ratio: float = 0.1
    """The last step's learning rate, as a share of the highest, where the schedule has a decay."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from zero, in a line."""
    decay_steps: int | None = None
    """Under wsd, the steps of its decay; null: a tenth of the run's."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    epsilon: float = 1e-8
    """Added to the root of that mean."""
    muon_momentum: float = 0.95
    """Muon's decay of the mean of gradients (Jordan et al. 2024); with Nesterov's momentum."""
    weight_decay: float = 0.1
    """What matrices lose of themselves in a step, times the learning rate; one-dimensional
    parameters (norms, biases) lose nothing."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this global norm; null: no clipping."""
    in_backward: bool = False
    """Update each parameter in the backward and free its gradient, so that all gradients never
    exist together; without clipping and accumulation."""
    offload: str = choice("none", OFFLOADS)
    """Where AdamW's states, master weights and gradients are and the update is computed. none: on
    the device. host: in host memory, by DeepSpeed's CPUAdam."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when."""

    every: int = 500
    """Steps between checkpoints; the last step of a run has one too."""
    keep: int = 2
    """How many of the newest checkpoints to keep."""
    background: bool = True
    """Copy the state to host memory and write the copy while training goes on: until it is written,
    the host holds weights and optimizer states once more. False: training waits."""


@dataclass(frozen=True)
class RulerConfig:
    """What the texts of evaluation.tasks are like."""

    digits: int = 5
    """Digits in a number."""
    needles: int = 4
    """Keys with a number in niah_multikey and niah_multiquery, numbers of the key in
    niah_multivalue."""
    chains: int = 1
    """Values that vt gives to variables; one of them is asked for."""
    hops: int = 4
    """How often a value of vt goes on from one variable to the next."""
    common_words: int = 10
    """Words that cwe asks for."""
    frequent_words: int = 3
    """Words that fwe asks for."""
    alpha: float = 2.0
    """In fwe the frequency of a word is its rank to the power of minus this."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated besides the validation loss."""

    every: int = 0
    """Steps between the tasks below; the last step of a run has them too. 0: never."""
    tasks: list[str] = field(default_factory=lambda: ["passkey"], metadata={"choices": TASKS})
    """Long texts whose end asks for what is in them: passkey, a number in filler, and RULER's
    niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, cwe and fwe."""
    lengths: list[int] = field(default_factory=list)
    """Tokens in a task's text, each tried; empty: data.sequence_length."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where what is asked for is hidden, from 0 (the beginning) to 1 (the end), each tried; of
    passkey, niah_single and niah_multikey, as that of others is in several places."""
    samples: int = 1
    """Texts of each task, length and depth."""
    ruler: RulerConfig = field(default_factory=RulerConfig)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = choice("offline", ("offline", "online", "disabled"))
    """offline: into the run's folder, to be sent by wandb sync. online: sent as it comes."""
    project: str = "mst_train"
    """The project that runs belong to."""
    artifacts: str = choice("none", ("none", "last", "all"))
    """Checkpoints that go to W&B. last: the newest one when the run ends. all: each as it is
    written; W&B keeps a copy of it on disk until it is sent."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is recorded beside the run's own files."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Write the same numbers for TensorBoard, to tensorboard/ in the run's folder (the package
    tensorboard is needed)."""


@dataclass(frozen=True)
class KernelConfig:
    """What computes."""

    backend: str = choice(AUTO, ("auto", "triton", "torch"))
    """What computes activations, losses, norms and rotary embeddings. auto: triton on CUDA where it
    is installed, torch elsewhere."""
    attention: str = choice(AUTO, ATTENTION_BACKENDS)
    """auto: on CUDA the fastest that works here, measured at the first step; the others are
    described in attention/select.py. flash_attn, flash_attn_3 and flash_attn_4 need their
    packages."""


@dataclass(frozen=True)
class Config:
    """The settings of a run, in groups."""

    precision: str = choice("fp32", PRECISIONS)
    """fp32, bf16: weights, gradients and optimizer states in that type. bf16_master: bf16 weights
    and gradients, with fp32 master weights and fp32 optimizer states."""
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


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a tree of groups, by its whole key."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def lookup(tree: Any, key: str) -> Any:
    """The setting of a whole key in a tree of groups; None where there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
