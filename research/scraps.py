"""Kill rollout workers again and again while a run trains on what they sample: `make scraps`.

    python -m research.scraps        # minutes; the runs are in runs/scraps

A cold start, a GRPO trainer and its rollout workers run on this machine. The workers are killed, preempted
and frozen. Afterwards the record of the trainer is checked: each question once, no sample too old. A replay
of the record must end with the same weights, to the bit. Exit status 1 if anything differs.
"""

import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir, run_root_of
from r1hpc.config import load
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.evaluations import read_evaluations
from r1hpc.telemetry.records.metrics import read_steps
from r1hpc.train.exchange.mailbox import read_beat, read_boxes
from research.demo import command, current_step, free_name, processes

_JOB, _COLD_START = "jobs/r1_scraps.yaml", "research/cold_start.yaml"
_NUM_WORKERS = 2
_QUICK = ("workers.patience_s=8", "workers.silence_s=4")
"""For starts of seconds. The job file's own values suit a cluster."""
_FROZEN_S = 6.0
"""Longer than workers.silence_s, so that the worker counts as lost."""
_PAUSE_S = 5.0
"""Between two disturbances."""
_DISTURBED_S = 100.0
"""The disturbances end after this time; the run goes on."""
_PRINT_EVERY = 10


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m research.scraps", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances; default 0")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of the trainer")
    arguments = parser.parse_args(argv)
    root = run_root_of(None)
    scraps = Scraps(RunDir(root / free_name(root, "scraps")), arguments.seed, arguments.words)
    try:
        return scraps.play()
    finally:
        kill(processes(scraps.folder.path), signal.SIGKILL)  # after Ctrl-C, or if a run has failed


class Scraps:
    """One trainer with its workers, the disturbances, and the replay."""

    def __init__(self, folder: RunDir, seed: int, words: Sequence[str]) -> None:
        self.folder, self.words = folder, words
        self.cold = folder.path / "cold" / "sft" / "model"
        self.trainer, self.replay = RunDir(folder.path / "grpo"), RunDir(folder.path / "replay")
        self.workers = [RunDir(folder.path / f"w{number:02}") for number in range(1, _NUM_WORKERS + 1)]
        self._random = random.Random(seed)
        self._began = time.monotonic()
        self._printed = 0
        self._count: Counter[str] = Counter()
        self._frozen: dict[str, tuple[float, int]] = {}
        """By worker: when it was frozen, and its process."""

    def play(self) -> int:
        """Return 0 if every check held, else 1."""
        print("A tiny model learns to sum four digits. It trains on what rollout workers sample.")
        print("We kill the workers at random, and compare the result with a replay of its record.\n")
        self._submit("cold", _COLD_START, "--follow")
        self._note("the cold start is ready: GRPO begins")
        self._submit("grpo", _JOB, f"model.path={self.cold}", *_QUICK, *self.words)
        for worker in self.workers:
            self._submit(worker.run_id, *self._worker_words())
        self._disturb_until_finished()
        self._note("the trainer has finished")
        self._wait_for(self.workers)
        self._note("the workers have ended. Replay the record, without any worker:")
        # The replay samples nothing, and its weights do not depend on evaluations.
        off = ("workers.patience_s=null", "workers.silence_s=30", "evaluate.every=0", "evaluate.num_items=1")
        here = (f"model.path={self.cold}", *self.words)
        self._submit("replay", _JOB, *here, *off, f"rl.replay={self.trainer.path}")
        self._wait_for([self.replay])
        return self._judge()

    def _submit(self, name: str, *words: str) -> None:
        where = ("--executor", "local", "--run-root", str(self.folder.path), "--run-name", name)
        command("submit", *words, *where, is_shown=False)

    def _worker_words(self) -> tuple[str, ...]:
        endless = ("limits.max_crashes=-1", "limits.max_attempts_without_checkpoint=1000")
        return (
            "jobs/rollout.yaml",
            f"workers.trainer={self.trainer.path}",
            "resources.gpus_per_node=0",
            *endless,
        )

    def _disturb_until_finished(self) -> None:
        first: float | None = None
        newest = 0.0
        while not self.trainer.finished.exists():
            if not processes(self.trainer.path, "local"):
                raise R1hpcError(f"the trainer ended early. See {self.trainer.logs}/latest")
            self._show_progress()
            self._wake()
            now = time.monotonic()
            ready = [worker for worker in self.workers if self._has_delivered(worker)]
            is_time = now - newest > _PAUSE_S and (first is None or now - first < _DISTURBED_S)
            if ready and is_time and current_step(self.trainer):
                first, newest = first or now, now
                self._disturb(self._random.choice(ready))
            time.sleep(0.2)
        self._wake(at_once=True)
        self._show_progress()

    def _has_delivered(self, worker: RunDir) -> bool:
        """True if the newest start of a worker has brought a group, lives and is not frozen."""
        boxes = read_boxes(self.trainer.workers / worker.run_id)
        beat = read_beat(boxes[-1]) if boxes else None
        if beat is None or not beat["groups"] or beat["left"] or worker.run_id in self._frozen:
            return False
        is_newest = boxes[-1].name.startswith(f"box-{len(read_history(worker).attempts)}-")
        return is_newest and bool(processes(worker.path, "rank"))

    def _disturb(self, worker: RunDir) -> None:
        name, rank = worker.run_id, processes(worker.path, "rank")
        choice = self._random.choice(("SIGKILL", "SIGTERM", "SIGSTOP", "all"))
        self._count[choice] += 1
        if choice == "SIGKILL":
            self._note(f"{name}: SIGKILL")
            kill(rank, signal.SIGKILL)
        elif choice == "SIGTERM":
            self._note(f"{name}: SIGTERM, as a preemption sends it")
            kill(rank, signal.SIGTERM)
        elif choice == "SIGSTOP":
            self._note(f"{name}: SIGSTOP, it hangs for {_FROZEN_S:g} s")
            kill(rank, signal.SIGSTOP)
            self._frozen[name] = (time.monotonic(), rank[0])
        else:
            self._note(f"{name}: SIGKILL to its supervisor too; it is resumed by `submit --resume`")
            kill(processes(worker.path), signal.SIGKILL)
            self._submit(name, "--resume")

    def _wake(self, at_once: bool = False) -> None:
        for name, (since, process) in [*self._frozen.items()]:
            if at_once or time.monotonic() - since > _FROZEN_S:
                kill([process], signal.SIGCONT)
                del self._frozen[name]

    def _show_progress(self) -> None:
        while current_step(self.trainer) >= self._printed + _PRINT_EVERY:
            first, self._printed = self._printed + 1, self._printed + _PRINT_EVERY
            steps = read_steps(self.trainer).effective
            extras = [steps[number].extra or {} for number in range(first, self._printed + 1)]
            accuracy, staleness, groups = (
                sum(extra[key] for extra in extras) / len(extras)
                for key in ("accuracy", "staleness_mean", "worker_groups")
            )
            bar = "█" * round(20 * accuracy)
            facts = f"staleness {staleness:.1f}, {groups:.1f} of 8 groups from workers"
            self._note(f"step {self._printed:3} {bar:20} {accuracy:4.0%} of the samples right, {facts}")

    def _wait_for(self, runs: Sequence[RunDir]) -> None:
        """Wait until no process of these runs is left.

        Raises:
            R1hpcError: one has not finished.
        """
        for run in runs:
            while processes(run.path):
                time.sleep(0.2)
            if not run.finished.exists():
                raise R1hpcError(f"{run.run_id} has not finished. See {run.logs}/latest")

    def _judge(self) -> int:
        """Print what the record shows; return 0 if all of it is as it must be."""
        config = load.read(self.trainer.config)
        records = [json.loads(path.read_text()) for path in sorted(self.trainer.trained.glob("*.json"))]
        items = [item for record in records for item, _ in record["groups"]]
        num_items = len(records) * config.rollout.num_prompts
        stalest, bound = max(record["staleness_max"] for record in records), config.rl.max_staleness
        same = digest(self.trainer) == digest(self.replay)
        once = items == list(range(num_items))
        self._print_figures(records)
        checks = {
            f"each of {num_items} questions was trained on once": once,
            f"no sample was older than {bound} versions (the oldest: {stalest})": stalest <= bound,
            f"the replay ends with the same weights, to the bit ({digest(self.replay)[:12]})": same,
        }
        for text, holds in checks.items():
            print(f"{'yes' if holds else 'NO':3}  {text}")
        self._note(f"runs in {self.folder.path}; the record is {self.trainer.trained}")
        return 0 if all(checks.values()) else 1

    def _print_figures(self, records: Sequence[dict[str, Any]]) -> None:
        by = Counter(worker or "the trainer itself" for record in records for _, worker in record["groups"])
        twins = sum("first" in reason for record in records for _, _, reason in record["dropped"])
        others = sum(len(record["dropped"]) for record in records) - twins
        attempts = {run.run_id: len(read_history(run).attempts) for run in self.workers}
        tests = read_evaluations(self.trainer)
        before, after = (tests[step]["greedy"]["value"] for step in (min(tests), max(tests)))
        print(f"\nTest questions right: {before:.0%} before, {after:.0%} after {max(tests)} steps.")
        print("Disturbances: " + ", ".join(f"{count} {name}" for name, count in sorted(self._count.items())))
        print("Starts of each worker: " + ", ".join(f"{name} {count}" for name, count in attempts.items()))
        print("Groups by: " + ", ".join(f"{name} {count}" for name, count in sorted(by.items())))
        print(f"Groups dropped: {twins} that another worker had brought first, {others} for other reasons")

    def _note(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        print(f"{minutes:2}:{seconds:02}  {text}", flush=True)


def kill(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(pid, number)


def digest(run: RunDir) -> str:
    return hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    run_command(main)
