"""Choosing a device and a dtype, refusing what the machine cannot do, and ranks that agree with each other."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from errors import KestrelError
from tests import warm
from training import distributed
from training.distributed import (
    HardwareConfig,
    choose_cuda_graph,
    choose_device,
    choose_dtype,
    read_ranks,
    require_fp8,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def no_torchrun(monkeypatch):
    for key in distributed.TORCHRUN_KEYS:
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A machine with `count` GPUs of a compute capability, as far as choosing goes."""

    def pretend(count=1, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def test_without_torchrun_there_is_one_rank():
    assert read_ranks({"PATH": "/bin"}) == (0, 0, 1)


def test_torchrun_environment_is_read():
    assert read_ranks({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}) == (5, 1, 8)


@pytest.mark.parametrize("present", [("RANK",), ("RANK", "WORLD_SIZE"), ("LOCAL_RANK",)])
def test_half_a_torchrun_environment_is_refused_by_name(present):
    missing = [key for key in distributed.TORCHRUN_KEYS if key not in present]
    with pytest.raises(KestrelError, match=f"{', '.join(missing)} is not; start with torchrun"):
        read_ranks(dict.fromkeys(present, "1"))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"RANK": "x", "WORLD_SIZE": "2"},
            "RANK=x is set in the environment and must be a whole number; start with torchrun",
        ),
        ({"RANK": "5"}, "RANK=5 .* must be 0 to 0 with WORLD_SIZE=1; start with torchrun"),
        ({"RANK": "-1"}, "RANK=-1 .* must be 0 to 0"),
        ({"LOCAL_RANK": "2", "WORLD_SIZE": "2"}, "LOCAL_RANK=2 .* must be 0 to 1"),
        ({"WORLD_SIZE": "-3"}, "WORLD_SIZE=-3 .* must be positive; start with torchrun"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_impossible_torchrun_environment_is_refused_by_name(environment, says):
    with pytest.raises(KestrelError, match=says):
        read_ranks({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | environment)


def test_ranks_that_cannot_find_each_other_are_refused(monkeypatch):
    for key, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(KestrelError, match="MASTER_ADDR is not; start with torchrun"):
        distributed.init(HardwareConfig(device="cpu"))


def test_more_threads_than_a_process_can_have_are_refused(no_torchrun):
    with pytest.raises(KestrelError, match=r"hardware\.threads=1000000 is too many"):
        distributed.init(HardwareConfig(device="cpu", threads=1_000_000))


def test_auto_takes_the_gpu_if_there_is_one(pretend_gpu):
    pretend_gpu(count=0)
    assert choose_device("auto", 0) == CPU
    pretend_gpu(count=4)
    assert choose_device("auto", 3) == torch.device("cuda", 3)
    assert choose_device("cpu", 3) == CPU


def test_missing_gpu_is_refused(pretend_gpu):
    pretend_gpu(count=0)
    with pytest.raises(KestrelError, match=r"hardware\.device=cuda but PyTorch sees no GPU; use hardware\.device=cpu"):
        choose_device("cuda", 0)
    pretend_gpu(count=2)
    with pytest.raises(KestrelError, match="--nproc_per_node=2"):
        choose_device("cuda", 2)


def test_mps_must_exist_to_be_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(KestrelError, match="no Metal GPU"):
        choose_device("mps", 0)


def test_auto_dtype_is_bf16_where_the_gpu_has_it(pretend_gpu):
    assert choose_dtype("auto", CPU) == torch.float32
    pretend_gpu(capability=(8, 0))
    assert choose_dtype("auto", GPU) == torch.bfloat16
    pretend_gpu(capability=(7, 5))
    assert choose_dtype("auto", GPU) == torch.float32


def test_dtype_the_device_lacks_is_refused(pretend_gpu):
    pretend_gpu(capability=(7, 5))
    with pytest.raises(KestrelError, match=r"hardware\.dtype=bfloat16 but .* use float32 or float16"):
        choose_dtype("bfloat16", GPU)
    assert choose_dtype("float16", GPU) == torch.float16
    with pytest.raises(KestrelError, match=r"hardware\.dtype=float16 needs a GPU"):
        choose_dtype("float16", CPU)
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def graphs(device, dtype=torch.bfloat16, one_machine=True, **changes):
    return choose_cuda_graph(HardwareConfig(**changes), device, dtype, one_machine)


def test_steps_are_captured_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "is_interpreted", lambda: False)
    assert graphs(GPU)
    assert graphs(GPU, cuda_graph="auto")
    assert not graphs(CPU)
    assert not graphs(GPU, one_machine=False)  # unless it is asked for
    assert graphs(GPU, cuda_graph="true", one_machine=False)
    assert graphs(GPU, cuda_graph="local", one_machine=False)
    assert not graphs(GPU, torch.float16)  # its scale changes on the way
    assert not graphs(GPU, compile=True)  # the baseline that everyone knows
    assert graphs(GPU, compile=True, cuda_graph="true")
    assert not graphs(GPU, cuda_graph="false")
    assert not graphs(CPU, cuda_graph="False")  # as YAML's false arrives
    monkeypatch.setattr(distributed, "is_interpreted", lambda: True)
    assert not graphs(GPU)


def test_a_run_says_how_its_steps_are_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    say = lambda *given: distributed.Device(GPU, torch.bfloat16, 0, 0, *given).describe()
    assert say(1, True) == "cuda:0 (NVIDIA H200), bfloat16, 1 rank, steps in CUDA graphs"
    assert say(2, False) == "cuda:0 (NVIDIA H200), bfloat16, 2 ranks"
    assert say(2, True).endswith("2 ranks, steps in CUDA graphs with messages between ranks")
    assert say(2, True, True).endswith("2 ranks, steps in CUDA graphs but for messages between ranks")


def test_what_cannot_be_captured_is_refused_in_a_sentence():
    with pytest.raises(
        KestrelError, match=r"^hardware\.cuda_graph=true needs an NVIDIA GPU, but the device is cpu; .*$"
    ):
        graphs(CPU, cuda_graph="true")
    with pytest.raises(KestrelError, match=r"^hardware\.cuda_graph=local needs an NVIDIA GPU"):
        graphs(CPU, cuda_graph="local")
    with pytest.raises(KestrelError, match=r"hardware\.cuda_graph=true does not go with float16"):
        graphs(GPU, torch.float16, cuda_graph="True")


def test_fp8_is_refused_where_there_are_no_such_products(no_torchrun, monkeypatch):
    with pytest.raises(
        KestrelError, match=r"Hopper, such as an H100\) or newer, but the device is cpu: leave hardware\."
    ):
        distributed.init(HardwareConfig(device="cpu", fp8=True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(KestrelError, match=r"and NVIDIA A100 has 8\.0: leave hardware\.fp8=false"):
        require_fp8(GPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(
        KestrelError, match=r"hardware\.dtype gives float32: take bfloat16, or leave hardware\.fp8=false"
    ):
        require_fp8(GPU, torch.float32)
    require_fp8(GPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, r"hardware\.device must be one of auto, cpu, cuda, mps, got 'gpu'"),
        ({"dtype": "bf16"}, r"hardware\.dtype must be one of .*got 'bf16'"),
        ({"device_batch_size": 0}, r"hardware\.device_batch_size must be positive, or -1"),
        ({"cuda_graph": "maybe"}, r"hardware\.cuda_graph must be auto, true, local or false, got 'maybe'"),
        ({"reduce_dtype": "float16"}, r"hardware\.reduce_dtype must be float32 or bfloat16, got 'float16'"),
        ({"recompute": ["mlp"]}, r"hardware\.recompute knows no 'mlp'; choose from block, embedding"),
        (
            {"fp8": True, "recompute": ["rmsnorm", "relu2_mlp"]},
            r"hardware\.recompute=\[relu2_mlp\] does not go with hardware\.fp8=true",
        ),
        ({"threads": 0}, r"hardware\.threads must be positive, or null"),
    ],
)
def test_bad_hardware_is_refused_by_name(changes, message):
    with pytest.raises(KestrelError, match=message):
        HardwareConfig(**changes)


def test_one_process_needs_no_group(no_torchrun):
    device = distributed.init(HardwareConfig(device="cpu"))
    assert (device.device, device.dtype, device.rank, device.world_size) == (CPU, torch.float32, 0, 1)
    assert device.is_main
    assert device.memory_bytes is None
    assert not torch.distributed.is_initialized()
    x = torch.tensor([1.0, 2.0])
    distributed.barrier()
    assert torch.equal(distributed.all_reduce_mean(x), torch.tensor([1.0, 2.0]))
    assert torch.equal(distributed.all_reduce_sum(x), torch.tensor([1.0, 2.0]))
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.any_rank(True, CPU)
    assert not distributed.any_rank(False, CPU)
    distributed.cleanup()


def test_threads_and_determinism_are_set(no_torchrun, monkeypatch):
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        torch.use_deterministic_algorithms(False)
        distributed.init(HardwareConfig(device="cpu", threads=1))
        assert torch.get_num_threads() == 1
        assert not torch.are_deterministic_algorithms_enabled()
        distributed.init(HardwareConfig(device="cpu", deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


RANK_PROGRAM = """
import torch
from training import distributed
device = distributed.init(distributed.HardwareConfig(device="cpu", threads=1), timeout_s=60)
rank = device.rank
distributed.print_main("spoken by", rank, "of", device.world_size)
assert device.is_main == (rank == 0)
assert distributed.all_reduce_sum(torch.tensor(rank + 1.0)) == 3
assert distributed.all_reduce_mean(torch.tensor(rank + 1.0)) == 1.5
assert distributed.broadcast_object({"from": rank} if rank == 0 else None) == {"from": 0}
assert distributed.any_rank(rank == 1, device.device) and not distributed.any_rank(False, device.device)
distributed.require_same({"seed": 1, "model.depth": None}, device)
try:
    distributed.require_same({"seed": 1, "model.depth": 2 + rank}, device)
except distributed.KestrelError as error:
    assert str(error) == "rank 1 was started with model.depth=3 and rank 0 with model.depth=2: start all with the same"
else:
    raise AssertionError("different models were let through")
distributed.barrier()
distributed.cleanup()
distributed.cleanup()
"""


def test_two_ranks_agree_and_one_speaks():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [*warm.python(), "-c", RANK_PROGRAM],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, _, code in results] == [0, 0], results
    assert [out for out, _, _ in results] == ["spoken by 0 of 2\n", ""]
