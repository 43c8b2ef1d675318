"""A small GPT of one's own, plain and with mini-sequences: same loss and gradients, less memory.

    python examples/small_gpt.py [TOKENS]

Everything in a block but attention treats each token by itself, so ``Block`` has two methods, one
for what is before attention and one for what is after it. ``mini_sequence_block`` calls both, chunk
after chunk, and ``mini_sequence_cross_entropy`` the head. What is counted are the bytes of live
tensors, the weights included.

Legend: B batch, S sequence, T tokens of a chunk, D hidden, H heads, E head size, V vocabulary.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mst_train.attention import attention_kernel
from mst_train.memory.tracker import MemoryTracker
from mst_train.mst import mini_sequence_block, mini_sequence_cross_entropy, mini_sequence_mlp

D, H, LAYERS, V, CHUNK = 128, 4, 4, 8192, 512


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(D, 4 * D, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * D, D, bias=False)

    def before_attention(
        self, x: Tensor, *, queries: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, T, D] -> q, k and v [B, T, H, E]; without ``queries``, k and v alone are wanted."""
        h = self.norm1(x)
        q = self.q(h).unflatten(-1, (H, -1)) if queries else None
        return q, self.k(h).unflatten(-1, (H, -1)), self.v(h).unflatten(-1, (H, -1))

    def after_attention(
        self, x: Tensor, out: Tensor, *, values: bool = True
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D], out [B, T, H, E] -> two tensors [B, T, D], whose sum is the result.

        The second is the MLP's as it is, so ``values`` is handed on to it.
        """
        x = x + self.o(out.flatten(-2))
        weights = self.gate.weight, self.up.weight, self.down.weight
        return x, mini_sequence_mlp(self.norm2(x), *weights, values=values)

    def forward(self, x: Tensor) -> Tensor:
        """As one would write it without mini-sequences."""
        q, k, v = (part.transpose(1, 2) for part in self.before_attention(x))  # [B, H, S, E]
        x = x + self.o(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        )
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GPT(nn.Module):
    def __init__(self, *, mini_sequences: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.mini_sequences = mini_sequences

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens and labels [B, S]; the labels are shifted, and -100 where there is none."""
        x = self.embedding(tokens)
        if not self.mini_sequences:
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())
        kernel = attention_kernel(x.device, x.dtype)
        for block in self.blocks:
            x = mini_sequence_block(block, kernel, x, chunk_tokens=CHUNK)
        hidden = self.norm(x).flatten(0, 1)  # [B * S, D]
        loss_sum, valid_tokens = mini_sequence_cross_entropy(
            hidden, self.head.weight, labels.flatten(), chunk_tokens=CHUNK
        )
        return loss_sum / valid_tokens


def step(tokens: Tensor, labels: Tensor, *, mini_sequences: bool) -> tuple[float, float, int]:
    """The loss, the gradients' norm, and the most bytes that were alive at once."""
    torch.manual_seed(0)
    model = GPT(mini_sequences=mini_sequences)
    with MemoryTracker() as tracker:
        tracker.watch_module(model)
        loss = model.loss(tokens, labels)
        loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
    return loss.item(), norm.item(), tracker.peak_bytes


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    torch.manual_seed(1)
    tokens, labels = torch.randint(V, (2, 1, length))
    peaks = []
    for mini_sequences in (False, True):
        loss, norm, peak = step(tokens, labels, mini_sequences=mini_sequences)
        name = "mini-sequences" if mini_sequences else "plain"
        print(f"{name:15} loss {loss:.5f}, gradient norm {norm:.5f}, peak {peak / 2**20:.0f} MiB")
        peaks.append(peak)
    print(f"{length} tokens, {peaks[0] / peaks[1]:.1f} times less")


if __name__ == "__main__":
    main()
