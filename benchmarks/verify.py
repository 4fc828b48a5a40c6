"""Time judging in another process beside comparing strings in this one.

    python benchmarks/verify.py [--prompts 32] [--samples 8] [--rounds 200]

The floor cuts the answer out of each completion and compares it: no process, no bounds, no terms. Ours is
Scorer.score_groups with accuracy and the gated format term, chain_sum judged in the verifier's process;
`countdown` is the same with its parser in place of the comparison. All take turns in one process; medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from r1hpc.config.schema.rl import RewardConfig, TaskConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Item, Task
from r1hpc.tasks.rewards import Completion, Scorer

Groups = Sequence[tuple[Item, Sequence[Completion]]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a rollout (32)")
    parser.add_argument("--samples", type=int, default=8, help="completions of each (8)")
    parser.add_argument("--rounds", type=int, default=200, help="turns of each (200)")
    arguments = parser.parse_args()
    measure(arguments.prompts, arguments.samples, arguments.rounds)
    return 0


def measure(num_prompts: int, num_samples: int, rounds: int) -> None:
    names = ("chain_sum", "countdown")
    tasks = {name: make_task(TaskConfig(name)) for name in names}
    rollouts = {name: completions(tasks[name], num_prompts, num_samples) for name in names}
    scorers = {name: Scorer(RewardConfig(), tasks[name], max_completion_length=64) for name in names}
    times: dict[str, list[float]] = {name: [] for name in ("floor", *names)}
    for turn in range(rounds + 1):
        taken = {"floor": timed(partial(compare, rollouts["chain_sum"]))}
        for name in names:
            taken[name] = timed(partial(scorers[name].score_groups, rollouts[name]))
        for name in taken if turn else ():  # the first turn waits for the processes to start
            times[name].append(taken[name])
    for scorer in scorers.values():
        scorer.close()
    floor = statistics.median(times["floor"])
    for name, values in times.items():
        median, worst = statistics.median(values), sorted(values)[int(0.95 * len(values))]
        print(
            f"{name:10s} {num_prompts * num_samples} completions  {median * 1e3:7.3f} ms  "
            f"best {min(values) * 1e3:7.3f}  p95 {worst * 1e3:7.3f}  {median / floor:5.1f} x the floor"
        )


def completions(task: Task, num_prompts: int, num_samples: int) -> Groups:
    """Groups of which half is right, no two of the wrong ones the same."""
    groups = []
    for index in range(num_prompts):
        item = task.item(index)
        right = [task.demonstration(item, thinking=True)] * (num_samples // 2)
        wrong = [f"<think></think><answer>{number}</answer>" for number in range(num_samples - len(right))]
        groups.append((item, [Completion(text, 12, False) for text in right + wrong]))
    return groups


def compare(groups: Groups) -> list[bool]:
    return [
        completion.text.partition("<answer>")[2].partition("</answer>")[0] == item.answer
        for item, written in groups
        for completion in written
    ]


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
