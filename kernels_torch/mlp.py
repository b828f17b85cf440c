"""The feed-forward half of a block: up, activation, down. Weights are [out, in] as in nn.Linear, and have no biases."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices
from kernels_torch.masters import check_masters, of_masters


def relu2_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, *, masters: Sequence[Tensor] | None = None) -> Tensor:
    """relu(x W_upᵀ)² W_downᵀ

    x         [..., D]
    w_up      [F, D], the dtype of x
    w_down    [D, F]
    masters   what the weights are roundings of, in this order: they get the gradients, in their dtype;
              None: the weights get them
    → [..., D]

    Raises ValueError for shapes or dtypes that do not fit together.
    Source: Primer, https://arxiv.org/abs/2109.08668.
    """
    check_mlp(x, (w_up,), w_down)
    check_masters((w_up, w_down), masters)
    w_up, w_down = of_masters((w_up, w_down), masters)
    return F.linear(F.relu(F.linear(x, w_up)).square(), w_down)


def swiglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, masters: Sequence[Tensor] | None = None
) -> Tensor:
    """(silu(x W_gateᵀ) · x W_upᵀ) W_downᵀ,   silu(z) = z · sigmoid(z)

    x             [..., D]
    w_gate, w_up  [F, D], the dtype of x
    w_down        [D, F]
    masters       as in relu2_mlp
    → [..., D]

    Raises ValueError for shapes or dtypes that do not fit together.
    Source: https://arxiv.org/abs/2002.05202.
    """
    check_mlp(x, (w_gate, w_up), w_down)
    check_masters((w_gate, w_up, w_down), masters)
    w_gate, w_up, w_down = of_masters((w_gate, w_up, w_down), masters)
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def check_mlp(x: Tensor, ins: tuple[Tensor, ...], w_down: Tensor) -> None:
    """Refuse weights that do not lead from D to F and back."""
    check_devices(x=x, **{f"weight {i}": weight for i, weight in enumerate((*ins, w_down))})
    if x.dim() == 0 or w_down.dim() != 2 or w_down.shape[0] != x.shape[-1]:
        raise ValueError(f"w_down must be [D, F] for x [..., D], got {tuple(w_down.shape)} for x {tuple(x.shape)}")
    for weight in ins:
        if weight.shape != (w_down.shape[1], w_down.shape[0]):
            raise ValueError(
                f"weights must be [F, D] up and [D, F] down, got {tuple(weight.shape)}, {tuple(w_down.shape)}"
            )
    if any(weight.dtype != x.dtype for weight in (*ins, w_down)):
        dtypes = ", ".join(str(weight.dtype) for weight in (*ins, w_down))
        raise ValueError(f"weights must have the dtype of x, {x.dtype}, got {dtypes}")
