"""Products of 8-bit numbers whose result is rounded to 8 bits where it is made, on Hopper's tensor cores.

    matmul_relu2_fp8         a = relu(x wᵀ)²            x [N, D], w [F, D] e4m3 → a [N, F] e4m3, and aᵀ
    matmul_relu2_grad_fp8    dz = 2 √a · (dy wᵀ)        dy [N, D] e5m2, w [F, D] e4m3, aᵀ [F, N] e4m3 → dz [N, F] e5m2, and dzᵀ

Both operands lie along the dimension that is summed over, as these tensor cores want them: w is W_up, and W_down turned.
The unit of the result comes from bounds (kernels_torch/fp8.py), known before the first product. Blocks come and go by TMA
as in matmul.py; sums lose digits beyond 14 bits on their way, as in cuBLAS's fast ones, which is nothing beside the
rounding of what is summed. The first program writes the unit and the bound; each tile has one writer.

The products to come want the transposes, too: written here, byte by byte through shared memory, they cost 16 to 60 µs, and
a pass of their own 95 and 114. Reading aᵀ instead of a costs 5 to 8, and a need not be kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_torch.fp8 import E4M3, E5M2, TOP
from kernels_triton.launch import ceil_div, is_hopper, launch_with_descriptors, n_processors
from kernels_triton.matmul import Tile, _halves, _place, _programs
from kernels_triton.primitives import relu2, relu2_grad


@triton.jit
def bits_of(b_x):
    """Of |x|: in the order of the values, NaN above all."""
    return b_x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def unit_of(b_bits, TOP: tl.constexpr):
    """Bits of a bound → the unit: kernels_torch.fp8.unit_of."""
    exponent = (b_bits >> 23) - 127 - TOP
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    unit = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(b_bits >= 0x7F800000, float("nan"), unit)


@triton.jit
def gradient_bound(a_facts, dy_facts, down_facts, D, DOWN_TOP: tl.constexpr):
    """kernels_torch.fp8.hidden_gradient_bound; no value of W_down is more than 2 · DOWN_TOP units."""
    down = tl.load(down_facts) * (2.0 * DOWN_TOP)
    return 2.0 * tl.load(a_facts + 1) * (tl.load(dy_facts + 1) * tl.sqrt_rn(D.to(tl.float32))) * down


@triton.jit
def note(facts, unit, bound):
    """By the first program."""
    if tl.program_id(0) == 0:
        tl.store(facts, unit)
        tl.store(facts + 1, bound)


@triton.jit
def _matmul_relu2_fp8_kernel(
    x, w, a, a_turned, x_facts, w_facts, facts, N, F, D,
    TOP: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):
    scale = tl.load(x_facts) * tl.load(w_facts)
    bound = tl.load(x_facts + 1) * tl.load(w_facts + 1)
    unit = unit_of(bits_of(bound * bound), TOP)
    n_n, n_f = tl.cdiv(N, BN), tl.cdiv(F, BF)
    for i_tile in tl.range(tl.program_id(0), n_n * n_f, tl.num_programs(0), flatten=True):
        i_n, i_f = _place(i_tile, n_n, n_f, GROUP)
        b_z = tl.zeros([BN, BF], dtype=tl.float32)                                                      # [BN, BF]
        for i_d in range(tl.cdiv(D, BD)):
            b_x, b_w = x.load([i_n * BN, i_d * BD]), w.load([i_f * BF, i_d * BD])                       # [BN, BD], [BF, BD]
            b_z = tl.dot(b_x, b_w.T, b_z)
        b_left, b_right = _halves(b_z)                                                                  # [BN, BF / 2]
        b_left = (relu2(b_left * scale) * (1.0 / unit)).to(a.dtype)
        a.store([i_n * BN, i_f * BF], b_left)
        if a_turned is not None:
            a_turned.store([i_f * BF, i_n * BN], b_left.T)
        b_right = (relu2(b_right * scale) * (1.0 / unit)).to(a.dtype)
        a.store([i_n * BN, i_f * BF + BF // 2], b_right)
        if a_turned is not None:
            a_turned.store([i_f * BF + BF // 2, i_n * BN], b_right.T)
    note(facts, unit, bound)


@triton.jit
def _matmul_relu2_grad_fp8_kernel(
    dy, w, a_turned, dz, dz_turned, dy_facts, w_facts, a_facts, facts, N, F, D,
    TOP: tl.constexpr, DOWN_TOP: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):
    scale, a_unit = tl.load(dy_facts) * tl.load(w_facts), tl.load(a_facts)
    bound = gradient_bound(a_facts, dy_facts, w_facts, D, DOWN_TOP)
    unit = unit_of(bits_of(bound), TOP)
    n_n, n_f = tl.cdiv(N, BN), tl.cdiv(F, BF)
    for i_tile in range(tl.program_id(0), n_n * n_f, tl.num_programs(0)):
        i_n, i_f = _place(i_tile, n_n, n_f, GROUP)
        b_dh = tl.zeros([BN, BF], dtype=tl.float32)                                                     # [BN, BF]
        for i_d in range(tl.cdiv(D, BD)):
            b_dy, b_w = dy.load([i_n * BN, i_d * BD]), w.load([i_f * BF, i_d * BD])                     # [BN, BD], [BF, BD]
            b_dh = tl.dot(b_dy, b_w.T, b_dh)
        b_a = a_turned.load([i_f * BF, i_n * BN]).T.to(tl.float32) * a_unit                             # [BN, BF]
        b_dz = (relu2_grad(b_dh * scale, b_a) * (1.0 / unit)).to(dz.dtype)                              # [BN, BF]
        dz.store([i_n * BN, i_f * BF], b_dz)
        if dz_turned is not None:
            dz_turned.store([i_f * BF, i_n * BN], b_dz.T)
    note(facts, unit, bound)


# H200, N=65536 D=768 F=3072 / N=32768 D=1280 F=5120: 304 / 352 µs, without the transpose 261 / 336; cuBLAS's product alone,
# to bf16, 263 / 320. Three stages 364 / 394, 128 × 128 with two programs a processor 317 / 370. Without the transpose BD 64
# with six stages 1.04 times as long.
FORWARD = Tile(BN=128, BF=256, BD=128, warps=8, stages=4, group=8, stay=1)

# 393 / 422 µs, without the transpose 334 / 386; cuBLAS's product alone 276 / 336. 8 warps and two stages 486 / 554. Without
# the transpose: `flatten`, 128 × 256, 8 warps, three stages 324 / 368, which has no room for the transpose.
BACKWARD = Tile(BN=128, BF=128, BD=128, warps=4, stages=3, group=1, stay=2)


def fuses_fp8(x: Tensor, w: Tensor) -> bool:
    """x [N, D], w [F, D]: on Hopper, with tiles enough to keep every processor busy; elsewhere cuBLAS and a pass."""
    tiles = ceil_div(x.shape[0], FORWARD.BN) * ceil_div(w.shape[0], FORWARD.BF)
    return is_hopper(x.device) and 2 * tiles >= 5 * n_processors(x.device)


def matmul_relu2_fp8(
    x: Tensor, w: Tensor, x_facts: Tensor, w_facts: Tensor, turned: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """→ a [N, F], its transpose if that is wanted, and its facts: the unit, and the bound of x wᵀ."""
    (N, D), F, tile = x.shape, w.shape[0], FORWARD
    a = torch.empty((N, F), dtype=E4M3, device=x.device)
    a_turned = torch.empty((F, N), dtype=E4M3, device=x.device) if turned else None
    facts = torch.empty(2, dtype=torch.float32, device=x.device)
    launch_with_descriptors(
        _matmul_relu2_fp8_kernel, _programs(N, F, tile, x.device), x.device,
        x=TensorDescriptor.from_tensor(x, [tile.BN, tile.BD]),
        w=TensorDescriptor.from_tensor(w, [tile.BF, tile.BD]),
        a=TensorDescriptor.from_tensor(a, [tile.BN, tile.BF // 2]),
        a_turned=TensorDescriptor.from_tensor(a_turned, [tile.BF // 2, tile.BN]) if turned else None,
        x_facts=x_facts, w_facts=w_facts, facts=facts, N=N, F=F, D=D, TOP=TOP[E4M3],
        BN=tile.BN, BF=tile.BF, BD=tile.BD, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )
    return a, a_turned, facts


def matmul_relu2_grad_fp8(
    dy: Tensor, w: Tensor, a_turned: Tensor, dy_facts: Tensor, w_facts: Tensor, a_facts: Tensor, turned: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """→ dz [N, F], its transpose if that is wanted, and its facts: the unit, and its bound."""
    (N, D), F, tile = dy.shape, w.shape[0], BACKWARD
    dz = torch.empty((N, F), dtype=E5M2, device=dy.device)
    dz_turned = torch.empty((F, N), dtype=E5M2, device=dy.device) if turned else None
    facts = torch.empty(2, dtype=torch.float32, device=dy.device)
    launch_with_descriptors(
        _matmul_relu2_grad_fp8_kernel, _programs(N, F, tile, dy.device), dy.device,
        dy=TensorDescriptor.from_tensor(dy, [tile.BN, tile.BD]),
        w=TensorDescriptor.from_tensor(w, [tile.BF, tile.BD]),
        a_turned=TensorDescriptor.from_tensor(a_turned, [tile.BF, tile.BN]),
        dz=TensorDescriptor.from_tensor(dz, [tile.BN, tile.BF]),
        dz_turned=TensorDescriptor.from_tensor(dz_turned, [tile.BF, tile.BN]) if turned else None,
        dy_facts=dy_facts, w_facts=w_facts, a_facts=a_facts, facts=facts, N=N, F=F, D=D, TOP=TOP[E5M2],
        DOWN_TOP=2.0 ** TOP[E4M3],
        BN=tile.BN, BF=tile.BF, BD=tile.BD, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )
    return dz, dz_turned, facts
