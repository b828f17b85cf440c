"""What there is to note of each row when its next token is known, in one launch: kernels_torch.take_tokens has the rules.

Everything is some bytes a row, so a program takes ROWS of them, and each row is written by one thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_torch.take_tokens import check_take_tokens
from kernels_triton.launch import can_overlap, ceil_div, check_gpu, launch

ROWS = 32


@triton.jit
def _take_tokens_kernel(
    ids, forced, limit, is_stop, token, step, active, history,
    stride_ids, stride_forced, stride_limit, stride_stop, stride_token, stride_step, stride_active, stride_b, stride_h,
    B, H, V, BB: tl.constexpr, OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    o_b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    m_b = o_b < B
    b_forced = tl.load(forced + o_b * stride_forced, mask=m_b, other=-1).to(tl.int64)                   # [BB]
    b_token = tl.load(ids + o_b * stride_ids, mask=m_b, other=0).to(tl.int64)                           # [BB]
    b_step = tl.load(step + o_b * stride_step, mask=m_b, other=0).to(tl.int64)                          # [BB]
    b_active = tl.load(active + o_b * stride_active, mask=m_b, other=0)                                 # [BB]
    b_limit = tl.load(limit + o_b * stride_limit, mask=m_b, other=0).to(tl.int64)                       # [BB]
    is_free = b_forced < 0
    b_token = tl.where(is_free, b_token, b_forced)
    m_v = m_b & (b_token >= 0) & (b_token < V)
    b_stop = tl.load(is_stop + b_token * stride_stop, mask=m_v, other=0).to(tl.int1)                    # [BB]
    tl.store(token + o_b * stride_token, b_token, mask=m_b)
    tl.store(history + o_b * stride_b + b_step % H * stride_h, b_token, mask=m_b)
    b_step += b_active
    tl.store(step + o_b * stride_step, b_step, mask=m_b)
    ends = (b_stop & is_free) | (b_step >= b_limit)
    tl.store(active + o_b * stride_active, tl.where(ends, 0, b_active), mask=m_b)


def take_tokens(
    ids: Tensor, forced: Tensor, limit: Tensor, is_stop: Tensor, token: Tensor, step: Tensor, active: Tensor,
    history: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels_torch.take_tokens, in one launch. Arguments: see there."""
    check_take_tokens(ids, forced, limit, is_stop, token, step, active, history)
    check_gpu(ids=ids)
    B, H = history.shape
    overlap = can_overlap(ids.device)
    if B:
        with torch.no_grad():
            launch(
                _take_tokens_kernel, (ceil_div(B, ROWS),), ids=ids, forced=forced, limit=limit, is_stop=is_stop,
                token=token, step=step, active=active, history=history, stride_ids=ids.stride(0),
                stride_forced=forced.stride(0), stride_limit=limit.stride(0), stride_stop=is_stop.stride(0),
                stride_token=token.stride(0), stride_step=step.stride(0), stride_active=active.stride(0),
                stride_b=history.stride(0), stride_h=history.stride(1), B=B, H=H, V=len(is_stop), BB=ROWS,
                OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
            )
    return token, step, active, history
