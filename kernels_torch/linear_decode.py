"""The matrix product of decoding: few rows, all of the weight, and what stands before and behind it in a model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices
from kernels_torch.quantised_weight import check_codes, dequantise
from kernels_torch.rmsnorm import rmsnorm

ACTIVATIONS = ("relu2", "silu", "swiglu")


def linear_decode(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = activation(norm(x) Wᵀ) + residual, bounded to softcap · tanh(y / softcap)

    x            [..., C]; meant for one to some dozen rows, right for any number
    weight       [F, C] in the dtype of x; or its codes, see quantised_weight.py
    scales       of codes: [F], or [F, groups] of int4
    norm_weight  [C] or None: the gain of the norm
    eps          of rmsnorm(x, norm_weight, eps=eps) before the product; None: no norm
    activation   None; "relu2": relu(z)²; "silu": z · sigmoid(z); "swiglu": silu(z[:F/2]) · z[F/2:], which halves F
    residual     like the result, in the dtype of x
    softcap      None: no bound
    out_dtype    of the result; None: that of x
    → [..., F] or [..., F/2]

    Several matrices with one input are one weight, stacked once: their results lie side by side. Not differentiated.
    Raises ValueError for shapes, dtypes or names that do not fit together.
    """
    check_linear_decode(x, weight, scales, norm_weight, eps, activation, residual, softcap, out_dtype)
    with torch.no_grad():
        if eps is not None:
            x = rmsnorm(x, norm_weight, eps=eps)
        w = weight if scales is None else dequantise(weight, scales, x.shape[-1], x.dtype)
        y = activate(F.linear(x, w), activation)
        y = (y if residual is None else y + residual).to(x.dtype if out_dtype is None else out_dtype)
        return y if softcap is None else softcap * torch.tanh(y / softcap)


def activate(z: Tensor, activation: str | None) -> Tensor:
    if activation == "relu2":
        return F.relu(z).square()
    if activation == "silu":
        return F.silu(z)
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up
    return z


def check_linear_decode(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    eps: float | None,
    activation: str | None,
    residual: Tensor | None,
    softcap: float | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Refuse what `linear_decode` cannot mean."""
    check_devices(x=x, weight=weight, scales=scales, norm_weight=norm_weight, residual=residual)
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., C] of floats with at least one column, got {tuple(x.shape)} {x.dtype}")
    C = x.shape[-1]
    if weight.dim() != 2:
        raise ValueError(f"weight must be [F, C], got {tuple(weight.shape)}")
    if scales is not None:
        check_codes(weight, scales, C)
    elif weight.shape[1] != C or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be [F, {C}] in {x.dtype} for x {tuple(x.shape)}, or codes with scales, "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == "swiglu" and weight.shape[0] % 2:
        raise ValueError(f"swiglu takes gate and up in one weight, of an even number of rows, got {weight.shape[0]}")
    if norm_weight is not None and eps is None:
        raise ValueError("norm_weight needs eps, got None: without eps there is no norm")
    if norm_weight is not None and tuple(norm_weight.shape) != (C,):
        raise ValueError(f"norm_weight must have shape ({C},), got {tuple(norm_weight.shape)}")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    shape = (*x.shape[:-1], weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0])
    if residual is not None and (tuple(residual.shape) != shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {shape} in {x.dtype}, got {tuple(residual.shape)} {residual.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be floating point, got {out_dtype}")
