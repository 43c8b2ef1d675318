"""Compiles every Triton kernel for a GPU that is not there: python compile_kernels.py CAPABILITY.

The launchers run on CPU tensors with a driver that only knows its device's compute capability; each
launch is compiled down to machine code and not launched. Prints, as JSON, what each kernel takes:
registers per thread, bytes of stack (spilled registers), bytes of shared memory, warps.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mst_kernels.cross_entropy_triton import cross_entropy_triton
from mst_kernels.glu_triton import glu_backward_triton_, glu_forward_triton
from mst_kernels.rms_norm_triton import rms_norm_backward_triton, rms_norm_forward_triton
from mst_kernels.rope_triton import apply_rope_triton_

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ROWS = 3


class Driver:
    """What compiling needs to know of a device."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(kernel):
    """A compiled kernel's, by what the machine code itself says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def rms_norm(width, *, residual, offset):
    x, weight = bf16(ROWS, width), bf16(width)
    other = bf16(ROWS, width) if residual else None
    rstd = torch.empty(ROWS, 1)
    rms_norm_forward_triton(x, other, weight, 1e-5, offset, bf16(ROWS, width), rstd, x)
    rms_norm_backward_triton(bf16(ROWS, width), other, x, weight, rstd, offset, bf16(ROWS, width))


def glu(width, activation):
    gate, up, product = (bf16(ROWS, width) for _ in range(3))
    glu_forward_triton(gate, up, activation, product)
    glu_backward_triton_(product, gate, up, activation)


def rope(heads, size):
    angles = torch.empty(ROWS, size // 2)
    for inverse in (False, True):
        apply_rope_triton_(bf16(1, ROWS, heads, size), angles, angles, inverse)


def cross_entropy(vocabulary, softcap, z_loss, smoothing):
    labels = torch.zeros(ROWS, dtype=torch.int64)
    for gradient in (False, True):
        logits = bf16(ROWS, vocabulary)
        cross_entropy_triton(logits, labels, -100, softcap, z_loss, smoothing, gradient)


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


SHAPES = {
    "norm of Llama3-8B": lambda: rms_norm(4096, residual=True, offset=False),
    "norm of Gemma2-9B": lambda: rms_norm(3584, residual=False, offset=True),
    "norm of Llama2-70B": lambda: rms_norm(8192, residual=True, offset=False),
    "norm of a head of 128": lambda: rms_norm(128, residual=False, offset=False),
    "MLP of Llama3-8B": lambda: glu(14336, "silu"),
    "MLP of Gemma2-9B": lambda: glu(14336, "gelu_tanh"),
    "queries of Llama3-8B": lambda: rope(32, 128),
    "keys of Llama3-8B": lambda: rope(8, 128),
    "head of Llama3-8B": lambda: cross_entropy(128256, None, 0.0, 0.0),
    "head of Gemma2-9B": lambda: cross_entropy(256000, 30.0, 1e-4, 0.1),
}


def main(capability):
    found = {}
    run = JITFunction.run

    def noting(shape):
        def compiled(self, *args, **kwargs):
            kernel = run(self, *args, **kwargs | {"warmup": True})
            name = f"{shape}: {self.fn.__name__.strip('_').removesuffix('_kernel')}"
            while name in found:  # the second of two launches, such as the inverse
                name += ", again"
            found[name] = resources(kernel)

        return compiled

    driver.set_active(Driver(capability))
    for shape, launch in SHAPES.items():
        JITFunction.run = noting(shape)
        launch()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
