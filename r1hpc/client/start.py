"""Give a script the same start in every attempt of a run: hashes of text, and random streams nobody seeded.

    start_seed(run)              # recorded with the run: each run has another
    start_streams(seed, rank)    # in the script's interpreter, before its first line

A script that seeds itself is not changed. Without this a vocabulary from `set()`, or an unseeded split, would
differ after a preemption.
"""

import hashlib
import random
from collections.abc import Callable
from types import ModuleType

from r1hpc.base.run_dir import RunDir

HASH_SEED = "PYTHONHASHSEED"


def start_seed(run: RunDir) -> int:
    """Return a number below 2**32 from the record of the run's first submission."""
    try:
        with run.attempts.open("rb") as file:
            first = file.readline()  # contains its time
    except FileNotFoundError:
        first = run.run_id.encode()
    return int.from_bytes(hashlib.sha256(first).digest()[:4], "big")


def start_streams(seed: int, rank: int) -> dict[str, Callable[[ModuleType], None]]:
    """Seed Python's stream; return what seeds those of modules once they are imported."""
    dice = random.Random(seed * 2**32 + rank)
    random.seed(dice.getrandbits(64))
    of_numpy, of_torch = dice.getrandbits(32), dice.getrandbits(63)

    def seed_numpy(module: ModuleType) -> None:
        module.seed(of_numpy)
        module.bit_generator.randbits = dice.getrandbits  # default_rng() without a seed asks for it

    def seed_torch(module: ModuleType) -> None:
        module.manual_seed(of_torch)

    return {"numpy.random": seed_numpy, "torch": seed_torch}
