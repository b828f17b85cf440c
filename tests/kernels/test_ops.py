"""How a config becomes functions, and how every way in which that can fail is said."""

import dataclasses
import pickle
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import kernels_torch
import model.ops
from errors import KestrelError
from model import ops as ops_module
from model.ops import OP_NAMES, KernelConfig, describe_ops, load_ops, prove
from tests.conftest import HAS_GPU
from tests.kernels.test_contract import BACKENDS, MODULES

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


def test_the_default_is_the_reference(device):
    ops = load_ops(KernelConfig(), device)
    assert all(getattr(ops, op) is getattr(kernels_torch, op) for op in OP_NAMES)
    assert describe_ops(KernelConfig()) == "all torch"


@needs_triton
def test_single_ops_can_be_swapped(device):
    """Either way round, and `device` may be a string."""
    config = KernelConfig(rmsnorm="triton")
    ops = load_ops(config, str(device))
    assert ops.rmsnorm is MODULES["triton"].rmsnorm
    assert ops.attention is kernels_torch.attention
    assert describe_ops(config).startswith("rmsnorm triton, others torch")
    others = {op: "torch" for op in OP_NAMES if op != "rmsnorm"}
    assert load_ops(KernelConfig(backend="triton", **others), device) == ops


@needs_triton
def test_proving_a_kernel_leaves_the_random_state_alone(device):
    """Initial weights and data order must not depend on the kernels."""
    torch.manual_seed(7)
    expected = torch.randn(3, device=device)
    torch.manual_seed(7)
    load_ops(KernelConfig(rmsnorm="triton"), device)
    assert torch.equal(torch.randn(3, device=device), expected)


@needs_triton
def test_omegaconf_resolves_what_follows_the_backend(device):
    """The same config, through OmegaConf or without it."""
    others = {op: "torch" for op in OP_NAMES if op != "rmsnorm"}
    node = OmegaConf.merge(OmegaConf.structured(KernelConfig), {"backend": "triton", **others})
    config = OmegaConf.to_object(node)
    assert config.rmsnorm == "triton"
    assert load_ops(config, device) == load_ops(KernelConfig(backend="triton", **others), device)
    assert pickle.loads(pickle.dumps(config)) == config


def test_yaml_lists_what_is_not_ours_yet():
    """conf/kernels/triton.yaml doubles as the list of what is not fast yet, or not proven to be right on a GPU."""
    node = OmegaConf.load(ROOT / "conf/kernels/triton.yaml")
    listed = {key for key in node if key not in ("defaults", "backend")}
    assert node.backend == "triton"
    assert {node[op] for op in listed} <= {"torch"}
    if "triton" in BACKENDS:
        assert set(OP_NAMES) - set(MODULES["triton"].__all__) <= listed <= set(OP_NAMES)
    assert OmegaConf.load(ROOT / "conf/kernels/torch.yaml").backend == "torch"


def test_an_unknown_backend_names_those_that_exist(device):
    with pytest.raises(KestrelError, match="no backend kernels=cuda; choose from torch, triton"):
        load_ops(KernelConfig(backend="cuda"), device)
    with pytest.raises(KestrelError, match=r"no backend kernels\.attention=numpy"):
        load_ops(KernelConfig(attention="numpy"), device)


@needs_triton
def test_an_op_without_a_kernel_names_the_remedy(device, monkeypatch):
    monkeypatch.setattr(MODULES["triton"], "__all__", ["rmsnorm"])
    with pytest.raises(KestrelError, match=r"no attention, only rmsnorm: add kernels\.attention=torch"):
        load_ops(KernelConfig(attention="triton"), device)


def test_triton_that_is_not_installed_is_said_so(device, monkeypatch):
    monkeypatch.setattr(model.ops, "find_spec", lambda name: None)
    with pytest.raises(KestrelError, match="pip install triton"):
        load_ops(KernelConfig(rmsnorm="triton"), device)


@needs_triton
def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KestrelError, match="TRITON_INTERPRET=1"):
        load_ops(KernelConfig(backend="triton"), "cpu")
    its_key = r"kernels\.attention=triton_portable needs an NVIDIA GPU.*: take kernels\.attention=torch"
    with pytest.raises(KestrelError, match=its_key):
        load_ops(KernelConfig(attention="triton_portable"), "cpu")


@needs_triton
def test_a_gpu_too_old_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(KestrelError, match=r"Old GPU has 7\.5: take kernels=torch"):
        load_ops(KernelConfig(backend="triton"), "cuda")


@needs_triton
@pytest.mark.parametrize("fault", ["does not launch", "gives NaN", "is off by a tenth", "forgets the gradient"])
def test_a_kernel_that_is_broken_here_is_found_at_the_start(fault, device, monkeypatch):
    reference = kernels_torch.rmsnorm

    def broken(x, weight=None, *, eps=1e-6):
        if fault == "does not launch":
            raise RuntimeError("no C compiler\nand a long trace")
        y = reference(x, weight, eps=eps)
        wrong = {"gives NaN": y * torch.nan, "is off by a tenth": y * 1.1}
        return wrong.get(fault, reference(x.detach(), weight, eps=eps) + 0 * x.sum())

    monkeypatch.setattr(MODULES["triton"], "rmsnorm", broken)
    with pytest.raises(KestrelError, match=r"kernels\.rmsnorm=torch$") as caught:
        load_ops(KernelConfig(rmsnorm="triton"), device)
    assert "\n" not in str(caught.value)
    assert ("no C compiler" in str(caught.value)) == (fault == "does not launch")


@needs_triton
def test_where_a_kernel_for_hopper_fails_the_one_for_every_gpu_is_named(device, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper = torch.device("cuda")
    assert model.ops.remedy_for("attention", "triton", hopper) == "triton_portable"
    assert model.ops.remedy_for("attention", "triton_portable", hopper) == "torch"
    assert model.ops.remedy_for("rmsnorm", "triton", hopper) == "torch"
    assert model.ops.remedy_for("attention", "triton", torch.device("cpu")) == "torch"
    with pytest.raises(KestrelError, match=r"\(no such instruction\): take kernels\.attention=triton_portable$"):
        prove("attention", broken, device, remedy="triton_portable")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert model.ops.remedy_for("attention", "triton", hopper) == "torch"


@needs_triton
def test_the_kernels_for_every_gpu_can_be_asked_for(device):
    config = KernelConfig(attention="triton_portable")
    assert load_ops(config, device).attention is import_module("kernels_triton.attention").attention_portable
    assert describe_ops(config, device).startswith("attention triton_portable, others torch")


@needs_triton
def test_which_of_two_kernels_runs_is_said(monkeypatch):
    """On a GPU, for the op whose choice it is; elsewhere there is none."""
    attention = import_module("kernels_triton.attention")
    config, gpu = KernelConfig(backend="triton"), torch.device("cuda")
    assert "attention by" not in describe_ops(config, torch.device("cpu"))
    monkeypatch.setattr(attention.torch, "empty", lambda *size, device, dtype: torch.zeros((1, 1, 1, 64), dtype=dtype))
    assert "; attention by its kernels for every GPU" in describe_ops(config, gpu, torch.bfloat16)
    monkeypatch.setattr(attention, "takes_hopper", lambda q, causal, softcap: q.dtype == torch.bfloat16)
    assert "; attention by its kernels for Hopper" in describe_ops(config, gpu, torch.bfloat16)
    assert "; attention by its kernels for every GPU" in describe_ops(config, gpu, torch.float32)
    others = KernelConfig(backend="triton", attention="triton_portable")
    assert "attention by" not in describe_ops(others, gpu, torch.bfloat16)


@pytest.mark.parametrize(("options", "proven", "not_proven"), [
    (dict(trains=False), {"rmsnorm", "linear_decode", "take_tokens"}, {"muon_update", "linear_cross_entropy"}),
    (dict(generates=False), {"rmsnorm", "linear_cross_entropy", "attention_decode"}, {"draw_tokens", "take_tokens"}),
    (dict(), {"rmsnorm", "linear_decode", "muon_update"}, set()),
])  # fmt: skip
def test_what_a_command_does_not_run_is_not_proven(options, proven, not_proven, device, monkeypatch):
    seen = {}
    monkeypatch.setattr(ops_module, "prove", lambda op, *_, gradients, **__: seen.update({op: gradients}))
    load_ops(KernelConfig(backend="triton"), device, **options)
    assert proven <= set(seen)
    assert not not_proven & set(seen)
    assert set(seen.values()) == {options.get("trains", True)}


def test_ops_can_be_spied_on_by_replacing_one(device):
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return kernels_torch.rmsnorm(*args, **kwargs)

    ops = dataclasses.replace(load_ops(KernelConfig(), device), rmsnorm=spy)
    x = torch.randn(2, 3, device=device)
    assert torch.equal(ops.rmsnorm(x, eps=1e-3), kernels_torch.rmsnorm(x, eps=1e-3))
    assert calls == [{"eps": 1e-3}]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ops.rmsnorm = spy


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reference_runs_where_triton_cannot_be_imported():
    """And asking for Triton there is answered in one sentence."""
    printed = python(
        "import sys; sys.modules['triton'] = None\n"
        "from model.ops import KernelConfig, load_ops\n"
        "import torch\n"
        "ops = load_ops(KernelConfig(), 'cpu')\n"
        "print(ops.rmsnorm(torch.ones(1, 2)).shape)\n"
        "try: load_ops(KernelConfig(rmsnorm='triton'), 'cpu')\n"
        "except ValueError as error: print(error)"
    )
    assert "torch.Size([1, 2])" in printed
    assert "pip install triton" in printed


@needs_triton
def test_triton_is_not_imported_when_nobody_asks_for_it():
    printed = python(
        "import sys\n"
        "from model.ops import KernelConfig, load_ops\n"
        "load_ops(KernelConfig(), 'cpu')\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('triton', 'kernels_triton')])"
    )
    assert printed.strip() == "[]"
    assert find_spec("triton") is not None


@needs_triton
def test_the_interpreter_is_refused_in_bfloat16(device):
    """It would be silently wrong there; a GPU is not."""
    if device.type == "cuda":
        load_ops(KernelConfig(rmsnorm="triton"), device, torch.bfloat16)
    else:
        with pytest.raises(KestrelError, match=r"bfloat16: take hardware\.dtype=float32"):
            load_ops(KernelConfig(rmsnorm="triton"), device, torch.bfloat16)
        load_ops(KernelConfig(), device, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])])
def test_every_kernel_is_proven_in_the_dtype_of_the_run(dtype, device):
    for op in MODULES["triton"].__all__:
        prove(op, getattr(MODULES["triton"], op), device, dtype)
