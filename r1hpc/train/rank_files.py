"""Which files of a checkpoint a rank wrote, by their names: those it seals, and whether any is missing."""

from collections.abc import Iterable
from pathlib import Path

from r1hpc.checkpoint.errors import CheckpointWriteError
from r1hpc.train.compression import PREFIX as COMPRESSION
from r1hpc.train.distributed import Group
from r1hpc.train.weight_parts import PREFIX as WEIGHTS


def streams_name(rank: int) -> str:
    """The file with a rank's random streams."""
    return f"streams_rank_{rank}.pt"


def own_files(staging: Path, group: Group) -> list[str]:
    """The files this rank wrote: those that carry its number; rank 0 also all that carry none."""
    paths = (path for path in staging.rglob("*") if _owner(path.name, group.world_size) == group.rank)
    return sorted(path.relative_to(staging).as_posix() for path in paths if path.is_file())


def check_whole(staging: Path, names: list[str], endings: Iterable[str], rank: int) -> None:
    """Raise CheckpointWriteError unless `rank` wrote a file with each of these endings."""
    for ending in endings:
        if not any(name.endswith(ending) for name in names):
            raise CheckpointWriteError(f"rank {rank} finds no file *{ending} of its own in {staging}")


def _owner(name: str, world_size: int) -> int:
    """The rank that wrote a file, by DeepSpeed's naming (`zero_pp_rank_3_mp_rank_00…`) and ours."""
    for marker in ("zero_pp_rank_", "streams_rank_", "stage_rank_", WEIGHTS, COMPRESSION):
        _, found, tail = name.partition(marker)
        if found:
            rank = int(tail.replace(".", "_").split("_")[0])
            return rank if rank < world_size else 0
    return 0
