"""How close is close enough: as close as plain PyTorch gets in the same dtype, judged from fp64.

No tolerance here is chosen by hand. `plain` is the reference run in the tested dtype, `exact` the reference in fp64;
the kernel may err `slack` times as much as `plain` does. Two rules, because each misses what the other sees: the RMS
catches a scale that is off by one percent, the maximum catches a single wrong element.
"""

import torch
from torch import Tensor


def assert_close(got: Tensor, exact: Tensor, plain: Tensor, name: str = "value", slack: float = 2.0) -> None:
    """Assert that `got` errs from `exact` (fp64) at most `slack` times as much as `plain` (same dtype as got) does.

    The maximum rule adds one rounding of the largest value: what any result stored in that dtype may lose.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, plain PyTorch gives {plain.dtype}"
    if got.numel() == 0:
        return
    assert got.isfinite().all(), f"{name}: not finite"
    got, exact, plain_dtype, plain = got.double(), exact.double(), plain.dtype, plain.double()
    ours, theirs = (got - exact).abs(), (plain - exact).abs()
    ulp = torch.finfo(plain_dtype).eps * exact.abs().max()
    rms_ours, rms_theirs = ours.square().mean().sqrt(), theirs.square().mean().sqrt()
    # A handful of values can round luckily all at once, so the RMS rule grants a fraction of one rounding too.
    floor = torch.finfo(plain_dtype).eps * exact.square().mean().sqrt() * 0.5 + 1e-12
    assert rms_ours <= slack * rms_theirs + floor, f"{name}: rms {rms_ours:.2e}, plain PyTorch {rms_theirs:.2e}"
    assert ours.max() <= slack * (theirs.max() + ulp), f"{name}: max {ours.max():.2e}, plain PyTorch {theirs.max():.2e}"
