"""Which code runs each hot operation: decided once, by name, before anything starts.

A backend is a folder beside this one: the word `triton` in a config means the package `kernels_triton`. The model is
handed the resolved functions (`Ops`) and looks nothing up while it runs. Nothing falls back in silence: what cannot run
is refused here, in one sentence, and a mix of backends is something the user wrote down.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, make_dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from errors import KestrelError


@dataclass(frozen=True)
class Ops:
    """The hot operations the models and their optimizer are written in. `kernels_torch` says what each one means.

    A backend may have more (layer_norm, gelu, softmax, top_k): an op gets a field here when a model runs it.
    """

    embedding: Callable
    smear: Callable
    rmsnorm: Callable
    add_rmsnorm: Callable
    mix_rmsnorm: Callable
    value_embedding: Callable
    qk_norm_rope: Callable
    qk_norm_rope_append: Callable
    qk_norm_rope_append_paged: Callable
    attention: Callable
    attention_decode: Callable
    attention_decode_paged: Callable
    attention_step_paged: Callable
    linear_decode: Callable
    draw_tokens: Callable
    take_tokens: Callable
    relu2_mlp: Callable
    swiglu_mlp: Callable
    linear_cross_entropy: Callable
    muon_momentum: Callable
    newton_schulz: Callable
    muon_update: Callable
    adamw_update: Callable


# Chosen by another's key: the same op on pages or with what surrounds it, and what belongs to the draw of a token.
FORMS = {
    "attention_decode_paged": "attention_decode",
    "attention_step_paged": "attention_decode",
    "qk_norm_rope_append_paged": "qk_norm_rope_append",
    "take_tokens": "draw_tokens",
}
OP_NAMES = [f.name for f in fields(Ops) if f.name not in FORMS]
SAME_AS_BACKEND = "${.backend}"  # OmegaConf resolves it; without OmegaConf it means the same

# One field per op, each following `backend` unless set: `kernels=triton kernels.attention=torch`.
KernelConfig = make_dataclass(
    "KernelConfig", [("backend", str, "torch"), *((op, str, SAME_AS_BACKEND) for op in OP_NAMES)]
)
KernelConfig.__module__ = __name__  # so that it can be pickled
KernelConfig.__doc__ = "The backend of every op: a word X stands for the package kernels_X."


# What only training runs, and what only the engine does.
TRAINING = {op for op in Ops.__dataclass_fields__ if op.startswith(("linear_cross", "muon_", "newton_", "adamw_"))}
OPTIMIZER = {op for op in TRAINING if not op.startswith("linear_cross")}
ENGINE = {*FORMS, "linear_decode", "draw_tokens"}


def load_ops(
    config: KernelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    trains: bool = True,
    generates: bool = True,
) -> Ops:
    """The functions `config` asks for, each proven to be there and, for Triton, to run on `device` in `dtype`.

    trains     False: what only training runs is not proven, nor are gradients: to compile it all takes its time
    generates  False: what only the engine runs is not

    Raises KestrelError for a backend that does not exist, cannot run here, or lacks the op.
    """
    device = torch.device(device)
    if any(map(is_triton, chosen_backends(config).values())) and is_interpreted() and dtype == torch.bfloat16:
        raise KestrelError(
            "Triton's interpreter is silently wrong in bfloat16: take hardware.dtype=float32, or kernels=torch"
        )
    chosen = chosen_backends(config)
    chosen |= {form: chosen[op] for form, op in FORMS.items()}
    modules = {}
    for op, backend in chosen.items():
        if backend not in modules:
            modules[backend] = load_backend(backend, device, "kernels" if backend == config.backend else key_of(op))
    ops = {op: find_op(modules[backend], op) for op, backend in chosen.items()}
    unused = (set() if trains else TRAINING) | (set() if generates else ENGINE)
    ours = {op: backend for op, backend in chosen.items() if is_triton(backend) and op not in unused}

    def rehearse() -> None:
        for op in ours:
            for case, shape in proofs(op, device):
                run_case(case, shape, ops[op], device, dtype, trains)

    compile_ahead(("proofs", ours, dtype, trains), rehearse, config, device)
    for op, backend in ours.items():
        prove(op, ops[op], device, dtype, remedy=remedy_for(op, backend, device), gradients=trains)
    return Ops(**ops)


def compile_ahead(
    what: object,
    work: Callable[[], None],
    config: KernelConfig,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> None:
    """Compile the kernels that `work` launches side by side, and do nothing of it, if any of ours may run in it.

    what   all that decides which kernels these are: done once for each, until kernels or Triton's cache change
    """
    if device.type != "cuda" or is_interpreted() or not any(map(is_triton, chosen_backends(config).values())):
        return
    gpu = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.__version__
    with torch.cuda.device(device):
        import_module("kernels_triton.ahead").compile_once((what, gpu), work, say)


# What has a backward pass: neither decoding nor the optimizer.
RECOMPUTABLE = [op for op in OP_NAMES if op not in {*FORMS.values(), *ENGINE, *OPTIMIZER}]


def recomputing(ops: Ops, names: list[str]) -> Ops:
    """The same ops, of which those named keep their inputs only and do their work again in the backward pass."""
    return replace(ops, **{name: again_in_backward(getattr(ops, name)) for name in names})


def again_in_backward(function: Callable) -> Callable:
    """`function`, of whose forward pass only the inputs are kept. Nothing in a model is random, so none is restored."""

    def recomputed(*args: object, **options: object) -> object:
        if not torch.is_grad_enabled():
            return function(*args, **options)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return recomputed


def chosen_backends(config: KernelConfig) -> dict[str, str]:
    """op → backend, in the order of `Ops`."""
    words = {op: getattr(config, op) for op in OP_NAMES}
    return {op: config.backend if word == SAME_AS_BACKEND else word for op, word in words.items()}


def describe_ops(config: KernelConfig, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> str:
    """What runs, for logs: "all torch", or "rmsnorm triton, others torch"; on a GPU also which of two kernels."""
    chosen = chosen_backends(config)
    words = list(chosen.values())
    usual = max(dict.fromkeys(words), key=words.count)
    others = [f"{op} {backend}" for op, backend in chosen.items() if backend != usual]
    text = ", ".join([*others, f"others {usual}"]) if others else f"all {usual}"
    if device is not None and device.type == "cuda" and "triton" in words:
        which = import_module("kernels_triton").which_kernels(device, dtype)
        text += "".join(f"; {op} by {kernels}" for op, kernels in which.items() if chosen[op] == "triton")
    return f"{text} (triton interpreted)" if any(map(is_triton, words)) and is_interpreted() else text


def is_triton(backend: str) -> bool:
    """kernels_triton, or a selection of its kernels."""
    return backend.split("_")[0] == "triton"


def load_backend(backend: str, device: torch.device, key: str = "kernels") -> ModuleType:
    """Import kernels_<backend>, which `key` asked for, after the checks whose failure would otherwise be a riddle."""
    existing = sorted(path.parent.name.removeprefix("kernels_") for path in ROOT.glob("kernels_*/__init__.py"))
    if backend not in existing:
        raise KestrelError(f"there is no backend {key}={backend}; choose from {', '.join(existing)}")
    if is_triton(backend):
        require_triton(device, key, backend)
    return import_module(f"kernels_{backend}")


ROOT = Path(__file__).parent.parent


def reference(op: str) -> Callable:
    """What the op means, in plain PyTorch."""
    return getattr(import_module("kernels_torch"), op)


def find_op(module: ModuleType, op: str) -> Callable:
    """The function of that name, or how to do without it."""
    if op in module.__all__:
        return getattr(module, op)
    has = ", ".join(name for name in OP_NAMES if name in module.__all__)
    raise KestrelError(f"{module.__name__} has no {op}, only {has}: add {key_of(op)}=torch")


def key_of(op: str) -> str:
    """What in a config chooses the backend of an op."""
    return f"kernels.{FORMS.get(op, op)}"


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter: slow, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_triton(device: torch.device, key: str, backend: str) -> None:
    """Refuse Triton where it is not installed or has nothing to run on."""
    if find_spec("triton") is None:
        raise KestrelError(f"{key}={backend} needs the package triton: pip install triton (Linux), or take {key}=torch")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise KestrelError(
                f"{key}={backend} needs a GPU of compute capability 8.0 (Ampere) or newer, and {name} has "
                f"{capability[0]}.{capability[1]}: take {key}=torch"
            )
    elif not is_interpreted():
        raise KestrelError(
            f"{key}={backend} needs an NVIDIA GPU, and the device is {device}: take {key}=torch, or set the "
            "environment variable TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter"
        )


PORTABLE = "triton_portable"  # the kernels for every GPU, of ops that have others for Hopper


def remedy_for(op: str, backend: str, device: torch.device) -> str:
    """What may run where a Triton kernel does not: before plain PyTorch, the kernel for every GPU."""
    if backend == PORTABLE or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "torch"
    return PORTABLE if op in import_module(f"kernels_{PORTABLE}").__all__ else "torch"


def prove(
    op: str,
    function: Callable,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    remedy: str = "torch",
    gradients: bool = True,
) -> None:
    """Run the op once, forward and perhaps backward, on its smallest case and compare with the reference.

    This finds a broken installation (no compiler, wrong driver) at the start instead of at the first step. It is no
    precision test: those are in tests/kernels.
    """
    remedy = f"take {key_of(op)}={remedy}"
    for case, shape in proofs(op, device):
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                both = (function, reference(op))
                got, expected = (run_case(case, shape, f, device, dtype, gradients) for f in both)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise KestrelError(f"the triton kernel of {op} does not run on {device} ({reason}): {remedy}") from error
        for a, b in zip(got, expected, strict=True):
            if a.shape != b.shape or not (a.double() - b.double()).norm() <= 0.05 * b.double().norm() + 1e-3:
                raise KestrelError(f"the triton kernel of {op} gives wrong results on {device}: {remedy}")


def proofs(op: str, device: torch.device) -> list[tuple]:
    """(case, shape) of what an op is proven with."""
    case = import_module("kernels_torch.cases").CASES[op]
    return [(case, shape) for shape in [case.check[0], *(case.prove if device.type == "cuda" else [])]]


def run_case(
    case: object, shape: dict, function: Callable, device: torch.device, dtype: torch.dtype, gradients: bool = True
) -> list[Tensor]:
    """Outputs and gradients of `function` on one of the case's shapes."""
    inputs = case.make(shape, dtype, device)
    names = case.differentiable if gradients else ()
    leaves = [inputs[name].requires_grad_() for name in names if inputs[name] is not None]
    with torch.enable_grad():
        out = function(**inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        floating = [out for out in outs if out.is_floating_point()]
        upstream = [torch.arange(out.numel(), device=device).cos().to(out.dtype).view(out.shape) for out in floating]
        grads = torch.autograd.grad(floating, leaves, upstream) if leaves else []
    return [*outs, *grads]
