"""Two ranks saving as fast as they can, SIGKILLed at random moments: nothing committed is ever lost.

R1HPC_SEED repeats the seed that a failure printed, R1HPC_KILLS sets how many the long test takes.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.checkpoint.two_ranks import kill_and_check, supersede_and_check, time_of_commits

SEED = int(os.environ.get("R1HPC_SEED", "20240229"))
NUM_KILLS = int(os.environ.get("R1HPC_KILLS", "10000"))


def run(root: Path, num_kills: int) -> Counter[str]:
    """Of ten incarnations, nine are killed and one is superseded while it still runs.

    They live up to as long as five commits take here: memory or disk, idle or busy.
    """
    longest_s = time_of_commits(root, 1, 5)
    seen: Counter[str] = Counter()
    attempt = 0
    while seen["kills"] < num_kills:
        attempt += 2
        if attempt % 20 == 0:
            seen += supersede_and_check(root, attempt, SEED, longest_s)
        else:
            seen += kill_and_check(root, attempt, SEED, longest_s)
    return seen


def test_random_kills_lose_nothing(memory_path: Path) -> None:
    seen: Counter[str] = Counter()
    for number in range(5):  # each measures its commits anew: the machine may have become busy
        seen += run(memory_path / f"checkpoints-{number}", 60)
        if seen["commits"] >= 20 and seen["half_written"] >= 5:
            break
    assert seen["commits"] >= 20, f"the ranks hardly got to commit: {seen}"
    assert seen["half_written"] >= 5, f"the kills hardly hit a save: {seen}"


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_ten_thousand_random_kills_lose_nothing(memory_path: Path, tmp_path: Path) -> None:
    seen = run(memory_path / "checkpoints", NUM_KILLS // 2)
    seen += run(tmp_path / "checkpoints", NUM_KILLS // 2)
    print(dict(seen))
    for kind in ("half_written", "half_removed", "commits_not_acknowledged", "superseded"):
        assert seen[kind] > 0, f"no kill hit that moment: {seen}"
