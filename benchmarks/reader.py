"""How fast are verified windows? The direct reader beside np.memmap (the floor) and zarr-python (the peer).

    python benchmarks/reader.py [--tokens 33554432] [--rounds 9] [--windows 20000] [--vocab 4096|129280]

Windows of 2,049 tokens at uniform random starts, one process, page cache warm. All readers take the same
starts; their rounds alternate, so that other load on the machine hits all alike. Each reader's answer is
compared with the others' before anything is timed.

np.memmap is a slice copied out of one flat file: no checksum, no shards. zarr-python reads the very
dataset the direct reader reads, with its default codec pipeline.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import zarr

from r1hpc.corpus.build.build import build_dataset
from r1hpc.data.read.reader import TokenDataset, open_dataset

WINDOW = 2049
TARGET_MEMMAP, TARGET_ZARR = 0.5, 50.0
Read = Callable[[int], npt.NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2**25)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--windows", type=int, default=20_000)
    parser.add_argument("--vocab", type=int, default=4096, help="up to 65,535 gives uint16, more uint32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = _build(Path(folder), arguments.tokens, arguments.vocab)
        _compare(dataset, Path(folder) / "flat", arguments.rounds, arguments.windows)


def _build(folder: Path, num_tokens: int, vocab_size: int) -> TokenDataset:
    """A one-part dataset with default chunks and shards, through the ordinary build."""
    ids = np.random.default_rng(0).integers(1, vocab_size, num_tokens, dtype=np.uint32)
    ids[::1000] = 0
    with h5py.File(folder / "ids.h5", "w") as file:
        file["ids"] = ids
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: bench\ntokenizer: {{kind: ids, vocab_size: {vocab_size}, eos_id: 0}}\n"
        "sources: [{name: ids, kind: hdf5, root: ., glob: ids.h5, field: ids}]\n"
    )
    return open_dataset(build_dataset(recipe, folder / "dataset").path)


def _compare(dataset: TokenDataset, flat: Path, rounds: int, num_windows: int) -> None:
    dataset.read(0, dataset.num_tokens).tofile(flat)
    memmap = np.memmap(flat, dtype=dataset.dtype, mode="r")
    view = memmap.view(np.ndarray)  # what is left of np.memmap without its subclass overhead
    array: Any = zarr.open_array(dataset.path / "parts/part-00000/tokens", mode="r")
    every = open_dataset(dataset.path, verify="every")
    readers: dict[str, tuple[Read, int]] = {
        "np.memmap slice copy (no checks)": (lambda at: np.array(memmap[at : at + WINDOW]), 1),
        "its ndarray view, slice copy": (lambda at: view[at : at + WINDOW].copy(), 1),
        "direct, each chunk verified once": (lambda at: dataset.read(at, WINDOW), 1),
        "direct, every read verified": (lambda at: every.read(at, WINDOW), 10),
        "zarr-python, default pipeline": (lambda at: array[at : at + WINDOW], 200),
    }
    starts = np.random.default_rng(1).integers(0, dataset.num_tokens - WINDOW, num_windows).tolist()
    for start in starts[:20]:
        first, *others = (read(start) for read, _ in readers.values())
        assert all(np.array_equal(first, other) for other in others), f"readers differ at {start}"
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, (read, divisor) in readers.items():
            times[name].append(_time(read, starts[: max(1, num_windows // divisor)]))
    _print(dataset, times)


def _time(read: Read, starts: list[int]) -> float:
    """Seconds per window."""
    began = time.perf_counter()
    for start in starts:
        read(start)
    return (time.perf_counter() - began) / len(starts)


def _print(dataset: TokenDataset, times: dict[str, list[float]]) -> None:
    memmap, _, once, _, peer = (min(values) for values in times.values())
    print(f"{WINDOW}-token windows of {dataset.dtype}, {dataset.num_tokens:,} tokens, page cache warm")
    print(f"{'reader':34} {'best us':>9} {'median us':>10} {'Mtok/s':>8} {'/ memmap':>9}")
    for name, values in times.items():
        best = min(values)
        median = statistics.median(values) * 1e6
        print(f"{name:34} {best * 1e6:9.2f} {median:10.2f} {WINDOW / best / 1e6:8.0f} {memmap / best:9.3f}")
    memmaps, _, onces, _, peers = times.values()
    versus_memmap = _paired(memmaps, onces)
    versus_peer = _paired(peers, onces)
    print(
        f"direct (once) / np.memmap: {memmap / once:.2f} best, {versus_memmap:.2f} median of rounds "
        f"(target >= {TARGET_MEMMAP})"
    )
    print(
        f"direct (once) / zarr-python: {peer / once:.0f} best, {versus_peer:.0f} median of rounds "
        f"(target >= {TARGET_ZARR:.0f})"
    )


def _paired(others: list[float], ours: list[float]) -> float:
    """Median over rounds of other / ours, whose times of one round met about the same load."""
    return statistics.median(other / our for other, our in zip(others, ours, strict=True))


if __name__ == "__main__":
    main()
