"""The embedding table: each token's own row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_torch.checks import check_devices, holds_integers


def embedding(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Row table[t] for every token t, cast to `dtype`.

    tokens    [...] integers below V
    table     [V, D]; fp32 as a rule: a table in bf16 would lose its small updates
    → [..., D] in `dtype`; the gradient of the table is summed in fp32 (fp64 for fp64)

    Raises ValueError for shapes and dtypes that do not fit together. A token outside the table is PyTorch's own index
    error: checking it here would wait for the device.
    """
    check_embedding(tokens, table, dtype)
    return F.embedding(tokens, table).to(dtype)


def check_embedding(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    """Refuse what `embedding` cannot mean."""
    check_devices(tokens=tokens, table=table)
    if not holds_integers(tokens):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(f"table must be floating point [V, D], got {table.dtype} {tuple(table.shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"embedding gives floating-point values, not {dtype}")
