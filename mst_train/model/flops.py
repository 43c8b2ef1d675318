"""Parameters of a model, and the floating-point operations of training it."""

from mst_train.config import ModelConfig


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that take part in a matrix product for each token.

    All but the embedding, norms, biases, sinks and the experts that a token does not go through; a
    tied embedding counts as the head that it is.
    """
    return _matrices(config, config.experts_per_token)


def _matrices(config: ModelConfig, experts: int) -> int:
    """``matrix_parameters`` with so many of the experts, where there are any."""
    hidden, head = config.hidden_size, config.head_dim
    attention = hidden * head * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * hidden * config.intermediate_size
    if config.num_experts is not None:
        mlp = experts * mlp + hidden * config.num_experts
    return config.num_layers * (attention + mlp) + hidden * config.vocab_size


def parameter_count(config: ModelConfig) -> int:
    """The model's number of parameters; tied ones count once."""
    hidden, query_size = config.hidden_size, config.num_heads * config.head_dim
    key_size = config.num_kv_heads * config.head_dim
    embedding = 0 if config.tie_embeddings else config.vocab_size * hidden
    block = (4 if config.norm_placement == "around" else 2) * hidden
    if config.qkv_bias:
        block += query_size + 2 * key_size
    if config.output_bias:
        block += hidden
    if config.attention_sinks:
        block += config.num_heads
    if config.num_experts is not None and config.expert_bias:
        block += config.num_experts * (1 + 2 * config.intermediate_size + hidden)
    if config.qk_norm == "head":
        block += 2 * config.head_dim
    elif config.qk_norm == "projection":
        block += query_size + key_size
    matrices = _matrices(config, config.num_experts or 0)
    return matrices + embedding + config.num_layers * block + hidden


def active_parameter_count(config: ModelConfig) -> int:
    """Those parameters that one token uses: all but the experts that it does not go through."""
    idle = _matrices(config, config.num_experts or 0) - matrix_parameters(config)
    return parameter_count(config) - idle


def training_flops(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of training on one sequence: forward and backward, nothing recomputed.

    Two per weight and token in the forward and four in the backward; attention counts the scores
    that its mask leaves, half of S^2 or what a sliding window W leaves of it, W * (S - W / 2), with
    4 * H * E for each in the forward and twice that in the backward.
    """
    dense = 6 * matrix_parameters(config) * sequence_length
    attention = 12 * scores(config, sequence_length) * config.num_heads * config.head_dim
    return float(dense + attention)


def scores(config: ModelConfig, sequence_length: int) -> float:
    """Pairs of a query and a key that it sees, in all layers, for one head."""
    windows = (config.window(layer) or sequence_length for layer in range(config.num_layers))
    spans = (min(window, sequence_length) for window in windows)
    return sum(span * (sequence_length - span / 2) for span in spans)
