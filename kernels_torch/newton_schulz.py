"""The orthogonalisation inside Muon: push every singular value of a matrix towards one, with matrix products only.

Five steps of Polar Express: the iteration of Newton and Schulz with coefficients that are optimal for each step
instead of the same in all. The result is not U Vᵀ exactly, its singular values only lie in a band around one; Muon
needs no more.
"""

import torch
from torch import Tensor

# (a, b, c) of each step, for singular values that start in [1e-3, 1] and with a safety factor of 2e-2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(g: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """X ← g / (1.01 · ‖g‖_F + 1e-6), then five times

        A = X Xᵀ,  X ← a X + (b A + c A²) X        for wide or square matrices (r ≤ c)
        A = XᵀX,   X ← a X + X (b A + c A²)        for tall ones

    g         [K, r, c]: a stack of matrices of any floating-point dtype
    dtype     of the iteration and of the result; the norm is taken in fp32 (fp64 for fp64 input)
    → [K, r, c] in `dtype`; a matrix of zeros stays zero

    Raises ValueError for a g that is not a stack of floating-point matrices.
    Source: Amsel et al., The Polar Express, https://arxiv.org/abs/2505.16932.
    """
    check_newton_schulz(g)
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    norm = torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True)
    X = (g / (1.01 * norm + 1e-6)).to(dtype)
    tall = X.shape[1] > X.shape[2]
    for a, b, c in POLAR_EXPRESS:
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def check_newton_schulz(g: Tensor) -> None:
    """Refuse what `newton_schulz` cannot mean."""
    if g.dim() != 3 or not g.is_floating_point():
        raise ValueError(f"newton_schulz takes a floating-point stack [K, r, c], got {g.dtype} {tuple(g.shape)}")
