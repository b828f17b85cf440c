"""How close decoding comes to what limits it: each token must read all weights once, and its row's keys and values."""

import torch

from inference.engine import Engine
from model.cost import bytes_of_products, kv_bytes_per_token

COPIED = 2**28  # bytes


def share_of_bandwidth(engine: Engine, seconds: float) -> float | None:
    """What the engine's steps of decoding, which took so long, read of what a copy moves meanwhile; None on a CPU."""
    if engine.device.type != "cuda" or seconds <= 0:
        return None
    weights = engine.n_decoded * bytes_of_products(engine.model)
    cache = engine.n_keys_read * kv_bytes_per_token(engine.model, engine.cache.k.dtype)
    return (weights + cache) / seconds / copied_per_s(engine.device)


def copied_per_s(device: torch.device) -> float:
    """Bytes read and written by a large copy."""
    source = torch.zeros(COPIED, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    begin.record()
    for _ in range(8):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 8 * 2 * COPIED / (1e-3 * begin.elapsed_time(end))
