"""The embedding:  y = e,  e = table[token], and the gradient of a table, which value_embedding.py shares.

Backward, with d the incoming gradient and g a gate (1 here):   dtable[r] = Σ over the tokens that are r of g · d

The gradient of a table is summed without atomics. Tokens are sorted, so that those of one row of the table lie together
(`order` says where each came from), and then each row is written once, zeros too, by the program that sums its
entries. So that a frequent token does not keep one program busy while the others have gone home, the sorted list is cut
into chunks of equal length, and a kernel before sums those chunks that are of one token throughout: a row is then the sum
of such chunks and of what sticks out at both ends. That kernel also marks where in the list each row begins and ends.
Which values are added in which order follows from the tokens alone. With gates the same pass over d and the table gives
Σ over a head's channels of d · e, too. Forward keeps the tokens alone.

A token outside the table is an IndexError on a CPU. A GPU would have to be waited for: there its values are NaN, and so
is all that is computed from them. Nothing is read or written outside of the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.embedding import check_embedding
from kernels_torch.masters import take_gradient
from kernels_triton.autograd import differentiable_once
from kernels_triton.launch import Tile, block_of, ceil_div, check_gpu, launch
from kernels_triton.rows import stride_of, values_side_by_side

# Rows × columns at a time, and warps for the widest block of columns. µs between two events on an H200, L2 flushed, bf16,
# of 65536 tokens × 768 and a vocabulary of 32768, distributed as words are; a plain copy of 201 MB takes 52.9. What has no
# number has not been measured.
GATHER = Tile(BT=4, BD=256, warps=1)      # 43.1; (2, 1024, 4) 45.5, (8, 1024, 8) 45.5, all with ordinary stores

# The gradient of the table, with tokens sorted as int32, took 129 µs; with chunks of 64 entries 138 (of which 2 entries at
# a time made 156, and 8 made 150), with 128 168: in a chunk one program goes from entry to entry.
CHUNK = 32                                # sorted entries that are summed ahead when they are all of one token
CHUNKS = Tile(BT=8, BD=1024, warps=4)     # 4 in the numbers above
ENTRIES = Tile(BT=4, BD=1024, warps=4)
GATED_ENTRIES = Tile(BT=2, BD=1024, warps=4)  # compiled for sm_90, 4 entries at a time take 96 registers and spill
SHORT = 2**16  # rows that 16 bits tell apart: 65536 tokens are sorted as int16 in 36 µs, as int32 in 51, as int64 in 80


@triton.jit
def _embedding_fwd_kernel(
    tokens, table, y, stride_token, stride_v, stride_d, N, V,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    b_token = tl.load(tokens + o_n * stride_token, mask=o_n < N, other=0).to(tl.int64)                  # [BT]
    inside = (b_token >= 0) & (b_token < V)
    p_e = table + b_token[:, None] * stride_v + o_d[None, :] * stride_d
    b_e = tl.load(p_e, mask=m & inside[:, None], other=float("nan"))                                    # [BT, BD]
    # What is written makes way in the L2 cache for the table, whose rows are asked for again: 45.5 → 42.2 µs at (8, 1024, 8).
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_e.to(y.dtype.element_ty), mask=m, cache_modifier=".cs")


@triton.jit
def _add_entries(
    b_sum, b_e, d, order, sigma, dots, begin, n_head, tail, n, stride_n, o_h, o_hd, m,
    H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):
    """b_sum [BH · BD] + Σ of d, times its gate, over n sorted entries: n_head from `begin` on, the others from `tail` on.

    With `dots`, leaves d · e there for each of them, e being the row of the table that they all name, b_e.
    """
    for i_n in range(0, n, BT):
        o_i = i_n + tl.arange(0, BT)
        m_i = o_i < n
        o_i = tl.where(o_i < n_head, begin + o_i, tail - n_head + o_i)
        b_n = tl.load(order + o_i, mask=m_i, other=0)                                                   # [BT]
        p_d = d + b_n[:, None] * stride_n + o_hd[None, :]
        b_d = tl.load(p_d, mask=m_i[:, None] & m[None, :], other=0.0).to(b_sum.dtype)                   # [BT, BH · BD]
        if sigma is not None:
            o_nh = b_n[:, None] * H + o_h[None, :]
            m_nh = m_i[:, None] & (o_h < H)[None, :]
            if dots is not None:
                b_dot = tl.sum(tl.reshape(b_d * b_e[None, :], [BT, BH, BD]), 2)                         # [BT, BH]
                tl.store(dots + o_nh, b_dot, mask=m_nh)
            b_sigma = tl.load(sigma + o_nh, mask=m_nh, other=0.0)                                       # [BT, BH]
            b_d *= tl.reshape(tl.broadcast_to(b_sigma[:, :, None], [BT, BH, BD]), [BT, BH * BD])
        b_sum += tl.sum(b_d, 0)
    return b_sum


@triton.jit
def _chunks_kernel(
    d, sorted_tokens, order, bounds, chunks, table, sigma, dots, stride_n, stride_h, stride_tv, stride_td, N, V,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):
    """Where each row begins and ends in the sorted list, and the sum of each chunk of L entries that are of one row.

    BITS undoes the sign that tokens beyond 2¹⁵ have when they are sorted as int16.
    """
    i_l = tl.program_id(0).to(tl.int64)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        o_i = i_l * L + tl.arange(0, L)
        m_i = o_i < N
        b_token = tl.load(sorted_tokens + o_i, mask=m_i, other=0).to(tl.int32) & BITS                          # [L]
        b_before = tl.load(sorted_tokens + o_i - 1, mask=m_i & (o_i > 0), other=0).to(tl.int32) & BITS         # [L]
        b_after = tl.load(sorted_tokens + o_i + 1, mask=o_i + 1 < N, other=0).to(tl.int32) & BITS              # [L]
        m_i &= (b_token >= 0) & (b_token < V)
        tl.store(bounds + b_token, o_i, mask=m_i & ((o_i == 0) | (b_token != b_before)))
        tl.store(bounds + V + b_token, o_i + 1, mask=m_i & ((o_i + 1 == N) | (b_token != b_after)))
    i_last = tl.minimum((i_l + 1) * L, N) - 1
    token = tl.load(sorted_tokens + i_l * L).to(tl.int32) & BITS
    same = token == tl.load(sorted_tokens + i_last).to(tl.int32) & BITS
    if same & ((i_l + 1) * L <= N) & (token >= 0) & (token < V):
        i_d = tl.program_id(2).to(tl.int64)
        o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
        o_ch = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH * BD) // BD
        o_cd = i_d * BD + tl.arange(0, BH * BD) % BD
        m = (o_ch < H) & (o_cd < D)
        b_sum = tl.zeros([BH * BD], dtype=chunks.dtype.element_ty)                                      # [BH · BD]
        b_e = b_sum
        if dots is not None:
            dots += i_d * N * H
            p_e = table + token.to(tl.int64) * stride_tv + (o_ch * D + o_cd) * stride_td
            b_e = tl.load(p_e, mask=m, other=0.0).to(d.dtype.element_ty).to(b_sum.dtype)                # [BH · BD]
        b_sum = _add_entries(
            b_sum, b_e, d, order, sigma, dots, i_l * L, L, 0, L, stride_n, o_h, o_ch * stride_h + o_cd, m, H, BT, BH, BD
        )
        tl.store(chunks + i_l * H * D + o_ch * D + o_cd, b_sum, mask=m)


@triton.jit
def _table_bwd_kernel(
    d, order, bounds, chunks, table, sigma, dots, dtable, stride_n, stride_h, stride_tv, stride_td, N, V,
    H: tl.constexpr, D: tl.constexpr, gate_range: tl.constexpr, L: tl.constexpr, ADD: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):
    """A row of dtable: the sum of its whole chunks and of its entries before and behind them. With ADD that is added to what
    the row has, and nothing happens to rows that no token names."""
    i_v, i_d = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    o_ch = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH * BD) // BD
    o_cd = i_d * BD + tl.arange(0, BH * BD) % BD
    o_c = o_ch * D + o_cd
    m = (o_ch < H) & (o_cd < D)
    begin, end = tl.load(bounds + i_v), tl.load(bounds + V + i_v)
    first, last = tl.cdiv(begin, L), end // L
    some = first < last
    n_head = tl.where(some, first * L, end) - begin
    tail = tl.where(some, last * L, end)
    b_sum = tl.zeros([BH * BD], dtype=chunks.dtype.element_ty)                                          # [BH · BD]
    b_e = b_sum
    if dots is not None:
        dots += i_d * N * H
        p_e = table + i_v * stride_tv + o_c * stride_td
        b_e = tl.load(p_e, mask=m & (o_c < tl.where(begin < end, H * D, 0)), other=0.0)                 # [BH · BD]
        b_e = b_e.to(d.dtype.element_ty).to(b_sum.dtype)
    b_sum = _add_entries(
        b_sum, b_e, d, order, sigma, dots, begin, n_head, tail, n_head + end - tail,
        stride_n, o_h, o_ch * stride_h + o_cd, m, H, BT, BH, BD,
    )
    if dtable is not None:
        for i_l in range(first, last, BT):
            o_l = i_l + tl.arange(0, BT)
            p_l = chunks + o_l[:, None] * (H * D) + o_c[None, :]
            b_sum += tl.sum(tl.load(p_l, mask=(o_l < last)[:, None] & m[None, :], other=0.0), 0)
        b_sum *= gate_range
        if ADD:
            m &= o_c < tl.where(begin < end, H * D, 0)
            b_sum += tl.load(dtable + i_v * H * D + o_c, mask=m, other=0.0).to(b_sum.dtype)
        tl.store(dtable + i_v * H * D + o_c, b_sum.to(dtable.dtype.element_ty), mask=m)


def _embedding_fwd(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens [N], table [V, D] → y [N, D]."""
    N, (V, D) = tokens.shape[0], table.shape
    y = torch.empty((N, D), dtype=dtype, device=table.device)
    if y.numel() > 0:
        BD = block_of(D, GATHER.BD)
        launch(
            _embedding_fwd_kernel, (ceil_div(N, GATHER.BT), ceil_div(D, BD)),
            tokens=tokens, table=table, y=y, stride_token=tokens.stride(0), stride_v=table.stride(0),
            stride_d=table.stride(1), N=N, V=V, D=D, BT=GATHER.BT, BD=BD, num_warps=GATHER.warps,
        )
    return y


def heads_and_columns(H: int, D: int, tile: Tile) -> tuple[int, int, int]:
    """Blocks of BH heads and BD columns of each, and warps: several heads where one has few columns."""
    BD = block_of(D, tile.BD)
    BH = block_of(H, tile.BD // BD, max(1, 256 // BD))
    return BH, BD, max(1, tile.warps * BH * BD // tile.BD)


def _table_bwd(
    d: Tensor, tokens: Tensor, V: int, dtype: torch.dtype | None, table: Tensor | None, sigma: Tensor | None,
    gate_range: float, wide: torch.dtype, total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """d [N, H, D], tokens [N], table [V, H · D], σ [N, H] → dtable [V, H · D] and d · e [C, N, H] for C blocks of columns.

    The first in `dtype`, or None without, or `total` and it added to that; the second where the table is given. Both are
    summed in `wide`.
    """
    N, H, D = d.shape
    tile = ENTRIES if sigma is None else GATED_ENTRIES
    BH, BD, warps = heads_and_columns(H, D, tile)
    blocks = (ceil_div(H, BH), ceil_div(D, BD))
    dtable = total
    if total is None and dtype is not None:
        dtable = torch.empty((V, H * D), dtype=dtype, device=d.device)
    dots = None if table is None else torch.empty((blocks[1], N, H), dtype=wide, device=d.device)
    if V * H * D == 0:
        return dtable, dots
    short = V <= SHORT
    sorted_tokens, order = torch.sort(tokens.to(torch.int16 if short else torch.int32), stable=True)
    bounds = torch.zeros((2, V), dtype=torch.int64, device=d.device)
    n_chunks = ceil_div(N, CHUNK)
    chunks = torch.empty((n_chunks, H * D), dtype=wide, device=d.device)
    inputs = dict(
        d=d, order=order, bounds=bounds, chunks=chunks, table=table, sigma=sigma, dots=dots, stride_n=d.stride(0),
        stride_h=d.stride(1), stride_tv=stride_of(table, 0), stride_td=stride_of(table, 1), N=N, V=V, H=H, D=D,
        L=CHUNK, BH=BH, BD=BD, num_warps=warps,
    )
    if N > 0:
        bits = 2**16 - 1 if short else -1
        launch(_chunks_kernel, (n_chunks, *blocks), **inputs, sorted_tokens=sorted_tokens, BITS=bits, BT=CHUNKS.BT)
    add = total is not None
    launch(_table_bwd_kernel, (V, *blocks), **inputs, dtable=dtable, gate_range=gate_range, ADD=add, BT=tile.BT)
    return dtable, dots


def refuse_tokens_outside(tokens: Tensor, V: int) -> None:
    """F.embedding's error, where asking costs nothing."""
    if tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.compiler.is_compiling():
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= V:
            raise IndexError(f"token {low if low < 0 else high} is outside the table of {V} rows")


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.owner = table
        return _embedding_fwd(tokens.reshape(-1), table, dtype).view(*tokens.shape, table.shape[1])

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        rows = values_side_by_side(d.reshape(tokens.numel(), 1, d.shape[-1]))
        owner, total = ctx.owner, take_gradient(ctx.owner)
        wide = torch.promote_types(owner.dtype, torch.float32)
        dtable, _ = _table_bwd(rows, tokens.reshape(-1), len(owner), owner.dtype, None, None, 1.0, wide, total)
        return None, dtable, None


def embedding(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """kernels_torch.embedding, gathered and cast in one pass. Arguments: see kernels_torch.embedding."""
    check_embedding(tokens, table, dtype)
    check_gpu(tokens=tokens)
    refuse_tokens_outside(tokens, table.shape[0])
    return _Embedding.apply(tokens, table, dtype)
