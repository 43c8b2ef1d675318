"""Rotary position embeddings (Su et al. 2021), and how they are stretched to longer sequences.

Features e and e + E/2 of a head are the two coordinates of a point that is turned by the angle
position * theta^(-2e/E): the "half rotation" layout that Hugging Face checkpoints have.

A model that was trained on short sequences has not seen the angles of far positions. What
``RopeScalingConfig`` offers, with s its factor and f the frequencies theta^(-2e/E):

    linear  f / s (Chen et al. 2023)
    ntk     theta s^(E / (E-2)) in the place of theta: the slowest frequency becomes 1/s of itself
    yarn    f / s where f makes few turns in the original length, f where it makes many, a ramp over
            the features in between, and longer queries and keys (Peng et al. 2023)
    llama3  the same by turns, the ramp over the turns (Llama 3.1)

All but ntk have the formulas and the rounding of transformers' ``modeling_rope_utils``; ntk is
what transformers computes for the raised theta.

Legend: B batch, S sequence, E head size.
"""

import math

import torch
from torch import Tensor

from mst_kernels import rope
from mst_train.config import ModelConfig, RopeScalingConfig

__all__ = ["beyond_positions", "idle_scaling", "ntk_theta", "rope", "rotary_angles"]


def rotary_angles(
    positions: Tensor, config: ModelConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles at every position, [S] or [B, S] -> [..., S, E/2].

    Computed in fp32, like the implementations that checkpoints were trained with, and given in
    fp32, or fp64 for activations of that ``dtype``.
    """
    frequencies, factor = _frequencies(config, positions.device)
    angles = positions[..., None].float() * frequencies
    table_dtype = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * factor).to(table_dtype), (angles.sin() * factor).to(table_dtype)


def ntk_theta(config: ModelConfig) -> float:
    """The theta that scaling of type ntk amounts to."""
    exponent = config.head_dim / (config.head_dim - 2)
    return config.rope_theta * config.rope_scaling.factor**exponent


def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Angles per position, [E/2] in fp32, and what cosines and sines are multiplied by."""
    scaling, size = config.rope_scaling, config.head_dim
    theta = ntk_theta(config) if scaling.type == "ntk" else config.rope_theta
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    if scaling.type == "yarn":
        return _yarn(theta**exponents, scaling, theta)
    frequencies = 1.0 / theta**exponents
    if scaling.type == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.type == "llama3":
        frequencies = _llama3(frequencies, scaling)
    return frequencies, 1.0


def _yarn(periods: Tensor, scaling: RopeScalingConfig, theta: float) -> tuple[Tensor, float]:
    """Frequencies and factor for the periods theta^(2e/E) (over 2 pi)."""
    size, length = 2 * periods.shape[0], scaling.original_length
    assert length is not None

    def feature(turns: float) -> float:
        """The feature (a real number) that makes this many turns in the original length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    begin, end = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        begin, end = math.floor(begin), math.ceil(end)
    first, last = max(begin, 0), min(end, size - 1)
    width = last - first if last != first else 0.001
    features = torch.arange(size // 2, dtype=torch.float32, device=periods.device)
    kept = 1 - ((features - first) / width).clamp(0, 1)
    stretched = 1.0 / (scaling.factor * periods)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0
    return stretched * (1 - kept) + (1.0 / periods) * kept, factor


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    assert scaling.original_length is not None
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    wavelengths = 2 * math.pi / frequencies
    slow = wavelengths > scaling.original_length / low
    fast = wavelengths < scaling.original_length / high
    kept = (scaling.original_length / wavelengths - low) / (high - low)
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, between))


def idle_scaling(scaling: RopeScalingConfig) -> str | None:
    """What to say of a type of stretching that stretches nothing; None where it does."""
    if scaling.type == "none" or scaling.factor != 1:
        return None
    return (
        f"model.rope_scaling.type={scaling.type} does nothing at model.rope_scaling.factor=1: set "
        f"how many times longer sequences are than those that the model was trained on"
    )


def beyond_positions(config: ModelConfig, sequence_length: int) -> str | None:
    """What to say of sequences that are longer than a checkpoint knows; None where they are not, or
    the model starts at random."""
    scaling = config.rope_scaling
    reach = max(config.max_positions or 0, int((scaling.original_length or 0) * scaling.factor))
    if config.from_pretrained is None or not 0 < reach < sequence_length:
        return None
    return (
        f"data.sequence_length={sequence_length} is beyond the {reach} positions that "
        f"{config.from_pretrained} knows, and its loss will be high there at first: "
        f"model.rope_scaling.type=yarn with model.rope_scaling.factor="
        f"{math.ceil(sequence_length / (scaling.original_length or reach))} stretches them"
    )
