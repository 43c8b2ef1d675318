"""A training step without its data: the code that trains, run on tensors that have only shapes.

``simulate`` builds the model, the optimizer and the batch under torch's fake tensors and runs
``train_step`` on them, while a tracker adds up the bytes that would be alive and the operations
that would be done. Nothing is allocated and nothing computed, so a model of any size takes seconds
on any machine.

What runs is the code of the run itself but for what needs a real device or other processes:
attention on a GPU is replaced by a kernel that takes the same memory (``SimulatedKernel``), AdamW
on the host by torch's, what carries tensors between processes and DeepSpeed's ZeRO by what takes
their memory (``SimulatedTransport``, ``SimulatedZero``), and numbers read off the device are 1.

What tensors do not show is added as constants, named below: the CUDA context, cuBLAS's workspace,
buffers of communication, and what the caching allocator cannot use, where that is not found by
giving it what the step asks for (reserved.py).
"""

from dataclasses import dataclass, field

from torch import Tensor

from mst_train.config import Config
from mst_train.distributed.exchange import Exchange
from mst_train.memory.counter import Work
from mst_train.memory.devices import Device
from mst_train.memory.extrapolate import at_any_length
from mst_train.memory.simulated_step import Build, SimulatedStep
from mst_train.memory.trace import Trace
from mst_train.model import Policy
from mst_train.units import MIB

CUDA_CONTEXT_BYTES = 512 * MIB
"""What a process takes of a GPU before its first tensor: context and loaded kernels."""

CUBLAS_WORKSPACE_BYTES = 32 * MIB
"""torch's default for Hopper; 8 MiB before it."""

NCCL_BYTES = 1024 * MIB
"""Buffers of NCCL's channels between several GPUs. Assumed; not yet measured."""

BUCKET_BYTES = 256 * MIB
COMMUNICATION_BUFFERS = 2
"""Room for gradients on their way between GPUs without ZeRO. Assumed: the sums are in place."""

UNUSABLE_SHARE = 0.02
"""What the caching allocator holds beyond what is in use, as a share of that, where its rules are
not followed (reserved.py). They give less with expandable segments for what fills a GPU, and more
without."""


@dataclass(frozen=True)
class Simulation:
    """A step's memory and work on one device.

    policy, exchange: with what "auto" stood for. allocated_bytes: the most that tensors and
    workspaces take at once, what ``torch.cuda.max_memory_allocated`` reports. overhead_bytes: what
    the device holds beside them. breakdown: allocated_bytes by kind. host_bytes: for what is
    offloaded. reserved_bytes: what torch's allocator holds for tensors, as
    ``torch.cuda.max_memory_reserved`` reports; None where that was not asked for. trace: what the
    step asks of the allocator, for ``reserved_bytes``; None where it was not run at its length.
    """

    policy: Policy
    exchange: Exchange
    allocated_bytes: int
    overhead_bytes: int
    host_bytes: int
    breakdown: dict[str, int] = field(hash=False)
    work: Work
    reserved_bytes: int | None = None
    trace: Trace | None = field(default=None, compare=False, repr=False)

    @property
    def peak_bytes(self) -> int:
        """What the device has to have."""
        return self.allocated_bytes + self.overhead_bytes

    @property
    def passing_bytes(self) -> int:
        """Of allocated_bytes, what is gone when the step is over."""
        staying = ("parameters", "optimizer")
        return self.allocated_bytes - sum(self.breakdown.get(kind, 0) for kind in staying)


def simulate(
    config: Config,
    device: Device,
    *,
    gpus: int = 1,
    per_machine: int | None = None,
    build: Build | None = None,
    cu_seqlens: Tensor | None = None,
) -> Simulation:
    """One training step of ``config`` on one of ``gpus`` devices, once the states exist.

    per_machine: so many of them are in a machine; None: all. build: makes the model, where it is
    not the decoder of this project. cu_seqlens: where the documents of the batch begin and end, as
    ``Batch`` has them; None: one document in each row, the whole sequence, which takes the most
    time and memory. On a CPU the peak is that of the real step to the byte, as the tracker counts
    it, for the boundaries given; without them it is one that documents packed otherwise stay
    within.

    Micro-batches beyond the second change nothing but the work, which is counted for all. Deep
    models and long sequences are extrapolated (extrapolate.py).
    """
    step = SimulatedStep.of(
        config, device, gpus=gpus, per_machine=per_machine, build=build, cu_seqlens=cu_seqlens
    )
    found = at_any_length(step, config)
    peak = max(found.moments.values(), key=lambda kinds: sum(kinds.values()))
    breakdown = {kind: round(size) for kind, size in peak.items() if size}
    allocated = sum(breakdown.values())
    return Simulation(
        policy=step.policy,
        exchange=step.exchange,
        allocated_bytes=allocated,
        overhead_bytes=_overhead(allocated, config, device, gpus),
        host_bytes=round(found.host_bytes),
        breakdown=breakdown,
        work=Work(**found.work),
        trace=found.trace,
    )


def fixed_bytes(config: Config, gpus: int) -> int:
    """What a GPU holds that torch's allocator does not give out."""
    communication = 0
    if gpus > 1:
        communication = NCCL_BYTES
        if config.parallel.zero_stage == 0:
            communication += COMMUNICATION_BUFFERS * BUCKET_BYTES
    return CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + communication


def _overhead(allocated_bytes: int, config: Config, device: Device, gpus: int) -> int:
    if device.kind != "cuda":
        return 0
    fixed = fixed_bytes(config, gpus)
    communication = fixed - CUDA_CONTEXT_BYTES - CUBLAS_WORKSPACE_BYTES
    return fixed + int((allocated_bytes + communication) * UNUSABLE_SHARE)
