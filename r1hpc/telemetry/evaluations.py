"""What evaluations said of a model, read back from metrics/ and evaluation.json.

    lines = held_out_lines(run)      # for a person: accuracy over the steps, and answers before and after

The answers hold the same held-out items at every step, so that one question can be followed.
"""

from pathlib import Path
from typing import Any

from r1hpc.base.files import iter_records, read_json
from r1hpc.base.names import printable
from r1hpc.base.rundir import RunDir

_MOST_SHOWN = 3
_WIDEST = 100


def evaluations_path(run: RunDir) -> Path:
    """One line per evaluation of an RL run: {global_step, attempt, time, greedy, pass_at, ...}."""
    return run.metrics / "evaluation.jsonl"


def answers_path(run: RunDir, step: int) -> Path:
    """Every answer of the evaluation after optimizer step `step`."""
    return run.metrics / f"answers-{step:06d}.jsonl"


def read_evaluations(run: RunDir) -> dict[int, dict[str, Any]]:
    """By step, ascending; the newest line where a step was evaluated twice."""
    found = {line["global_step"]: line for line in iter_records(evaluations_path(run))}
    return dict(sorted(found.items()))


def sentence(summary: dict[str, Any]) -> str:
    """An evaluation in one line."""
    greedy, first = summary["greedy"], summary["pass_at"]["1"]
    last = max(summary["pass_at"], key=int)
    text = f"greedy {greedy['value']:.3f} [{greedy['low']:.3f}, {greedy['high']:.3f}]"
    text += f"  pass@1 {first['value']:.3f} [{first['low']:.3f}, {first['high']:.3f}]"
    text += f"  pass@{last} {summary['pass_at'][last]['value']:.3f}" if last != "1" else ""
    return f"{text}  mean length {summary['response_length']:.1f}  ({summary['num_items']} held-out items)"


def held_out_lines(run: RunDir) -> list[str]:
    """What the run's evaluations say; empty where there are none."""
    if run.evaluation.exists():
        return [f"Held out  {sentence(read_json(run.evaluation))}", f"          {run.transcripts}"]
    found = read_evaluations(run)
    if not found:
        return []
    lines = ["Held out"]
    lines += [f"  step {step:<5} {sentence(summary)}" for step, summary in found.items()]
    first, last = min(found), max(found)
    return lines + (_before_and_after(run, first, last) if first != last else [])


def _before_and_after(run: RunDir, first: int, last: int) -> list[str]:
    """Items that were answered wrongly at first and rightly in the end."""
    before = {a["index"]: a for a in iter_records(answers_path(run, first))}
    lines = []
    for after in iter_records(answers_path(run, last)):
        was = before.get(after["index"])
        if was is None or was["greedy_correct"] or not after["greedy_correct"]:
            continue
        lines.append(f"  {_short(after['prompt'])}")
        lines.append(
            f"    step {first:<5} {_short(was['greedy'])}  wrong, expected {_short(was['expected'])}"
        )
        lines.append(f"    step {last:<5} {_short(after['greedy'])}  right")
        if len(lines) >= 3 * _MOST_SHOWN:
            break
    return [*(["Learned"] if lines else []), *lines]


def _short(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 3]}..."
