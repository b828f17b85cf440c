"""What there is to note of a row when its next token is known: all state of a decoding loop, where graphs find it."""

import torch
from torch import Tensor

from kernels_torch.checks import check_devices, holds_integers


def take_tokens(
    ids: Tensor,
    forced: Tensor,
    limit: Tensor,
    is_stop: Tensor,
    token: Tensor,
    step: Tensor,
    active: Tensor,
    history: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take note of each row's next token, in place:

        token = forced where that is a token (≥ 0), else ids
        history[step % H] = token;   step += active
        active = 0 where token is a stop token and not forced, or where step has reached limit

    ids      [B] int64: what was drawn
    forced   [B] int64: what to say whatever was drawn; negative: nothing
    limit    [B] int64
    is_stop  [V] bool
    token    [B] int64, written
    step     [B] int64, written
    active   [B] int32, 0 or 1, written: a row that is not goes on as it is but for what it last said
    history  [B, H] int64, written
    → token, step, active, history

    Raises ValueError for shapes and dtypes that do not fit together.
    """
    check_take_tokens(ids, forced, limit, is_stop, token, step, active, history)
    is_free = forced < 0
    token.copy_(torch.where(is_free, ids, forced))
    history.scatter_(1, (step % history.shape[1])[:, None], token[:, None])
    step += active
    active *= ~((is_stop[token] & is_free) | (step >= limit))
    return token, step, active, history


def check_take_tokens(
    ids: Tensor,
    forced: Tensor,
    limit: Tensor,
    is_stop: Tensor,
    token: Tensor,
    step: Tensor,
    active: Tensor,
    history: Tensor,
) -> None:
    """Refuse what `take_tokens` cannot mean."""
    of_rows = dict(ids=ids, forced=forced, limit=limit, token=token, step=step, active=active)
    check_devices(**of_rows, history=history, is_stop=is_stop)
    if ids.dim() != 1:
        raise ValueError(f"ids must be an integer tensor [B], got {ids.dtype} {tuple(ids.shape)}")
    for name, value in of_rows.items():
        if value.shape != ids.shape or not holds_integers(value):
            raise ValueError(f"{name} must be an integer tensor [{len(ids)}], got {value.dtype} {tuple(value.shape)}")
    if history.dim() != 2 or history.shape[0] != len(ids) or history.shape[1] == 0 or not holds_integers(history):
        raise ValueError(
            f"history must be an integer tensor [{len(ids)}, H], got {history.dtype} {tuple(history.shape)}"
        )
    if is_stop.dim() != 1 or is_stop.dtype != torch.bool:
        raise ValueError(f"is_stop must be a bool tensor [V], got {is_stop.dtype} {tuple(is_stop.shape)}")
