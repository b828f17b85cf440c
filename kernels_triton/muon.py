"""Muon around `newton_schulz`, each value read and written as seldom as can be: see kernels_torch.muon for the formulas.

    muon_momentum    one pass: reads G and M, writes M and U in the dtype of the iteration; a program has whole rows, so
                     that the norm of a row needs no second look. 14 bytes a parameter (fp32, U in bf16)
    muon_update      X is read for the mean squares of its rows or columns, one program a matrix turns these into a
                     factor for each row or column, and P moves in a pass over X and P: 12 bytes, and 2 for a bf16 copy

Matrices that lie apart, gradients and parameters, are reached by a table of their addresses (tables.py) and never copied
together. Sums go by lines of a buffer that one program each writes and one program adds up in order: no atomics.
Momentum, learning rate and decay are read on the device, where a captured CUDA graph finds those of its step.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.muon import Number, Stack, check_muon_momentum, check_muon_update
from kernels_triton.launch import Tile, ceil_div, check_gpu, launch, next_power_of_two
from kernels_triton.primitives import upcast
from kernels_triton.tables import aligned, table_of

# Not measured yet.
VALUES = 4096      # of a tile of whole rows
WIDEST = 8192      # rows up to this are held in registers; wider ones are read a second time, from L2
COLUMNS = Tile(BT=32, BD=128, warps=4)   # sums down columns: so many rows at a time
SPLIT = 256        # rows of a column that one program adds
ROWS = Tile(BT=4, BD=1024, warps=4)      # sums along rows
VECTOR = Tile(BT=1, BD=1024, warps=4)    # of the factors
DESCEND = Tile(BT=1, BD=2048, warps=4)


@triton.jit
def _matrix(like, table, i_k, column, stride_k, ALIGNED: tl.constexpr, BYTES: tl.constexpr = 16):
    """Where matrix i_k begins: by the table, or in a stack. ALIGNED: at a multiple of BYTES, or more, of which nothing is said."""
    if table is not None:
        p = tl.load(table + column).to(like.dtype)
    else:
        p = like + i_k * stride_k  # i_k has 64 bits, and so has the product; one matrix stays below 2³¹ values
    if ALIGNED:
        p = tl.multiple_of(p, BYTES)
    return p


@triton.jit(do_not_specialize_on_alignment=["u"])
def _muon_momentum_kernel(
    grad, table, momentum, new_momentum, u, squares, mu, r, c, n_rows,
    EQUILIBRATE: tl.constexpr, ALIGNED: tl.constexpr, U_ALIGNED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """BT rows of one matrix: M, U and Σ G²."""
    i_k, i_t = (tl.program_id(0) // n_rows).to(tl.int64), tl.program_id(0) % n_rows
    grad = _matrix(grad, table, i_k, i_k, r * c, ALIGNED)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    first = i_k * r * c
    u = _matrix(u, None, i_k, 0, r * c, U_ALIGNED, 8)
    dtype: tl.constexpr = momentum.dtype.element_ty
    keep = tl.load(mu).to(dtype)
    b_squares = tl.zeros([BT], dtype=dtype)                                                             # [BT]
    b_norm = tl.zeros([BT], dtype=dtype)
    for i_d in range(tl.cdiv(c, BD)):
        m = (o_t < r)[:, None] & (i_d * BD + o_d < c)[None, :]
        o = o_t[:, None] * c + i_d * BD + o_d[None, :]
        b_g = tl.load(grad + o, mask=m, other=0.0).to(dtype)                                            # [BT, BD]
        b_m = tl.load(momentum + first + o, mask=m, other=0.0)                                          # [BT, BD]
        b_m += (1.0 - keep) * (b_g - b_m)
        tl.store(new_momentum + first + o, b_m, mask=m)
        b_squares += tl.sum(b_g * b_g, 1)
        b_g += keep * (b_m - b_g)
        b_norm += tl.sum(b_g * b_g, 1)
        if not EQUILIBRATE:
            tl.store(u + o, b_g.to(u.dtype.element_ty), mask=m)
    tl.store(squares + tl.program_id(0), tl.sum(b_squares, 0))
    if EQUILIBRATE:
        b_norm = 1.0 / tl.maximum(tl.sqrt(b_norm), 1e-6)
        for i_d in range(tl.cdiv(c, BD)):
            m = (o_t < r)[:, None] & (i_d * BD + o_d < c)[None, :]
            o = o_t[:, None] * c + i_d * BD + o_d[None, :]
            b_g = tl.load(grad + o, mask=m, other=0.0).to(dtype)
            b_m = tl.load(new_momentum + first + o, mask=m, other=0.0)  # each thread finds what it wrote
            b_g += keep * (b_m - b_g)
            tl.store(u + o, (b_g * b_norm[:, None]).to(u.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize_on_alignment=["u"])
def _muon_momentum_rows_kernel(
    grad, table, momentum, new_momentum, u, squares, mu, r, c, n_rows,
    EQUILIBRATE: tl.constexpr, ALIGNED: tl.constexpr, U_ALIGNED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):
    """The same with whole rows in registers: c ≤ BD."""
    i_k, i_t = (tl.program_id(0) // n_rows).to(tl.int64), tl.program_id(0) % n_rows
    grad = _matrix(grad, table, i_k, i_k, r * c, ALIGNED)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    first = i_k * r * c
    u = _matrix(u, None, i_k, 0, r * c, U_ALIGNED, 8)
    dtype: tl.constexpr = momentum.dtype.element_ty
    keep = tl.load(mu).to(dtype)
    m = (o_t < r)[:, None] & (o_d < c)[None, :]
    o = o_t[:, None] * c + o_d[None, :]
    b_g = tl.load(grad + o, mask=m, other=0.0).to(dtype)                                                # [BT, BD]
    b_m = tl.load(momentum + first + o, mask=m, other=0.0)                                              # [BT, BD]
    b_m += (1.0 - keep) * (b_g - b_m)
    tl.store(new_momentum + first + o, b_m, mask=m)
    tl.store(squares + tl.program_id(0), tl.sum(tl.sum(b_g * b_g, 1), 0))
    b_g += keep * (b_m - b_g)                                                                           # U
    if EQUILIBRATE:
        b_g *= (1.0 / tl.maximum(tl.sqrt(tl.sum(b_g * b_g, 1)), 1e-6))[:, None]
    tl.store(u + o, b_g.to(u.dtype.element_ty), mask=m)


@triton.jit
def _row_squares_kernel(x, lines, r, c, n_rows, BT: tl.constexpr, BD: tl.constexpr):
    """lines [K, r]: Σ X² of each row."""
    i_k, i_t = (tl.program_id(0) // n_rows).to(tl.int64), tl.program_id(0) % n_rows
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    x += i_k * r * c
    b_sum = tl.zeros([BT], dtype=lines.dtype.element_ty)                                                # [BT]
    for i_d in range(tl.cdiv(c, BD)):
        m = (o_t < r)[:, None] & (i_d * BD + o_d < c)[None, :]
        b_x = upcast(tl.load(x + o_t[:, None] * c + i_d * BD + o_d[None, :], mask=m, other=0.0))
        b_sum += tl.sum(b_x * b_x, 1)
    tl.store(lines + i_k * r + o_t, b_sum, mask=o_t < r)


@triton.jit
def _column_squares_kernel(x, lines, r, c, n_columns, n_splits, SPAN, BT: tl.constexpr, BD: tl.constexpr):
    """lines [K, n_splits, c]: Σ X² of SPAN rows of each column."""
    i_k, i_in = (tl.program_id(0) // (n_columns * n_splits)).to(tl.int64), tl.program_id(0) % (n_columns * n_splits)
    i_d, i_s = i_in % n_columns, i_in // n_columns
    o_t, o_d = tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    x += i_k * r * c
    b_sum = tl.zeros([BT, BD], dtype=lines.dtype.element_ty)                                            # [BT, BD]
    for i_t in range(tl.cdiv(SPAN, BT)):
        t = i_s * SPAN + i_t * BT + o_t
        m = (t < r)[:, None] & (o_d < c)[None, :]
        b_x = upcast(tl.load(x + t[:, None] * c + o_d[None, :], mask=m, other=0.0))        # [BT, BD]
        b_sum += b_x * b_x
    tl.store(lines + (i_k * n_splits + i_s) * c + o_d, tl.sum(b_sum, 0), mask=o_d < c)


@triton.jit
def _as(number, dtype: tl.constexpr):
    """An integer argument as a floating-point number; Triton makes a 1 a constant, which has no `to`."""
    return tl.full([], 0.0, dtype) + number


@triton.jit
def _mean_square(lines, i_k, n_splits, n, o, m):
    """Σ over the splits of lines [K, n_splits, n], at places o [BD]."""
    b_sum = tl.load(lines + i_k * n_splits * n + o, mask=m, other=0.0)                                  # [BD]
    for i in range(1, n_splits):
        b_sum += tl.load(lines + (i_k * n_splits + i) * n + o, mask=m, other=0.0)
    return b_sum


@triton.jit
def _factors_kernel(
    lines, second_moment, new_second_moment, factors, beta2, n, length, n_splits, short,
    SNAP: tl.constexpr, BD: tl.constexpr,
):
    """factors [K, n] of rows or columns of `length` values: √min(r, c) / ‖X‖ · q · ‖X‖ / ‖X q‖."""
    i_k = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = lines.dtype.element_ty
    second_moment += i_k * n
    new_second_moment += i_k * n
    factors += i_k * n
    keep = tl.load(beta2).to(dtype)
    b_total = tl.zeros([BD], dtype=dtype)                                                               # [BD]
    for i in range(tl.cdiv(n, BD)):
        o = i * BD + tl.arange(0, BD)
        b_total += _mean_square(lines, i_k, n_splits, n, o, o < n)
    total = tl.sum(b_total, 0)
    scale = tl.full([], 1.0, dtype)
    if SNAP:
        norm = tl.maximum(tl.sqrt(total), 1e-10)
        scale = tl.sqrt(_as(short, dtype)) / norm
    b_before, b_after = tl.zeros([BD], dtype=dtype), tl.zeros([BD], dtype=dtype)
    for i in range(tl.cdiv(n, BD)):
        o = i * BD + tl.arange(0, BD)
        b_v = _mean_square(lines, i_k, n_splits, n, o, o < n) * (scale * scale / _as(length, dtype))      # [BD]
        b_s = tl.load(second_moment + o, mask=o < n, other=0.0)
        b_s += (1.0 - keep) * (b_v - b_s)
        tl.store(new_second_moment + o, b_s, mask=o < n)
        b_q = 1.0 / tl.sqrt(tl.maximum(b_s, 1e-10))
        tl.store(factors + o, b_q, mask=o < n)
        b_before += b_v
        b_after += b_v * b_q * b_q
    scale *= tl.sqrt(tl.sum(b_before, 0)) / tl.maximum(tl.sqrt(tl.sum(b_after, 0)), 1e-10)
    for i in range(tl.cdiv(n, BD)):
        o = i * BD + tl.arange(0, BD)
        b_q = tl.load(factors + o, mask=o < n, other=0.0)  # each thread finds what it wrote
        tl.store(factors + o, b_q * scale, mask=o < n)


@triton.jit(do_not_specialize_on_alignment=["x"])
def _descend_kernel(
    param, new_param, copy, table, x, factors, lr, weight_decay, r, c, n_blocks,
    BY_ROW: tl.constexpr, ALIGNED: tl.constexpr, X_ALIGNED: tl.constexpr, BD: tl.constexpr,
):
    """BD values of a matrix, in the order of memory."""
    i_k, i_b = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    size = r * c
    o = i_b * BD + tl.arange(0, BD)
    m = o < size
    param = _matrix(param, table, i_k, 2 * i_k, size, ALIGNED)
    if table is not None:
        new_param = param
    else:
        new_param += i_k * size
    dtype: tl.constexpr = factors.dtype.element_ty
    x = _matrix(x, None, i_k, 0, size, X_ALIGNED, 8)
    b_x = tl.load(x + o, mask=m, other=0.0).to(dtype)                                      # [BD]
    b_p = tl.load(param + o, mask=m, other=0.0).to(dtype)                                               # [BD]
    if BY_ROW:
        b_x *= tl.load(factors + i_k * r + o // c, mask=m, other=0.0)
    else:
        b_x *= tl.load(factors + i_k * c + o % c, mask=m, other=0.0)
    step = tl.load(lr) * tl.sqrt(tl.maximum(_as(r, tl.float64) / c, 1.0))  # fp64
    decay = (step * tl.load(weight_decay)).to(dtype)
    b_p -= tl.where(b_x * b_p >= 0, decay, 0.0) * b_p
    b_p -= step.to(dtype) * b_x
    tl.store(new_param + o, b_p.to(new_param.dtype.element_ty), mask=m)
    if copy is not None:
        copy = _matrix(copy, table, i_k, 2 * i_k + 1, size, ALIGNED, 8)
        tl.store(copy + o, b_p.to(copy.dtype.element_ty), mask=m)


def on_device(number: Number, device: torch.device) -> Tensor:
    """A 0-d fp64 tensor: what was given, or made by a kernel, which waits for nothing."""
    if isinstance(number, Tensor):
        return number.to(torch.float64)
    return torch.full((), float(number), dtype=torch.float64, device=device)


def where_they_are(matrices: Stack, *others: Sequence[Tensor] | None) -> tuple[Tensor, Tensor | None, bool]:
    """A stack, no table, and whether all its matrices begin at multiples of 16 bytes; or the first of several, their
    table, in which `others` have columns of their own, and the same."""
    if isinstance(matrices, Tensor):
        fits = matrices.shape[1] * matrices.shape[2] * matrices.element_size() % 16 == 0
        return matrices, None, fits and (torch.compiler.is_compiling() or aligned(matrices))
    for matrix in matrices:
        if matrix.dtype != matrices[0].dtype:
            raise ValueError(f"matrices of one call must have one dtype, got {matrices[0].dtype} and {matrix.dtype}")
    columns = [matrices, *(other for other in others if other is not None)]
    n_columns = 1 + len(others)
    rows = [tuple(m.data_ptr() for m in row) + (0,) * (n_columns - len(row)) for row in zip(*columns)]
    return matrices[0], table_of(rows, matrices[0].device), all(aligned(*column) for column in columns)


def eightfold(stack: Tensor) -> bool:
    """Whether all matrices of a stack begin at multiples of 8 bytes."""
    fits = stack.shape[1] * stack.shape[2] * stack.element_size() % 8 == 0
    return fits and (torch.compiler.is_compiling() or stack.data_ptr() % 8 == 0)


def in_one_piece(matrices: Stack) -> Stack:
    """Every matrix contiguous."""
    if isinstance(matrices, Tensor):
        return matrices.contiguous()
    return [matrix.contiguous() for matrix in matrices]


def refuse_scattered(name: str, tensors: Stack | Sequence[Tensor] | None) -> None:
    """What is written in place must be contiguous: a copy would be written instead."""
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors or ():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous to be written in place, got strides {tensor.stride()}")


def _muon_momentum(
    grads: Stack, momentum: Tensor, mu: Tensor, equilibrate: bool, dtype: torch.dtype, in_place: bool
) -> tuple[Tensor, Tensor, Tensor]:
    K, r, c = momentum.shape
    new = momentum if in_place else torch.empty_like(momentum)
    u = torch.empty((K, r, c), dtype=dtype, device=momentum.device)
    if u.numel() == 0:
        return u, new, torch.zeros(K, dtype=momentum.dtype, device=momentum.device)
    grad, table, fits = where_they_are(grads)
    whole = c <= WIDEST
    BD = next_power_of_two(c) if whole else VALUES
    BT = min(max(1, VALUES // BD), next_power_of_two(r))
    n_rows = ceil_div(r, BT)
    squares = torch.empty((K, n_rows), dtype=momentum.dtype, device=momentum.device)
    launch(
        _muon_momentum_rows_kernel if whole else _muon_momentum_kernel, (K * n_rows,), grad=grad, table=table,
        momentum=momentum, new_momentum=new, u=u, squares=squares, mu=mu, r=r, c=c, n_rows=n_rows,
        EQUILIBRATE=equilibrate, ALIGNED=fits, U_ALIGNED=eightfold(u), BT=BT, BD=BD, num_warps=4 if BT * BD <= 4096 else 8,
    )
    return u, new, squares.sum(1)


def _muon_factors(x: Tensor, second_moment: Tensor, new: Tensor, beta2: float, snap: bool) -> Tensor:
    """[K, r] or [K, c]: what each row or column of X is multiplied with; fills `new` with the new second moment."""
    (K, r, c), by_row, device = x.shape, x.shape[1] >= x.shape[2], x.device
    n, length = (r, c) if by_row else (c, r)
    n_splits = 1 if by_row else ceil_div(r, SPLIT)
    lines = torch.empty((K, n_splits, n), dtype=new.dtype, device=device)
    if by_row:
        n_rows = ceil_div(r, ROWS.BT)
        launch(
            _row_squares_kernel, (K * n_rows,), x=x, lines=lines, r=r, c=c, n_rows=n_rows, BT=ROWS.BT,
            BD=min(ROWS.BD, next_power_of_two(c)), num_warps=ROWS.warps,
        )
    else:
        n_columns = ceil_div(c, COLUMNS.BD)
        launch(
            _column_squares_kernel, (K * n_columns * n_splits,), x=x, lines=lines, r=r, c=c, n_columns=n_columns,
            n_splits=n_splits, SPAN=SPLIT, BT=COLUMNS.BT, BD=COLUMNS.BD, num_warps=COLUMNS.warps,
        )
    factors = torch.empty((K, n), dtype=new.dtype, device=device)
    launch(
        _factors_kernel, (K,), lines=lines, second_moment=second_moment, new_second_moment=new, factors=factors,
        beta2=on_device(beta2, device), n=n, length=length, n_splits=n_splits, short=min(r, c), SNAP=snap,
        BD=min(VECTOR.BD, next_power_of_two(n)), num_warps=VECTOR.warps,
    )
    return factors


def _muon_update(
    params: Stack, x: Tensor, second_moment: Tensor, lr: Tensor, weight_decay: Tensor, beta2: float, snap: bool,
    copies: Sequence[Tensor] | None, in_place: bool,
) -> tuple[Stack, Tensor]:
    K, r, c = x.shape
    new = second_moment if in_place else torch.empty_like(second_moment)
    if isinstance(params, Tensor) and copies is not None:
        params = list(params.unbind())
    if not in_place and not isinstance(params, Tensor):
        raise ValueError("matrices that lie apart, and copies, are written in place only: pass in_place=True")
    new_params = params if in_place else torch.empty_like(params)
    if x.numel() == 0:
        return new_params, new
    factors = _muon_factors(x, second_moment, new, beta2, snap)
    param, table, fits = where_they_are(params, copies)
    n_blocks = ceil_div(r * c, DESCEND.BD)
    launch(
        _descend_kernel, (K * n_blocks,), param=param, new_param=param if in_place else new_params,
        copy=copies[0] if copies else None, table=table, x=x, factors=factors, lr=lr, weight_decay=weight_decay,
        r=r, c=c, n_blocks=n_blocks, BY_ROW=r >= c, ALIGNED=fits, X_ALIGNED=eightfold(x), BD=DESCEND.BD, num_warps=DESCEND.warps,
    )
    return new_params, new


def muon_momentum(
    grads: Stack,
    momentum: Tensor,
    mu: Number,
    *,
    equilibrate: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels_torch.muon_momentum, in one pass. Arguments: see kernels_torch.muon_momentum."""
    check_muon_momentum(grads, momentum, mu)
    check_gpu(momentum=momentum)
    if in_place:
        refuse_scattered("momentum", momentum)
    mu = on_device(mu, momentum.device)
    return _muon_momentum(in_one_piece(grads), momentum.contiguous(), mu, equilibrate, dtype, in_place)


def muon_update(
    params: Stack,
    x: Tensor,
    second_moment: Tensor,
    lr: Number,
    weight_decay: Number,
    *,
    beta2: float = 0.9,
    snap: bool = True,
    copies: Sequence[Tensor] | None = None,
    in_place: bool = False,
) -> tuple[Stack, Tensor]:
    """kernels_torch.muon_update, in two passes over X and one over P. Arguments: see kernels_torch.muon_update."""
    check_muon_update(params, x, second_moment, lr, weight_decay)
    check_gpu(x=x)
    if in_place:
        refuse_scattered("params", params)
        refuse_scattered("second_moment", second_moment)
    refuse_scattered("copies", copies)
    lr, weight_decay = on_device(lr, x.device), on_device(weight_decay, x.device)
    together = in_one_piece(params)
    new, second_moment = _muon_update(
        together, x.contiguous(), second_moment.contiguous(), lr, weight_decay, beta2, snap, copies, in_place
    )
    return params if in_place else new, second_moment
