"""Example inputs and cost of every op: what tests check, what benches time, what `load_ops` proves a kernel with.

A shape is a dictionary of dimensions and options. `check` shapes are small and odd on purpose: the interpreter is slow
and mistakes live at the edges. `time` shapes are those of real models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, rand, randint, randn

from kernels_torch.adamw import AdamWRates
from kernels_torch.muon import variance_shape
from kernels_torch.quantised_cache import FORMS, as_bytes
from kernels_torch.quantised_cache import quantise as quantise_heads
from kernels_torch.quantised_weight import GROUP, quantise

Shape = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One op.

    inputs          shape → keyword arguments of the op, on the default device
    flops, bytes    shape → floating-point operations of a forward pass, and values it must read and write at least
                    (times the size of an element: bytes)
    backward        work of a backward pass as (flops, bytes), each a multiple of the forward pass; or a function of
                    the shape
    differentiable  inputs that get a gradient
    batched         inputs with one independent entry per index of their first dimension, as the outputs have
    fp32            inputs that stay fp32 whatever the dtype (fp64 in an fp64 run)
    prove           shapes that reach kernels which check[0] does not: `load_ops` runs these on a GPU, too
    huge            a shape with more elements in one tensor than 32 bits can count, where that makes sense
    part            (name, tensor, inputs) → what of an input, output or gradient makes up a small independent
                    part of the problem, where the reference in fp64 would not fit into memory whole; only benches ask
    """

    op: str
    inputs: Callable[..., Shape]
    flops: Callable[..., float]
    bytes: Callable[..., float]
    check: list[Shape]
    time: list[Shape]
    backward: tuple[float, float] | Callable[..., tuple[float, float]] = (2.0, 2.0)
    differentiable: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    fp32: tuple[str, ...] = ()
    prove: tuple[Shape, ...] = ()
    huge: Shape | None = None
    part: Callable[[str, Tensor, Shape], Tensor] | None = None

    def make(self, shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Shape:
        """Keyword arguments of the op for a shape: the same numbers for the same seed on the same kind of device.

        The random state of whoever calls is left as it was.
        """
        device = torch.device(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            return self.cast(self.inputs(**shape), dtype)

    def cast(self, inputs: Shape, dtype: torch.dtype) -> Shape:
        """Fresh leaf tensors with the floating-point ones in `dtype`."""
        own = {name: torch.promote_types(dtype, torch.float32) if name in self.fp32 else dtype for name in inputs}
        return {name: clone_as(value, own[name]) for name, value in inputs.items()}


def clone_as(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in another dtype, other tensors and codes copied, an op's dtype option set, the rest as
    it is."""
    if isinstance(value, torch.dtype):
        return dtype
    if not isinstance(value, Tensor):
        return value
    is_code = not value.is_floating_point() or value.element_size() == 1
    return value.detach().to(value.dtype if is_code else dtype, copy=True)


def rmsnorm_inputs(M: int, D: int, weight: bool = False, eps: float = 1e-6) -> Shape:
    return dict(x=randn(M, D), weight=1 + 0.5 * randn(D) if weight else None, eps=eps)


def add_rmsnorm_inputs(M: int, D: int, weight: bool = False, eps: float = 1e-6) -> Shape:
    inputs = rmsnorm_inputs(M, D, weight, eps)
    return dict(x=inputs["x"], branch=randn(M, D), weight=inputs["weight"], eps=eps)


def mix_rmsnorm_inputs(M: int, D: int, branch: bool = True, scaled: bool = True, eps: float = 1e-6) -> Shape:
    """scaled: the stream is weighed too, as before a layer; else only the anchor is, as in backout."""
    return dict(
        x=randn(M, D),
        anchor=randn(M, D),
        x_scale=1 + 0.5 * rand(1) if scaled else None,
        anchor_scale=rand(()) - 1.5,
        branch=randn(M, D) if branch else None,
        eps=eps,
    )


def layer_norm_inputs(M: int, D: int, weight: bool = True, bias: bool = True, eps: float = 1e-5) -> Shape:
    """Rows with means far from zero: a variance taken as E[x²] − E[x]² would lose its digits."""
    x = randn(M, D) + 4 * randn(M, 1)
    return dict(x=x, weight=1 + 0.5 * randn(D) if weight else None, bias=randn(D) if bias else None, eps=eps)


def embedding_inputs(N: int, D: int, V: int, zipf: bool = False) -> Shape:
    return dict(tokens=token_ids((N,), V, zipf), table=randn(V, D), dtype=torch.float32)


def value_embedding_inputs(
    B: int, T: int, Hkv: int, D: int, V: int, G: int = 12, gate_range: float = 3.0, zipf: bool = False
) -> Shape:
    return dict(
        v=randn(B, T, Hkv, D),
        tokens=token_ids((B, T), V, zipf),
        table=randn(V, Hkv * D),
        gate_input=randn(B, T, G),
        gate_weight=randn(Hkv, G) / G**0.5,
        gate_range=gate_range,
    )


def token_ids(shape: tuple[int, ...], V: int, zipf: bool) -> Tensor:
    """zipf: as words are distributed, the r-th most frequent 1/r as often as the first; else all alike."""
    if not zipf:
        return randint(0, V, shape)
    ranks = torch.exp(rand(shape) * torch.log(torch.tensor(V + 1.0))).long() - 1  # a density of 1/r
    return ranks.clamp(0, V - 1) * 7919 % V  # the frequent ones are not next to each other


def smear_inputs(B: int, T: int, D: int, G: int = 24, previous: bool = False, documents: int = 0) -> Shape:
    doc_ids = randint(0, documents, (B, T), dtype=torch.int32).sort(dim=1).values if documents else None
    return dict(
        x=randn(B, T, D),
        gate_weight=randn(1, G) / G**0.5,
        scale=0.5 + rand(1),
        previous=randn(B, 1, D) if previous else None,
        doc_ids=doc_ids,
    )


def qk_norm_rope_append_inputs(
    B: int, T: int, S: int, H: int, Hkv: int, D: int, eps: float | None = 1e-6, scale: float = 1.0, full: bool = False
) -> Shape:
    """full: some rows have no room for all new tokens."""
    inputs = qk_norm_rope_inputs(B, T, H, Hkv, D, eps=eps, scale=scale)
    angles = torch.outer(torch.arange(S), 100.0 ** (-torch.arange(0, D, 2) / D))
    return dict(
        q=inputs["q"],
        k=inputs["k"],
        v=randn(B, T, Hkv, D),
        k_cache=randn(B, S, Hkv, D),
        v_cache=randn(B, S, Hkv, D),
        cos=angles.cos(),
        sin=angles.sin(),
        lengths=randint(S - T if full else 0, S + 1 if full else S - T + 1, (B,), dtype=torch.int32),
        eps=eps,
        scale=scale,
    )


def qk_norm_rope_append_paged_inputs(
    B: int,
    T: int,
    page: int,
    n: int,
    H: int,
    Hkv: int,
    D: int,
    eps: float | None = 1e-6,
    scale: float = 1.0,
    full: bool = False,
    short: int = 0,
    codes: str | None = None,
) -> Shape:
    """The cache of qk_norm_rope_append_inputs, cut into pages that lie in any order among some that are nobody's.

    short   rows that the rotary tables lack
    codes   what the pages hold: int8, fp8; None: numbers
    """
    inputs = qk_norm_rope_append_inputs(B, T, n * page - short, H, Hkv, D, eps, scale, full)
    order = 1 + torch.randperm(B * n + 2)  # page 0 is nobody's
    del inputs["k_cache"], inputs["v_cache"]
    pages = dict(k_pages=randn(B * n + 3, page, Hkv, D), v_pages=randn(B * n + 3, page, Hkv, D))
    return dict(inputs, **as_codes(pages, codes), block_table=order[: B * n].view(B, n).to(torch.int32))


def as_codes(pages: Shape, form: str | None) -> Shape:
    """k_pages and v_pages, or their codes and scales; a code whose scale is not finite is the largest there is."""
    if form is None:
        return pages
    codes = {}
    for x in "kv":
        codes[f"{x}_pages"], codes[f"{x}_scales"] = quantise_heads(pages[f"{x}_pages"], FORMS[form])
        as_bytes(codes[f"{x}_pages"])[~codes[f"{x}_scales"].isfinite()] = 127  # 127, or NaN
    return codes


def attention_step_paged_inputs(
    B: int,
    page: int,
    n: int,
    H: int,
    Hkv: int,
    D: int,
    eps: float | None = 1e-6,
    qk_scale: float = 1.0,
    window: int | None = None,
    codes: str | None = None,
) -> Shape:
    """As qk_norm_rope_append_paged_inputs with room for a token; what pages hold beyond the lengths would show."""
    inputs = qk_norm_rope_append_paged_inputs(B, 1, page, n, H, Hkv, D, eps, qk_scale)
    beyond = (torch.arange(n * page) >= inputs["lengths"][:, None]).view(B, n, page, 1, 1)
    for name in ("k_pages", "v_pages"):
        pages = torch.full_like(inputs[name], 1000.0)
        pages[inputs["block_table"].long()] = randn(B, n, page, Hkv, D).masked_fill(beyond, 1000.0)
        inputs[name] = pages
    inputs |= as_codes({name: inputs[name] for name in ("k_pages", "v_pages")}, codes)
    return dict(inputs, qk_scale=inputs.pop("scale"), window=window)


def qk_norm_rope_inputs(
    B: int, T: int, H: int, Hkv: int, D: int, start: int | str = 0, eps: float | None = 1e-6, scale: float = 1.0
) -> Shape:
    """start "ragged": one position per row."""
    S = T + 8
    angles = torch.outer(torch.arange(S), 100.0 ** (-torch.arange(0, D, 2) / D))
    start = randint(0, S - T + 1, (B,), dtype=torch.int32) if start == "ragged" else start
    q, k = randn(B, T, H, D), randn(B, T, Hkv, D)
    return dict(q=q, k=k, cos=angles.cos(), sin=angles.sin(), start=start, eps=eps, scale=scale)


def attention_inputs(
    B: int,
    T: int,
    H: int,
    Hkv: int,
    D: int,
    Tk: int | None = None,
    causal: bool = True,
    window: int | None = None,
    documents: int = 0,
    softcap: float | None = None,
) -> Shape:
    """documents: how many each row is cut into at random places, 0 for no doc_ids."""
    S = T if Tk is None else Tk
    doc_ids = randint(0, documents, (B, T), dtype=torch.int32).sort(dim=1).values if documents else None
    q, k, v = randn(B, T, H, D), randn(B, S, Hkv, D), randn(B, S, Hkv, D)
    return dict(q=q, k=k, v=v, causal=causal, window=window, doc_ids=doc_ids, softcap=softcap)


def attention_part(name: str, value: Tensor, inputs: Shape) -> Tensor:
    """The first row's first key head and its queries."""
    heads = 1 if name.split()[-1][0] in "kv" else inputs["q"].shape[2] // inputs["k"].shape[2]
    return value[:1] if name == "doc_ids" else value[:1, :, :heads]


def attention_decode_inputs(
    B: int, Tn: int, S: int, H: int, Hkv: int, D: int, window: int | None = None, full: bool = False
) -> Shape:
    """full: every row fills the cache; else rows have all lengths and what lies beyond is NaN."""
    lengths = torch.full((B,), S) if full else randint(Tn, S + 1, (B,))
    k, v = randn(B, S, Hkv, D), randn(B, S, Hkv, D)
    beyond = (torch.arange(S) >= lengths[:, None])[:, :, None, None]
    k, v = k.masked_fill(beyond, torch.nan), v.masked_fill(beyond, torch.nan)
    return dict(q=randn(B, Tn, H, D), k_cache=k, v_cache=v, lengths=lengths.to(torch.int32), window=window)


def attention_decode_paged_inputs(
    B: int,
    Tn: int,
    page: int,
    n: int,
    H: int,
    Hkv: int,
    D: int,
    window: int | None = None,
    full: bool = False,
    codes: str | None = None,
) -> Shape:
    """The cache of attention_decode_inputs, cut into pages that lie in any order among some that are nobody's."""
    inputs = attention_decode_inputs(B, Tn, n * page, H, Hkv, D, window, full)
    order = torch.randperm(B * n + 3)
    pages = torch.full((2, B * n + 3, page, Hkv, D), torch.nan)
    for i, name in enumerate(("k_cache", "v_cache")):
        pages[i, order[: B * n]] = inputs.pop(name).view(B * n, page, Hkv, D)
    block_table = order[: B * n].view(B, n).to(torch.int32)
    pages = as_codes(dict(k_pages=pages[0].clone(), v_pages=pages[1].clone()), codes)
    return dict(inputs, **pages, block_table=block_table)


def draw_tokens_inputs(B: int, V: int, most: int = 0, draws: bool = True, ties: bool = False) -> Shape:
    """Rows with a top_k of their own, some without, one at temperature 0. ties: few different logits."""
    return dict(
        logits=randint(0, 3, (B, V)).float() if ties else 3 * randn(B, V),
        temperature=(rand(B) + 0.1) * (torch.arange(B) != 1) * draws,
        top_k=randint(0, most + 1, (B,)) * (torch.arange(B) != 2),
        seed=randint(0, 2**62, (B,)),
        sample=torch.arange(B),
        step=randint(0, 1000, (B,)),
        draws=draws,
        most=most,
    )


def take_tokens_inputs(B: int, V: int, H: int) -> Shape:
    """Some rows are forced, some end by a stop token or by their limit, some have ended before."""
    return dict(
        ids=randint(0, V, (B,)),
        forced=torch.where(rand(B) < 0.3, randint(0, V, (B,)), -1),
        limit=randint(1, 2 * H, (B,)),
        is_stop=rand(V) < 0.3,
        token=randint(0, V, (B,)),
        step=randint(0, 2 * H, (B,)),
        active=randint(0, 2, (B,), dtype=torch.int32),
        history=randint(-1, V, (B, H)),
    )


def linear_cross_entropy_inputs(
    N: int,
    D: int,
    V: int,
    padding: int = 0,
    softcap: float | None = None,
    weights: bool = False,
    ignored: float = 0.2,
    reduction: str = "mean",
) -> Shape:
    """padding: rows of weight beyond the vocabulary. ignored: what share of the targets is −1."""
    targets = torch.where(rand(N) < ignored, -1, randint(0, V, (N,)))
    return dict(
        x=randn(N, D),
        weight=randn(V + padding, D) * (3 / D**0.5),
        targets=targets,
        token_weights=randn(N) if weights else None,
        vocab_size=V,
        softcap=softcap,
        reduction=reduction,
    )


def linear_decode_inputs(
    N: int,
    C: int,
    F: int,
    form: str | None = None,
    group: int = GROUP,
    norm: bool = False,
    gain: bool = False,
    activation: str | None = None,
    residual: bool = False,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Shape:
    """form: of the weight's codes; None: it is no codes. F counts the rows of the weight."""
    weight, scales = randn(F, C) / C**0.5, None
    if form is not None:
        weight, scales = quantise(weight, form, group)
    return dict(
        x=randn(N, C),
        weight=weight,
        scales=scales,
        norm_weight=1 + 0.5 * randn(C) if gain else None,
        eps=1e-6 if norm or gain else None,
        activation=activation,
        residual=randn(N, F // 2 if activation == "swiglu" else F) if residual else None,
        softcap=softcap,
        out_dtype=out_dtype,
    )


def relu2_mlp_inputs(N: int, D: int, F: int) -> Shape:
    return dict(x=randn(N, D), w_up=randn(F, D) / D**0.5, w_down=randn(D, F) / F**0.5)


def swiglu_mlp_inputs(N: int, D: int, F: int) -> Shape:
    return dict(relu2_mlp_inputs(N, D, F), w_gate=randn(F, D) / D**0.5)


def muon_momentum_inputs(K: int, r: int, c: int, equilibrate: bool = True) -> Shape:
    grads, momentum = randn(K, r, c), randn(K, r, c)
    return dict(grads=grads, momentum=momentum, mu=0.9, equilibrate=equilibrate, dtype=torch.float32)


def muon_update_inputs(K: int, r: int, c: int, snap: bool = True) -> Shape:
    second_moment = rand(K, *variance_shape(r, c))
    return dict(
        params=randn(K, r, c), x=randn(K, r, c), second_moment=second_moment, lr=0.1, weight_decay=0.3, snap=snap
    )


def adamw_update_inputs(N: int, D: int, step: int = 3) -> Shape:
    rates = AdamWRates(lr=0.1, step=step, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1)
    return dict(params=randn(N, D), grads=randn(N, D), exp_avg=randn(N, D), exp_avg_sq=rand(N, D), rates=rates)


def visible_pairs(T: int, Tk: int | None = None, window: int | None = None, causal: bool = True) -> int:
    """(query, key) pairs of attention, documents aside."""
    Tk = T if Tk is None else Tk
    reach = T + Tk if window is None else window
    positions = range(Tk - T, Tk)
    return sum(max(0, min(Tk - 1, p if causal else p + reach) - max(0, p - reach) + 1) for p in positions)


def mlp_case(op: str, inputs: Callable[..., Shape], matrices: int, time: list[Shape]) -> Case:
    """relu² has two matrices, SwiGLU three."""
    weights = ("w_up", "w_down") if matrices == 2 else ("w_gate", "w_up", "w_down")
    return Case(
        op,
        inputs=inputs,
        flops=lambda N, D, F: 2 * matrices * N * D * F,
        bytes=lambda N, D, F: 2 * N * D + matrices * D * F,
        differentiable=("x", *weights),
        batched=("x",),
        check=[dict(N=7, D=12, F=20), dict(N=1, D=1, F=1), dict(N=37, D=31, F=53), dict(N=0, D=4, F=8)],
        prove=(dict(N=7168, D=384, F=1536),),  # where Hopper's kernels begin
        time=time,
    )


def d_model(width: int) -> Shape:
    """A training step of nanochat of that width, 32 rows of 2048."""
    return dict(N=65536, D=width, F=4 * width)


CASES = {
    case.op: case
    for case in (
        Case(
            "rmsnorm",
            inputs=rmsnorm_inputs,
            flops=lambda M, D, **_: 4 * M * D,
            bytes=lambda M, D, **_: 2 * M * D,
            backward=(2.0, 1.5),
            differentiable=("x", "weight"),
            batched=("x",),
            check=[
                dict(M=7, D=60, weight=True),
                dict(M=5, D=33, eps=1e-3),
                dict(M=37, D=128),
                dict(M=1, D=9, weight=True),  # not one value: how far fp64 may be off cannot be told from one
                dict(M=130, D=1),
                dict(M=3, D=1, weight=True),
                dict(M=67, D=97, weight=True),
                dict(M=2, D=2176, weight=True),
                dict(M=0, D=5, weight=True),
            ],
            time=[
                dict(M=M, D=D, weight=weight)
                for M, D in ((65536, 768), (65536, 1536), (32768, 2176), (32768, 4096), (4096, 768))
                for weight in (True, False)
            ],
            huge=dict(M=600_000, D=4096),
        ),
        Case(
            "add_rmsnorm",
            inputs=add_rmsnorm_inputs,
            flops=lambda M, D, **_: 5 * M * D,
            bytes=lambda M, D, **_: 4 * M * D,
            backward=(2.0, 1.0),  # reads s, dy and ds, writes the one gradient of both
            differentiable=("x", "branch", "weight"),
            batched=("x", "branch"),
            check=[
                dict(M=7, D=60, weight=True),
                dict(M=5, D=33, eps=1e-3),
                dict(M=37, D=128),
                dict(M=1, D=9, weight=True),
                dict(M=130, D=1),
                dict(M=67, D=97, weight=True),
                dict(M=2, D=2176, weight=True),
                dict(M=0, D=5, weight=True),
            ],
            time=[dict(M=M, D=D) for M, D in ((65536, 768), (32768, 1280), (65536, 1536), (32768, 2176))]
            + [dict(M=65536, D=768, weight=True)],
            huge=dict(M=600_000, D=4096),
        ),
        Case(
            "mix_rmsnorm",
            inputs=mix_rmsnorm_inputs,
            flops=lambda M, D, branch=True, **_: 8 * M * D,
            bytes=lambda M, D, branch=True, **_: (5 if branch else 4) * M * D,
            backward=lambda branch=True, **_: (2.0, 1.6 if branch else 1.75),  # reads 6 or 5, writes 2
            differentiable=("x", "anchor", "x_scale", "anchor_scale", "branch"),
            batched=("x", "anchor", "branch"),
            fp32=("x_scale", "anchor_scale"),
            check=[
                dict(M=7, D=60),
                dict(M=5, D=33, branch=False),
                dict(M=37, D=128, scaled=False),
                dict(M=3, D=9, branch=False, scaled=False, eps=1e-3),
                dict(M=130, D=1),
                dict(M=67, D=97),
                dict(M=2, D=2176),
                dict(M=0, D=5),
            ],
            time=[
                dict(M=65536, D=768),
                dict(M=65536, D=768, branch=False),
                dict(M=65536, D=768, scaled=False),
                dict(M=32768, D=1280),
                dict(M=65536, D=1536),
            ],
            huge=dict(M=600_000, D=4096),
        ),
        Case(
            "layer_norm",
            inputs=layer_norm_inputs,
            flops=lambda M, D, **_: 8 * M * D,
            bytes=lambda M, D, **_: 2 * M * D,
            backward=(2.0, 1.5),
            differentiable=("x", "weight", "bias"),
            batched=("x",),
            check=[
                dict(M=7, D=60),
                dict(M=5, D=33, bias=False, eps=1e-3),
                dict(M=37, D=128, weight=False, bias=False),
                dict(M=3, D=9, weight=False),
                dict(M=130, D=2),
                dict(M=67, D=97),
                dict(M=2, D=2176),
                dict(M=0, D=5),
            ],
            time=[dict(M=65536, D=768), dict(M=65536, D=1600), dict(M=32768, D=4096), dict(M=1024, D=128)],
            huge=dict(M=600_000, D=4096),
        ),
        Case(
            "gelu",
            inputs=lambda M, D: dict(x=2 * randn(M, D)),
            flops=lambda M, D: 20 * M * D,
            bytes=lambda M, D: 2 * M * D,
            backward=(2.0, 1.5),
            differentiable=("x",),
            batched=("x",),
            check=[
                dict(M=7, D=60),
                dict(M=5, D=33),
                dict(M=1, D=9),
                dict(M=130, D=1),
                dict(M=67, D=97),
                dict(M=0, D=5),
            ],
            time=[dict(M=65536, D=3072), dict(M=32768, D=6400), dict(M=1024, D=512)],
            huge=dict(M=600_000, D=4096),
        ),
        Case(
            "softmax",
            inputs=lambda M, D: dict(x=3 * randn(M, D)),
            flops=lambda M, D: 5 * M * D,
            bytes=lambda M, D: 2 * M * D,
            backward=(1.0, 1.5),
            differentiable=("x",),
            batched=("x",),
            check=[
                dict(M=7, D=60),
                dict(M=5, D=33),
                dict(M=37, D=128),
                dict(M=130, D=2),
                dict(M=67, D=97),
                dict(M=3, D=2176),
                dict(M=0, D=5),
            ],
            time=[dict(M=65536, D=1024), dict(M=32768, D=4096), dict(M=4096, D=32768), dict(M=1024, D=64)],
            huge=dict(M=600_000, D=4096),
        ),
        Case(
            "top_k",
            inputs=lambda M, D, k: dict(x=randn(M, D), k=k),
            flops=lambda M, D, k: k * M * D,
            bytes=lambda M, D, k: M * D,
            backward=(1.0, 1.0),
            differentiable=("x",),
            batched=("x",),
            check=[
                dict(M=7, D=60, k=5),
                dict(M=37, D=8, k=2),
                dict(M=5, D=33, k=33),
                dict(M=3, D=1, k=1),
                dict(M=67, D=97, k=1),
                dict(M=2, D=2176, k=50),
                dict(M=0, D=5, k=2),
            ],
            time=[dict(M=65536, D=8, k=2), dict(M=65536, D=128, k=8), dict(M=32, D=32768, k=50)],
            huge=dict(M=600_000, D=4096, k=2),
        ),
        Case(
            "embedding",
            inputs=embedding_inputs,
            flops=lambda N, D, V, **_: 0,
            bytes=lambda N, D, V, **_: N * D + 2 * min(N, V) * D,  # rows of the table are fp32: two values each
            backward=(1.0, 1.0),
            differentiable=("table",),
            fp32=("table",),
            check=[
                dict(N=37, D=12, V=9),
                dict(N=7, D=33, V=50),
                dict(N=1, D=1, V=1),
                dict(N=130, D=8, V=3),
                dict(N=64, D=130, V=200, zipf=True),
                dict(N=0, D=4, V=6),
            ],
            time=[dict(N=65536, D=768, V=32768, zipf=True), dict(N=32768, D=1280, V=32768, zipf=True)],
        ),
        Case(
            "value_embedding",
            inputs=value_embedding_inputs,
            flops=lambda B, T, Hkv, D, **_: 2 * B * T * Hkv * D,
            bytes=lambda B, T, Hkv, D, V, **_: Hkv * D * (2 * B * T + 2 * min(B * T, V)),
            backward=(2.0, 1.0),
            differentiable=("v", "table", "gate_input", "gate_weight"),
            batched=("v", "gate_input"),
            fp32=("table", "gate_weight"),
            check=[
                dict(B=2, T=7, Hkv=3, D=8, V=11),
                dict(B=1, T=33, Hkv=1, D=5, V=4, G=3, gate_range=2.0),
                dict(B=3, T=1, Hkv=2, D=16, V=50),
                dict(B=1, T=1, Hkv=1, D=1, V=1, G=1),
                dict(B=2, T=40, Hkv=2, D=32, V=19, zipf=True),
                dict(B=0, T=3, Hkv=2, D=4, V=6),
            ],
            time=[
                dict(B=32, T=2048, Hkv=6, D=128, V=32768, zipf=True),
                dict(B=16, T=2048, Hkv=10, D=128, V=32768, zipf=True),
            ],
        ),
        Case(
            "smear",
            inputs=smear_inputs,
            flops=lambda B, T, D, **_: 2 * B * T * D,
            bytes=lambda B, T, D, **_: 2 * B * T * D,
            backward=(2.0, 1.5),
            differentiable=("x", "gate_weight", "scale", "previous"),
            batched=("x", "previous"),
            fp32=("gate_weight", "scale"),
            check=[
                dict(B=2, T=7, D=60),
                dict(B=1, T=33, D=24, previous=True),
                dict(B=3, T=1, D=31, G=5, previous=True),
                dict(B=2, T=19, D=33, documents=3),
                dict(B=1, T=1, D=1, G=1),
                dict(B=2, T=5, D=130, documents=5, previous=True),
                dict(B=0, T=3, D=30),
            ],
            time=[dict(B=32, T=2048, D=768), dict(B=16, T=2048, D=1280)],
            huge=dict(B=300, T=2048, D=4096),
        ),
        Case(
            "qk_norm_rope_append",
            inputs=qk_norm_rope_append_inputs,
            flops=lambda B, T, S, H, Hkv, D, **_: 8 * B * T * (H + Hkv) * D,
            bytes=lambda B, T, S, H, Hkv, D, **_: 2 * B * T * (H + 2 * Hkv) * D,
            batched=("q", "k", "v", "k_cache", "v_cache"),
            fp32=("cos", "sin"),
            check=[
                dict(B=3, T=1, S=9, H=4, Hkv=2, D=16),
                dict(B=2, T=5, S=13, H=2, Hkv=1, D=6, scale=1.2),
                dict(B=4, T=3, S=7, H=2, Hkv=2, D=8, eps=None),
                dict(B=5, T=3, S=6, H=3, Hkv=1, D=32, full=True),
                dict(B=0, T=1, S=4, H=2, Hkv=1, D=8),
            ],
            time=[dict(B=B, T=1, S=2048, H=H, Hkv=H, D=128) for B, H in ((1, 6), (32, 6), (32, 16))],
        ),
        Case(
            "qk_norm_rope_append_paged",
            inputs=qk_norm_rope_append_paged_inputs,
            flops=lambda B, T, H, Hkv, D, **_: 8 * B * T * (H + Hkv) * D,
            bytes=lambda B, T, H, Hkv, D, **_: 2 * B * T * (H + 2 * Hkv) * D,
            batched=("q", "k", "v"),
            fp32=("cos", "sin", "k_scales", "v_scales"),
            check=[
                dict(B=3, T=1, page=4, n=3, H=4, Hkv=2, D=16),
                dict(B=2, T=5, page=4, n=4, H=2, Hkv=1, D=6, scale=1.2),
                dict(B=4, T=3, page=7, n=1, H=2, Hkv=2, D=8, eps=None),
                dict(B=5, T=3, page=2, n=3, H=3, Hkv=1, D=32, full=True),
                dict(B=3, T=2, page=4, n=2, H=2, Hkv=1, D=8, full=True, short=3),
                dict(B=4, T=3, page=4, n=2, H=2, Hkv=2, D=24, full=True, codes="int8"),
                dict(B=3, T=1, page=5, n=2, H=2, Hkv=1, D=16, codes="fp8"),
                dict(B=0, T=1, page=4, n=1, H=2, Hkv=1, D=8),
            ],
            time=[dict(B=B, T=1, page=32, n=64, H=H, Hkv=H, D=128) for B, H in ((1, 6), (32, 6), (32, 16))],
        ),
        Case(
            "qk_norm_rope",
            inputs=qk_norm_rope_inputs,
            flops=lambda B, T, H, Hkv, D, **_: 8 * B * T * (H + Hkv) * D,
            bytes=lambda B, T, H, Hkv, D, **_: 2 * B * T * (H + Hkv) * D,
            backward=(2.0, 1.5),
            differentiable=("q", "k"),
            batched=("q", "k"),
            fp32=("cos", "sin"),
            check=[
                dict(B=2, T=7, H=4, Hkv=2, D=16),
                dict(B=1, T=5, H=3, Hkv=1, D=6, start=3, scale=1.2),
                dict(B=3, T=1, H=2, Hkv=2, D=32, start="ragged"),
                dict(B=2, T=4, H=2, Hkv=2, D=2, start="ragged", eps=None),
                dict(B=1, T=1, H=1, Hkv=1, D=96, eps=1.1920929e-7, scale=1.2),
                dict(B=0, T=3, H=2, Hkv=1, D=8),
            ],
            time=[dict(B=32, T=2048, H=6, Hkv=6, D=128), dict(B=16, T=2048, H=16, Hkv=16, D=128)],
            huge=dict(B=300, T=2048, H=16, Hkv=16, D=256),
        ),
        Case(
            "attention",
            inputs=attention_inputs,
            flops=lambda B, T, H, Hkv, D, Tk=None, window=None, causal=True, **_: (
                4 * B * H * D * visible_pairs(T, Tk, window, causal)
            ),
            bytes=lambda B, T, H, Hkv, D, Tk=None, **_: B * D * (2 * T * H + 2 * (Tk or T) * Hkv),
            backward=(2.5, 2.0),
            differentiable=("q", "k", "v"),
            batched=("q", "k", "v"),
            part=attention_part,
            prove=(dict(B=1, T=200, H=2, Hkv=2, D=128),),
            check=[
                dict(B=2, T=17, H=4, Hkv=2, D=16),
                dict(B=1, T=13, H=2, Hkv=2, D=8, window=4),
                dict(B=2, T=19, H=2, Hkv=1, D=8, documents=3),
                dict(B=1, T=23, H=3, Hkv=1, D=4, window=5, documents=2),
                dict(B=1, T=5, Tk=11, H=2, Hkv=1, D=8),
                dict(B=1, T=3, Tk=11, H=2, Hkv=2, D=8, window=2),
                dict(B=2, T=1, Tk=9, H=2, Hkv=2, D=8, window=4),
                dict(B=1, T=1, H=1, Hkv=1, D=1),
                dict(B=1, T=7, H=2, Hkv=2, D=6, window=1),
                dict(B=1, T=9, Tk=5, H=2, Hkv=1, D=8),
                dict(B=2, T=18, H=4, Hkv=2, D=8, causal=False),
                dict(B=1, T=21, Tk=14, H=2, Hkv=1, D=6, causal=False, window=5),
                dict(B=1, T=15, H=3, Hkv=1, D=4, causal=False, window=6, documents=2),
                dict(B=1, T=17, H=2, Hkv=1, D=8, window=6, softcap=1.5),
                dict(B=1, T=11, Tk=19, H=2, Hkv=2, D=16, causal=False, softcap=3.0),
                dict(B=0, T=4, H=2, Hkv=1, D=4),
            ],
            time=[
                dict(B=32, T=2048, H=6, Hkv=6, D=128),
                dict(B=32, T=2048, H=6, Hkv=6, D=128, window=768),
                dict(B=16, T=2048, H=16, Hkv=16, D=128),
                dict(B=4, T=8192, H=16, Hkv=16, D=128),
                dict(B=4, T=8192, H=16, Hkv=16, D=128, window=2048),
                dict(B=1, T=32768, H=16, Hkv=16, D=128),
                dict(B=32, T=2048, H=12, Hkv=12, D=64),
                dict(B=4, T=8192, H=16, Hkv=4, D=128),
            ],
        ),
        Case(
            "attention_decode",
            inputs=attention_decode_inputs,
            flops=lambda B, Tn, S, H, Hkv, D, window=None, **_: 4 * B * H * D * visible_pairs(Tn, S, window),
            bytes=lambda B, Tn, S, H, Hkv, D, window=None, **_: (
                B * D * (2 * Tn * H + 2 * min(S, (S if window is None else window) + Tn) * Hkv)
            ),
            batched=("q", "k_cache", "v_cache"),
            check=[
                dict(B=3, Tn=1, S=17, H=4, Hkv=2, D=16),
                dict(B=2, Tn=5, S=13, H=2, Hkv=1, D=8, window=3),
                dict(B=1, Tn=7, S=7, H=2, Hkv=2, D=8, full=True),
                dict(B=4, Tn=1, S=9, H=1, Hkv=1, D=6, window=1),
                dict(B=0, Tn=1, S=4, H=2, Hkv=1, D=8),
            ],
            prove=(dict(B=2, Tn=1, S=300, H=2, Hkv=2, D=128), dict(B=2, Tn=1, S=300, H=8, Hkv=2, D=128)),
            time=[
                dict(B=B, Tn=1, S=S, H=H, Hkv=Hkv, D=128, full=True)
                for B, S, H, Hkv in (
                    (1, 1024, 6, 6),
                    (1, 2048, 17, 17),
                    (1, 32768, 6, 6),
                    (1, 131072, 16, 4),
                    (1, 131072, 16, 1),
                    (8, 8192, 16, 16),
                    (32, 2048, 6, 6),
                    (32, 8192, 16, 4),
                    (64, 1024, 12, 12),
                    (64, 8192, 16, 1),
                )
            ],
        ),
        Case(
            "attention_decode_paged",
            inputs=attention_decode_paged_inputs,
            flops=lambda B, Tn, page, n, H, Hkv, D, window=None, **_: (
                4 * B * H * D * visible_pairs(Tn, n * page, window)
            ),
            bytes=lambda B, Tn, page, n, H, Hkv, D, window=None, **_: (
                B * D * (2 * Tn * H + 2 * min(n * page, (n * page if window is None else window) + Tn) * Hkv)
            ),
            batched=("q",),
            fp32=("k_scales", "v_scales"),
            check=[
                dict(B=3, Tn=1, page=8, n=3, H=4, Hkv=2, D=16),
                dict(B=2, Tn=5, page=4, n=4, H=2, Hkv=1, D=8, window=3),
                dict(B=1, Tn=7, page=7, n=1, H=2, Hkv=2, D=8, full=True),
                dict(B=3, Tn=1, page=8, n=3, H=2, Hkv=2, D=24, codes="int8"),
                dict(B=2, Tn=5, page=16, n=3, H=4, Hkv=2, D=16, window=9, codes="int8"),
                dict(B=3, Tn=1, page=8, n=5, H=2, Hkv=2, D=16, window=9, codes="fp8"),
                dict(B=2, Tn=2, page=5, n=4, H=4, Hkv=1, D=8, codes="fp8"),
                dict(B=0, Tn=1, page=4, n=2, H=2, Hkv=1, D=8),
            ],
            time=[
                dict(B=B, Tn=1, page=256, n=S // 256, H=H, Hkv=Hkv, D=128, full=True)
                for B, S, H, Hkv in ((1, 2048, 6, 6), (32, 2048, 6, 6), (32, 8192, 16, 4))
            ],
        ),
        Case(
            "attention_step_paged",
            inputs=attention_step_paged_inputs,
            flops=lambda B, page, n, H, D, **_: 4 * B * H * D * n * page,
            bytes=lambda B, page, n, H, Hkv, D, **_: 2 * B * D * (H + n * page * Hkv),
            batched=("q", "k", "v"),
            fp32=("cos", "sin", "k_scales", "v_scales"),
            check=[
                dict(B=3, page=4, n=3, H=2, Hkv=2, D=16),
                dict(B=2, page=8, n=9, H=3, Hkv=3, D=6, window=5, qk_scale=1.2),
                dict(B=4, page=32, n=5, H=1, Hkv=1, D=24, eps=None),
                dict(B=2, page=4, n=2, H=4, Hkv=2, D=8, window=1),
                dict(B=2, page=3, n=2, H=2, Hkv=2, D=8, window=1),
                dict(B=3, page=8, n=5, H=2, Hkv=2, D=24, codes="int8"),
                dict(B=2, page=4, n=3, H=4, Hkv=2, D=16, codes="int8"),
                dict(B=3, page=3, n=5, H=2, Hkv=2, D=16, window=4, codes="fp8"),
                dict(B=0, page=4, n=2, H=2, Hkv=2, D=8),
            ],
            prove=(dict(B=2, page=32, n=10, H=2, Hkv=2, D=128), dict(B=2, page=32, n=10, H=8, Hkv=2, D=128)),
            time=[dict(B=1, page=32, n=64, H=H, Hkv=H, D=128) for H in (6, 12, 17)],
        ),
        mlp_case("relu2_mlp", relu2_mlp_inputs, 2, [d_model(384), d_model(768), d_model(1280)]),
        mlp_case("swiglu_mlp", swiglu_mlp_inputs, 3, [dict(N=65536, D=768, F=2048), dict(N=16384, D=2048, F=5632)]),
        Case(
            "draw_tokens",
            inputs=draw_tokens_inputs,
            flops=lambda B, V, **_: 20 * B * V,
            bytes=lambda B, V, **_: B * V,
            batched=("logits",),
            fp32=("temperature",),
            check=[
                dict(B=3, V=75, most=5),
                dict(B=4, V=5000, most=50),
                dict(B=5, V=2049, draws=False, most=3),
                dict(B=3, V=4100),
                dict(B=4, V=4097, most=33, ties=True),
                dict(B=3, V=5000, most=300),
                dict(B=2, V=40, most=90, ties=True),
                dict(B=3, V=7, most=1),
                dict(B=0, V=4, most=2),
            ],
            time=[
                dict(B=B, V=V, most=most, draws=draws)
                for B in (1, 32)
                for V in (32768, 65536)
                for draws, most in ((False, 0), (True, 0), (True, 50))
            ],
        ),
        Case(
            "take_tokens",
            inputs=take_tokens_inputs,
            flops=lambda B, **_: 4 * B,
            bytes=lambda B, **_: 16 * B,
            batched=(),
            check=[dict(B=3, V=20, H=5), dict(B=70, V=9, H=3), dict(B=0, V=4, H=2)],
            time=[dict(B=1, V=32768, H=512), dict(B=128, V=32768, H=512)],
        ),
        Case(
            "linear_cross_entropy",
            inputs=linear_cross_entropy_inputs,
            flops=lambda N, D, V, **_: 2 * N * D * V,
            bytes=lambda N, D, V, padding=0, **_: N * D + (V + padding) * D,
            differentiable=("x", "weight", "token_weights"),
            batched=("x",),  # with reduction="none"
            fp32=("token_weights",),
            check=[
                dict(N=7, D=12, V=33),
                dict(N=19, D=8, V=41, padding=23, softcap=15.0, weights=True),
                dict(N=67, D=6, V=10, reduction="sum", softcap=2.0),
                dict(N=5, D=4, V=9, padding=7, reduction="none", weights=True),
                dict(N=3, D=4, V=5, ignored=1.0),
                dict(N=1, D=1, V=1, ignored=0.0),
                dict(N=0, D=4, V=6),
            ],
            prove=(dict(N=300, D=384, V=1000, padding=24, softcap=15.0, weights=True),),  # Hopper's kernel
            time=[dict(N=65536, D=768, V=32768, softcap=15.0), dict(N=32768, D=1536, V=65536, softcap=15.0)],
        ),
        Case(
            "linear_decode",
            inputs=linear_decode_inputs,
            flops=lambda N, C, F, **_: 2 * N * C * F,
            bytes=lambda N, C, F, form=None, **_: N * (C + F) + C * F * {None: 1, "int4": 0.25}.get(form, 0.5),
            batched=("x", "residual"),
            fp32=("scales", "norm_weight", "out_dtype"),
            check=[
                dict(N=3, C=60, F=33),
                dict(N=1, C=130, F=48, norm=True, activation="relu2"),
                dict(N=1, C=384, F=37, residual=True),
                dict(N=2, C=33, F=20, gain=True, activation="swiglu", residual=True),
                dict(N=19, C=96, F=40, norm=True, residual=True, out_dtype=torch.float32),
                dict(N=5, C=31, F=1, activation="silu"),
                dict(N=20, C=24, F=50, softcap=0.7),
                dict(N=1, C=300, F=21, form="int8", gain=True),
                dict(N=6, C=130, F=24, form="int8", norm=True, activation="relu2"),
                dict(N=1, C=130, F=24, form="int4", norm=True, residual=True),
                dict(N=7, C=200, F=22, form="int4", group=64, gain=True, activation="swiglu"),
                dict(N=1, C=70, F=18, form="fp8", softcap=1.5, out_dtype=torch.float32),
                dict(N=4, C=257, F=35, form="fp8", norm=True, residual=True),
                dict(N=70, C=40, F=12, form="int4", norm=True),
                dict(N=0, C=12, F=9),
            ],
            prove=(dict(N=1, C=384, F=128, norm=True), dict(N=16, C=384, F=128, residual=True)),
            time=[
                dict(N=N, C=C, F=F, form=form)
                for N in (1, 16)
                for C, F in ((768, 2304), (2176, 8704), (8704, 2176), (2176, 65536))
                for form in (None, "int8", "int4")
            ],
        ),
        Case(
            "muon_momentum",
            inputs=muon_momentum_inputs,
            flops=lambda K, r, c, **_: 8 * K * r * c,
            bytes=lambda K, r, c, **_: 4 * K * r * c,
            batched=("grads", "momentum"),
            fp32=("momentum",),
            check=[
                dict(K=2, r=7, c=31),
                dict(K=3, r=12, c=5, equilibrate=False),
                dict(K=1, r=1, c=1),
                dict(K=2, r=9, c=1),
                dict(K=2, r=3, c=9000),
                dict(K=0, r=4, c=6),
            ],
            time=[dict(K=12, r=768, c=3072), dict(K=80, r=1280, c=1280)],
        ),
        Case(
            "muon_update",
            inputs=muon_update_inputs,
            flops=lambda K, r, c, **_: 10 * K * r * c,
            bytes=lambda K, r, c, **_: 3 * K * r * c,
            batched=("params", "x", "second_moment"),
            fp32=("second_moment",),
            check=[
                dict(K=2, r=7, c=31),
                dict(K=3, r=12, c=5, snap=False),
                dict(K=2, r=30, c=30),
                dict(K=1, r=300, c=601),
                dict(K=2, r=1, c=9),
                dict(K=0, r=4, c=6),
            ],
            time=[dict(K=12, r=768, c=3072), dict(K=12, r=3072, c=768), dict(K=80, r=1280, c=1280)],
        ),
        Case(
            "adamw_update",
            inputs=adamw_update_inputs,
            flops=lambda N, D, **_: 14 * N * D,
            bytes=lambda N, D, **_: 7 * N * D,
            fp32=("exp_avg", "exp_avg_sq"),
            check=[
                dict(N=7, D=31),
                dict(N=3, D=1, step=1),
                dict(N=130, D=67, step=1000),
                dict(N=0, D=5),
            ],
            time=[dict(N=32768, D=768), dict(N=32768, D=1280)],
        ),
        Case(
            "newton_schulz",
            inputs=lambda K, r, c: dict(g=randn(K, r, c), dtype=torch.float32),
            flops=lambda K, r, c, **_: 5 * 2 * K * (2 * min(r, c) ** 2 * max(r, c) + min(r, c) ** 3),
            bytes=lambda K, r, c, **_: 2 * K * r * c,
            batched=("g",),
            check=[
                dict(K=2, r=12, c=12),
                dict(K=3, r=7, c=31),
                dict(K=1, r=33, c=5),
                dict(K=1, r=1, c=1),
                dict(K=2, r=1, c=9),
                dict(K=0, r=4, c=6),
                dict(K=2, r=20, c=70),
                dict(K=1, r=67, c=66),
            ],
            prove=(dict(K=2, r=640, c=640), dict(K=2, r=640, c=1280)),
            time=[dict(K=12, r=768, c=3072), dict(K=48, r=768, c=768), dict(K=20, r=1280, c=5120)],
        ),
    )
}
