"""How long does it take to resume at any sample? The plan of 10^9 samples, against shuffling an array.

    python benchmarks/seek.py [--cursors 1000] [--batch 1024]

A seek is what a resumed run does before its first read: make the plan afresh and work out the window
starts of one global batch at the cursor. The contrast is np.random.permutation of 10^7 windows, a
hundredth of the plan, which a sampler that materialises its order pays at each start and epoch.
"""

import argparse
import random
import statistics
import time

import numpy as np

from r1hpc.data.read.order import SamplePlan

SEQ_LEN = 2048
NUM_WINDOWS = 10**9
CONTRAST = 10**7
TARGET_S = 0.050


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cursors", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1024)
    arguments = parser.parse_args()
    draw = random.Random(0)
    # Ten epochs, so that cursors fall into later epochs too; the last one of an epoch straddles its edge.
    cursors = [draw.randrange(10 * NUM_WINDOWS) for _ in range(arguments.cursors)] + [0, NUM_WINDOWS - 1]
    times = [_seek(cursor, arguments.batch) for cursor in cursors]
    contrast = min(_permute() for _ in range(3))
    print(f"seek in a plan of {NUM_WINDOWS:,} samples, {len(cursors)} cursors, batch of {arguments.batch}:")
    print(
        f"  max {max(times) * 1e3:.2f} ms, median {statistics.median(times) * 1e3:.2f} ms (target <= 50 ms)"
    )
    print(
        f"np.random.permutation of {CONTRAST:,}: {contrast * 1e3:.0f} ms, "
        f"{contrast / max(times):.0f} x the max"
    )
    print("met" if max(times) <= TARGET_S else "NOT met")


def _seek(cursor: int, batch: int) -> float:
    began = time.perf_counter()
    plan = SamplePlan("0" * 64, NUM_WINDOWS * SEQ_LEN + 1, SEQ_LEN, seed=0)
    starts = plan.window_starts(np.arange(cursor, cursor + batch))
    elapsed = time.perf_counter() - began
    assert plan.num_windows == NUM_WINDOWS, "the plan is the one the title names"
    assert len(np.unique(starts)) >= batch - 1 or cursor % NUM_WINDOWS + batch > NUM_WINDOWS, "no repeats"
    return elapsed


def _permute() -> float:
    began = time.perf_counter()
    np.random.default_rng(0).permutation(CONTRAST)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
