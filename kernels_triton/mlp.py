"""The feed-forward half of a block, with as few trips of the wide hidden tensor [N, F] through memory as it takes.

relu²     z = x W_upᵀ,  a = relu(z)²,  y = a W_downᵀ
          Forward keeps a alone, whose root is relu(z); in fp16, where the square of a small z is 0, z. Backward:
          dz = 2 √a · (dy W_down),  dx = dz W_up,  dW_up = dzᵀ x,  dW_down = dyᵀ a

SwiGLU    g = x W_gateᵀ,  u = x W_upᵀ,  h = silu(g) · u,  y = h W_downᵀ
          Forward keeps g and u. Backward makes h again for dW_down in the pass that makes, from dh = dy W_down,
          [dg du] = [dh · u · silu'(g),  dh · silu(g)],  dx = [dg du] [W_gate; W_up],  d[W_gate; W_up] = [dg du]ᵀ x

How often a tensor [N, F] is read or written, the products' own reading and writing included:

                                                    relu² forward   backward   SwiGLU forward   backward
    each function one pass over memory after cuBLAS             4          7                6         12
    in the epilogue of a product (matmul.py)                    2          5                4          –

On Hopper and in half precision the epilogue wins at the sizes one trains with, and `fuses` says where it is taken. All else
is cuBLAS and one pass, in place where autograd allows it: over z and over dh, never over what is kept. So it is in fp32,
whose products PyTorch does without TF32. Each value of a tile or a pass has one writer, and cuBLAS adds up in one order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels_torch.masters import check_masters, values_and_owners, weight_gradient, weight_gradients
from kernels_torch.mlp import check_mlp
from kernels_triton.autograd import differentiable_once
from kernels_triton.launch import ceil_div, check_gpu, launch, n_processors, next_power_of_two
from kernels_triton.matmul import FORWARD, can_use_tma, matmul_relu2, matmul_relu2_grad, matmul_swiglu
from kernels_triton.primitives import relu2, relu2_grad, silu, silu_grad, upcast

# Values a program of a pass and its warps. H200, bf16, where a copy moves 4.26 TB/s; 65536 × 3072: relu² 194 µs (4.15 TB/s),
# its gradient 281 (4.30); 65536 × 2048: SwiGLU 190 (4.24), its gradient 388 (4.15). 4096 values: 202, 285, 190, 393.
BLOCK, WARPS = 2048, 4


@triton.jit
def _relu2_kernel(
    z, a, n,
    BLOCK: tl.constexpr,
):
    """a = relu(z)²"""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_z = upcast(tl.load(z + o, mask=o < n, other=0.0))                                                 # [BLOCK]
    tl.store(a + o, relu2(b_z).to(a.dtype.element_ty), mask=o < n)


@triton.jit
def _relu2_grad_kernel(
    dh, kept, n,
    BLOCK: tl.constexpr, OF_Z: tl.constexpr,
):
    """dh becomes dz, by z or by a = relu(z)²."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_dh = upcast(tl.load(dh + o, mask=o < n, other=0.0))                                               # [BLOCK]
    b_kept = upcast(tl.load(kept + o, mask=o < n, other=0.0))                                           # [BLOCK]
    b_a = relu2(b_kept) if OF_Z else b_kept                                                             # [BLOCK]
    tl.store(dh + o, relu2_grad(b_dh, b_a).to(dh.dtype.element_ty), mask=o < n)


@triton.jit
def _swiglu_kernel(
    g, u, h, n,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_g = upcast(tl.load(g + o, mask=o < n, other=0.0))                                                 # [BLOCK]
    b_u = upcast(tl.load(u + o, mask=o < n, other=0.0))                                                 # [BLOCK]
    tl.store(h + o, (silu(b_g) * b_u).to(h.dtype.element_ty), mask=o < n)


@triton.jit
def _swiglu_grad_kernel(
    dh, g, u, dz, N, F, KEEP: tl.constexpr,
    BN: tl.constexpr, BF: tl.constexpr,
):
    """dz [N, 2F] = [dg du]; with KEEP, dh becomes h."""
    n_f = tl.cdiv(F, BF)
    i_n, i_f = tl.program_id(0).to(tl.int64) // n_f, tl.program_id(0) % n_f
    o_n, o_f = i_n * BN + tl.arange(0, BN), i_f * BF + tl.arange(0, BF)
    m = (o_n < N)[:, None] & (o_f < F)[None, :]
    o = o_n[:, None] * F + o_f[None, :]
    b_dh = upcast(tl.load(dh + o, mask=m, other=0.0))                                                   # [BN, BF]
    b_g, b_u = upcast(tl.load(g + o, mask=m, other=0.0)), upcast(tl.load(u + o, mask=m, other=0.0))     # [BN, BF]
    b_s = silu(b_g)                                                                                     # [BN, BF]
    if KEEP:
        tl.store(dh + o, (b_s * b_u).to(dh.dtype.element_ty), mask=m)
    p_dz = dz + o_n[:, None] * (2 * F) + o_f[None, :]
    tl.store(p_dz, silu_grad(b_dh * b_u, b_g).to(dz.dtype.element_ty), mask=m)
    tl.store(p_dz + F, (b_dh * b_s).to(dz.dtype.element_ty), mask=m)


def _relu2(z: Tensor, a: Tensor) -> Tensor:
    """Fill a, which may be z; both contiguous."""
    if z.numel() > 0:
        launch(_relu2_kernel, (ceil_div(z.numel(), BLOCK),), z=z, a=a, n=z.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return a


def _relu2_grad_(dh: Tensor, kept: Tensor, of_z: bool) -> Tensor:
    """dh, contiguous as what was kept is, in place."""
    if dh.numel() > 0:
        grid = (ceil_div(dh.numel(), BLOCK),)
        launch(
            _relu2_grad_kernel, grid, dh=dh, kept=kept, n=dh.numel(), BLOCK=BLOCK, OF_Z=of_z, num_warps=WARPS
        )
    return dh


def _swiglu(g: Tensor, u: Tensor, h: Tensor) -> Tensor:
    """Fill h, which may be g."""
    if h.numel() > 0:
        grid = (ceil_div(h.numel(), BLOCK),)
        launch(_swiglu_kernel, grid, g=g, u=u, h=h, n=h.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return h


def _swiglu_grad(dh: Tensor, g: Tensor, u: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """dh, g, u [N, F], contiguous → dz [N, 2F], and h [N, F] in the place of dh when it is to be kept."""
    N, F = dh.shape
    dz = torch.empty((N, 2 * F), dtype=dh.dtype, device=dh.device)
    if dh.numel() > 0:
        BF = min(BLOCK, next_power_of_two(F))
        BN = BLOCK // BF
        grid = (ceil_div(N, BN) * ceil_div(F, BF),)
        launch(
            _swiglu_grad_kernel, grid, dh=dh, g=g, u=u, dz=dz, N=N, F=F, KEEP=keep, BN=BN, BF=BF, num_warps=WARPS
        )
    return dz, dh


def fuses(x: Tensor, F: int) -> bool:
    """Whether relu² and its gradient are computed where z and dh are: with tiles enough to keep every processor busy.

    H200, bf16, replayed as a graph, µs of product and pass against epilogue (by matmul.py's kernels), forward and backward:

                 tiles        forward          backward
    4096 × 384 × 1536    192     21 : 18      24 : 24
    2048 × 768 × 3072    192     26 : 25      30 : 31
    2048 × 1280 × 5120   320     50 : 48      56 : 59
    4096 × 768 × 3072    384     44 : 34      51 : 46
    4096 × 1280 × 5120   640     97 : 77     107 : 101
    65536 × 384 × 1536  3072    227 : 137    275 : 212
    65536 × 768 × 3072  6144    620 : 444    721 : 591
    32768 × 1280 × 5120 5120    746 : 603    815 : 761
    65536 × 1280 × 5120 10240  1639 : 1315  1802 : 1568
    """
    tiles = ceil_div(x.shape[0], FORWARD.BN) * ceil_div(F, FORWARD.BF)
    return can_use_tma(x, F) and 2 * tiles >= 5 * n_processors(x.device)


def fuses_swiglu(x: Tensor, F: int, keep: bool) -> bool:
    """The same for SwiGLU, whose tiles take whole blocks of both weights, after a copy that lays these side by side.

    H200, bf16, µs of products and pass against epilogue, with g and u kept and without: 16384 × 384 × 1536 113 : 99 and
    113 : 76, 2048 × 768 × 3072 46 : 47 and 45 : 41, 65536 × 768 × 2048 773 : 718 and 773 : 613, 4096 × 1280 × 5120
    185 : 183 and 184 : 165, 16384 × 2048 × 5632 1235 : 1223 and 1235 : 1136.
    """
    N, D = x.shape
    pays = N >= 4 * D and D <= 1024 if keep else N >= 2 * D
    return pays and F % (FORWARD.BF // 2) == 0 and fuses(x, 2 * F)


class _Relu2MLP(torch.autograd.Function):
    """relu² of the up-projection is all of the hidden layer that is kept, or the up-projection itself in fp16."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, w_up: Tensor, w_down: Tensor, up_owner: Tensor, down_owner: Tensor
    ) -> Tensor:
        rows = as_rows(x)
        if keeps_z(rows):
            kept = torch.mm(rows, w_up.t())
            a = _relu2(kept, torch.empty_like(kept))
        elif fuses(rows, w_up.shape[0]):
            kept = a = matmul_relu2(rows, w_up)
        else:
            z = torch.mm(rows, w_up.t())
            kept = a = _relu2(z, z)
        needs_x, _, _, needs_up, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_up else None, w_up if needs_x else None, w_down, kept)
        ctx.owners = up_owner, down_owner
        return torch.mm(a, w_down.t()).view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, w_up, w_down, kept = ctx.saved_tensors
        up_owner, down_owner = ctx.owners
        needs_x, _, _, needs_up, needs_down = ctx.needs_input_grad
        d_rows = as_rows(dy)
        of_z = keeps_z(d_rows)
        dx = dw_up = dw_down = None
        if needs_x or needs_up:
            if not of_z and fuses(d_rows, kept.shape[1]):
                dz = matmul_relu2_grad(d_rows, w_down, kept)
            else:
                dz = _relu2_grad_(torch.mm(d_rows, w_down), kept, of_z)
            dx = torch.mm(dz, w_up).view(dy.shape) if needs_x else None
            dw_up = weight_gradient(dz, rows, up_owner) if needs_up else None
        if needs_down:
            a = _relu2(kept, torch.empty_like(kept)) if of_z else kept
            dw_down = weight_gradient(d_rows, a, down_owner)
        return dx, None, None, dw_up, dw_down


def keeps_z(x: Tensor) -> bool:
    """fp16 ends at 6e-8: of relu² below that no root is left."""
    return x.dtype == torch.float16


class _SwiGluMLP(torch.autograd.Function):
    """Gate and up are kept, their product is made again. `keep`: whether there will be a backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, keep: bool, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *owners: Tensor
    ) -> Tensor:
        rows = as_rows(x)
        if fuses_swiglu(rows, w_up.shape[0], keep):
            g, u, h = matmul_swiglu(rows, w_gate, w_up, keep)
        else:
            g, u = torch.mm(rows, w_gate.t()), torch.mm(rows, w_up.t())
            h = _swiglu(g, u, torch.empty_like(g) if keep else g)
        needs_x, (needs_gate, needs_up, _) = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        weights = (w_gate, w_up) if needs_x else (None, None)
        if keep:
            ctx.save_for_backward(rows if needs_gate or needs_up else None, *weights, w_down, g, u)
            ctx.owners = owners
        return torch.mm(h, w_down.t()).view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, w_gate, w_up, w_down, g, u = ctx.saved_tensors
        *owners, down_owner = ctx.owners
        needs_x, (needs_gate, needs_up, needs_down) = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        d_rows, F = as_rows(dy), g.shape[1]
        dx = dw_gate = dw_up = dw_down = None
        if needs_x or needs_gate or needs_up:
            dz, h = _swiglu_grad(torch.mm(d_rows, w_down), g, u, keep=needs_down)
            if needs_x:
                dx = torch.mm(dz, torch.cat((w_gate, w_up))).view(dy.shape)
            if needs_gate and needs_up:
                dw_gate, dw_up = weight_gradients(dz, rows, owners)
            elif needs_gate:
                dw_gate = weight_gradient(dz[:, :F], rows, owners[0])
            elif needs_up:
                dw_up = weight_gradient(dz[:, F:], rows, owners[1])
        else:
            h = _swiglu(g, u, torch.empty_like(g))
        if needs_down:
            dw_down = weight_gradient(d_rows, h, down_owner)
        return dx, None, None, None, None, dw_gate, dw_up, dw_down


def as_rows(x: Tensor) -> Tensor:
    """[..., D] → [N, D]"""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def relu2_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, *, masters: Sequence[Tensor] | None = None) -> Tensor:
    """kernels_torch.relu2_mlp, keeping relu² alone for backward. Arguments: see kernels_torch.relu2_mlp."""
    check_mlp(x, (w_up,), w_down)
    check_masters((w_up, w_down), masters)
    check_gpu(x=x)
    return _Relu2MLP.apply(x, *values_and_owners((w_up, w_down), masters))


def swiglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, masters: Sequence[Tensor] | None = None
) -> Tensor:
    """kernels_torch.swiglu_mlp, keeping gate and up for backward. Arguments: see kernels_torch.swiglu_mlp."""
    check_mlp(x, (w_gate, w_up), w_down)
    check_masters((w_gate, w_up, w_down), masters)
    check_gpu(x=x)
    weights = values_and_owners((w_gate, w_up, w_down), masters)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    return _SwiGluMLP.apply(x, keep, *weights)
