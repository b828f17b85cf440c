"""What kernels over rows share: how rows lie in memory, and the sum of the lines that programs leave behind.

Gradients that every row adds to are summed in two steps: each program adds up its own rows and stores the sum in its own
line of a [programs, D] buffer, then a second kernel sums the lines. No atomics, one order, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_triton.launch import SUM_LINES, ceil_div, launch


@triton.jit
def sum_of_lines(lines, o_d, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Some columns o_d [BD] of lines [T, D], summed over T."""
    b_sum = tl.zeros([BT, BD], dtype=lines.dtype.element_ty)                                            # [BT, BD]
    for i_t in range(0, T, BT):
        o_t = i_t + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(lines + o_t[:, None] * D + o_d[None, :], mask=m, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def _sum_lines_kernel(
    lines, dw, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """dw [D] = Σ of lines [T, D], in one order whatever the timing."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    if OVERLAP:  # this kernel may have been started early: what it reads is there only now
        tl.extra.cuda.gdc_wait()
    b_dw = sum_of_lines(lines, o_d, T, D, BT, BD)                                                       # [BD]
    tl.store(dw + o_d, b_dw.to(dw.dtype.element_ty), mask=o_d < D)


def sum_lines(lines: Tensor, dtype: torch.dtype, overlap: bool = False) -> Tensor:
    """lines [T, D], one of each program, → their sum [D]. `overlap`: the kernel that writes them lets this one start."""
    T, D = lines.shape
    dw = torch.empty(D, dtype=dtype, device=lines.device)
    launch(
        _sum_lines_kernel, (ceil_div(D, SUM_LINES.BD),), lines=lines, dw=dw, T=T, D=D, BT=SUM_LINES.BT,
        BD=SUM_LINES.BD, OVERLAP=overlap, num_warps=SUM_LINES.warps, launch_pdl=overlap,
    )
    return dw


def with_rows(x: Tensor) -> Tensor:
    """x [..., D] as it is where kernels can walk over its rows: all lie side by side. Else [T, D] with the same rows,
    any distance apart, copied where the values of each do not lie side by side."""
    if x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def count_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def row_stride(x: Tensor | None) -> int:
    """From one row to the next, of what `with_rows` gave."""
    if x is None:
        return 0
    return x.shape[-1] if x.is_contiguous() else x.stride(0)


def accumulated_in(x: Tensor) -> torch.dtype:
    """The dtype of sums over values of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def values_side_by_side(x: Tensor) -> Tensor:
    """x, copied when the values of its last dimension do not lie next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def stride_of(x: Tensor | None, dim: int) -> int:
    """Of a tensor that may not be there."""
    return 0 if x is None else x.stride(dim)
