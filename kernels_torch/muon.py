"""What Muon does to a stack of gradients before and after `newton_schulz`, in two operations.

    muon_momentum    momentum, Nesterov, and every row at one norm (MuonEq)
    muon_update      the Frobenius norm of an orthogonal matrix (Muon+), rows or columns at one size (NorMuon), and the
                     step along the result with cautious decay

All is computed in fp32 (fp64 for fp64). An all-zero matrix, which is what padding and the first gradient behind a
zero-initialised projection are, stays zero in every step; the small floors exist for it alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels_torch.checks import check_devices

Stack = Tensor | Sequence[Tensor]  # [K, r, c], or K matrices [r, c] that lie apart
Number = float | Tensor  # a float, or a 0-d fp64 tensor on the device of the others, read when the operation runs


def muon_momentum(
    grads: Stack,
    momentum: Tensor,
    mu: Number,
    *,
    equilibrate: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """M ← μ M + (1 − μ) G;   U = (1 − μ) G + μ M;   with `equilibrate` U_row ← U_row / max(‖U_row‖, 1e-6)

    MuonEq gives every row the mean row norm, so that no neuron is drowned by a loud neighbour. What that norm is makes
    no difference to Newton-Schulz, which divides by the norm of the matrix, so here it is one.

    grads       G: [K, r, c], or K matrices [r, c] that lie apart
    momentum    M: [K, r, c] fp32 (fp64 for fp64 gradients)
    mu          μ: a float, or a 0-d fp64 tensor, read when the operation runs
    dtype       of U
    in_place    M is written where it was
    → U [K, r, c], M, and ‖G‖² of each matrix [K]
    """
    check_muon_momentum(grads, momentum, mu)
    grad = as_stack(grads).to(momentum.dtype)
    weight = (1 - mu.to(momentum.dtype)) if isinstance(mu, Tensor) else 1 - mu
    M = momentum.lerp_(grad, weight) if in_place else momentum.lerp(grad, weight)
    U = grad.lerp(M, mu.to(momentum.dtype) if isinstance(mu, Tensor) else mu)
    if equilibrate:
        U = U / U.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return U.to(dtype), M, grad.square().sum(dim=(1, 2))


def muon_update(
    params: Stack,
    x: Tensor,
    second_moment: Tensor,
    lr: Number,
    weight_decay: Number,
    *,
    beta2: float = 0.9,
    snap: bool = True,
    copies: Sequence[Tensor] | None = None,
    in_place: bool = False,
) -> tuple[Stack, Tensor]:
    """X ← X √min(r, c) / ‖X‖                                    with `snap`; five iterations only come near that norm
    v̄ = mean of X² along each row if r ≥ c, else along each column
    S ← β₂ S + (1 − β₂) v̄;   q = max(S, 1e-10)^−½;   X ← X q ‖X‖ / ‖X q‖
    P ← P − η' X − η' λ P ⊙ [X ⊙ P ≥ 0],   η' = η √max(1, r/c)

    No bias correction: the factor behind q cancels it. Only entries that the update itself pulls towards zero decay. A
    tall matrix of unit singular values moves its outputs less, entry by entry, than a square one: so it steps further.

    params           P: [K, r, c], or K matrices [r, c] that lie apart
    x                X: [K, r, c], what newton_schulz gave
    second_moment    S: [K, r, 1] if r ≥ c, else [K, 1, c], fp32 (fp64 for fp64 parameters)
    lr, weight_decay η and λ: floats, or 0-d fp64 tensors, read when the operation runs
    copies           K matrices [r, c] of another dtype that the new parameters are written to as well
    in_place         P and S are written where they were
    → P, as it came, and S
    """
    check_muon_update(params, x, second_moment, lr, weight_decay)
    stack = as_stack(params)
    r, c = stack.shape[1:]
    S = second_moment if in_place else second_moment.clone()
    x = x.contiguous().to(S.dtype)
    X = reduce_variance(snap_frobenius(x) if snap else x, S, beta2)
    P = stack.to(S.dtype, copy=True)
    lr = lr * max(1.0, r / c) ** 0.5
    P -= torch.where(X * P >= 0, P, 0.0) * (lr * weight_decay)
    P = P - X * lr if isinstance(lr, Tensor) else P.sub_(X, alpha=lr)
    new = P.to(stack.dtype)
    for k, copy in enumerate(copies or ()):
        copy.copy_(new[k])
    if not in_place:
        return (new if isinstance(params, Tensor) else list(new.unbind())), S
    if isinstance(params, Tensor):
        params.copy_(new)
    else:
        torch._foreach_copy_(list(params), list(new.unbind()))
    return params, S


def snap_frobenius(x: Tensor) -> Tensor:
    """Muon+: x · √min(r, c) / ‖x‖_F, of each matrix."""
    norm = x.norm(dim=(-2, -1), keepdim=True)
    return x * (min(x.shape[-2:]) ** 0.5 / norm.clamp_min(1e-10))


def variance_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of NorMuon's state for one matrix: one number per row if r ≥ c, else one per column."""
    return (rows, 1) if rows >= columns else (1, columns)


def reduce_variance(x: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """NorMuon: divide every row (column, if wide) by the running RMS of its updates, at the same Frobenius norm."""
    axis = -1 if x.size(-2) >= x.size(-1) else -2
    mean_square = x.square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    q = second_moment.clamp_min(1e-10).rsqrt()
    norm_before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (mean_square * q.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return x * (q * (norm_before / norm_after.clamp_min(1e-10)))


def as_stack(matrices: Stack) -> Tensor:
    """[K, r, c] in one piece, without a copy where it is already."""
    return matrices.contiguous() if isinstance(matrices, Tensor) else torch.stack(list(matrices))


def stack_shape(matrices: Stack) -> tuple[int, ...]:
    """(K, r, c) of a stack, or of matrices that all have one shape."""
    if isinstance(matrices, Tensor):
        return tuple(matrices.shape)
    shapes = {tuple(matrix.shape) for matrix in matrices}
    return (len(matrices), *shapes.pop()) if len(shapes) == 1 else (len(matrices), -1, -1)


def check_muon_momentum(grads: Stack, momentum: Tensor, mu: Number) -> None:
    """Refuse what `muon_momentum` cannot mean."""
    shape = stack_shape(grads)
    if len(shape) != 3 or tuple(momentum.shape) != shape:
        raise ValueError(f"momentum must be [K, r, c] like the gradients {shape}, got {tuple(momentum.shape)}")
    first = grads if isinstance(grads, Tensor) else grads[0]
    if not first.is_floating_point() or momentum.dtype not in (torch.float32, torch.float64):
        found = f"{first.dtype} and {momentum.dtype}"
        raise ValueError(f"gradients must be floating-point and momentum fp32 or fp64, got {found}")
    check_devices(grads=first, momentum=momentum, mu=mu if isinstance(mu, Tensor) else None)


def check_muon_update(params: Stack, x: Tensor, second_moment: Tensor, lr: Number, weight_decay: Number) -> None:
    """Refuse what `muon_update` cannot mean."""
    shape = stack_shape(params)
    if len(shape) != 3 or tuple(x.shape) != shape:
        raise ValueError(f"x must be [K, r, c] like the parameters {shape}, got {tuple(x.shape)}")
    expected = (shape[0], *variance_shape(*shape[1:]))
    if tuple(second_moment.shape) != expected:
        raise ValueError(f"second_moment must be {expected} for parameters {shape}, got {tuple(second_moment.shape)}")
    first = params if isinstance(params, Tensor) else params[0]
    if not x.is_floating_point() or second_moment.dtype not in (torch.float32, torch.float64):
        found = f"{x.dtype} and {second_moment.dtype}"
        raise ValueError(f"x must be floating-point and second_moment fp32 or fp64, got {found}")
    numbers = {name: n for name, n in (("lr", lr), ("weight_decay", weight_decay)) if isinstance(n, Tensor)}
    check_devices(params=first, x=x, second_moment=second_moment, **numbers)
