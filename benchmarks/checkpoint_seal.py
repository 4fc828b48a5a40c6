"""Time a verified checkpoint beside an unverified one: seal against a plain write and fsync.

    python benchmarks/checkpoint_seal.py [--mib 256] [--files 4] [--rounds 7] [--folder DIR]

The floor writes the same files and syncs them; it keeps no digest, so that nothing would notice a flipped
byte. Ours adds CheckpointStore.seal (digests, modes, folders) and, on its own line, the commit. `digest
after` digests once the sync is done instead of beside it, and `pool of 4` seals four files at once: what
was tried and not taken. All take turns in one process; medians. The last line is verification, from the
page cache, so an upper bound for a disk.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from r1hpc.checkpoint.commit import seal_files
from r1hpc.checkpoint.manifest import digest_fd
from r1hpc.checkpoint.store import CheckpointStore

MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256, help="MiB per checkpoint (256)")
    parser.add_argument("--files", type=int, default=4, help="files it is split into (4)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (7)")
    parser.add_argument("--folder", default=None, help="where to write (the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.mib, arguments.files, arguments.rounds)
    return 0


def measure(root: Path, mib: int, num_files: int, rounds: int) -> None:
    ways: dict[str, Callable[[Path, list[str]], object]] = {
        "write, fsync (floor)": sync,
        "write, seal (ours)": seal_files,
        "digest after": digest_after,
        "pool of 4": pooled,
    }
    times: dict[str, list[float]] = {name: [] for name in [*ways, "commit", "verify"]}
    sync(root / "warm", write(root / "warm", mib, num_files))
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way(root / "one", write(root / "one", mib, num_files))
            times[name].append(time.perf_counter() - started)
            shutil.rmtree(root / "one")
        commit, verify = through_the_store(root / "store", mib, num_files)
        times["commit"].append(commit)
        times["verify"].append(verify)
    floor = statistics.median(times["write, fsync (floor)"])
    for name, taken in times.items():
        median = statistics.median(taken)
        beside = f"{median / floor:.2f} x the floor's time" if name in ways else f"{median * 1e3:.1f} ms"
        print(f"{name:22s} {mib / median:8.0f} MiB/s   {beside}")


def write(folder: Path, mib: int, num_files: int) -> list[str]:
    """Write the files, in MiB pieces that are not zeros; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    piece = os.urandom(MIB)
    for number in range(num_files):
        with open(folder / f"shard_{number}", "wb") as file:
            for _ in range(mib // num_files):
                file.write(piece)
    return [f"shard_{number}" for number in range(num_files)]


def sync(folder: Path, names: list[str]) -> None:
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def digest_after(folder: Path, names: list[str]) -> None:
    sync(folder, names)
    for name in names:
        with open(folder / name, "rb") as file:
            digest_fd(file.fileno())


def pooled(folder: Path, names: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: seal_files(folder, [name]), names))


def through_the_store(root: Path, mib: int, num_files: int) -> tuple[float, float]:
    """Seconds of a commit of sealed files and of a full verification."""
    store = CheckpointStore(root)
    store.begin(1, "bench")
    folder = store.open_staging(1, 1, "bench")
    records = store.seal(folder, write(folder, mib, num_files))
    started = time.perf_counter()
    checkpoint = store.commit(1, 1, "bench", records, {})
    committed = time.perf_counter()
    assert not store.verify(checkpoint)
    done = time.perf_counter()
    shutil.rmtree(root)
    return committed - started, done - committed


if __name__ == "__main__":
    sys.exit(main())
