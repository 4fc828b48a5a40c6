"""How often are the files of a dataset asked for when a node of 32 ranks opens it? Counted by strace.

    python benchmarks/opening.py [--parts 300] [--ranks 32]     # needs strace (Debian: apt install strace)

Each rank is a process of its own in a gloo group, and opens the dataset as training does
(train.supervised.open_once). Counted is every system call on a path or an open file below the dataset: opens,
stats, reads, closes. Beside it one rank alone, and the ranks opening it each for itself, as a data loader
does that knows nothing of its neighbours.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from r1hpc.corpus.build.build import build_dataset

TARGET = 2.0
CALLS = "openat,stat,newfstatat,statx,fstat,lstat,access,read,pread64,lseek,close,fadvise64,getdents64"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--rank", nargs=3, metavar=("RANK", "HOW", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        _open_as_rank(int(arguments.rank[0]), arguments.ranks, arguments.rank[1], Path(arguments.rank[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        dataset = _build(Path(folder), arguments.parts)
        alone = _count(Path(folder), dataset, 1, "once")
        print(f"{arguments.parts} parts, one rank        {alone:9,d} calls")
        for how, words in (("once", "one for all"), ("each", "each for itself")):
            calls = _count(Path(folder), dataset, arguments.ranks, how)
            print(f"{arguments.ranks} ranks, {words:<17}{calls:9,d} calls  {calls / alone:6.2f} x one rank")
    print(f"target: one for all at most {TARGET} x one rank")


def _build(folder: Path, num_parts: int) -> Path:
    """Real text, one part a file."""
    docs = folder / "docs"
    docs.mkdir()
    for number in range(num_parts):
        (docs / f"{number:04d}.txt").write_text(f"document {number} " * 40)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "name: parts\ntokenizer: {kind: bytes}\npart_bytes: 1\n"
        "sources: [{name: docs, kind: text, root: docs, glob: '*.txt'}]\n"
    )
    return build_dataset(recipe, folder / "dataset").path


def _count(folder: Path, dataset: Path, num_ranks: int, how: str) -> int:
    """System calls on files of the dataset, over all ranks."""
    meeting = folder / f"store-{num_ranks}-{how}"
    this = [sys.executable, __file__, "--ranks", str(num_ranks)]
    ranks = []
    for rank in range(num_ranks):
        log = folder / f"calls-{how}-{num_ranks}-{rank}"
        trace = ["strace", "-f", "--seccomp-bpf", "-y", "-qq", "-e", f"trace={CALLS}", "-o", str(log)]
        command = [*this, "--rank", str(rank), how, str(dataset)]
        ranks.append(subprocess.Popen([*trace, *command], env=_environment(meeting)))
    statuses = [rank.wait() for rank in ranks]
    if any(statuses):
        raise SystemExit("a rank failed")
    below = re.compile(re.escape(f"{dataset}/"))
    logs = folder.glob(f"calls-{how}-{num_ranks}-*")
    return sum(bool(below.search(line)) for log in logs for line in log.open(errors="replace"))


def _environment(meeting: Path) -> dict[str, str]:
    return {**os.environ, "MEETING": str(meeting), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _open_as_rank(rank: int, num_ranks: int, how: str, dataset: Path) -> None:
    import torch
    import torch.distributed as dist

    from r1hpc.data.read.reader import open_dataset
    from r1hpc.train.parallel.distributed import Group
    from r1hpc.train.supervised.supervised import open_once

    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=num_ranks
    )
    if how == "once":
        open_once(Group(rank, rank, num_ranks, torch.device("cpu")), lambda: open_dataset(dataset))
    else:
        open_dataset(dataset)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
