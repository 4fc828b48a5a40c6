"""Form the group of ranks: rank, device, the few collectives the loop needs, and the record of ranks' times.

train/rank.py calls it: the rendezvous store, new for each attempt, then torch's settings for the process,
then `join`. An inherited MASTER_ADDR or RANK is ignored.
"""

import datetime
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed hides them from type checkers

from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.ranks import RankTimeWriter

ItemT = TypeVar("ItemT")
MadeT = TypeVar("MadeT")
_TIMES_EVERY = 10
_STORE_TIMEOUT = datetime.timedelta(minutes=10)
# The watchdog ends a hopeless wait and names the cause; waiting for a slow rank may take hours.
_COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Group:
    """One rank, its device, and its collectives, which wait inside `waits()`."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    waits: Callable[[], AbstractContextManager[None]] = nullcontext
    """The watchdog's `waiting`."""
    beat: Callable[[], None] = lambda: None
    """The watchdog's `still`: called during long work that waits for no other rank."""
    store: Store | None = None
    """The store where the ranks met; None for a single rank."""

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Return element-wise sums over the ranks, in float64 (exact for integers below 2^53)."""
        sums: list[float] = self.sum_array(np.array(values, dtype=np.float64)).tolist()
        return sums

    def sum_array(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return element-wise sums over the ranks. On a CPU `values` may be overwritten."""
        tensor = torch.from_numpy(values).to(self.device)
        with self.waits():
            if self.world_size > 1:
                dist.all_reduce(tensor)
            return tensor.cpu().numpy()  # waits for the GPU

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` in rank order, on all ranks. Pickles: only for small, rare messages."""
        gathered = [value] * self.world_size
        with self.waits():
            if self.world_size > 1:
                dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on all ranks."""
        box = [value]
        with self.waits():
            if self.world_size > 1:
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        with self.waits():
            if self.world_size > 1:
                dist.barrier()


def by_rank_0(group: Group, make: Callable[[], MadeT]) -> MadeT:
    """Return on every rank what rank 0 makes, or raise its R1hpcError on every rank."""
    made: MadeT | R1hpcError | None = None
    if group.rank == 0:
        try:
            made = make()
        except R1hpcError as error:
            made = error
    found: MadeT | R1hpcError = group.broadcast(made)
    if isinstance(found, R1hpcError):
        raise found
    return found


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

    `waits` is entered wherever this rank waits for the others; `beat` is called in long work, as a sign of
    life.
    """
    if use_gpu and not torch.cuda.is_available():
        raise R1hpcError(
            f"torch {torch.__version__} finds no GPU on {socket.gethostname()}: look at the driver there "
            "(nvidia-smi), or exclude the node with -x; a CPU run has resources.gpus_per_node=0"
        )
    choose_accelerator(use_gpu)
    index = device_index(local_rank, torch.cuda.device_count()) if use_gpu else local_rank
    # DeepSpeed reads these when it builds its engine, and uses LOCAL_RANK as the device.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(index), WORLD_SIZE=str(world_size))
    device = torch.device("cuda", index) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
        # Otherwise torch's own watchdog aborts this process (SIGABRT) as soon as a peer is gone, or its
        # monitor eight minutes later, even in the middle of writing a checkpoint. Ours prevents endless
        # waits.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    backend = "nccl" if use_gpu else "gloo"
    _let_groups_wait()
    with waits():
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT
        )
        # NCCL connects at the first collective, and waits for rank 0 only as long as the store does. At the
        # next one rank 0 may be late: it opens the dataset and reads the model.
        dist.all_reduce(torch.zeros(1, device=device))
    _join_deepspeed(backend, device)
    return Group(rank, local_rank, world_size, device, waits, beat, store)


def choose_accelerator(use_gpu: bool) -> None:
    """Make DeepSpeed use the job's device, in this process and those it starts.

    DeepSpeed fixes its device at first import, so call this before. A DS_ACCELERATOR from the submitting
    shell belongs to another machine and would put the weights on the wrong device.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"


def be_deterministic() -> None:
    """Make torch, cuBLAS and flash attention use kernels with a fixed order of addition, if they have any.

    Call it before the GPU is first used: cuBLAS reads its variable once (docs.nvidia.com/cuda/cublas,
    "Results reproducibility"). An operation without a deterministic kernel warns in the rank's log; in a
    backward pass it fails (loop/step.py). cuDNN's attention, which torch prefers on Hopper, has none for that
    pass. NCCL's order is the same for the same ranks, algorithm and protocol, which are set here.
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
    """Make torch's allocator grow its segments in place, unless the environment configures it.

    Sequences that grow token by token leave holes that no later one fits: simulated for a 7B, 24 GiB were
    reserved for caches of 2.6. vLLM 0.32 turns this off around the pool that its sleep mode frees, and on
    again (device_allocator/cumem.py).
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name; torch reads the older one first
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def attend_at_any_length() -> None:
    """Keep torch from cuDNN's attention, which it prefers on Hopper and Blackwell.

    cuDNN builds a plan for every new shape, and torch keeps them all. Completions that grow token by token
    make nearly every shape new: in one fine-tuning on a B200 a step of a new shape took a second instead of a
    tenth (modelscope/FunASR issue 3704, torch 2.11). Pretraining has one shape.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def make_store(host: str, port: int, world_size: int, listener: socket.socket | None) -> Store:
    """Return the key-value store the ranks meet at. With `listener`, serve it on that bound socket.

    torch's store listens on every address without authentication: the cluster's network is trusted, and
    train/rank.py checks a token so that at least mistakes are noticed.
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


def connected_again(store: Store) -> Store:
    """Return another connection to the same store: one thread's wait then blocks no other thread."""
    # torch's type stubs do not know clone().
    own: Store = store.clone()  # type: ignore[attr-defined]
    return own


def leave() -> None:
    """Close the group, so that no peer keeps a live connection to a dead process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def portions(items: Iterable[ItemT], size: Callable[[ItemT], int], most: int) -> list[list[ItemT]]:
    """Group consecutive items, of at most `most` together or a single larger one."""
    groups: list[list[ItemT]] = [[]]
    held = 0
    for item in items:
        needed = size(item)
        if groups[-1] and held + needed > most:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += needed
    return groups


def device_index(local_rank: int, num_visible: int) -> int:
    """Return this rank's visible GPU: Slurm shows a task all GPUs of the node, or its own."""
    if local_rank < num_visible:
        return local_rank
    if num_visible == 1:  # else NCCL fails: "Duplicate GPU detected"
        return 0
    raise R1hpcError(
        f"rank {local_rank} of {socket.gethostname()} sees only {num_visible} GPUs, and two ranks must not "
        "share one: ask for as many GPUs as ranks a node, and look at CUDA_VISIBLE_DEVICES there"
    )


def _let_groups_wait() -> None:
    """Make groups without a timeout, as DeepSpeed makes them, wait as long as ours.

    torch's default for NCCL is 10 minutes: it would abort the ranks before the watchdog can name the one that
    hangs. DeepSpeed 0.19 passes no timeout on.
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
        # under the user's home for which the ranks of several nodes race. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        # DeepSpeed 0.19 queries NVML by the numbers it expects in CUDA_VISIBLE_DEVICES. A MIG slice, and any
        # GPU where gres.conf sets env_uuid, has a UUID there.
        accelerator = deepspeed.accelerator.get_accelerator()
        accelerator.available_memory = lambda index=None: torch.cuda.mem_get_info(index)[0]
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


class RankTimes:
    """Records working and waiting times of each rank every few steps, to find a straggler."""

    def __init__(self, run: RunDir, attempt: int, node: str, group: Group) -> None:
        """Collective."""
        self._group = group
        self._times: list[tuple[float, float]] = []
        self._writer: RankTimeWriter | None = None
        uuid = None
        if group.device.type == "cuda":
            uuid = f"GPU-{torch.cuda.get_device_properties(group.device).uuid}"
        places: list[tuple[str, str | None]] = group.gather((node, uuid))
        if group.rank == 0:
            nodes, uuids = zip(*places, strict=True)
            self._writer = RankTimeWriter(run, attempt, nodes, uuids)

    def step(self, global_step: int, step_time_s: float, own_s: float) -> None:
        """Note a finished step. Collective, every _TIMES_EVERY steps. `own_s` is its part in this rank's own
        work: reading, sampling, its forward passes."""
        self._times.append((step_time_s, max(0.0, step_time_s - own_s)))
        if len(self._times) < _TIMES_EVERY:
            return
        means = [sum(column) / len(self._times) for column in zip(*self._times, strict=True)]
        gathered = self._group.gather(means)
        if self._writer is not None:
            times, waits = zip(*gathered, strict=True)
            num_steps = len(self._times)
            self._writer.write(global_step=global_step, num_steps=num_steps, step_time_s=times, wait_s=waits)
        self._times = []
