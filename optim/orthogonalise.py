"""What Muon does to a stack of gradients besides the Newton-Schulz iteration: four short steps, each with its formula.

All take stacks [K, r, c] (K matrices of one shape) and compute in fp32. The iteration itself is a hot op and lives with
the kernels (`newton_schulz`). Order within one update, names as in the papers:

    momentum → equilibrate_rows (MuonEq) → newton_schulz → snap_frobenius (Muon+) → reduce_variance (NorMuon) → descend

An all-zero matrix, which is what padding and the first gradient behind a zero-initialised projection are, stays zero in
every step; the small floors below exist for it alone.
"""

import torch
from torch import Tensor


def equilibrate_rows(x: Tensor) -> Tensor:
    """MuonEq: every row gets the mean row norm, so that no neuron is drowned by a loud neighbour.

    x_row ← x_row · (‖x‖_F / √r) / max(‖x_row‖, 1e-6)
    """
    row_norm = x.norm(dim=-1, keepdim=True)  # [K, r, 1]
    mean_norm = x.norm(dim=(-2, -1), keepdim=True) / x.size(-2) ** 0.5  # [K, 1, 1]
    return x * (mean_norm / row_norm.clamp_min(1e-6))


def snap_frobenius(x: Tensor) -> Tensor:
    """Muon+: rescale to the Frobenius norm of an exactly orthogonal matrix, which five iterations only approach.

    x ← x · √min(r, c) / ‖x‖_F
    """
    norm = x.norm(dim=(-2, -1), keepdim=True)
    return x * (min(x.shape[-2:]) ** 0.5 / norm.clamp_min(1e-10))


def variance_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of NorMuon's state for one matrix: one number per row if r ≥ c, else one per column."""
    return (rows, 1) if rows >= columns else (1, columns)


def reduce_variance(x: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """NorMuon: divide every row (column, if wide) by the running RMS of its updates, at the same Frobenius norm.

    v̄ = mean of x² along the other axis;   S ← β₂ S + (1 − β₂) v̄;   q = max(S, 1e-10)^−½
    x ← x · q · ‖x‖_F / ‖x · q‖_F

    second_moment   S, [K, r, 1] or [K, 1, c], updated in place. No bias correction: the last factor cancels it.
    """
    axis = -1 if x.size(-2) >= x.size(-1) else -2
    mean_square = x.square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    q = second_moment.clamp_min(1e-10).rsqrt()
    norm_before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (mean_square * q.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return x * (q * (norm_before / norm_after.clamp_min(1e-10)))


def shape_factor(rows: int, columns: int) -> float:
    """√max(1, r/c): a tall matrix of unit singular values moves its outputs less, entry by entry, than a square one."""
    return max(1.0, rows / columns) ** 0.5


def descend_(p: Tensor, x: Tensor, lr: float, weight_decay: float) -> None:
    """Step along the update with cautious decay: only entries that the update itself pulls towards zero decay.

    p ← p − lr · x − lr · λ · p · [x · p ≥ 0]
    """
    shrink = torch.where(x * p >= 0, lr * weight_decay, 0.0).mul_(p)
    p.sub_(shrink).sub_(x, alpha=lr)
