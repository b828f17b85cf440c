"""Training with 8-bit products: which layers take part, and their weights in 8 bits.

Only the large products inside the blocks do: queries, keys and values together, both halves of an MLP that is not
gated, and in wide models the projection behind attention. The head and small gates stay as they are. So does everything
without gradients: validation, samples and inference read the same weights in the model's dtype, and checkpoints know
nothing of this.

kernels_torch/fp8.py has the arithmetic. The weights in 8 bits are made once for each step, by `refresh`; until then
they are NaN.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from errors import KestrelError
from model.layers.attention import Attention
from model.layers.linear import Linear
from model.layers.mlp import ReluSquaredMLP, SiluMLP
from model.layers.norm import RMSNorm
from model.ops import KernelConfig, chosen_backends, compile_ahead, is_triton

MULTIPLE = 16  # of what the products take
SMALLEST = 128  # below that there is nothing to save
# n_in · n_out / (n_in + n_out): what products save, beside what rounding input and gradient costs where both have to be
# measured for this layer alone. H200, forward and backward, bf16 : fp8 µs: the projection behind attention, 65536 × 768
# 347 : 447, 32768 × 1280 483 : 443; queries, keys and values, whose input a norm bounds, 1037 : 891 and 1447 : 1025.
WORTH_MEASURING = 600


class Fp8Layers:
    """Linear layers with one input, whose products are in 8 bits while there are gradients.

    row_norm   what no norm of a row of the input is above, where that is known
    """

    def __init__(self, backend: ModuleType, layers: Sequence[Linear], row_norm: float | None) -> None:
        self.backend, self.layers, self.row_norm = backend, layers, row_norm
        n_rows, width = sum(len(layer.weight) for layer in layers), layers[0].weight.shape[1]
        self.weight = backend.empty_weight(n_rows, width, layers[0].weight.device)

    def sources(self) -> list[Tensor]:
        """What the weights in 8 bits are made of: the copies in the model's dtype where there are any."""
        return [layer.weight.detach() if layer.copy is None else layer.copy for layer in self.layers]

    def products(self, x: Tensor, n_first: int = 0) -> tuple[Tensor, ...]:
        """The first channels of x, and what each layer makes of x."""
        masters = [layer.weight for layer in self.layers]
        return self.backend.fp8_linear(x, masters, self.weight, row_norm=self.row_norm, n_first=n_first)

    def relu2_mlp(self, x: Tensor, down: "Fp8Layers") -> Tensor:
        """This is the layer up."""
        masters = (self.layers[0].weight, down.layers[0].weight)
        return self.backend.fp8_relu2_mlp(x, *masters, self.weight, down.weight, row_norm=self.row_norm)


class Fp8Training:
    """The 8-bit side of a model."""

    def __init__(self, groups: list[Fp8Layers], left_out: list[str], n_layers: int) -> None:
        self.groups, self.left_out, self.n_layers = groups, left_out, n_layers

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights in 8 bits anew, after they changed."""
        if self.groups:
            self.groups[0].backend.fp8_weights([g.sources() for g in self.groups], [g.weight for g in self.groups])

    def describe(self) -> str:
        """For people: which layers, and which not."""
        n = sum(len(group.layers) for group in self.groups)
        rest = f"; not: {', '.join(self.left_out)}" if self.left_out else ""
        return f"fp8: the products of {n} of {n + self.n_layers} matrices while training{rest}"


def train_in_fp8(model: nn.Module, backend: ModuleType) -> Fp8Training:
    """From now on what can be multiplied in 8 bits is, while there are gradients. Call `refresh` before each step."""
    groups, names = [], {module: name for name, module in model.named_modules()}
    for block in model.blocks_in_order:
        has_gain = any(isinstance(module, RMSNorm) and module.weight is not None for module in block.modules())
        row_norm = None if has_gain else model.config.n_embd**0.5
        for module in block.modules():
            for together in candidates(module, row_norm):
                if all(fits(layers) for layers, _ in together) and pays(together):
                    groups += [Fp8Layers(backend, layers, norm) for layers, norm in together]
    for group in groups:
        for layer in group.layers:
            layer.fp8 = group
    others = [module for module in names if isinstance(module, Linear) and module.fp8 is None]
    return Fp8Training(groups, without_numbers([names[module] for module in others]), len(others))


def candidates(module: nn.Module, row_norm: float | None) -> list[list[tuple[list[Linear], float | None]]]:
    """Groups of layers that share an input, and what bounds its rows' norms; those in one list together or not at all.

    row_norm   the bound of what a norm leaves; None: it has a gain
    """
    if isinstance(module, Attention):
        return [[([module.c_q, module.c_k, module.c_v], row_norm)], [([module.c_proj], None)]]
    if isinstance(module, ReluSquaredMLP):
        return [[([module.c_fc], row_norm), ([module.c_proj], None)]]
    if isinstance(module, SiluMLP):
        return [[([module.c_fc], row_norm)], [([module.c_proj], None)]]
    return []


def fits(layers: list[Linear]) -> bool:
    """Whether cuBLAS takes them, and they are not small."""
    return all(n % MULTIPLE == 0 and n >= SMALLEST for layer in layers for n in layer.weight.shape)


def pays(together: list[tuple[list[Linear], float | None]]) -> bool:
    """Whether there is more to save than to spend; always where nothing has to be measured for one product alone."""
    (layers, row_norm), *rest = together
    n_in, n_out = layers[0].weight.shape[1], sum(len(layer.weight) for layer in layers)
    return bool(rest) or row_norm is not None or n_in * n_out >= WORTH_MEASURING * (n_in + n_out)


def without_numbers(names: list[str]) -> list[str]:
    """`transformer.h.0.mlp.c_fc` of every layer → one `transformer.h.*.mlp.c_fc`."""
    short = [".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names]
    return list(dict.fromkeys(short))


def load_fp8(config: KernelConfig, device: torch.device) -> ModuleType:
    """The 8-bit products of the backend that has the MLPs, proven to run on `device`."""
    backend = "triton" if is_triton(chosen_backends(config)["relu2_mlp"]) else "torch"
    module = import_module(f"kernels_{backend}.fp8")
    compile_ahead(("fp8", backend), partial(a_product, module, device), config, device)
    try:
        errors = [float((ours.float() - exact).norm() / exact.norm()) for ours, exact in a_product(module, device)]
    except Exception as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise KestrelError(f"fp8 products do not run on {device} ({reason}): leave hardware.fp8=false") from problem
    if not all(error < 0.1 for error in errors):
        raise KestrelError(f"fp8 products give wrong results on {device}: leave hardware.fp8=false")
    return module


def a_product(module: ModuleType, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """y, dx and dW of one linear layer, and the same in fp32."""
    n = SMALLEST
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(n, n, generator=generator).to(device) for _ in range(3))
    weight = module.empty_weight(n, n, device)
    module.fp8_weights([[w.bfloat16() if device.type == "cuda" else w]], [weight])
    with torch.enable_grad():
        ours, master = (leaf.detach().clone().requires_grad_() for leaf in (x, w))
        _, y = module.fp8_linear(ours.bfloat16() if device.type == "cuda" else ours, [master], weight)
        grads = torch.autograd.grad(y, [ours, master], dy.to(y.dtype))
    return list(zip((y.detach(), *grads), (x @ w.t(), dy @ w, dy.t() @ x), strict=True))
