"""What models are wrapped in, in two processes: the method comes before it, or is refused."""

import re

import pytest

pytest.importorskip("transformers")

from hf_models import assert_same

AFTER = {
    "ddp": None,
    "fsdp2": "FSDPLlamaForCausalLM is not supported",
    "fsdp2 head": "FSDPLlamaForCausalLM is not supported",
    "fsdp1": "layer 0, 1, 2: it is a .*FullyShardedDataParallel",
    "fsdp1 original": "layer 0, 1, 2: it is a .*FullyShardedDataParallel",
    "zero2": None,
    "zero3": "layer 0, 1, 2: self_attn has a hook .deepspeed",
    "zero3 adapters": "layer 0, 1, 2: self_attn has a hook .deepspeed",
}
"""What is said to a model that is wrapped already, if it is refused."""


@pytest.mark.slow
@pytest.mark.parametrize("names", [["fsdp1 original", "fsdp2 head"], ["zero3 adapters"]], ids=str)
def test_wrappers(names, tmp_path):
    check(names, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("names", [["ddp", "fsdp2", "fsdp1"], ["zero2", "zero3"]], ids=str)
def test_other_wrappers(names, tmp_path):
    check(names, tmp_path)


def check(names, tmp_path):
    """Loss and this process's gradients with the method are those without."""
    zero = names[0].startswith("zero")
    if zero:
        pytest.importorskip("deepspeed")
        pytest.importorskip("peft")
    import hf_distributed
    import processes

    tolerance = 1e-5 if zero else 1e-9  # ZeRO exchanges gradients in fp32
    for results in processes.run(hf_distributed.run_all, 2, tmp_path, wrappers=names):
        for name in names:
            expected = results[f"{name}, without"]
            assert_same(results[f"{name}, before"], expected, tolerance)
            after = results[f"{name}, after"]
            if AFTER[name] is None:
                assert_same(after, expected, tolerance)
            else:
                assert re.search(AFTER[name], after)
