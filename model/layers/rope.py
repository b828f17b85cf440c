"""Tables of rotary position embeddings: the angle of every position and frequency, as cos and sin.

The rotation itself is part of the op `qk_norm_rope`: the two halves of a head rotate by −θ (y1 = x1·cos + x2·sin,
y2 = −x1·sin + x2·cos), the convention of nanochat and of its class in transformers.
"""

import torch
from torch import Tensor


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i/D), each [length, D/2] in fp32.

    The angles are computed in fp64: at position 2000 an fp32 angle is already off by 1e-4.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)  # (length, D/2)
    return angles.cos().float(), angles.sin().float()
