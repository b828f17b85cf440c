"""Products whose result is turned into something else before it is stored, on Hopper's tensor cores.

    matmul_relu2        y = relu(x wᵀ)²                           x [N, D], w [F, D] → y [N, F]
    matmul_relu2_grad   dz = 2 √y · (dy w)                        dy [N, D], w [D, F], y [N, F] → dz [N, F]
    matmul_swiglu       g = x w_gᵀ,  u = x w_uᵀ,  h = silu(g) u   x [N, D], w_g, w_u [F, D] → g, u, h [N, F]

The sum runs in fp32 and is rounded once, after the function. Blocks come and go by the tensor memory accelerator (TMA):
every tensor starts at a multiple of 16 bytes and so does each of its rows, which `for_tma` sees to where D and F allow.
A program writes its own tile and nothing else, so that neither timing nor other rows change a bit of it.

Why these three and no more: cuBLAS multiplies a little faster, and what is won is the pass over [N, F] that is saved. Where
Gluon is, relu² and its gradient are made by hopper_matmul.py, which is as fast as cuBLAS or faster.
Tried on an H200 and left: 128 × 128 tiles of gate and of up, a product each (1.2 times as long as one of their rows
interleaved), both gradients of SwiGLU in an epilogue (1.2 to 1.4 times as long as cuBLAS and a pass), fetching y into L2
ahead of time and the root from integer arithmetic (no faster). Triton's warp specialisation hung (3.6) or did not compile
(3.9), and its clusters share no loads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_triton.launch import ceil_div, is_hopper, launch_with_descriptors, n_processors
from kernels_triton.primitives import relu2, relu2_grad, silu, upcast

try:
    from kernels_triton import hopper_matmul
except (ImportError, AttributeError):  # a Triton whose Gluon has other names
    hopper_matmul = None


class Tile(NamedTuple):
    """BN rows by BF columns of the result, BD terms of the sum at a time, by `warps` warps, `stages` blocks on their way.

    group    so many tiles of one column follow one another, before the next column
    stay     programs a processor that go from tile to tile
    """

    BN: int
    BF: int
    BD: int
    warps: int
    stages: int
    group: int
    stay: int


@triton.jit
def _place(i_tile, n_n, n_f, GROUP: tl.constexpr):
    """Which rows and columns: down a column for GROUP tiles, then the next, so that what is read again is still in L2."""
    i_group = i_tile // (GROUP * n_f)
    first = i_group * GROUP
    rows = min(n_n - first, GROUP)
    i_in = i_tile % (GROUP * n_f)
    return first + i_in % rows, i_in // rows


@triton.jit
def _halves(b):
    """[BN, BF] → its left and its right half: the result leaves in two pieces, which leaves room for one more stage."""
    BN: tl.constexpr = b.shape[0]
    BF: tl.constexpr = b.shape[1]
    return tl.split(tl.permute(tl.reshape(b, (BN, 2, BF // 2)), (0, 2, 1)))


@triton.jit
def _matmul_relu2_kernel(
    x, w, y, N, F, D,
    BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):
    n_n, n_f = tl.cdiv(N, BN), tl.cdiv(F, BF)
    for i_tile in tl.range(tl.program_id(0), n_n * n_f, tl.num_programs(0), flatten=True):
        i_n, i_f = _place(i_tile, n_n, n_f, GROUP)
        b_z = tl.zeros([BN, BF], dtype=tl.float32)                                                      # [BN, BF]
        for i_d in range(tl.cdiv(D, BD)):
            b_x, b_w = x.load([i_n * BN, i_d * BD]), w.load([i_f * BF, i_d * BD])                       # [BN, BD], [BF, BD]
            b_z = tl.dot(b_x, b_w.T, b_z)
        b_left, b_right = _halves(b_z)                                                                  # [BN, BF / 2]
        y.store([i_n * BN, i_f * BF], relu2(b_left).to(y.dtype))
        y.store([i_n * BN, i_f * BF + BF // 2], relu2(b_right).to(y.dtype))


@triton.jit
def _matmul_relu2_grad_kernel(
    dy, w, y, dz, N, F, D,
    BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):
    n_n, n_f = tl.cdiv(N, BN), tl.cdiv(F, BF)
    for i_tile in range(tl.program_id(0), n_n * n_f, tl.num_programs(0)):
        i_n, i_f = _place(i_tile, n_n, n_f, GROUP)
        b_dh = tl.zeros([BN, BF], dtype=tl.float32)                                                     # [BN, BF]
        for i_d in range(tl.cdiv(D, BD)):
            b_dy, b_w = dy.load([i_n * BN, i_d * BD]), w.load([i_d * BD, i_f * BF])                     # [BN, BD], [BD, BF]
            b_dh = tl.dot(b_dy, b_w, b_dh)
        b_left, b_right = _halves(b_dh)                                                                 # [BN, BF / 2]
        b_y = upcast(y.load([i_n * BN, i_f * BF]))                                                      # [BN, BF / 2]
        dz.store([i_n * BN, i_f * BF], relu2_grad(b_left, b_y).to(dz.dtype))
        b_y = upcast(y.load([i_n * BN, i_f * BF + BF // 2]))                                            # [BN, BF / 2]
        dz.store([i_n * BN, i_f * BF + BF // 2], relu2_grad(b_right, b_y).to(dz.dtype))


@triton.jit
def _matmul_swiglu_kernel(
    x, w, g, u, h, N, F, D,
    BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):
    """w [2F, D] has BF / 2 rows of the gate, then as many of up, and so on: a tile is both halves of the same columns."""
    n_n, n_f = tl.cdiv(N, BN), tl.cdiv(2 * F, BF)
    for i_tile in tl.range(tl.program_id(0), n_n * n_f, tl.num_programs(0), flatten=True):
        i_n, i_f = _place(i_tile, n_n, n_f, GROUP)
        b_z = tl.zeros([BN, BF], dtype=tl.float32)                                                      # [BN, BF]
        for i_d in range(tl.cdiv(D, BD)):
            b_x, b_w = x.load([i_n * BN, i_d * BD]), w.load([i_f * BF, i_d * BD])                       # [BN, BD], [BF, BD]
            b_z = tl.dot(b_x, b_w.T, b_z)
        b_g, b_u = _halves(b_z)                                                                         # [BN, BF / 2]
        if g is not None:
            g.store([i_n * BN, i_f * (BF // 2)], b_g.to(g.dtype))
            u.store([i_n * BN, i_f * (BF // 2)], b_u.to(u.dtype))
        h.store([i_n * BN, i_f * (BF // 2)], (silu(b_g) * b_u).to(h.dtype))


# H200, bf16, N=65536 D=768 F=3072: 444 µs, where cuBLAS takes 430 and its pass 194 more. `flatten` makes one loop of tiles
# and sums, so that the next tile's blocks are on their way while this one is stored: 462 against 549 without, in one run,
# where 128 × 128 with two programs a processor took 483, three stages 479, 64 × 256 637 and cuBLAS 444. From 321 terms of the
# sum on hopper_matmul.py does relu², in 80 to 92 % of the time.
FORWARD = Tile(BN=128, BF=256, BD=64, warps=8, stages=4, group=8, stay=1)

# Two programs share a processor, and one reads y and takes roots while the other multiplies: 591 µs, where cuBLAS takes 443
# and its pass 281 more. One program with 128 × 256 607, columns stored in quarters 594 to 629, no root at all 575.
# From 257 terms of the sum on hopper_matmul.py does it, in 65 to 80 % of the time.
BACKWARD = Tile(BN=128, BF=128, BD=64, warps=4, stages=3, group=1, stay=2)


def _programs(N: int, F: int, tile: Tile, device: torch.device) -> tuple[int]:
    return (min(ceil_div(N, tile.BN) * ceil_div(F, tile.BF), tile.stay * n_processors(device)),)


def can_use_tma(x: Tensor, F: int) -> bool:
    """Whether these kernels take x [N, D] and a hidden width F: half precision, rows of whole 16-byte words, on Hopper."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] % 8 != 0 or F % 8 != 0:
        return False
    return is_hopper(x.device)


def for_tma(x: Tensor) -> Tensor:
    """x, or a copy where TMA cannot read it: the values of a row side by side, rows at multiples of 16 bytes.

    Where torch.compile traces there is no address to look at, and only what is contiguous is read in place.
    """
    if torch.compiler.is_compiling():
        readable = x.is_contiguous()
    else:
        row, aligned = x.stride(0) * x.element_size(), x.data_ptr() % 16 == 0
        readable = x.stride(1) == 1 and x.stride(0) >= x.shape[1] and row % 16 == 0 and aligned
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def matmul_relu2(x: Tensor, w: Tensor) -> Tensor:
    """x [N, D], w [F, D] → relu(x wᵀ)² [N, F]."""
    (N, D), F, tile = x.shape, w.shape[0], FORWARD
    if hopper_matmul is not None and is_hopper(x.device) and hopper_matmul.takes(D, hopper_matmul.RELU2):
        return hopper_matmul.relu2_product(for_tma(x), for_tma(w))
    y = torch.empty((N, F), dtype=x.dtype, device=x.device)
    launch_with_descriptors(
        _matmul_relu2_kernel, _programs(N, F, tile, x.device), x.device,
        x=TensorDescriptor.from_tensor(for_tma(x), [tile.BN, tile.BD]),
        w=TensorDescriptor.from_tensor(for_tma(w), [tile.BF, tile.BD]),
        y=TensorDescriptor.from_tensor(y, [tile.BN, tile.BF // 2]),
        N=N, F=F, D=D, BN=tile.BN, BF=tile.BF, BD=tile.BD, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    return y


def matmul_relu2_grad(dy: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """dy [N, D], w [D, F], y [N, F] as matmul_relu2 made it → dz [N, F]."""
    (N, D), F, tile = dy.shape, w.shape[1], BACKWARD
    if hopper_matmul is not None and is_hopper(dy.device) and hopper_matmul.takes(D, hopper_matmul.RELU2_GRAD):
        return hopper_matmul.relu2_grad_product(for_tma(dy), for_tma(w), y)
    dz = torch.empty((N, F), dtype=dy.dtype, device=dy.device)
    launch_with_descriptors(
        _matmul_relu2_grad_kernel, _programs(N, F, tile, dy.device), dy.device,
        dy=TensorDescriptor.from_tensor(for_tma(dy), [tile.BN, tile.BD]),
        w=TensorDescriptor.from_tensor(for_tma(w), [tile.BD, tile.BF]),
        y=TensorDescriptor.from_tensor(y, [tile.BN, tile.BF // 2]),
        dz=TensorDescriptor.from_tensor(dz, [tile.BN, tile.BF // 2]),
        N=N, F=F, D=D, BN=tile.BN, BF=tile.BF, BD=tile.BD, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    return dz


def matmul_swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, keep: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """x [N, D], weights [F, D], F a multiple of 128 → g, u, h [N, F]; g and u are None unless asked to `keep` them."""
    (N, D), F, tile = x.shape, w_up.shape[0], FORWARD
    half = tile.BF // 2
    w = torch.stack((w_gate.reshape(-1, half, D), w_up.reshape(-1, half, D)), dim=1).view(2 * F, D)
    h = torch.empty((N, F), dtype=x.dtype, device=x.device)
    g, u = (torch.empty_like(h), torch.empty_like(h)) if keep else (None, None)
    launch_with_descriptors(
        _matmul_swiglu_kernel, _programs(N, 2 * F, tile, x.device), x.device,
        x=TensorDescriptor.from_tensor(for_tma(x), [tile.BN, tile.BD]),
        w=TensorDescriptor.from_tensor(w, [tile.BF, tile.BD]),
        g=TensorDescriptor.from_tensor(g, [tile.BN, half]) if keep else None,
        u=TensorDescriptor.from_tensor(u, [tile.BN, half]) if keep else None,
        h=TensorDescriptor.from_tensor(h, [tile.BN, half]),
        N=N, F=F, D=D, BN=tile.BN, BF=tile.BF, BD=tile.BD, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    return g, u, h
