"""AdamW on many tensors in one launch: see kernels_torch.adamw for the formulas.

Each value is read and written once, 28 bytes a parameter in fp32 and 2 more for a bf16 copy. A table holds the addresses
of every tensor (tables.py) and which program is its first: a program has CHUNK values of one tensor. Learning rate, step
and decays are read on the device, where a captured CUDA graph finds those of its step; the powers of the decays are
taken in fp64. Sums of g² go by a line each, and one program a tensor adds them in order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.adamw import AdamWRates, Tensors, check_adamw_update
from kernels_triton.launch import ceil_div, check_gpu, launch, next_power_of_two
from kernels_triton.muon import refuse_scattered
from kernels_triton.tables import aligned, table_of

# Not measured yet.
CHUNK, BLOCK, WARPS = 8192, 1024, 4  # values of a program, values at a time
# Columns of the table: p, g, m, v, copy, rates, number of values, first program.


@triton.jit
def _adamw_block(
    p, g, m, v, new_p, new_m, new_v, copy, wanted, o, N, keep, step_size, root, rest1, beta2, rest2, eps, FULL: tl.constexpr,
):
    """Values at places o [BD] of a tensor, the step along them, and their g²."""
    inside = None if FULL else o < N
    b_m = tl.load(m + o, mask=inside)                                                                   # [BD]
    b_v = tl.load(v + o, mask=inside)
    b_g = tl.load(g + o, mask=inside).to(b_m.dtype)
    b_p = tl.load(p + o, mask=inside).to(b_m.dtype)
    if not FULL:
        b_g = tl.where(inside, b_g, 0.0)
    b_m += rest1 * (b_g - b_m)
    b_v = b_v * beta2 + rest2 * b_g * b_g
    b_p = b_p * keep - step_size * (b_m / (tl.sqrt(b_v) * root + eps))
    tl.store(new_m + o, b_m, mask=inside)
    tl.store(new_v + o, b_v, mask=inside)
    tl.store(new_p + o, b_p.to(new_p.dtype.element_ty), mask=inside)
    if copy is not None:
        tl.store(copy + o, b_p.to(copy.dtype.element_ty), mask=(o < N) & (tl.zeros_like(o) + wanted != 0))
    return b_g * b_g


@triton.jit
def _adamw_kernel(
    p, g, m, v, new_p, new_m, new_v, copy, rates, N, table, n, lines,
    BN: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr,
):
    """CHUNK values of one tensor, in place if there is a table. lines: Σ g² of each program."""
    i, wanted = tl.program_id(0), 1
    if table is not None:
        o_n = tl.arange(0, BN)
        b_first = tl.load(table + o_n * 8 + 7, mask=o_n < n, other=2**62)                               # [BN]
        row = table + (tl.sum((b_first <= i).to(tl.int32), 0) - 1) * 8
        p, g = tl.load(row).to(p.dtype), tl.load(row + 1).to(g.dtype)
        m, v = tl.load(row + 2).to(m.dtype), tl.load(row + 3).to(v.dtype)
        rates = tl.load(row + 5).to(rates.dtype)
        N = tl.load(row + 6)
        i -= tl.load(row + 7)
        if ALIGNED:
            p, g, m, v = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16), tl.multiple_of(v, 16)
        if copy is not None:
            wanted = tl.load(row + 4)  # 0 where there is none
            copy = wanted.to(copy.dtype)
            if ALIGNED:
                copy = tl.multiple_of(copy, 8)
        new_p, new_m, new_v = p, m, v
    dtype: tl.constexpr = m.dtype.element_ty
    lr, step, eps = tl.load(rates), tl.load(rates + 1), tl.load(rates + 4).to(dtype)
    beta1, beta2 = tl.load(rates + 2), tl.load(rates + 3)
    keep = (1.0 - lr * tl.load(rates + 5)).to(dtype)
    step_size = (lr / (1.0 - tl.exp2(step * tl.log2(beta1)))).to(dtype)
    root = (1.0 / tl.sqrt(1.0 - tl.exp2(step * tl.log2(beta2)))).to(dtype)
    rest1, rest2 = (1.0 - beta1).to(dtype), (1.0 - beta2).to(dtype)
    beta2 = beta2.to(dtype)
    b_squares = tl.zeros([BD], dtype=dtype)                                                             # [BD]
    first = i.to(tl.int64) * CHUNK
    if first + CHUNK <= N:  # without a mask to look at, values come and go by 16 bytes
        for i_b in range(CHUNK // BD):
            o = first + i_b * BD + tl.arange(0, BD)
            b_squares += _adamw_block(
                p, g, m, v, new_p, new_m, new_v, copy, wanted, o, N, keep, step_size, root, rest1, beta2, rest2, eps, True)
    else:
        for i_b in range(CHUNK // BD):
            o = first + i_b * BD + tl.arange(0, BD)
            b_squares += _adamw_block(
                p, g, m, v, new_p, new_m, new_v, copy, wanted, o, N, keep, step_size, root, rest1, beta2, rest2, eps, False)
    tl.store(lines + tl.program_id(0), tl.sum(b_squares, 0))


@triton.jit
def _sum_squares_kernel(lines, table, squares, programs, BD: tl.constexpr):
    """squares [n]: the lines of each tensor, added in order."""
    i = tl.program_id(0)
    first, end = tl.load(table + i * 8 + 7), tl.cast(programs, tl.int64)
    if i + 1 < tl.num_programs(0):
        end = tl.load(table + (i + 1) * 8 + 7)
    b_sum = tl.zeros([BD], dtype=lines.dtype.element_ty)                                                # [BD]
    for i_b in range(tl.cdiv(end - first, BD)):
        o = first + i_b * BD + tl.arange(0, BD)
        b_sum += tl.load(lines + o, mask=o < end, other=0.0)
    tl.store(squares + i, tl.sum(b_sum, 0))


def rates_on_device(rates: AdamWRates, device: torch.device) -> Tensor:
    """[6] fp64: as given, or made by kernels, which wait for nothing."""
    if rates.on_device is not None:
        return rates.on_device
    return torch.stack([torch.full((), float(x), dtype=torch.float64, device=device) for x in rates[:6]])


def _adamw_one(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: Tensor, copy: Tensor | None, in_place: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One tensor, of which no address needs to be known: torch.compile can trace it."""
    new_p, new_m, new_v = (x if in_place else torch.empty_like(x) for x in (p, m, v))
    programs = ceil_div(p.numel(), CHUNK)
    lines = torch.empty(programs, dtype=m.dtype, device=p.device)
    if programs > 0:
        launch(
            _adamw_kernel, (programs,), p=p, g=g, m=m, v=v, new_p=new_p, new_m=new_m, new_v=new_v, copy=copy, rates=rates,
            N=p.numel(), table=None, n=1, lines=lines, BN=1, ALIGNED=False, CHUNK=CHUNK, BD=BLOCK, num_warps=WARPS,
        )
    return new_p, new_m, new_v, lines.sum(0, keepdim=True)


def _adamw_many(
    ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], vs: list[Tensor], rates: list[Tensor],
    copies: Sequence[Tensor | None] | None,
) -> Tensor:
    """In place, tensors of the same dtypes; → Σ g² [n]."""
    n, device, rows, programs = len(ps), ps[0].device, [], 0
    for i, p in enumerate(ps):
        addresses = [x[i].data_ptr() for x in (ps, gs, ms, vs)] + [0 if copies is None or copies[i] is None else copies[i].data_ptr()]
        rows.append((*addresses, rates[i].data_ptr(), p.numel(), programs))
        programs += ceil_div(p.numel(), CHUNK)
    lines = torch.empty(programs, dtype=ms[0].dtype, device=device)
    squares = torch.empty(n, dtype=ms[0].dtype, device=device)
    present = [copy for copy in copies or () if copy is not None]
    table, fits = table_of(rows, device), all(aligned(*tensors) for tensors in (ps, gs, ms, vs, present))
    if programs > 0:
        launch(
            _adamw_kernel, (programs,), p=ps[0], g=gs[0], m=ms[0], v=vs[0], new_p=ps[0], new_m=ms[0], new_v=vs[0],
            copy=present[0] if present else None, rates=rates[0], N=0, table=table, n=n, lines=lines,
            BN=next_power_of_two(n), ALIGNED=fits, CHUNK=CHUNK, BD=BLOCK, num_warps=WARPS,
        )
    launch(
        _sum_squares_kernel, (n,), lines=lines, table=table, squares=squares, programs=programs, BD=1024, num_warps=4,
    )
    return squares


def adamw_update(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    rates: AdamWRates | Sequence[AdamWRates],
    *,
    copies: Sequence[Tensor | None] | None = None,
    in_place: bool = False,
) -> tuple[Tensors, Tensors, Tensors, Tensor]:
    """kernels_torch.adamw_update, in one launch. Arguments: see kernels_torch.adamw_update."""
    ps, gs, ms, vs, each = check_adamw_update(params, grads, exp_avg, exp_avg_sq, rates)
    check_gpu(params=ps[0])
    if in_place:
        for name, tensors in (("params", ps), ("exp_avg", ms), ("exp_avg_sq", vs)):
            refuse_scattered(name, tensors)
    refuse_scattered("copies", [copy for copy in copies or () if copy is not None])
    ps, gs, ms, vs = ([x.detach().contiguous() for x in tensors] for tensors in (ps, gs, ms, vs))
    if isinstance(params, Tensor):
        numbers, copy = rates_on_device(each[0], params.device), copies[0] if copies else None
        new_p, new_m, new_v, squares = _adamw_one(ps[0], gs[0], ms[0], vs[0], numbers, copy, in_place)
        return (params if in_place else new_p), new_m, new_v, squares
    on_device = {id(own): rates_on_device(own, ps[0].device) for own in each}
    numbers = [on_device[id(own)] for own in each]
    if not in_place:
        ps, ms, vs = ([x.clone() for x in tensors] for tensors in (ps, ms, vs))
    squares = torch.empty(len(ps), dtype=ms[0].dtype, device=ps[0].device)
    kinds = [(p.dtype, g.dtype, m.dtype) for p, g, m in zip(ps, gs, ms)]
    for kind in dict.fromkeys(kinds):
        mine = [i for i, other in enumerate(kinds) if other == kind]
        pick = lambda tensors, mine=mine: [tensors[i] for i in mine]
        sums = _adamw_many(pick(ps), pick(gs), pick(ms), pick(vs), pick(numbers), pick(copies) if copies else None)
        if len(mine) == len(ps):
            squares = sums
            break
        for i, each_sum in zip(mine, sums.unbind()):
            squares[i] = each_sum
    return (params if in_place else ps), ms, vs, squares
