"""A thousand damaged files in checkpoints of a real DeepSpeed run: each named, the last good one used.

R1HPC_SEED repeats the seed that a failure printed.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from r1hpc.checkpoint.store import CheckpointStore
from tests.runs import submit, wait_over

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("R1HPC_SEED", "20240229"))
PAGE = 4096
Damage = Callable[[random.Random, Path, Path], None]


def test_each_is_named_and_the_last_good_one_chosen(tmp_path: Path) -> None:
    size = ("--nodes", "2", "train.num_steps=9", "checkpoint.save_every=3", "checkpoint.keep=3")
    run = submit(tmp_path, "run", *size, "train.global_batch_size=8").run
    wait_over(run)
    good = [found.step for found in CheckpointStore(run.checkpoints).list()]
    assert good == [9, 6, 3]
    seen: Counter[str] = Counter()
    for number in range(1000):
        chance = random.Random(f"{SEED}/{number}")
        copy = tmp_path / "copy"
        shutil.copytree(run.checkpoints, copy)
        damaged = spoil_some(chance, copy, seen)
        passed_over: list[str] = []
        chosen = CheckpointStore(copy).newest_verified(report=passed_over.append)
        note = f"seed {SEED}, number {number}: {damaged} {passed_over}"
        assert chosen is not None, note
        assert chosen.step == max(set(good) - damaged.keys()), note
        for step, path in damaged.items():
            assert any(str(path) in line for line in passed_over), f"{note}: step {step} is not named"
        shutil.rmtree(copy)
    print(dict(seen))


def spoil_some(chance: random.Random, root: Path, seen: Counter[str]) -> dict[int, Path]:
    """Damage one file of the newest checkpoint, and in a third of the cases one of the next as well."""
    damaged = {}
    for step in (9, 6)[: chance.choice([1, 1, 2])]:
        folder = root / f"step-{step:08d}"
        path = chance.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        other = root / "step-00000003" / path.relative_to(folder)
        damage = chance.choice(DAMAGES)
        before = path.read_bytes()
        damage(chance, path, other)
        if path.exists() and path.read_bytes() == before:  # a page of zeros, or the same in both steps
            flip_a_bit(chance, path, other)
            damage = flip_a_bit
        seen[damage.__name__] += 1
        damaged[step] = path
    return damaged


def flip_a_bit(chance: random.Random, path: Path, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)


def zero_a_page(chance: random.Random, path: Path, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    start = chance.randrange(0, len(raw), PAGE)
    raw[start : start + PAGE] = bytes(len(raw[start : start + PAGE]))
    path.write_bytes(raw)


def truncate(chance: random.Random, path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def delete(chance: random.Random, path: Path, other: Path) -> None:
    path.unlink()


def swap(chance: random.Random, path: Path, other: Path) -> None:
    """With the file of the same name in another step."""
    path.write_bytes(other.read_bytes())


DAMAGES: tuple[Damage, ...] = (flip_a_bit, zero_a_page, truncate, delete, swap)
