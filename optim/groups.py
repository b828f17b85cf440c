"""Which parameter gets which update rule, decided from its role in the model; and the optimizer's configuration.

Learning rates are nanochat's, tuned at width 768 and 2¹⁹ tokens per step, and travel to other sizes by two factors:
(C/768)^−½ for AdamW on the three big tables, and √(B/2¹⁹) for everything but the smear and backout scalars. Muon's
weight decay arrives already scaled from the horizon (training/horizon.py); its cap is applied here.

`optim=adamw` is the plain alternative: one learning rate, taken as written (no batch or width factor), decay on
matrices only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from errors import KestrelError

REFERENCE_WIDTH = 768


def _check(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise KestrelError(f"optim.{key} must be {rule}, got {value}")


def _check_positive(config: "OptimConfig", keys: Iterable[str]) -> None:
    for key in keys:
        _check(getattr(config, key) > 0, key, "positive", getattr(config, key))


@dataclass
class OptimConfig:
    """What both optimizers have: a schedule of the learning rate, and clipping."""

    name: str = "muon_adamw"
    schedule: str = "trapezoid"  # trapezoid (warm-up, plateau, linear warm-down) | cosine (warm-up, half a cosine)
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65  # trapezoid: the part of the run spent going down
    final_lr_frac: float = 0.05  # the learning rate's multiplier at the very end
    grad_clip: float = 0.0  # largest norm of all gradients together; 0: off
    weight_decay: float = 0.28

    def __post_init__(self) -> None:
        _check(self.name in ("muon_adamw", "adamw"), "name", "muon_adamw or adamw", repr(self.name))
        _check(self.schedule in ("trapezoid", "cosine"), "schedule", "trapezoid or cosine", repr(self.schedule))
        _check(self.warmup_steps >= 0, "warmup_steps", "0 or more", self.warmup_steps)
        _check(0 <= self.warmdown_ratio <= 1, "warmdown_ratio", "between 0 and 1", self.warmdown_ratio)
        _check(0 <= self.final_lr_frac <= 1, "final_lr_frac", "between 0 and 1", self.final_lr_frac)
        _check(self.grad_clip >= 0, "grad_clip", "0 (off) or positive", self.grad_clip)
        _check(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)


@dataclass
class MuonAdamWConfig(OptimConfig):
    """Muon on the matrices inside the blocks, AdamW on embeddings, head and scalars."""

    embedding_lr: float = 0.3  # value embeddings take half of it
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    # The horizon's rule λ ∝ √B/D was tuned between 12 and 26 layers. Extrapolated to 4 layers it gives 1.89; from about
    # there on decay would outweigh learning, so it stops here. Models of 6 layers and up (0.94) never touch the cap.
    max_weight_decay: float = 1.0
    muon_eq: bool = True
    muon_plus: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.name == "muon_adamw", "name", "muon_adamw here (optim=adamw chooses the other)", repr(self.name))
        _check_positive(self, ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr"))
        _check(self.max_weight_decay >= 0, "max_weight_decay", "0 or more", self.max_weight_decay)


@dataclass
class AdamWConfig(OptimConfig):
    """AdamW on everything; decay on matrices (two or more dimensions) only."""

    name: str = "adamw"
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_lr_frac: float = 0.1
    grad_clip: float = 1.0
    weight_decay: float = 0.1
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.name == "adamw", "name", "adamw here (optim=muon_adamw chooses the other)", repr(self.name))
        _check_positive(self, ("lr", "eps"))
        for key in ("beta1", "beta2"):
            _check(0 <= getattr(self, key) < 1, key, "in [0, 1)", getattr(self, key))


Named = list[tuple[str, nn.Parameter]]


def parameter_groups(
    model: nn.Module, optim: OptimConfig, *, n_embd: int, lr_scale: float = 1.0, weight_decay: float | None = None
) -> list[dict]:
    """One dict per group: kind, params, their names, and the hyperparameters of `MuonAdamW`.

    model          its parameter_roles() says what each parameter is
    n_embd         width, for the width factor
    lr_scale       √(B/2¹⁹), from the horizon
    weight_decay   Muon's λ, from the horizon; None: as configured
    """
    if isinstance(optim, AdamWConfig):
        return _adamw_groups(list(model.named_parameters()), optim)
    assert isinstance(optim, MuonAdamWConfig), type(optim)
    decay = min(optim.weight_decay if weight_decay is None else weight_decay, optim.max_weight_decay)
    return _muon_adamw_groups(_named_roles(model), optim, (n_embd / REFERENCE_WIDTH) ** -0.5, lr_scale, decay)


def _named_roles(model: nn.Module) -> dict[str, Named]:
    """parameter_roles() with names; every parameter has exactly one role."""
    names = {id(p): name for name, p in model.named_parameters()}
    roles = {role: [(names[id(p)], p) for p in params] for role, params in model.parameter_roles().items()}
    found = sorted(name for members in roles.values() for name, _ in members)
    assert found == sorted(names.values()), f"a parameter has no role or two: {set(names.values()) ^ set(found)}"
    return roles


def _adamw(members: Named, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-10) -> dict:
    names, params = [name for name, _ in members], [p for _, p in members]
    return {
        "kind": "adamw", "names": names, "params": params, "lr": lr, "betas": betas, "eps": eps,
        "weight_decay": weight_decay,
    }  # fmt: skip


def _muon_adamw_groups(
    roles: dict[str, Named], optim: MuonAdamWConfig, width: float, batch: float, decay: float
) -> list[dict]:
    """The table of nanochat, row by row. Its order numbers the parameters in a saved optimizer."""
    rows = {
        # role: (lr, betas, weight decay)
        "unembedding": (optim.unembedding_lr * width * batch, (0.8, 0.96), 0.01),
        "embedding": (optim.embedding_lr * width * batch, (0.8, 0.995), 0.001),
        "value_embedding": (optim.embedding_lr / 2 * width * batch, (0.8, 0.995), 0.01),
        "resid_lambda": (optim.scalar_lr / 100 * batch, (0.8, 0.95), 0.05),
        "x0_lambda": (optim.scalar_lr * batch, (0.96, 0.95), 0.0),
        "smear": (0.2, (0.8, 0.95), 0.0),
        # nanochat has no norm gains. A gain multiplies its whole branch as resid_lambda does, so it moves as slowly.
        "norm": (optim.scalar_lr / 100 * batch, (0.8, 0.95), 0.0),
    }
    unknown = set(roles) - set(rows) - {"matrix"}
    assert not unknown, f"no update rule for role {unknown}"
    groups = [_adamw(roles[role], *row) for role, row in rows.items() if roles.get(role)]
    matrices = roles.get("matrix", [])
    for shape in sorted({tuple(p.shape) for _, p in matrices}):
        members = [(name, p) for name, p in matrices if tuple(p.shape) == shape]
        groups.append(
            {
                "kind": "muon", "names": [name for name, _ in members], "params": [p for _, p in members],
                "lr": optim.matrix_lr * batch, "beta2": 0.9, "weight_decay": decay,
                "muon_eq": optim.muon_eq, "muon_plus": optim.muon_plus,
            }
        )  # fmt: skip
    return groups


def _adamw_groups(named: Named, optim: AdamWConfig) -> list[dict]:
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    vectors = [(name, p) for name, p in named if p.dim() < 2]
    parts = [(matrices, optim.weight_decay), (vectors, 0.0)]
    return [_adamw(part, optim.lr, (optim.beta1, optim.beta2), decay, optim.eps) for part, decay in parts if part]
