"""Train a transformers model a few steps, plain and with mini-sequences: same losses, less memory.

    python examples/huggingface_before_after.py [TOKENS]

The model is a small random Llama and the data random tokens: nothing is downloaded. What is counted
are the bytes of live tensors, the model's weights included.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mst_train.integrations.huggingface import apply_mini_sequence
from mst_train.memory.tracker import MemoryTracker

STEPS = 4
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=128,
    intermediate_size=448,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    use_cache=False,
)


def train(tokens: torch.Tensor, *, mini_sequences: bool) -> tuple[list[float], int]:
    """The losses of all steps, and the most bytes that were alive at once."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if mini_sequences:
        apply_mini_sequence(
            model, block_chunk_tokens=512, mlp_chunk_tokens=512, head_chunk_tokens=512
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with MemoryTracker() as tracker:
        tracker.watch_module(model)
        for _ in range(STEPS):
            output = model(input_ids=tokens, labels=tokens)
            output.loss.backward()
            losses.append(output.loss.item())
            del output
            optimizer.step()
            optimizer.zero_grad()
    return losses, tracker.peak_bytes


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    tokens = torch.randint(
        CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)
    )
    peaks = []
    for name, mini_sequences in (("before", False), ("after", True)):
        losses, peak = train(tokens, mini_sequences=mini_sequences)
        peaks.append(peak)
        print(f"{name:<7} losses {' '.join(f'{x:.5f}' for x in losses)}  {peak / 2**20:.1f} MiB")
    print(f"{length} tokens, {peaks[0] / peaks[1]:.1f} times less")


if __name__ == "__main__":
    main()
