"""A model that is nothing but parameters, one of every role, in shapes that no number of ranks divides evenly."""

import torch
from torch import nn

import kernels_torch
from optim.groups import MuonAdamWConfig, parameter_groups
from optim.muon_adamw import MuonAdamW

SHAPES = {
    "unembedding": [(64, 24)],  # two ranks share its rows evenly, three do not
    "embedding": [(67, 24)],
    "value_embedding": [(67, 16), (67, 16)],
    "resid_lambda": [(3,)],
    "x0_lambda": [(3,)],
    "smear": [(1, 24), (1,)],
    "norm": [(1025,)],  # a vector long enough to be shared out
    "matrix": [(24, 24), (24, 24), (24, 24), (50, 24), (24, 48), (24, 48), (2, 12), (2, 12), (2, 12)],
}


class Toy(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for role, shapes in SHAPES.items():
            for i, shape in enumerate(shapes):
                values = torch.randn(shape, generator=generator) * 0.5
                self.register_parameter(f"{role}_{i}", nn.Parameter(values))

    def parameter_roles(self):
        return {role: [getattr(self, f"{role}_{i}") for i in range(len(s))] for role, s in SHAPES.items()}


def toy_optimizer(model=None, config=None, ops=kernels_torch, reduce_dtype=torch.float32, **changes):
    """(model, optimizer) of one step to the next: the same numbers for every caller."""
    model = model or Toy()
    groups = parameter_groups(model, config or MuonAdamWConfig(**changes), n_embd=24)
    return model, MuonAdamW(groups, ops, reduce_dtype=reduce_dtype)


def random_gradients(model, seed):
    """Gradients that differ in size from parameter to parameter, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) * 10.0 ** -(i % 4) for i, p in enumerate(model.parameters())]


def set_gradients(model, gradients):
    for p, g in zip(model.parameters(), gradients):
        p.grad = g.clone()


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
