"""Keys and values of the tokens already seen, one set per layer, so that a new token costs one token: one piece a row.

The simplest cache a model can have, for a notebook, the samples of a training run, and the tests that hold every other
way of decoding to it. The engine keeps its rows in pages instead (paged_cache.py).

Everything is allocated once and never moves. How many tokens a row holds is known on the device only (`lengths`), so
rows may differ and no step waits for the host; `filled`, an upper bound of all lengths, is counted on the host and
serves the only check that must happen before a kernel runs: is there room. What lies beyond a row's length is garbage
by contract: the attention op never lets it matter.

What a family must remember besides keys and values (nanochat's smear needs the previous embedding) lies in `state`.
"""

import torch
from torch import Tensor, nn

from errors import KestrelError


class KVCache:
    """Room for `max_len` tokens in each of `batch` rows.

    model      a model (its shape, context limit, dtype and device are taken), or just (n_layer, n_kv_head, head_dim)
    k, v       [L, B, S, Hkv, D]
    lengths    [B] int32, on the device: how many tokens each row holds
    """

    block_table = None  # rows lie in one piece

    def __init__(
        self,
        model: nn.Module | tuple[int, int, int],
        batch: int,
        max_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(model, nn.Module):
            limit = model.context_len
            max_len = limit if max_len is None else max_len
            if max_len > limit:
                raise KestrelError(
                    f"this model sees at most {limit} tokens at once (prompt and answer), {max_len} needed"
                )
            n_layer, n_kv_head, head_dim = model.cache_shape
            dtype, device = dtype or model.dtype, device or next(model.parameters()).device
        else:
            n_layer, n_kv_head, head_dim = model
        self.k = torch.empty(n_layer, batch, max_len, n_kv_head, head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.state: dict[str, Tensor] = {}
        self.filled = 0

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def max_len(self) -> int:
        return self.k.shape[2]

    @property
    def is_empty(self) -> bool:
        return self.filled == 0

    def reserve(self, n_tokens: int) -> None:
        """Begin a call that brings `n_tokens` tokens a row: check the room."""
        if self.filled + n_tokens > self.max_len:
            raise KestrelError(
                f"the context is full: {self.filled} tokens are cached and {n_tokens} more do not fit "
                f"into its {self.max_len}; shorten the prompt or ask for fewer tokens"
            )
        self.coming = n_tokens
        self.ends = self.lengths + n_tokens

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v [B, S, Hkv, D] of a layer, to be written to behind what each row holds."""
        return self.k[layer], self.v[layer]

    def advance(self, n_tokens: int | Tensor) -> None:
        """End a call: the tokens written count from now on; a tensor [B] says how many of each row are real."""
        self.lengths += n_tokens
        self.filled += self.coming

    def recall(self, name: str, like: Tensor) -> Tensor:
        """What was remembered under `name`; zeros of `like`'s shape and dtype in the beginning."""
        if name not in self.state:
            self.state[name] = torch.zeros_like(like)
        return self.state[name]

    def remember(self, name: str, value: Tensor, after_each: Tensor | None = None) -> None:
        """Keep `value` for the next call, in the memory it always had (a captured graph reads the same address)."""
        self.state[name].copy_(value)

    def expand(self, num: int) -> "KVCache":
        """A new cache whose `num` rows all continue row 0: one prefill, many samples."""
        n_layer, _, max_len, n_kv_head, head_dim = self.k.shape
        other = KVCache((n_layer, n_kv_head, head_dim), num, max_len, self.k.dtype, self.k.device)
        other.k[:, :, : self.filled] = self.k[:, :1, : self.filled]
        other.v[:, :, : self.filled] = self.v[:, :1, : self.filled]
        other.lengths.copy_(self.lengths[:1].expand(num))
        other.state = {name: value[:1].repeat_interleave(num, dim=0) for name, value in self.state.items()}
        other.filled = self.filled
        return other

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.lengths.zero_()
        for value in self.state.values():
            value.zero_()
        self.filled = 0
