"""What this process runs on, and how it agrees with the others: read once from torchrun's environment and the config.

Everything below train.py is handed a `Device` and asks no further. One process is the common case and every helper here
does nothing in it. Errors come before anything is loaded, and say what to write instead.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from errors import KestrelError
from model.ops import RECOMPUTABLE, is_interpreted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
TORCHRUN_KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
THREADS_PER_CORE = 16  # more than anybody needs; some tens of thousands end the process without a word


@dataclass
class HardwareConfig:
    """What to run on. `auto` looks at the machine."""

    device: str = "auto"
    dtype: str = "auto"
    device_batch_size: int = -1  # rows per micro-batch; -1: as many as fit and divide the batch
    fp8: bool = False  # train with 8-bit products
    compile: bool = False
    cuda_graph: str = "auto"  # auto | true | local (without messages between GPUs) | false
    reduce_dtype: str = "float32"  # in what gradients travel between ranks: float32 | bfloat16
    recompute: list[str] = field(default_factory=list)  # "block", or names of ops
    profile: bool = False
    deterministic: bool = False
    threads: Optional[int] = None  # CPU threads per process; None: PyTorch's own choice

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise KestrelError(f"hardware.device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise KestrelError(f"hardware.dtype must be one of auto, {', '.join(DTYPES)}, got {self.dtype!r}")
        if unknown := [name for name in self.recompute if name not in ("block", *RECOMPUTABLE)]:
            raise KestrelError(
                f"hardware.recompute knows no {unknown[0]!r}; choose from block, {', '.join(RECOMPUTABLE)}"
            )
        if self.fp8 and "relu2_mlp" in self.recompute:
            raise KestrelError(
                "hardware.recompute=[relu2_mlp] does not go with hardware.fp8=true, which keeps an MLP's hidden layer "
                "in 8 bits: take hardware.recompute=[block], or none"
            )
        self.cuda_graph = self.cuda_graph.lower()  # YAML's true arrives as True
        if self.cuda_graph not in ("auto", "true", "local", "false"):
            raise KestrelError(f"hardware.cuda_graph must be auto, true, local or false, got {self.cuda_graph!r}")
        if self.reduce_dtype not in ("float32", "bfloat16"):
            raise KestrelError(f"hardware.reduce_dtype must be float32 or bfloat16, got {self.reduce_dtype!r}")
        if self.device_batch_size != -1 and self.device_batch_size < 1:
            raise KestrelError(
                f"hardware.device_batch_size must be positive, or -1 (auto), got {self.device_batch_size}"
            )
        if self.threads is not None and self.threads < 1:
            raise KestrelError(f"hardware.threads must be positive, or null (automatic), got {self.threads}")


@dataclass(frozen=True)
class Device:
    """This process: where it computes, in which dtype, and its place among the ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    cuda_graph: bool = False  # whether training steps are captured
    local_graphs: bool = False  # without what ranks exchange

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """For people: cuda:0 (NVIDIA H100 80GB HBM3), bfloat16, 1 rank."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        graphs = ", steps in CUDA graphs" if self.cuda_graph else ""
        if self.cuda_graph and self.world_size > 1:
            graphs += " but for messages between ranks" if self.local_graphs else " with messages between ranks"
        return f"{self.device}{name}, {str(self.dtype).removeprefix('torch.')}, {ranks}{graphs}"

    @property
    def memory_bytes(self) -> int | None:
        """Memory of the GPU; None on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None


def init(hardware: HardwareConfig, *, timeout_s: float = 1800.0) -> Device:
    """Choose device and dtype, join the other ranks if torchrun started us, set the process-wide switches.

    timeout_s   how long a collective waits for a rank before the run fails: longer than rank 0 alone may take to
                train a tokenizer while the others wait
    """
    rank, local_rank, world_size = read_ranks(os.environ)
    device = choose_device(hardware.device, local_rank)
    dtype = choose_dtype(hardware.dtype, device)
    one_machine = os.environ.get("LOCAL_WORLD_SIZE", str(world_size)) == str(world_size)
    cuda_graph = choose_cuda_graph(hardware, device, dtype, one_machine)
    if hardware.fp8:
        require_fp8(device, dtype)
    if hardware.threads is not None:
        most = THREADS_PER_CORE * (os.cpu_count() or 1)
        if hardware.threads > most:
            raise KestrelError(
                f"hardware.threads={hardware.threads} is too many for {os.cpu_count()} cores: give at most {most}, "
                "or null (automatic)"
            )
        torch.set_num_threads(hardware.threads)
    if hardware.deterministic:
        make_deterministic(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if dtype == torch.float32:
            torch.set_float32_matmul_precision("high")  # TF32: fp32 range, 10-bit mantissa, several times the speed
    if world_size > 1 and not dist.is_initialized():
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(key):
                raise KestrelError(
                    f"WORLD_SIZE={world_size} is set in the environment but {key} is not; "
                    "start with torchrun --nproc_per_node=N train.py, or unset it"
                )
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=device_id)
    local_graphs = cuda_graph and hardware.cuda_graph == "local"
    return Device(device, dtype, rank, local_rank, world_size, cuda_graph, local_graphs)


def read_ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun sets them; (0, 0, 1) without torchrun."""
    present = [key for key in TORCHRUN_KEYS if key in environment]
    if not present:
        return 0, 0, 1
    if len(present) < len(TORCHRUN_KEYS):
        missing = [key for key in TORCHRUN_KEYS if key not in environment]
        raise KestrelError(
            f"{', '.join(present)} is set in the environment but {', '.join(missing)} is not; "
            "start with torchrun --nproc_per_node=N train.py, or unset it"
        )
    remedy = "start with torchrun --nproc_per_node=N train.py, or unset it"
    rank, local_rank, world_size = (_whole_number(environment, key, remedy) for key in TORCHRUN_KEYS)
    if world_size < 1:
        raise KestrelError(f"WORLD_SIZE={world_size} is set in the environment and must be positive; {remedy}")
    for key, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if not 0 <= value < world_size:
            raise KestrelError(
                f"{key}={value} is set in the environment and must be 0 to {world_size - 1} with "
                f"WORLD_SIZE={world_size}; {remedy}"
            )
    return rank, local_rank, world_size


def _whole_number(environment: Mapping[str, str], key: str, remedy: str) -> int:
    try:
        return int(environment[key])
    except ValueError as error:
        raise KestrelError(
            f"{key}={environment[key]:.80} is set in the environment and must be a whole number; {remedy}"
        ) from error


def choose_device(name: str, local_rank: int) -> torch.device:
    """auto is the GPU if there is one, else the CPU. Never mps unless asked for: it is untested."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise KestrelError("hardware.device=mps but this machine has no Metal GPU; use hardware.device=cpu")
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise KestrelError(
            "hardware.device=cuda but PyTorch sees no GPU; use hardware.device=cpu, or install a CUDA build of PyTorch"
        )
    if local_rank >= torch.cuda.device_count():
        raise KestrelError(
            f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto is bf16 where the GPU computes in it (sm_80 and up), else fp32."""
    has_bfloat16 = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else torch.float32
    if name == "bfloat16" and not has_bfloat16:
        raise KestrelError(
            f"hardware.dtype=bfloat16 but this {device.type} device has no bf16 arithmetic; use float32 or float16"
        )
    if name == "float16" and device.type != "cuda":
        raise KestrelError(
            f"hardware.dtype=float16 needs a GPU, but the device is {device.type}; use float32 or bfloat16"
        )
    return DTYPES[name]


def choose_cuda_graph(
    hardware: HardwareConfig, device: torch.device, dtype: torch.dtype, one_machine: bool = True
) -> bool:
    """auto: on the GPUs of one machine, unless their dtype, torch.compile or Triton's interpreter speak against it.

    Messages between machines in graphs have not been tried.
    """
    is_gpu, is_fp16 = device.type == "cuda", dtype == torch.float16
    wanted = hardware.cuda_graph
    if wanted == "auto":
        return is_gpu and one_machine and not is_fp16 and not hardware.compile and not is_interpreted()
    if wanted == "false":
        return False
    if not is_gpu:
        raise KestrelError(
            f"hardware.cuda_graph={wanted} needs an NVIDIA GPU, but the device is {device}; leave it at auto"
        )
    if is_fp16:
        raise KestrelError(
            f"hardware.cuda_graph={wanted} does not go with float16, whose loss scale changes on the way: "
            "use hardware.dtype=bfloat16, or leave it at auto"
        )
    return True


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to train with 8-bit products where there are none, or beside another dtype than bf16."""
    needs = "hardware.fp8=true needs a GPU of compute capability 9.0 (Hopper, such as an H100) or newer"
    if device.type != "cuda":
        raise KestrelError(f"{needs}, but the device is {device}: leave hardware.fp8=false")
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        name = torch.cuda.get_device_name(device)
        raise KestrelError(f"{needs}, and {name} has {capability[0]}.{capability[1]}: leave hardware.fp8=false")
    if dtype != torch.bfloat16:
        raise KestrelError(
            "hardware.fp8=true leaves all that is not in 8 bits in bfloat16, and hardware.dtype gives "
            f"{str(dtype).removeprefix('torch.')}: take bfloat16, or leave hardware.fp8=false"
        )


def make_deterministic(device: torch.device) -> None:
    """Same numbers at every run on the same machine. Where PyTorch has no such kernel on a GPU it warns by name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, which has not happened yet
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs memory traffic
    torch.backends.cudnn.benchmark = False


def cleanup() -> None:
    """Leave the other ranks; harmless when there are none or when it is called twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of x over the ranks, in place and returned."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of x over the ranks, in place and returned."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank: how ranks agree to stop, say, when a signal reached only one of them."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item()) if dist.is_initialized() else flag


def require_same(settings: dict[str, Any], device: Device) -> None:
    """Refuse ranks that were started with different settings: they would wait for each other, or train nonsense.

    settings   dotted key → value
    """
    if device.world_size == 1:
        return
    texts = {key: repr(value) for key, value in settings.items()}
    everyone: list[Any] = [None] * device.world_size
    dist.all_gather_object(everyone, texts)
    for rank, theirs in enumerate(everyone):
        for key in sorted(everyone[0].keys() | theirs.keys()):
            if (ours := everyone[0].get(key)) != (other := theirs.get(key)):
                raise KestrelError(
                    f"rank {rank} was started with {key}={other} and rank 0 with {key}={ours}: start all with the same"
                )


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], Any], device: Device) -> Any:
    """What `function` returns on rank 0, on every rank; what the user did wrong there is raised on all of them."""
    result = problem = None
    if device.is_main:
        try:
            result = function()
        except KestrelError as error:
            if device.world_size == 1:
                raise
            problem = str(error)
    result, problem = broadcast_object((result, problem))
    if problem is not None:
        raise KestrelError(problem)
    return result


def print_main(*values: object) -> None:
    """print, on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*values, flush=True)
