"""The arrows between folders: who may import whom, read from the source so that lazy imports count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {
    "kernels_torch", "kernels_triton", "kernels_triton_portable", "model", "data", "optim", "training", "inference",
    "evals", "bench", "config", "checkpoint", "errors", "train", "infer", "quantize",
}  # fmt: skip
# folder or file → what of ours it may import; everyone may import `errors`
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "kernels_torch": set(),
    "kernels_triton": {"kernels_torch"},  # what the specification refuses, and what is the same in all backends
    "kernels_triton_portable": {"kernels_triton"},
    "model": {"kernels_torch"},  # what the codes of a weight stand for, and whose its gradient is; ops are handed to it
    "data": set(),
    "optim": set(),
    "evals": set(),
    "checkpoint": set(),
    "inference": {"model", "data", "checkpoint"},
    "training": {"model", "data", "optim", "evals", "inference", "checkpoint"},
    "config": {"model", "data", "optim", "inference", "training", "checkpoint"},
    "train": OURS,
    "infer": OURS,
    "quantize": OURS,
    "bench": OURS,
}
# folder → libraries that only it may import, so that the rest works without them
ONLY = {
    "hydra": {"config"},
    "omegaconf": {"config"},
    "triton": {"kernels_triton", "bench"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "tokenizers": {"data", "bench"},
}


def sources() -> list[Path]:
    """Every Python file of the project but the tests."""
    return sorted(path for part in OURS for path in [*ROOT.glob(f"{part}.py"), *ROOT.glob(f"{part}/**/*.py")])


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    used = imports(path)
    assert used & OURS <= ARROWS[part] | {part, "errors"}
    for library, owners in ONLY.items():
        assert library not in used or part in owners, f"{library} belongs to {', '.join(sorted(owners))}"


def test_every_folder_has_its_arrows():
    assert set(ARROWS) == OURS
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sources()} == OURS


@pytest.mark.parametrize("blocked", ["triton", "hydra", "datasets", "matplotlib"])
def test_torch_path_works_without(blocked: str):
    """Model, reference kernels, data stream and engine import and run with an optional library absent."""
    program = f"""
import sys
sys.modules[{blocked!r}] = None          # makes `import {blocked}` fail
import torch
import data.batches, inference.engine, optim.muon_adamw, training.loop, kernels_torch
from model import build
from model.nanochat import NanochatConfig
from model.ops import KernelConfig, load_ops
ops = load_ops(KernelConfig(), torch.device("cpu"))
model = build(NanochatConfig(depth=1, head_dim=32, sequence_len=16), 300, ops)
model.to_empty(device="cpu")
model.init_weights(0)
tokens = torch.zeros(1, 8, dtype=torch.int64)
assert model(tokens, tokens).isfinite()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
