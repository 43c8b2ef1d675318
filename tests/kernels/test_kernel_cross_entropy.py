"""Cross-entropy and its gradient against plain autograd."""

import math

import pytest
import torch
from kernel_truth import assert_exact, assert_no_worse

from mst_kernels import cross_entropy_, row_blocks

IGNORED = -100


def plain(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, gradient) from torch's own operations; 16-bit logits are taken to fp32 first."""
    logits = logits.detach().clone().requires_grad_()
    s = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    kept = labels != IGNORED
    lse = torch.logsumexp(s, 1)
    target = s.gather(1, torch.where(kept, labels, 0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * (lse - target) + z_loss * lse.square()
    if label_smoothing:  # with no smoothing, 0 times the mean of masked logits would be nan
        loss = loss + label_smoothing * (lse - s.mean(1))
    loss = torch.where(kept, loss, 0.0)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def make(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, ignored: str = "some"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; the labels include the first, the last and ignored ones."""
    logits = (5 * torch.randn(rows, vocabulary, dtype=torch.float64)).to(device, dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[0], labels[-1] = 0, vocabulary - 1
    if ignored == "some":
        labels[1::3] = IGNORED
    elif ignored == "all":
        labels[:] = IGNORED
    return logits, labels.to(device)


def run(logits: torch.Tensor, labels: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, whole gradient): what the function gives apart is added up, in float64."""
    losses, target_parts = cross_entropy_(logits, labels, **options)
    assert target_parts is not None and target_parts.dtype == losses.dtype
    column = labels.clamp(0, logits.shape[1] - 1)[:, None]
    return losses, logits.double().scatter_add(1, column, target_parts.double()[:, None])


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("block_elements", [300, 1 << 20])
def test_float64_is_exact(
    softcap, z_loss, label_smoothing, ignored, block_elements, monkeypatch
) -> None:
    monkeypatch.setattr(row_blocks, "_CPU_BLOCK_ELEMENTS", block_elements)
    logits, labels = make(11, 123, torch.float64, torch.device("cpu"), ignored)
    options = {"softcap": softcap, "z_loss": z_loss, "label_smoothing": label_smoothing}
    losses, gradient = plain(logits, labels, **options)
    actual_losses, actual_gradient = run(logits, labels, **options)
    assert_exact("losses", actual_losses, losses)
    assert_exact("gradient", actual_gradient, gradient)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 7.0},
        {"z_loss": 0.01},
        {"label_smoothing": 0.1},
        {"softcap": 7.0, "z_loss": 0.01, "label_smoothing": 0.1},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "shape", [(5, 1000), pytest.param((123, 7), marks=pytest.mark.slow), (5, 1), (1, 10_001)]
)
def test_no_worse_than_plain(implementation, device, options, dtype, shape) -> None:
    logits, labels = make(*shape, dtype, device, "some" if shape[0] > 1 else "none")
    in_dtype = plain(logits, labels, **options)
    truths = plain(logits.double(), labels, **options)
    losses, gradient = run(logits, labels, **options)
    assert_no_worse("losses", losses, in_dtype[0], truths[0], scale=1.0)
    assert_no_worse("gradient", gradient, in_dtype[1].double(), truths[1], scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_vocabulary(implementation, device, dtype) -> None:
    logits, labels = make(3, 50_257, dtype, device)
    in_dtype, truths = plain(logits, labels), plain(logits.double(), labels)
    losses, gradient = run(logits, labels)
    assert_no_worse("losses", losses, in_dtype[0], truths[0], scale=1.0)
    assert_no_worse("gradient", gradient, in_dtype[1].double(), truths[1], scale=1.0)


def test_largest_vocabulary_loses_no_digits(implementation, device) -> None:
    """262144 probabilities added one after the other would be off by 1e-5 in fp32."""
    logits = 3 * torch.randn(2, 262_144, device=device)
    labels = torch.tensor([5, 262_143], device=device)
    truth_losses, truth_gradient = plain(logits.double(), labels)
    losses, gradient = run(logits, labels)
    torch.testing.assert_close(losses.double(), truth_losses, rtol=0, atol=4e-6)
    torch.testing.assert_close(gradient, truth_gradient, rtol=4e-6, atol=0)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradient_the_logits_stay(implementation, device, softcap, dtype) -> None:
    logits, labels = make(5, 1000, dtype, device)
    before = logits.clone()
    losses, target_parts = cross_entropy_(logits, labels, softcap=softcap, gradient=False)
    assert target_parts is None
    assert torch.equal(logits, before)
    assert torch.equal(losses, cross_entropy_(logits, labels, softcap=softcap)[0])


@pytest.mark.parametrize("options", [{}, {"softcap": 7.0, "z_loss": 0.01, "label_smoothing": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_row_gives_zeros_whatever_it_holds(
    implementation, device, options, dtype
) -> None:
    logits, labels = make(6, 123, dtype, device, "none")
    labels[[1, 2, 4]] = 7
    logits[1, 3], logits[2, 4], logits[4] = math.nan, math.inf, -math.inf
    losses, target_parts = cross_entropy_(logits, labels, ignore_index=7, **options)
    assert torch.equal(losses[[1, 2, 4]], torch.zeros(3, device=device))
    assert torch.equal(target_parts[[1, 2, 4]], torch.zeros(3, device=device))
    assert torch.equal(logits[[1, 2, 4]], torch.zeros(3, 123, dtype=dtype, device=device))
    assert (losses[[0, 3, 5]] > 0).all() and torch.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_targets_part_is_apart_where_that_is_more_precise(
    implementation, device, dtype
) -> None:
    """Below half the probability it is apart; above it, 1 - p would be lost to rounding."""
    logits = torch.zeros(4, 50, dtype=dtype, device=device)
    logits[2:, 7] = torch.tensor([9.0, 3.0], dtype=dtype, device=device)
    labels = torch.tensor([7, IGNORED, 7, 7], device=device)
    truth = logits.double().softmax(1)
    truth[[0, 2, 3], 7] -= 1
    truth[1] = 0
    _, target_parts = cross_entropy_(logits, labels)
    assert target_parts.tolist() == [-1.0, 0.0, 0.0, -1.0]
    gradient = logits.double()
    gradient[:, 7] += target_parts.double()
    torch.testing.assert_close(gradient, truth, rtol=2.0**-8, atol=0)


def test_masked_and_huge_logits(implementation, device) -> None:
    """-inf masks a token, also a whole first block of them; values past exp's range are fine."""
    logits, labels = make(4, 20_000, torch.float32, device, "none")
    logits[:, :9000] = -math.inf
    logits[1, 9000:] *= 1000
    labels[:] = 19_999
    losses, gradient = plain(logits, labels)
    actual_losses, actual_gradient = run(logits, labels)
    torch.testing.assert_close(actual_losses, losses)
    torch.testing.assert_close(actual_gradient.float(), gradient)


def test_rows_with_a_stride(implementation, device) -> None:
    """The logits may be a slice of a wider buffer, whose other columns must stay."""
    logits, labels = make(5, 123, torch.float32, device)
    buffer = torch.full((5, 200), 3.0, device=device)
    buffer[:, :123] = logits
    losses, gradient = plain(logits, labels)
    actual_losses, actual_gradient = run(buffer[:, :123], labels)
    torch.testing.assert_close(actual_losses, losses)
    torch.testing.assert_close(actual_gradient.float(), gradient)
    assert (buffer[:, 123:] == 3.0).all()


def test_triton_writes_nothing_for_a_label_out_of_range(device) -> None:
    pytest.importorskip("triton")
    import mst_kernels

    buffer = torch.zeros(4, 100, device=device)
    buffer[[0, 3]] = 50.0  # what a read past either end would find
    labels = torch.tensor([-1, 100], device=device)
    with mst_kernels.backend("triton"):
        losses, target_parts = cross_entropy_(buffer[1:3], labels)
    assert torch.equal(target_parts, torch.zeros(2, device=device))
    torch.testing.assert_close(losses, torch.full((2,), math.log(100), device=device))
    assert (buffer[[0, 3]] == 50.0).all()
    torch.testing.assert_close(buffer[1:3], torch.full((2, 100), 0.01, device=device))


def test_no_rows(implementation, device) -> None:
    logits = torch.empty(0, 9, device=device)
    losses, parts = cross_entropy_(logits, torch.empty(0, dtype=torch.int64, device=device))
    assert losses.shape == parts.shape == (0,)


def test_wrong_arguments_are_refused() -> None:
    logits, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for arguments, options, message in [
        ((logits[None], labels), {}, r"logits \[N, V\]"),
        ((logits, labels[:2]), {}, r"labels \[N\]"),
        ((logits, labels.int()), {}, "int64"),
        ((logits[:, :0], labels), {}, "vocabulary"),
        ((logits, labels), {"softcap": 0.0}, "softcap"),
        ((logits, labels), {"label_smoothing": 1.5}, "label_smoothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            cross_entropy_(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_past_2_to_the_31_elements() -> None:
    rows, vocabulary = 20_000, 128_256
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free device memory")
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    last = slice(rows - 2, rows)
    kept = logits[last].clone()
    losses, target_parts = cross_entropy_(logits, labels)
    gradient = logits[last].double()
    gradient.scatter_add_(1, labels[last, None], target_parts[last, None].double())
    in_dtype, truths = plain(kept, labels[last]), plain(kept.double(), labels[last])
    assert_no_worse("losses", losses[last], in_dtype[0], truths[0], scale=1.0)
    assert_no_worse("gradient", gradient, in_dtype[1].double(), truths[1], scale=1.0)
