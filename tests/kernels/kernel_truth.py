"""How a kernel's result is judged."""

import torch


def assert_no_worse(
    what: str,
    actual: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    scale: float = 0.0,
) -> None:
    """The error against a float64 truth is at most 1.5 times that of the plain implementation.

    plain: the same computation in torch's own operations and the dtype under test. Compared are the
    largest error and the root mean square. A few fp32 roundings of the largest value (or of
    `scale`, the size of the terms that cancel in it) come free, for cases in which the plain
    implementation happens to be exact.
    """
    assert actual.shape == truth.shape, f"{what}: {actual.shape} is not {truth.shape}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype} is not {plain.dtype}"
    actual, plain = actual.double(), plain.double()
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    free = 8 * torch.finfo(torch.float32).eps * max(scale, truth.abs().max().item())
    errors, allowed = (actual - truth).abs(), (plain - truth).abs()
    assert errors.max() <= 1.5 * allowed.max() + free, (
        f"{what}: largest error {errors.max():.3g}, plain torch has {allowed.max():.3g}"
    )
    rms, plain_rms = errors.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert rms <= 1.5 * plain_rms + free, (
        f"{what}: rms error {rms:.3g}, plain torch has {plain_rms:.3g}"
    )


def assert_exact(what: str, actual: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal in float64 to 1e-12."""
    assert actual.dtype == truth.dtype == torch.float64, what
    torch.testing.assert_close(
        actual, truth, rtol=1e-12, atol=1e-12, msg=lambda message: f"{what}: {message}"
    )
