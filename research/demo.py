"""Kill a training run twice and show that nothing is lost: `make demo`.

    python -m research.demo        # two or three minutes on two cores; the runs are in runs/demo

It prints each command that it runs, so that you can type it yourself.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from r1hpc.accounting.open_ledger import settled_ledger
from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import write_atomic
from r1hpc.base.run_dir import RunDir, run_root_of
from r1hpc.base.units import format_duration
from r1hpc.reporting.style import card
from r1hpc.reporting.style import lines as as_html
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.telemetry.records.evaluations import read_answers, read_evaluations
from r1hpc.telemetry.records.metrics import last_steps, read_steps

_JOB = "jobs/demo.yaml"
_KILL_RANK_AT, _KILL_ALL_AT = 17, 44  # between two checkpoints, so that some steps must be taken again


def main(argv: Sequence[str]) -> int:
    ArgumentParser(prog="python -m research.demo", description=__doc__).parse_args(argv)
    root = run_root_of(None)
    demo = Demo(root, free_name(root, "demo"))
    try:
        demo.play()
    finally:
        if left := processes(demo.chain.path):  # after Ctrl-C, or if a stage has failed
            demo.kill(left)
    return 0


class Demo:
    """One chain: a cold start, then the same GRPO run twice. The second one is killed twice."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.chain, self.began = name, ChainDir(root / name), time.monotonic()
        self.page = root / name / "report" / "index.html"
        self.twin, self.killed = self.chain.stage("twin"), self.chain.stage("killed")
        self._lines: list[str] = []
        self._shown: set[tuple[str, int]] = set()

    def play(self) -> None:
        submit = ("submit", _JOB, "--run-name", self.name, "--executor", "local")
        killed, twin = f"{self.name}/killed", f"{self.name}/twin"
        self._print("A tiny model learns to think. Its task: the last digit of the sum of six digits.")
        self._print("We kill its run twice and compare it with a twin.\n")
        self._command(*submit, is_shown=False)
        self._wait_for("traces", "write demonstrations; 30 % of them think")
        self._wait_for("sft", "cold start: learn to answer, by supervised fine-tuning")
        self._wait_for("twin", "GRPO: learn to think. Nothing disturbs this run")
        self._note("killed", "the same GRPO run again, from the same cold start")
        self._watch(self.killed, lambda: current_step(self.killed) >= _KILL_RANK_AT)
        self._note("killed", f"step {current_step(self.killed)}. Kill one of its two ranks:")
        self.kill(processes(self.killed.path, "rank")[-1:])
        self._note("killed", "It goes on by itself, from its newest checkpoint")
        self._watch(self.killed, lambda: current_step(self.killed) >= _KILL_ALL_AT)
        self._note("killed", f"step {current_step(self.killed)}. Kill everything, supervisors and ranks:")
        self.kill(processes(self.chain.path))
        self._print("\nNothing runs any more. The first command takes it on:\n")
        self._command(*submit, is_shown=False)
        self._wait_for("killed", "goes on, from its newest checkpoint")
        self._print("\nIts three attempts, and the comparison with its twin:\n")
        self._command("status", killed)
        self._command("report", "--compare", killed, twin)
        self._print("A test question, before GRPO and after:\n")
        question = learned(self.killed)
        self._command("chat", f"{self.name}/sft", "--ask", question)
        self._command("chat", killed, "--ask", question)
        self._command("report", self.name, "--format", "html", "--out", str(self.page))
        screen, summary = list(self._lines), self._summary()
        self._print("\n".join(summary))
        add_to_page(self.page, summary, screen)

    def _wait_for(self, stage: str, what: str) -> None:
        self._note(stage, what)
        run = self.chain.stage(stage)
        self._watch(run, run.finished.exists)

    def _watch(self, run: RunDir, is_done: Callable[[], bool]) -> None:
        """Wait, and print each evaluation.

        Raises:
            R1hpcError: nothing runs any more.
        """
        while True:
            is_alive, done = bool(processes(self.chain.path)), is_done()
            for step, found in read_evaluations(run).items():
                if (run.run_id, step) not in self._shown:
                    self._shown.add((run.run_id, step))
                    right = f"{found['greedy']['value']:4.0%} of {found['num_items']}"
                    self._note(run.run_id, f"step {step:2} {right} test questions right")
            if done:
                return
            if not is_alive:
                raise R1hpcError(f"{run.run_id} ended early. See: r1hpc logs {self.name}/{run.run_id}")
            time.sleep(0.2)

    def _note(self, stage: str, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        self._print(f"{minutes:2}:{seconds:02}  {stage:7} {text}")

    def _print(self, text: str) -> None:
        self._lines.append(text)
        print(text, flush=True)

    def _command(self, *words: str, is_shown: bool = True) -> None:
        self._lines.append(command(*words, is_shown=is_shown))

    def kill(self, pids: Sequence[int]) -> None:
        self._print(f"$ kill -9 {' '.join(map(str, pids))}")
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)

    def _summary(self) -> list[str]:
        """Return at most ten lines: what was shown, what it cost, what to try next."""
        found = read_evaluations(self.killed)
        before, after = (found[step]["greedy"]["value"] for step in (min(found), max(found)))
        steps, name, now = read_steps(self.killed), self.name, time.time()
        held = [settled_ledger(run, now).wall().allocated / 1000 for run in (self.killed, self.twin)]
        return [
            "Shown  The killed run and its twin are the same to the bit: loss, gradient norm",
            f"       and learning rate of all {len(steps.effective)} steps.",
            f"       Test questions right: {before:.0%} before GRPO, {after:.0%} after it.",
            f"Cost   {format_duration(time.monotonic() - self.began)}. "
            f"The kills took {held[0] - held[1]:.0f} s of it: two starts, and {len(steps.lost)} steps again.",
            f"Page   {self.page}",
            "Next   . .venv/bin/activate",
            f"       r1hpc chat {f'{name}/killed':20} # ask it: six digits and =, as in 224538=",
            f"       r1hpc report {f'{name}/killed':18} # where its time went",
            "       make r1                         # all of R1, distillation too",
            "       r1hpc drill jobs/smoke.yaml     # the same proof on your cluster",
        ]


def command(*words: str, is_shown: bool = True) -> str:
    """Print a command of r1hpc, run it and print its output; return all of it. R1hpcError if it fails."""
    print(typed := "$ r1hpc " + " ".join(words), flush=True)
    argv = [sys.executable, "-m", "r1hpc", *words]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    print(output := done.stdout if is_shown or done.returncode else "", flush=True)
    if done.returncode:
        raise R1hpcError(f"r1hpc {words[0]} failed with exit status {done.returncode}")
    return f"{typed}\n{output}"


def add_to_page(page: Path, summary: Sequence[str], screen: Sequence[str]) -> None:
    """Put the summary under the page's heading; the rest of the screen unfolds below it."""
    rest = f"<details><summary>The whole screen</summary>{as_html(chr(10).join(screen))}</details>"
    shown = card("The demo", as_html("\n".join(summary)) + rest)
    shown = shown.replace(
        "<pre>", '<pre style="white-space:pre; overflow-x:auto">'
    )  # keep its columns on a phone
    write_atomic(page, page.read_text().replace("</header>", f"</header>{shown}", 1))


def processes(folder: Path, word: str = "r1hpc.launch") -> list[int]:
    """Return the processes of `r1hpc.launch` in this folder or below it that were started with this word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            words = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
            inside = any(Path(each).is_relative_to(folder) for each in words)
            if inside and {"r1hpc.launch", word} <= set(words):
                found.append(int(process.name))
    return sorted(found)


def current_step(run: RunDir) -> int:
    """Return the newest step; 0 before the first."""
    newest = last_steps(run, 1)
    return newest[-1].global_step if newest else 0


def learned(run: RunDir) -> str:
    """Return the first question that was answered wrongly before the first step and rightly in the end."""
    wrong = {line["index"] for line in read_answers(run, 0)[1] if not line["greedy_correct"]}
    answers = read_answers(run)[1]
    right = (line["prompt"] for line in answers if line["greedy_correct"] and line["index"] in wrong)
    return str(next(right, answers[0]["prompt"]))


def free_name(root: Path, first: str) -> str:
    """Return `first`, or the first of first-2, first-3 … that is not taken."""
    names = (first if number == 1 else f"{first}-{number}" for number in count(1))
    return next(name for name in names if not (root / name).exists())


if __name__ == "__main__":
    run_command(main)
