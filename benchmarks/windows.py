"""How fast does a DataLoader read `Windows`? Beside a torch Dataset over np.memmap, which checks nothing.

    python benchmarks/windows.py [--tokens 16777216] [--rounds 7] [--batch 64] [--mix] [--shuffle]

Windows of 2,048 tokens as input_ids and labels, both Datasets in the same shuffled order, one process. One
dataset has chunks of 32,768 tokens, the default of a recipe. The other has chunks of 1,024: a window lies in
two or three. The peer is an int64 file: no conversion, no checksum, no shards. Rounds alternate. An epoch
before them compares the batches and warms both: the page cache, and the starts of the windows.
CPU time counts, so other load on the machine changes little.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml

from r1hpc.corpus.build.build import build_dataset
from r1hpc.data.read.open_plan import open_plan
from r1hpc.data.read.reader import TokenDataset, open_dataset
from r1hpc.data.torch import Windows

SEQ_LEN = 2048
TARGET = 0.6
CHUNKS = (2**15, 2**10)


class Mapped(torch.utils.data.Dataset[dict[str, Any]]):
    """The Dataset that people write: a window is a slice of a memory map."""

    def __init__(self, path: Path, starts: list[int]) -> None:
        self._tokens, self._starts = np.load(path, mmap_mode="r"), starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self._starts[index]
        tokens = torch.from_numpy(self._tokens[start : start + SEQ_LEN].copy())
        return {"input_ids": tokens, "labels": tokens.clone()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2**24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--mix", action="store_true", help="a mixture 30/40/30 of three sources")
    parser.add_argument("--shuffle", action="store_true", help="the DataLoader shuffles once more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    is_met = [_compare(arguments, chunk) for chunk in CHUNKS]
    print("met" if all(is_met) else "NOT met")


def _compare(arguments: argparse.Namespace, chunk_tokens: int) -> bool:
    """Print how the two compare; return whether the target is met."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = _dataset(folder, arguments, chunk_tokens)
        windows = Windows(dataset.path, seq_len=SEQ_LEN)
        starts = open_plan(dataset, SEQ_LEN, 0, 1).window_starts(np.arange(len(windows))).tolist()
        np.save(folder / "tokens.npy", dataset.read(0, dataset.num_tokens).astype(np.int64))
        mapped = Mapped(folder / "tokens.npy", starts)
        for ours, theirs in zip(_loader(windows, 64), _loader(mapped, 64), strict=True):  # warms both
            assert torch.equal(ours["labels"], theirs["labels"]), "both read the same windows"
        seconds = np.array(
            [
                [_seconds(each, arguments.batch, arguments.shuffle) for each in (windows, mapped)]
                for _ in range(arguments.rounds)
            ]
        )
    ratios = seconds[:, 1] / seconds[:, 0]
    rate, middle = len(windows) / np.median(seconds[:, 0]), np.median(ratios)
    print(f"chunks of {chunk_tokens:,}: {len(windows):,} windows, batch {arguments.batch}, {rate:,.0f}/s")
    print(f"  {middle:.2f} x np.memmap (target >= {TARGET}), {ratios.min():.2f} to {ratios.max():.2f}")
    return bool(middle >= TARGET)


def _dataset(folder: Path, arguments: argparse.Namespace, chunk_tokens: int) -> TokenDataset:
    draw = np.random.default_rng(0)
    names = ("a", "b", "c") if arguments.mix else ("a",)
    for name in names:
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["ids"] = draw.integers(1, 4096, arguments.tokens // len(names))
    sources = [
        {"name": name, "kind": "hdf5", "root": ".", "glob": f"{name}.h5", "field": "ids"} for name in names
    ]
    recipe: dict[str, Any] = {"name": "windows", "sources": sources, "chunk_tokens": chunk_tokens}
    recipe["tokenizer"] = {"kind": "ids", "vocab_size": 4096, "eos_id": 0}
    if arguments.mix:
        recipe["mix"] = {"weights": {"a": 0.3, "b": 0.4, "c": 0.3}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return open_dataset(build_dataset(folder / "recipe.yaml", folder / "dataset").path)


def _loader(dataset: Any, batch: int, is_shuffled: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=is_shuffled, generator=generator)


def _seconds(dataset: Any, batch: int, is_shuffled: bool) -> float:
    began = time.process_time()
    for _ in _loader(dataset, batch, is_shuffled):
        pass
    return time.process_time() - began


if __name__ == "__main__":
    main()
