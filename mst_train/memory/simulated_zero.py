"""ZeRO as DeepSpeed does it, as far as memory goes: what each stage keeps, and when.

Of P parameters on n processes, with weights of w bytes (4, or 2 with ``precision=bf16_master``),
R elements reduced at once and G gathered, a process holds, in bytes:

                        stage 1, fp32    stage 1, bf16   stage 2              stage 3
    weights             wP               wP              wP                   wP/n
    fp32 copy, states   12P/n            12P/n           12P/n                12P/n
    summed gradient     4P/n             4P, always      4P/n                 4P/n, always
    own gradient        wP               wP              as it comes          a block's
    reduce bucket       wR               none            wR                   4R, always
    while it reduces    4R               4P if P < 5e8   4R, with bf16 6R     4R
    gathered weights                                                          wG

Where it is not "always", buckets are there in the backward and the summed gradient from there to
the step. fp32 weights have a copy as well; an fp32 summed gradient is copied once more in the step.
In fp32, stage 2 has a new part of the summed gradient in each micro-batch beside the one before.

From DeepSpeed 0.19's sources in ``deepspeed/runtime``, under the settings of ``engine.zero``:
``zero/stage_1_and_2.py`` (setup_buckets, reduce_independent_p_g_buckets_and_remove_grads,
copy_grads_in_partition, _build_compact_grad_partition_buffer, allreduce_bucket, step),
``bf16_optimizer.py`` (bf16 in stage 1), ``zero/stage3.py`` (_setup_for_real_optimizer,
__avg_scatter_grads, _prepare_fp32_grad_for_sub_group) and
``zero/partitioned_param_coordinator.py`` (fetch_sub_module, __params_to_release).

What differs on CUDA: exchanges overlap with the backward. So there are two buckets in stages 1 and
2, stage 1 takes fp32 gradients as they come in the last micro-batch, and what is being reduced is
counted all through the backward. On a CPU it is there only while a gradient is handed over. The
tests measure the CPU's way; CUDA's is read from the sources.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.config import Config
from mst_train.distributed import Topology
from mst_train.engine import NativeEngine
from mst_train.engine.zero import reduce_bucket_size
from mst_train.memory.counter import StepCounter
from mst_train.model.flops import parameter_count
from mst_train.optim import Optimizer, build_adamw

FP32 = torch.float32
DEFAULTS = {  # of deepspeed/runtime/zero/config.py, in elements
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_reuse_distance": 1e9,
    "sub_group_size": 1e9,
}
ALL_REDUCED = 5 * 10**8
"""Elements that DeepSpeed's engine sums at once without an optimizer's buckets."""


@dataclass(frozen=True)
class Buckets:
    """What does not grow with the model, in elements: of the whole model, at whatever depth it is
    run.

    bucket: of gradients on their way. fills: before the backward is over. reduced: the most that is
    reduced at once, a bucket or a parameter that is larger. flattened: copied to be summed in
    bf16's stage 1. gathered: weights that are together at once in stage 3. fetched: in the buffer
    of several parts that came together, in the blocks' forward. sub_group: updated at once in
    stage 3. overlaps: exchanges go on beside the backward.
    """

    bucket: int
    fills: bool
    reduced: int
    flattened: int
    gathered: int
    fetched: int
    sub_group: int
    overlaps: bool

    @classmethod
    def of(cls, config: Config, device_kind: str) -> "Buckets":
        given: Mapping[str, Any] = config.parallel.deepspeed.get("zero_optimization", {})
        sizes = {name: int(given.get(name, default)) for name, default in DEFAULTS.items()}
        every = parameter_count(config.model)
        embedding, parts = _parts(config)
        prefetch = sizes["stage3_prefetch_bucket_size"]
        bucket = int(given.get("reduce_bucket_size", reduce_bucket_size(config.model)))
        largest = max(part.largest for part in parts)
        reuse = sizes["stage3_max_reuse_distance"]
        return cls(
            bucket=bucket,
            fills=bucket < every,
            reduced=min(max(bucket, largest), every),
            flattened=every if every < ALL_REDUCED else 0,
            gathered=_gathered(embedding, parts, prefetch, reuse),
            fetched=min(prefetch, every) if prefetch > parts[0].size else 0,
            sub_group=sizes["sub_group_size"],
            overlaps=bool(given.get("overlap_comm", device_kind == "cuda")),
        )


class SimulatedZero(NativeEngine):
    """In the place of ``engine.zero.ZeroEngine`` in a simulated step of one of ``gpus`` devices.

    The model's weights are whole; in stage 3 ``counter`` counts a share of them.
    """

    after_bad_gradient = Optimizer.after_bad_gradient
    survives_bad_gradient = True
    remedies = Optimizer.remedies

    def __init__(
        self, model: Any, config: Config, gpus: int, buckets: Buckets, counter: StepCounter
    ) -> None:
        self.topology = Topology(device=torch.device("meta"))
        self._model = model
        self._hold = counter.hold
        self._buckets = buckets
        self._stage = config.parallel.zero_stage
        self._parameters = list(model.parameters())
        self._weight_type = self._parameters[0].dtype
        # Training refuses precision=bf16 with ZeRO: planned as if all were bf16, without a copy.
        whole = config.precision != "bf16"
        self._type = FP32 if whole else self._weight_type
        every = sum(p.numel() for p in self._parameters)
        self._own = -(-every // gpus)
        self._largest = max(p.numel() for p in self._parameters)
        self._on_host = config.optimizer.offload == "host"
        states = "host" if self._on_host else "optimizer"
        self._of_sums = "host" if self._on_host else "gradients"
        copy = self._hold(self._own if whole else 1, self._type, states)
        self._own_weights = nn.Parameter(copy.expand(self._own))
        self._adamw = build_adamw([self._own_weights], [], config.optimizer)
        self._adamw.state[self._own_weights] = {
            "step": torch.ones((), device="meta"),
            **{key: self._hold(self._own, self._type, states) for key in ("exp_avg", "exp_avg_sq")},
        }
        separate = self._weight_type != self._type
        self._sums_everything = separate and self._stage == 1
        self._sums: list[Tensor] = []
        """The summed gradient."""
        self._held: list[Tensor] = []
        """Buckets of gradients on their way."""
        if self._sums_everything:
            self._sums = [self._hold(every, self._type, self._of_sums)]
        elif self._stage == 3 or self._on_host:
            self._sums = [self._hold(self._own, self._type, self._of_sums)]
        if self._stage == 3:
            self._held = [self._hold(buckets.bucket, self._type, "working_set")]
        self._sums_stay = bool(self._sums)
        self._adds_up = self._sums_stay or separate
        """Micro-batches add to one summed gradient."""
        self._gathered: list[Tensor] = []
        self._waiting: list[Tensor] = []
        """Parameters whose gradients are not yet on their way."""
        self._last = False
        waits: set[Tensor] = set()
        if self._stage == 3:
            model.blocks[-1].register_forward_hook(lambda *_: self._all_fetched())
            # A block's first parameter has its gradient last.
            waits = {p for block in model.blocks for p in [*block.parameters()][1:]}
        for parameter in self._parameters:
            take = partial(self._take, parameter in waits)
            parameter.register_post_accumulate_grad_hook(take)

    def __call__(self, *arguments: Any) -> Any:
        if self._stage == 3:
            sizes = self._buckets.gathered, self._buckets.fetched
            self._gathered = [self._hold(n, self._weight_type, "working_set") for n in sizes]
        return self._model(*arguments)

    def set_learning_rate(self, rate: float) -> None:
        pass

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._last = last
        if self._stage < 3 and not self._sums_everything and not self._held:
            size, count = self._buckets.bucket, 2 if self._buckets.overlaps else 1
            self._held = [self._hold(size, self._weight_type, "working_set") for _ in range(count)]
        reduced = []
        if self._takes_gradients() and (self._buckets.fills or self._adds_up):
            self._sum_up()
            if self._buckets.overlaps and self._buckets.fills:
                reduced = self._being_reduced()
        loss.backward()
        self._gathered = []
        del reduced
        if self._takes_gradients():
            if not self._buckets.fills:
                self._being_reduced()
                self._sum_up()
            self._forget(self._parameters)
            self._waiting = []
        elif self._sums_everything:
            self._hold(self._largest, self._type, "working_set")  # a gradient that is added
            if last:
                self._hold(self._buckets.flattened, self._type, "working_set")
        elif last:
            self._sum_up()
            self._being_reduced()
            self._forget(self._parameters)
        self._sums = self._sums[:1]
        if self._stage == 2 or (self._stage == 1 and last):
            self._held = []

    def gradient_norm(self) -> Tensor:
        self._hold(min(self._largest, self._own), torch.float64, "other")  # as which it is taken
        return torch.ones(())

    def clip(self, max_norm: float, norm: Tensor) -> None:
        for part in self._sums:
            part.mul_(1.0)

    @torch.no_grad()
    def step(self) -> None:
        self._forget(self._parameters)
        copied = 0
        if self._on_host:
            pass  # where AdamW takes the sums themselves
        elif self._stage == 3:
            copied = min(self._own, self._buckets.sub_group)
        elif self._weight_type == self._type:
            copied = self._own
        copy = self._hold(copied, self._type, "gradients")
        self._own_weights.grad = copy if copied == self._own else self._sums[0][: self._own]
        if not self._sums_stay:
            self._sums = []
        self._adamw.step()
        self._own_weights.grad = None

    def _takes_gradients(self) -> bool:
        """Whether gradients leave the parameters as the backward produces them."""
        if self._stage == 1:
            return self._buckets.overlaps and self._last and not self._sums_everything
        return True

    @torch.no_grad()
    def _take(self, waits: bool, parameter: Tensor) -> None:
        """A gradient has come. Stage 3 waits for all of a block's; one that is larger than a bucket
        stays where it is until the next one comes, in bf16's stage 2 on its owner to the end.
        """
        if not self._takes_gradients():
            return
        self._waiting.append(parameter)
        if waits:
            return
        if self._buckets.fills and not self._buckets.overlaps:
            self._being_reduced()
        stays = parameter.numel() > self._buckets.bucket
        self._forget(self._waiting[:-1] if stays else self._waiting)
        to_the_end = self._stage == 2 and self._weight_type != self._type
        self._waiting = [parameter] if stays and not to_the_end else []

    def _all_fetched(self) -> None:
        del self._gathered[1:]

    def _being_reduced(self) -> list[Tensor]:
        """The copy of a bucket that is summed over all processes."""
        types = [self._type]
        if self._stage == 2 and self._weight_type != self._type:
            types.append(self._weight_type)
        return [self._hold(self._buckets.reduced, dtype, "working_set") for dtype in types]

    def _sum_up(self) -> None:
        """There is memory for this micro-batch's part of the summed gradient."""
        if not (self._adds_up and self._sums):
            self._sums = [*self._sums[-1:], self._hold(self._own, self._type, self._of_sums)]

    def _forget(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None


@dataclass(frozen=True)
class _Part:
    """What stage 3 puts together at once: its elements and those of its largest parameter."""

    size: int
    largest: int


def _parts(config: Config) -> tuple[_Part, list[_Part]]:
    """The embedding (nothing where the head has its weights), and blocks and head."""
    model = config.model
    outside = parameter_count(replace(model, num_layers=0))
    block = (parameter_count(model) - outside) // max(model.num_layers, 1)
    largest = (model.num_experts or 1) * model.hidden_size * model.intermediate_size
    blocks = [_Part(block, largest)] * model.num_layers
    table = model.vocab_size * model.hidden_size
    first = 0 if model.tie_embeddings else table
    return _Part(first, first), [*blocks, _Part(table, table)]


def _gathered(embedding: _Part, parts: list[_Part], prefetch: int, reuse: int) -> int:
    """The most weights that are together at once in stage 3, in elements.

    A part stays from its forward to its backward where less than ``reuse`` elements come after it
    in the forward; the embedding where the head's are less twice, as blocks do not count for what
    is not in one. Beside the part in use come the next parameters, until there are ``prefetch``
    elements.
    """
    kept = 0
    for part in reversed(parts):
        if kept >= reuse:
            break
        kept += part.size
    always = embedding.size if 2 * parts[-1].size < reuse else 0
    neighbours = [*pairwise([embedding, *parts]), *pairwise([*reversed(parts), embedding])]
    moving = [one.size + min(prefetch + other.largest, other.size) for one, other in neighbours]
    return max(always + kept, *moving)
