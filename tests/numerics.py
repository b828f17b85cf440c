"""How close is close enough: as close as plain PyTorch gets in the same dtype, judged from fp64.

No tolerance here is chosen by hand. `plain` is the reference run in the tested dtype, `exact` the reference in fp64;
the kernel may err `slack` times as much as `plain` does. Two rules, because each misses what the other sees: the RMS
catches a scale that is off by one percent, the maximum catches a single wrong element.

`judge` applies both to all outputs and gradients of an op, for tests and benches alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import kernels_torch
from kernels_torch.cases import CASES
from kernels_torch.quantised_cache import as_bytes


def assert_close(got: Tensor, exact: Tensor, plain: Tensor, name: str = "value", slack: float = 2.0) -> None:
    """Assert that `got` errs from `exact` (fp64) at most `slack` times as much as `plain` (same dtype as got) does.

    The maximum rule adds one rounding of the largest value: what any result stored in that dtype may lose.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, plain PyTorch gives {plain.dtype}"
    if got.numel() == 0:
        return
    assert got.isfinite().all(), f"{name}: not finite"
    slack += plain.dtype == torch.float64  # then `exact` errs as much as any
    got, exact, plain_dtype, plain = got.double(), exact.double(), plain.dtype, plain.double()
    ours, theirs = (got - exact).abs(), (plain - exact).abs()
    ulp = torch.finfo(plain_dtype).eps * exact.abs().max()
    rms_ours, rms_theirs = ours.square().mean().sqrt(), theirs.square().mean().sqrt()
    # A handful of values can round luckily all at once, so the RMS rule grants a fraction of one rounding too.
    floor = torch.finfo(plain_dtype).eps * exact.square().mean().sqrt() * 0.5 + 1e-12
    assert rms_ours <= slack * rms_theirs + floor, f"{name}: rms {rms_ours:.2e}, plain PyTorch {rms_theirs:.2e}"
    assert ours.max() <= slack * (theirs.max() + ulp), f"{name}: max {ours.max():.2e}, plain PyTorch {theirs.max():.2e}"


def outputs(op_function: Callable, inputs: dict) -> tuple[Tensor, ...]:
    out = op_function(**inputs)
    return out if isinstance(out, tuple) else (out,)


def floating(outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those that can have a gradient: top_k gives indices, too."""
    return tuple(out for out in outs if out.is_floating_point())


def leaves_of(op: str, inputs: dict) -> dict[str, Tensor]:
    """The differentiable inputs, asking for a gradient."""
    present = [name for name in CASES[op].differentiable if inputs[name] is not None]
    return {name: inputs[name].requires_grad_() for name in present}


def upstream_of(outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random incoming gradients, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(out.shape, generator=generator).to(out) for out in floating(outs))


def run(op: str, op_function: Callable, inputs: dict, upstream: tuple[Tensor, ...] | None = None) -> dict[str, Tensor]:
    """Outputs by number, those of 8 bits as their bytes, and gradients by input."""
    leaves = leaves_of(op, inputs)
    outs = outputs(op_function, inputs)
    results = {f"output {i}": as_bytes(out.detach()) for i, out in enumerate(outs)}
    if leaves:
        upstream = upstream_of(outs) if upstream is None else upstream
        grads = torch.autograd.grad(floating(outs), list(leaves.values()), upstream)
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def judge(
    op: str, got: dict[str, Tensor], inputs: dict, upstream: tuple[Tensor, ...] | None = None, cancels: bool = False
) -> None:
    """Hold every output and gradient in `got` against the reference on the same inputs.

    cancels   nothing but rounding is left of some result, see exact_and_plain
    """
    exact, plain = exact_and_plain(op, inputs, upstream, cancels)
    assert got.keys() == plain.keys()
    for name, value in got.items():
        if value.is_floating_point():
            assert_close(value, exact[name], plain[name], f"{op} {name}")
        else:
            assert_same_codes(value, plain[name], f"{op} {name}")


def assert_same_codes(got: Tensor, plain: Tensor, name: str) -> None:
    """Integers are the same; of codes of 8 bits few may be the next one, where a rounding before them decides."""
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype), name
    off = (got.long() - plain.long()).abs()
    is_codes = got.dtype in (torch.int8, torch.uint8)
    assert off.sum() <= is_codes * (1 + 0.002 * off.numel()), f"{name}: {int((off > 0).sum())} of {off.numel()} differ"


# So few values may all be rounded luckily, though each is a sum over everything.
FEW = 16


def exact_and_plain(
    op: str, inputs: dict, upstream: tuple[Tensor, ...] | None = None, cancels: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference on the same inputs, in fp64 and in the dtype under test.

    Where plain PyTorch may err less than can be asked for, what a rounding of the inputs does to the result counts as
    its error if that is larger: in results of few values, in fp64, and where all but rounding `cancels`.
    """
    case, reference = CASES[op], getattr(kernels_torch, op)
    dtype = dtype_of(op, inputs)
    upstream = upstream_of(outputs(reference, case.cast(inputs, dtype))) if upstream is None else upstream
    exact = run(op, reference, case.cast(inputs, torch.float64), tuple(up.double() for up in upstream))
    if dtype == torch.float64:
        plain = fp64_with_the_error_of_fp32(op, inputs, upstream, exact)
    else:
        plain = run(op, reference, case.cast(inputs, dtype), upstream)
    everywhere = cancels or dtype == torch.float64
    noisy = [
        name
        for name, value in exact.items()
        if value.is_floating_point() and value.numel() > 0 and (everywhere or value.numel() <= FEW)
    ]
    if noisy:
        noises = [noise_of_rounding(op, inputs, upstream, exact, seed) for seed in range(4)]
        for name in noisy:
            errors = [plain[name].double() - exact[name], *(noise[name] for noise in noises)]
            largest = max(errors, key=lambda error: error.square().mean())
            plain[name] = (exact[name] + largest).to(plain[name].dtype)
    return exact, plain


def noise_of_rounding(
    op: str, inputs: dict, upstream: tuple[Tensor, ...], exact: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """How far each result moves when all that comes in moves at random by up to two roundings: no op has but one."""
    device = next(value for value in inputs.values() if isinstance(value, Tensor)).device
    generator = torch.Generator(device).manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.element_size() == 1:  # codes mean what they are
            return value
        noise = 2 * torch.rand(value.shape, generator=generator, device=device).double() - 1
        return value.double() * (1 + 2 * torch.finfo(value.dtype).eps * noise)

    rounded = {name: moved(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    upstream = tuple(moved(up) for up in upstream)
    results = run(op, getattr(kernels_torch, op), CASES[op].cast(rounded, torch.float64), upstream)
    return {name: results[name] - exact[name] for name in exact if exact[name].is_floating_point()}


def dtype_of(op: str, inputs: dict) -> torch.dtype:
    """The one under test: of the first input that is not held in fp32, or what the op is told to give; fp32 if none."""
    if "dtype" in inputs:
        return inputs["dtype"]
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return next((inputs[name].dtype for name in names if name not in CASES[op].fp32), torch.float32)


def fp64_with_the_error_of_fp32(
    op: str, inputs: dict, upstream: tuple[Tensor, ...], exact: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What plain fp64 would give if we knew the truth beyond fp64: as far off as fp32, in units of its rounding."""
    case, reference = CASES[op], getattr(kernels_torch, op)
    rounded, upstream = case.cast(inputs, torch.float32), tuple(up.float() for up in upstream)
    plain = run(op, reference, rounded, upstream)
    truth = run(op, reference, case.cast(rounded, torch.float64), tuple(up.double() for up in upstream))
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {
        name: exact[name] + ratio * (plain[name].double() - truth[name]) if exact[name].is_floating_point() else value
        for name, value in plain.items()
    }
