"""What two processes run for ``test_integrations_distributed.py``: wrappers, with and without."""

import os
import warnings
from functools import partial

import torch
import torch.distributed as dist
from hf_models import CHUNKS, make_batch, make_model, step
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mst_train.errors import UserError
from mst_train.integrations.huggingface import apply_mini_sequence

ORDERS = ("without", "before", "after")


def run_all(wrappers):
    """Loss, and this process's part of gradients, by wrapper and order; or what was refused."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    results = {
        f"{wrapper}, {order}": one(wrapper, order) for wrapper in wrappers for order in ORDERS
    }
    dist.destroy_process_group()
    return results


def one(wrapper, order):
    wrap = WRAPPERS[wrapper]
    model = make_model(dtype=torch.float32 if "zero" in wrapper else torch.float64)
    if order == "before":
        apply_mini_sequence(model, **CHUNKS)
    wrapped, gradients = wrap(model)
    if order == "after":
        try:
            apply_mini_sequence(model, **CHUNKS)
        except UserError as error:
            return str(error)
    batch = make_batch(rows=2, seed=dist.get_rank())
    loss, _ = step(wrapped, **batch) if gradients is local else deepspeed_step(wrapped, batch)
    return loss, gradients(wrapped)


def deepspeed_step(engine, batch):
    loss = engine(**batch).loss
    engine.backward(loss)
    return loss.detach(), None


def local(wrapped):
    """This process's parts of all gradients."""
    parts = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.grad is not None:  # FSDP1 has parameters with no part here
            gradient = parameter.grad
            parts[name] = getattr(gradient, "to_local", lambda g=gradient: g)().clone()
    return parts


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model), local


def fsdp2(model, *, head=False):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    if head:
        fully_shard(model.lm_head)
    return fully_shard(model), local


def fsdp1(model, *, original):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        device_id=torch.device("cpu"),
        use_orig_params=original,
    )
    return wrapped, local


def adapted(model):
    import peft

    torch.manual_seed(0)
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, lora)


def zero(model, *, stage, adapt=False):
    import deepspeed

    if adapt:
        model = adapted(model)

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )

    def gradients(engine):
        from deepspeed.utils import safe_get_full_grad

        parameters = engine.module.named_parameters()
        return {name: safe_get_full_grad(p) for name, p in parameters if p.requires_grad}

    return engine, gradients


WRAPPERS = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2 head": partial(fsdp2, head=True),
    "fsdp1": partial(fsdp1, original=False),
    "fsdp1 original": partial(fsdp1, original=True),
    "zero1": partial(zero, stage=1),
    "zero2": partial(zero, stage=2),
    "zero3": partial(zero, stage=3),
    "zero3 adapters": partial(zero, stage=3, adapt=True),
}
