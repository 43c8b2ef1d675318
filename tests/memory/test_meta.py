"""What operations without data return, remembered: the same as torch's own rules say each time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mst_train.memory import meta


class Remembering(TorchDispatchMode):
    """Every operation that is no view by ``meta.call``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.is_view:
            return function(*args, **(kwargs or {}))
        return meta.call(function, args, kwargs or {})[0]


def form(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def twice(run):
    """The result of the second call."""
    with Remembering():
        run()
        return run()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(meta, "_known", {})


def a(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


@pytest.mark.parametrize(
    "run",
    [
        lambda: a(3, 4) + a(4),
        lambda: a(3, 4).t() * 2,
        lambda: a(3, 4, dtype=torch.bfloat16) + a(3, 4),
        lambda: a(3, 4) > 0,
        lambda: a(3, 4) @ a(4, 5),
        lambda: a(3, 4).sum(0, keepdim=True),
        lambda: a(8, 4).log_softmax(1),
        lambda: a(3, 4).clone(memory_format=torch.contiguous_format),
        lambda: a(4, 3, 8).transpose(1, 2).contiguous(),
        lambda: a(3, 4).to(torch.float64),
        lambda: torch.cat([a(3, 4), a(2, 4)]),
    ],
)
def test_a_new_tensor_is_one_of_the_same_form(run):
    expected = run()
    result = twice(run)
    assert form(result) == form(expected) and all(meta._known.values())
    assert result.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_several_results():
    result = twice(lambda: a(5, 4).sort(1))
    assert [form(t) for t in result] == [form(t) for t in a(5, 4).sort(1)]
    assert all(meta._known.values())


def test_what_is_changed_in_place_is_the_argument_itself():
    x, y = a(3, 4), a(3, 4)

    def run():
        return y.mul_(x), torch.mul(x, 2, out=y)

    first, second = twice(run)
    assert first is y and second is y and all(meta._known.values())


def test_numbers_of_other_types_are_other_arguments():
    with Remembering():
        assert (a(3, dtype=torch.int64) * 2).dtype == torch.int64
        assert (a(3, dtype=torch.int64) * 2.0).dtype == torch.float32
        assert (a(3, dtype=torch.int64) * True).dtype == torch.int64


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.ops.aten._unsafe_view(a(3, 4), [12]),
        lambda: a(3, 4).resize_(12),
        lambda: a(3, 4).as_strided_([4, 3], [1, 4]),
        lambda: torch.ones(3) + 1,
    ],
)
def test_what_shares_or_changes_a_form_or_has_data_is_run_each_time(run):
    assert form(twice(run)) == form(run()) and not any(meta._known.values())


def test_it_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(meta, "MOST", 3)
    with Remembering():
        for size in range(1, 9):
            assert (a(size) + 1).shape == (size,)
    assert 0 < len(meta._known) <= 3
