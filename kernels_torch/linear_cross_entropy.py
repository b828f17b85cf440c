"""From hidden states to the loss without ever holding all logits: V is the widest dimension of a language model.

65,536 tokens times 32,768 words in fp32 are 8 GiB. Here rows are taken a chunk at a time, the forward pass keeps one
number per row (the log-sum-exp) and the backward pass makes the logits of each chunk again: one matrix product more,
for a small part of the memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_torch.checks import check_devices, holds_integers
from kernels_torch.masters import check_masters, of_masters

# Logits of one chunk: few enough for a CPU's cache (measured fastest on one), enough to fill a GPU (128 MiB in fp32).
CHUNK_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 25}
COMPILED_CHUNKS = 16  # torch.compile unrolls the loop over chunks, so it gets few of them


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    master: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the logits x Wᵀ, each token's loss times its weight.

        z = x W[:vocab_size]ᵀ → fp32;   z ← softcap · tanh(z / softcap);   nll = logsumexp(z) − z[target]

    x              [N, D]
    weight         [Vp, D], the dtype of x
    targets        [N] integers below vocab_size, or ignore_index
    token_weights  [N] or None (all one); what a policy gradient puts its advantage in
    vocab_size     rows of `weight` that are words; those after it only pad the matrix and never take part. None: all
    softcap        bound on the logits; None: none
    reduction      "mean": Σ w · nll / number of targets that are not ignored (0 when there are none, never NaN);
                   "sum": Σ w · nll;  "none": [N] w · nll, 0 where ignored
    master         what `weight` is a rounding of: it gets the gradient, in its dtype. None: weight does
    → fp32 (fp64 for fp64 input), a scalar or [N]; gradients for x, weight and token_weights

    Raises ValueError for shapes, dtypes or options that do not fit together. A target outside the vocabulary is
    PyTorch's own index error: checking it here would wait for the device.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    check_linear_cross_entropy(x, weight, targets, token_weights, vocab_size, softcap, reduction)
    masters = None if master is None else (master,)
    check_masters((weight,), masters)
    (weight,) = of_masters((weight,), masters)
    counted = targets != ignore_index
    nll = _LinearCrossEntropy.apply(x, weight, torch.where(counted, targets, 0).long(), counted, vocab_size, softcap)
    loss = nll if token_weights is None else nll * torch.where(counted, token_weights, 0).to(nll.dtype)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Rows in chunks, logits made twice."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        counted: Tensor,
        vocab_size: int,
        softcap: float | None,
    ) -> Tensor:
        rows = chunk_rows(x.shape[0], weight.shape[0], x.device)
        lse, at_target = [], []
        for b_x, b_targets in zip(x.split(rows), targets.split(rows), strict=True):
            z = logits(b_x, weight, vocab_size, softcap)  # [rows, V]
            lse.append(z.logsumexp(dim=1))
            at_target.append(z.gather(1, b_targets[:, None]).squeeze(1))
        lse = torch.cat(lse)
        ctx.save_for_backward(x, weight, targets, counted, lse)
        ctx.vocab_size, ctx.softcap, ctx.rows = vocab_size, softcap, rows
        return torch.where(counted, lse - torch.cat(at_target), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, counted, lse = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        d_nll = torch.where(counted, d_nll, 0)
        words = torch.arange(ctx.vocab_size, device=x.device)
        dx, dw = [], torch.zeros_like(weight, dtype=lse.dtype) if needs_dw else None
        chunks = [tensor.split(ctx.rows) for tensor in (x, targets, lse, d_nll)]
        for b_x, b_targets, b_lse, b_d in zip(*chunks, strict=True):
            z = logits(b_x, weight, ctx.vocab_size, ctx.softcap)
            p = torch.exp(z - b_lse[:, None])
            dz = torch.where(words == b_targets[:, None], p - 1, p) * b_d[:, None]
            if ctx.softcap is not None:
                dz = dz * (1 - (z / ctx.softcap).square())
            dz = F.pad(dz.to(x.dtype), (0, weight.shape[0] - ctx.vocab_size))  # padding has no gradient
            if needs_dx:
                dx.append(dz @ weight)
            if needs_dw:
                dw += dz.mT @ b_x  # summed in fp32: there may be many chunks
        return torch.cat(dx) if needs_dx else None, dw.to(weight.dtype) if needs_dw else None, None, None, None, None


def logits(x: Tensor, weight: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    """[rows, D] → [rows, vocab_size] in fp32. The product covers the padding, whose round size suits the hardware."""
    z = F.linear(x, weight)[:, :vocab_size].to(torch.promote_types(x.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def chunk_rows(N: int, V: int, device: torch.device) -> int:
    """How many of N rows are worked on at a time."""
    rows = max(1, CHUNK_LOGITS["cpu" if device.type == "cpu" else "cuda"] // V)
    return max(rows, -(-N // COMPILED_CHUNKS)) if torch.compiler.is_compiling() else rows


def check_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    vocab_size: int,
    softcap: float | None,
    reduction: str,
) -> None:
    """Refuse what `linear_cross_entropy` cannot mean."""
    check_devices(x=x, weight=weight, targets=targets, token_weights=token_weights)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [N, D] and weight [V, D], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x and weight must have one floating-point dtype, got {x.dtype} and {weight.dtype}")
    if targets.shape != x.shape[:1] or not holds_integers(targets):
        raise ValueError(f"targets must be integers [{x.shape[0]}], got {targets.dtype} {tuple(targets.shape)}")
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(f"token_weights must be [{x.shape[0]}], got {tuple(token_weights.shape)}")
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be between 1 and the {weight.shape[0]} rows of weight, got {vocab_size}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
