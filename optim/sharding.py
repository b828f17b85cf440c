"""Sharing the optimizer's work among ranks: who owns which rows, and the two collectives that move them.

Every call starts its communication at once and returns a function that waits for the result, so that the optimizer can
start all of them before it needs any. One process owns everything and its functions return what they were given.

Rows are shared out in equal blocks of ceil(n / W). When W does not divide n the last blocks are short or empty, and
only the messages, never the state, are padded.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; the GPU builds we test (2.11) have only the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """The processes that train together: this one's number, how many there are, and what they exchange."""

    def __init__(self, group: "dist.ProcessGroup | None" = None, dtype: torch.dtype = torch.float32) -> None:
        """dtype: in what the rows of gradients travel; they are averaged in it, and fp32 again when they arrive"""
        self.group, self.dtype = group, dtype
        initialised = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if initialised else 0
        self.size = dist.get_world_size(group) if initialised else 1

    def share(self, n: int) -> slice:
        """The rows of n that this rank owns."""
        block = self._block(n)
        return slice(min(self.rank * block, n), min((self.rank + 1) * block, n))

    def average_rows(self, x: Tensor) -> Callable[[], Tensor]:
        """Start averaging x [n, …] over the ranks; the result is this rank's rows of it."""
        if self.size == 1:
            return lambda: x
        block, mine = self._block(len(x)), self.share(len(x))
        padded = _pad_rows(x.to(self.dtype), block * self.size)
        out = padded.new_empty(block, *x.shape[1:])
        work = _reduce_scatter(out, padded, op=dist.ReduceOp.AVG, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out[: mine.stop - mine.start].to(x.dtype)

        return wait

    def average_all(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Start averaging small tensors over the ranks, in one message; the result is all of them, on every rank."""
        if self.size == 1 or not tensors:
            return lambda: tensors
        flat = torch.cat([x.flatten() for x in tensors])
        work = dist.all_reduce(flat, op=dist.ReduceOp.AVG, group=self.group, async_op=True)

        def wait() -> list[Tensor]:
            work.wait()
            return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]

        return wait

    def gather_rows(self, rows: Tensor, n: int) -> Callable[[], Tensor]:
        """Start collecting every rank's rows; the result is all n of them, on every rank."""
        if self.size == 1:
            return lambda: rows
        block = self._block(n)
        out = rows.new_empty(block * self.size, *rows.shape[1:])
        padded = _pad_rows(rows, block)
        work = _all_gather(out, padded, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out[:n]

        return wait

    def gather_into(self, whole: Tensor, rows: Tensor) -> Callable[[], None]:
        """Start collecting every rank's rows into `whole`, of which `rows` is this rank's part."""
        if self.size == 1:
            return lambda: None
        if len(whole) % self.size == 0:
            return _all_gather(whole, rows, group=self.group, async_op=True).wait
        wait = self.gather_rows(rows, len(whole))
        return lambda: whole.copy_(wait())

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def _block(self, n: int) -> int:
        return -(-n // self.size)


def _pad_rows(x: Tensor, n: int) -> Tensor:
    """x itself if it has n rows, else a copy with zero rows at its end."""
    if len(x) == n:
        return x.contiguous()
    padded = x.new_zeros(n, *x.shape[1:])
    padded[: len(x)] = x
    return padded
