"""What our ops are measured against: other packages' kernels where they are installed, and bare matrix products.

Every function has the signature of our op, so that a bench can call them all alike. An option a peer does not know
(a token weight, a missing gain) makes it fail, and the bench says so and leaves it out.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Call
from kernels_torch.cases import Shape


def plain_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None,
    vocab_size: int,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    """What one writes without thinking of memory, and what a compiler can do most with."""
    z = F.linear(x, weight)[:, :vocab_size].to(torch.promote_types(x.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if token_weights is None:
        return F.cross_entropy(z, targets, ignore_index=-1, reduction=reduction)
    loss = F.cross_entropy(z, targets, ignore_index=-1, reduction="none") * token_weights
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != -1).sum().clamp(min=1)


UNCHUNKED = {"linear_cross_entropy": plain_linear_cross_entropy}


def liger(module: str, name: str) -> Callable:
    """The `apply` of one of Liger's autograd functions."""
    return getattr(import_module(f"liger_kernel.ops.{module}"), name).apply


def liger_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, token_weights: None, vocab_size: int, softcap: float, reduction: str
) -> Tensor:
    if token_weights is not None or vocab_size != weight.shape[0]:
        raise NotImplementedError("Liger knows no weights of tokens and no padding")
    apply = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return apply(x, weight, targets, None, None, -1, 0.0, 0.0, reduction, softcap)[0]


def liger_rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Liger computes in fp32 throughout, as we do, in the mode it names after Gemma."""
    return liger("rms_norm", "LigerRMSNormFunction")(x, weight, eps, 0.0, "gemma", False)


def liger_add_rmsnorm(x: Tensor, branch: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")(branch, x, weight, eps, 0.0, "gemma", False)


def liger_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return liger("layer_norm", "LigerLayerNormFunction")(x, weight, bias, eps)


def liger_swiglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(liger("swiglu", "LigerSiLUMulFunction")(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


LIGER = {
    "rmsnorm": liger_rmsnorm,
    "add_rmsnorm": liger_add_rmsnorm,
    "layer_norm": liger_layer_norm,
    "softmax": lambda x: liger("softmax", "LigerSoftmaxFunction")(x),
    "swiglu_mlp": liger_swiglu_mlp,
    "linear_cross_entropy": liger_linear_cross_entropy,
}


def quack_rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return import_module("quack").rmsnorm(x, weight, eps=eps)


QUACK = {"rmsnorm": quack_rmsnorm}


def sdpa(backend: str) -> Callable:
    """PyTorch's fused attention by one of its kernels alone: what that does not know fails."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: int | None,
        doc_ids: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        if not (causal and window is doc_ids is softcap is None and q.shape[1] == k.shape[1]):
            raise ValueError("causal attention of whole rows without a soft-cap only")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attention


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    doc_ids: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """The mask is made once for each length and window: it is not what is timed."""
    if not causal or doc_ids is not None or softcap is not None or q.shape[1] != k.shape[1]:
        raise ValueError("causal rows without documents and without a soft-cap only")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = block_mask(q.shape[2], window, q.device)
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@cache
def compiled_flex() -> Callable:
    return torch.compile(import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False)


@cache
def block_mask(T: int, window: int | None, device: torch.device) -> object:
    def causal(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return s <= t if window is None else (s <= t) & (t - s <= window)

    create = import_module("torch.nn.attention.flex_attention").create_block_mask
    return create(causal, None, None, T, T, device=device)


TORCH = {
    "attention": {"cudnn": sdpa("CUDNN_ATTENTION"), "flash": sdpa("FLASH_ATTENTION"), "flex": flex_attention},
}


def peers(op: str) -> dict[str, Callable]:
    """What else is installed and has the op. Where it cannot do a shape, the table leaves it out and says so."""
    packages = {"liger": ("liger_kernel", LIGER), "quack": ("quack", QUACK)}
    installed = {name: found[op] for name, (package, found) in packages.items() if op in found and find_spec(package)}
    return TORCH.get(op, {}) | installed


def products_of(op: str, inputs: Shape) -> dict[str, Call]:
    """The matrix products of an op bound by them, alone, each once over whole tensors: its floor by cuBLAS."""
    if op == "linear_cross_entropy":
        x, weight = inputs["x"].detach(), inputs["weight"].detach()
        z = torch.randn(x.shape[0], weight.shape[0], device=x.device, dtype=x.dtype)
        forward, backward = [(x, weight.mT)], [(z, weight), (z.mT, x)]
    elif op in ("relu2_mlp", "swiglu_mlp"):
        x, *ups, down = (
            inputs[name].detach() for name in ("x", *(["w_gate"] if "w_gate" in inputs else []), "w_up", "w_down")
        )
        h = torch.randn(x.shape[0], down.shape[1], device=x.device, dtype=x.dtype)
        forward = [*((x, up.mT) for up in ups), (h, down.mT)]
        backward = [(x, down), (x.mT, h), *(pair for up in ups for pair in ((h, up), (h.mT, x)))]
    else:
        return {}
    return {
        "forward": lambda: [a @ b for a, b in forward],
        "backward": lambda: [a @ b for a, b in backward],
        "both": lambda: [a @ b for a, b in forward + backward],
    }
