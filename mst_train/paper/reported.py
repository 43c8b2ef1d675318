"""The longest sequences that the paper reports (arXiv 2407.15892), in units of 1,024 tokens."""

from typing import NamedTuple

K = 1024


def short_number(tokens: float) -> str:
    """Tokens in units of 1,024."""
    return f"{tokens / K:.4g}K"


class Reported(NamedTuple):
    """One A100 80 GB. confirmed: those that the abstract states; the others are recalled from the
    paper's tables and not confirmed.

    experiment: this project's, at the paper's length in mini-sequences.
    """

    name: str
    experiment: str
    vanilla: float
    recompute: float
    mst: float
    confirmed: tuple[str, ...] = ()


MODELS = (
    Reported("Llama3-8B", "llama3_8b_seq60k", 5, 14, 60, confirmed=("mst",)),
    Reported("Llama2-7B", "llama2_7b_seq84k", 7, 45, 84, confirmed=("mst",)),
    Reported("Mistral-7B", "mistral_7b_seq70k", 5, 42, 70),
    Reported("Qwen2-7B", "qwen2_7b_seq74k", 4, 13, 74),
    Reported("Gemma-2-9B", "gemma2_9b_seq36k", 1.5, 5, 36),
)

SEVERAL_GPUS = {
    ("Llama3-8B", 2): "llama3_8b_seq120k_2gpu",
    ("Llama3-8B", 4): "llama3_8b_seq240k_4gpu",
    ("Llama3-8B", 8): "llama3_8b_seq480k_8gpu",
    ("Llama2-7B", 2): "llama2_7b_seq160k_2gpu",
    ("Llama2-7B", 4): "llama2_7b_seq320k_4gpu",
    ("Llama2-7B", 8): "llama2_7b_seq640k_8gpu",
}
"""This project's experiments at the paper's lengths on several GPUs; the lengths are recalled."""
