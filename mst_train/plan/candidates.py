"""What memory.policy=auto chooses from, and what would help beyond that.

Its own choice is among settings that give the same result. Plain recomputation is not among them:
the mini-sequence policy takes less memory and less time at every length.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mst_train.config import ALL, AUTO, Config

SMALL_BLOCK_CHUNK = 1024


def settings(config: Config, gpus: int = 1) -> Iterator[list[Config]]:
    """What to choose from, in groups: a later one where nothing of those before fits.

    With the configured optimizer; each parameter updated in the backward, where neither clipping
    nor accumulation forbids it; the optimizer on the host; and small chunks. In a group, with and
    without offload, those that take the least of the device are the last.

    gpus: how many processes train; the optimizers of several go to their hosts with ZeRO alone.
    """
    optimizer = config.optimizer
    yield _policies(config)
    in_backward = config
    if (
        not optimizer.in_backward
        and optimizer.max_grad_norm is None
        and optimizer.offload == "none"
        and config.train.accumulation_steps == 1
        and config.parallel.zero_stage == 0
    ):
        in_backward = replace(config, optimizer=replace(optimizer, in_backward=True))
        yield _policies(in_backward)
    if optimizer.offload == "none" and config.precision != "bf16" and host_works(config, gpus):
        on_host = replace(config, optimizer=replace(optimizer, in_backward=False, offload="host"))
        yield _policies(on_host)
    if config.memory.block_chunk_tokens == AUTO:
        small = replace(in_backward.memory, block_chunk_tokens=SMALL_BLOCK_CHUNK)
        candidates = _policies(replace(in_backward, memory=small))
        yield [c for c in candidates if c.memory.policy == "mst"]


def leanest(config: Config, gpus: int = 1) -> list[Config]:
    """Of the settings to choose from, those that can reach the longest sequences."""
    last = list(settings(config, gpus))[-1]
    keeping = any(keeps_attention(c) for c in last) and not all(map(keeps_attention, last))
    return [c for c in last if not (keeping and keeps_attention(c))]


def keeps_attention(config: Config) -> bool:
    """Whether blocks under mst do."""
    return config.memory.keep.attention != 0


def host_works(config: Config, gpus: int) -> bool:
    """Whether the optimizer can be on the host: AdamW, and that of several processes with ZeRO."""
    return config.optimizer.name == "adamw" and (gpus == 1 or config.parallel.zero_stage > 0)


def levers(config: Config, gpus: int = 1) -> Iterator[tuple[str, Config]]:
    """What auto does not do by itself, as it changes the result, and the configuration with it."""
    train, optimizer = config.train, config.optimizer
    without = " optimizer.in_backward=false" if optimizer.in_backward else ""
    if train.micro_batch_size > 1:
        count = train.accumulation_steps * train.micro_batch_size
        split = replace(train, micro_batch_size=1, accumulation_steps=count)
        one = replace(config, train=split, optimizer=replace(optimizer, in_backward=False))
        yield f"train.micro_batch_size=1 train.accumulation_steps={count}{without}", one
    plain = optimizer.offload == "none" and config.parallel.zero_stage == 0
    if optimizer.max_grad_norm is not None and train.accumulation_steps == 1 and plain:
        unclipped = replace(config, optimizer=replace(optimizer, max_grad_norm=None))
        yield "optimizer.max_grad_norm=null", unclipped
    if config.precision == "fp32":
        yield "precision=bf16_master", replace(config, precision="bf16_master")
    if config.precision != "bf16" and plain:
        yield "precision=bf16", replace(config, precision="bf16")
    if config.precision == "bf16" and optimizer.offload == "none" and host_works(config, gpus):
        host = replace(optimizer, in_backward=False, offload="host")
        master = replace(config, precision="bf16_master", optimizer=host)
        yield f"precision=bf16_master optimizer.offload=host{without}", master


def _policies(config: Config) -> list[Config]:
    """The memory settings that "auto" may take, the rest as configured."""

    def with_memory(**changes: Any) -> Config:
        return replace(config, memory=replace(config.memory, **changes))

    asked = config.memory.keep
    counts: list[int | str] = [ALL, 0] if asked.attention == AUTO else [asked.attention]
    keeps = [replace(asked, attention=count) for count in counts]
    on_host = [with_memory(policy="mst", keep=keep, offload="host") for keep in keeps]
    if config.memory.offload == "host":
        return on_host
    lean = with_memory(policy="mst", keep=keeps[-1], offload="none")  # more is kept where it fits
    return [with_memory(policy="vanilla"), lean, *on_host]
