"""The group of ranks: who we are, the device, and the few collectives the loop needs.

The rendezvous store is made by `launch`, freshly for each attempt; nothing is taken from an inherited
MASTER_ADDR or RANK.
"""

import datetime
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed hides them from type checkers

from r1hpc.base.errors import R1hpcError

_STORE_TIMEOUT = datetime.timedelta(minutes=10)
# A wait in vain is ended by the watchdog, which can say why; one for a slow rank may take hours.
_COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Group:
    """One rank's place among all, and its device. Its collectives wait inside `waits()`."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    waits: Callable[[], AbstractContextManager[None]] = nullcontext
    """The watchdog's `waiting`."""
    beat: Callable[[], None] = lambda: None
    """The watchdog's `still`: called within what takes long and waits for nobody."""
    store: Store | None = None
    """Where the ranks met; None: there is one rank."""

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64 (exact for integers below 2^53)."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.waits():
            if self.world_size > 1:
                dist.all_reduce(tensor)
            result: list[float] = tensor.tolist()  # on a GPU it is here that one waits
        return result

    def sum_array(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Element-wise sum over the ranks."""
        tensor = torch.from_numpy(values).to(self.device)
        with self.waits():
            if self.world_size > 1:
                dist.all_reduce(tensor)
            return tensor.cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on all ranks. Pickles: only for small, rare messages."""
        gathered: list[Any] = [None] * self.world_size
        with self.waits():
            dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks."""
        box = [value]
        with self.waits():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        with self.waits():
            dist.barrier()


def join(
    rank: int,
    local_rank: int,
    world_size: int,
    store: Store,
    *,
    use_gpu: bool,
    waits: Callable[[], AbstractContextManager[None]] = nullcontext,
    beat: Callable[[], None] = lambda: None,
) -> Group:
    """Initialise torch.distributed and DeepSpeed's view of it: NCCL for a GPU run, gloo for a CPU run.

    Args:
        waits: entered wherever this rank waits for the others.
        beat: a sign of life within what takes long.

    Raises:
        R1hpcError: a GPU run on a node where torch finds none, or DeepSpeed was imported for another device.
    """
    if use_gpu and not torch.cuda.is_available():
        raise R1hpcError(
            f"torch {torch.__version__} finds no GPU on {socket.gethostname()}: look at the driver there "
            "(nvidia-smi), or exclude the node with -x; a CPU run has resources.gpus_per_node=0"
        )
    choose_accelerator(use_gpu)
    index = device_index(local_rank, torch.cuda.device_count()) if use_gpu else local_rank
    # DeepSpeed reads these when it builds its engine, and takes LOCAL_RANK for the device.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(index), WORLD_SIZE=str(world_size))
    device = torch.device("cuda", index) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
        # Or torch's own watchdog ends this process (SIGABRT) as soon as a peer is gone, or its monitor eight
        # minutes later, in the middle of a checkpoint that is being written. Ours sees to it that nobody
        # waits for ever.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    backend = "nccl" if use_gpu else "gloo"
    _let_groups_wait()
    with waits():
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT
        )
        # NCCL connects at the first collective, and then waits for rank 0 only as long as the store does. At
        # the next one rank 0 may be late: it opens the dataset, it reads the model.
        dist.all_reduce(torch.zeros(1, device=device))
    _join_deepspeed(backend, device)
    return Group(rank, local_rank, world_size, device, waits, beat, store)


def choose_accelerator(use_gpu: bool) -> None:
    """Have DeepSpeed work on the device that the job was given, in this process and those it starts.

    DeepSpeed fixes its device when it is first imported, so this must come before that. A DS_ACCELERATOR of
    the shell that submitted is of another machine: it would put the weights on the wrong device.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"


def be_deterministic() -> None:
    """Have torch, cuBLAS and flash attention take kernels that add up in one order, where they have such.

    Before the GPU is first used: cuBLAS reads its variable once (docs.nvidia.com/cuda/cublas, "Results
    reproducibility"). An operation without such a kernel warns in the rank's log and goes on; in a backward
    pass it fails (engine.py). cuDNN's attention, which torch prefers on Hopper, has none for that pass.
    NCCL's order is its own: the same for the same ranks, algorithm and protocol, which are named here.
    """
    chosen = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "FLASH_ATTENTION_DETERMINISTIC": "1",
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
    }
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def let_memory_grow() -> None:
    """Have torch's allocator grow its segments in place, unless the environment says how it works.

    Sequences that grow token by token leave holes that no later one fits: simulated for a 7B, 24 GiB were
    reserved for caches of 2.6. vLLM 0.32 turns it off around the pool that its sleep mode gives back, and on
    again (device_allocator/cumem.py).
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name; torch reads the older one first
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def attend_at_any_length() -> None:
    """Have torch not take cuDNN's attention, which it prefers on Hopper and Blackwell.

    cuDNN builds a plan for every shape that it has not met, and torch keeps them all: of completions that
    grow token by token nearly each is a new one. In somebody's fine-tuning on a B200 a step of a new shape
    took a second instead of a tenth (modelscope/FunASR issue 3704, torch 2.11). Pretraining has one shape.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def make_store(host: str, port: int, world_size: int, listener: socket.socket | None) -> Store:
    """The key-value store the ranks meet at. With `listener`, serve it on that bound socket.

    torch's store listens on every address and authenticates nobody: the cluster's network is trusted, and
    `launch` checks a token so that a mistake, at least, is noticed.
    """
    return TCPStore(
        host,
        port,
        world_size,
        is_master=listener is not None,
        timeout=_STORE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
        use_libuv=listener is None,
    )


def leave() -> None:
    """Close the group, so that no peer is left with a live connection to a dead process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_index(local_rank: int, num_visible: int) -> int:
    """The visible GPU of this rank: Slurm shows a task all GPUs of the node, or (--gpus-per-task) its own.

    Raises:
        R1hpcError: it sees several, and fewer than there are ranks on the node.
    """
    if local_rank < num_visible:
        return local_rank
    if num_visible == 1:  # its own, or NCCL says "Duplicate GPU detected"
        return 0
    raise R1hpcError(
        f"rank {local_rank} of {socket.gethostname()} sees only {num_visible} GPUs, and two ranks must not "
        "share one: ask for as many GPUs as ranks a node, and look at CUDA_VISIBLE_DEVICES there"
    )


def _let_groups_wait() -> None:
    """Groups that are made without a timeout, as DeepSpeed makes its own, wait as long as ours.

    torch's default for NCCL is 10 minutes: it would abort the ranks before the watchdog can say which hangs.
    There is no argument for it: DeepSpeed 0.19 passes none on.
    """
    c10d = dist.distributed_c10d
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if isinstance(getattr(c10d, name, None), datetime.timedelta):  # None: built without NCCL
            setattr(c10d, name, _COLLECTIVE_TIMEOUT)


def _join_deepspeed(backend: str, device: torch.device) -> None:
    import deepspeed
    from deepspeed.utils import logger

    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device.type:
        raise R1hpcError(
            f"DeepSpeed was set to {chosen} before this rank could choose {device.type}: look for an import "
            "of deepspeed at start-up (sitecustomize, a .pth file) and remove it"
        )
    logger.setLevel("ERROR")
    if backend == "gloo":
        # On CPU DeepSpeed compiles a shared-memory all-reduce at first use: 20 s, a C++ compiler, and a cache
        # under the user's home that the ranks of several nodes race for. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        # DeepSpeed 0.19 asks NVML, by numbers that it expects in CUDA_VISIBLE_DEVICES: a MIG slice, and any
        # GPU where gres.conf says env_uuid, has a UUID there.
        accelerator = deepspeed.accelerator.get_accelerator()
        accelerator.available_memory = lambda index=None: torch.cuda.mem_get_info(index)[0]
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
