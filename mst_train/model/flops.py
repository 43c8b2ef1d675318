"""Floating-point operations of a training step, and how fast a device can do them."""

import torch

from mst_train.config import ModelConfig

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""Dense bf16 rate per second by a part of the device's name, from the makers' data sheets."""


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that take part in a matrix product for each token: all but embedding and norms."""
    hidden, head = config.hidden_size, config.head_dim
    attention = hidden * head * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * hidden * config.intermediate_size
    return config.num_layers * (attention + mlp) + hidden * config.vocab_size


def parameter_count(config: ModelConfig) -> int:
    """The model's number of parameters."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return matrix_parameters(config) + embedding + norms


def training_flops(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of training on one sequence: forward and backward, nothing recomputed.

    Two per weight and token in the forward and four in the backward; attention counts the causal
    half of its scores only: 2 * S^2 * H * E per layer in the forward, twice that in the backward.
    """
    dense = 6 * matrix_parameters(config) * sequence_length
    heads = config.num_heads * config.head_dim
    attention = 6 * config.num_layers * sequence_length**2 * heads
    return float(dense + attention)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 rate per second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_BF16_FLOPS.items() if part in name), None)
