"""Read the evaluations of a run and format them as text and tables.

The answers use the same held-out items at every step, so that one question can be followed.
"""

import re
from pathlib import Path
from typing import Any

from r1hpc.base.errors import R1hpcError, StateError, UsageError
from r1hpc.base.files import iter_records, read_json
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import format_table, wrap
from r1hpc.telemetry.records.lines import AnswerLine, EvaluatedStep, EvaluationLine, EvaluationSummary

_MOST_SHOWN = 3
_WIDEST = 100
OF_BEFORE = ""
"""Stands for a policy in lines of versions that did not record it."""


def answers_path(run: RunDir, step: int) -> Path:
    """Return the file with every answer of the evaluation after optimizer step `step`."""
    return run.metrics / f"answers-{step:06d}.jsonl"


def read_evaluations(run: RunDir) -> dict[int, dict[str, Any]]:
    """Return the complete evaluations by step, ascending; the newest if a step was evaluated twice."""
    lines = iter_records(run.rl_evaluations, EvaluationLine)
    found = {line["global_step"]: line for line in lines if _has_samples(line)}
    return {step: found[step] for step in sorted(found)}


def evaluated_policies(run: RunDir) -> dict[int, str]:
    """Return the name of the evaluated weights after each step, of the newest evaluation."""
    lines = iter_records(run.rl_evaluations, EvaluatedStep)
    return {line["global_step"]: line.get("policy", OF_BEFORE) for line in lines}


def read_answers(run: RunDir, step: int | None = None) -> tuple[int | None, list[dict[str, Any]]]:
    """Return the answers of a run of stage evaluate, or of an RL run after `step` (default: the last).

    They are (the step, None for stage evaluate; a line for each question). Raise UsageError if there are
    none.
    """
    if run.evaluation.exists() and step is None:
        return None, [line for path in run.all_parts for line in iter_records(path, AnswerLine)]
    steps = sorted(evaluated_policies(run))
    if not steps or (step is not None and step not in steps):
        known = f"; it was evaluated after steps {', '.join(map(str, steps))}" if steps else ""
        what = "no evaluation that is finished" if step is None else f"no evaluation after step {step}"
        raise UsageError(f"{run.run_id} has {what}{known}")
    chosen = steps[-1] if step is None else step
    return chosen, list(iter_records(answers_path(run, chosen), AnswerLine))


def sentence(summary: dict[str, Any]) -> str:
    greedy, first = summary["greedy"], summary["pass_at"]["1"]
    last = max(summary["pass_at"], key=int)
    text = f"greedy {greedy['value']:.3f} [{greedy['low']:.3f}, {greedy['high']:.3f}]"
    text += f"  pass@1 {first['value']:.3f} [{first['low']:.3f}, {first['high']:.3f}]"
    text += f"  pass@{last} {summary['pass_at'][last]['value']:.3f}" if last != "1" else ""
    return f"{text}  mean length {summary['response_length']:.1f}  ({_asked(summary)})"


def _asked(summary: dict[str, Any]) -> str:
    # The labels of test files and tasks have their own table.
    what = "questions" if "tasks" in summary else "held-out items"
    return f"{summary['num_items']} {what}{_drawn_again(summary)}"


def _drawn_again(summary: dict[str, Any]) -> str:
    num, different = summary["num_items"], summary.get("num_questions", summary["num_items"])
    return f", {different} distinct" if different < num else ""


def table(summary: dict[str, Any]) -> list[str]:
    """Return an evaluation in one line; for several tasks or test files a table with a row each."""
    tasks = summary.get("tasks", {})
    if len(tasks) < 2:
        return [sentence(summary), *contamination_lines(summary)]
    last = max(summary["pass_at"], key=int)
    rows = [("", "questions", "greedy", "", "pass@1", "", f"pass@{last}", f"maj@{last}", "length", "cut off")]
    for label, each in tasks.items():
        votes = each.get("maj_at")
        rows.append(
            (
                label,
                str(each["num_questions"]),
                *_with_interval(each["greedy"]),
                *_with_interval(each["pass_at"]["1"]),
                f"{each['pass_at'][last]['value']:.3f}",
                f"{votes[last]['value']:.3f}" if votes else "-",
                f"{each['response_length']:.0f}",
                f"{each['truncated_share']:.0%}",
            )
        )
    lines = format_table(rows[0], rows[1:], right=range(1, len(rows[0]))).splitlines()
    if again := _drawn_again(summary):
        lines.append(f"{summary['num_items']} questions were asked{again}")
    return [*lines, *contamination_lines(summary)]


def contamination_lines(summary: dict[str, Any]) -> list[str]:
    """Return lines on how much of each test file is in the training data, and what was not searched."""
    lines = []
    for label, each in (summary.get("contamination") or {}).items():
        said = f"{label}: {each['num_found']} of {each['num_questions']} questions are in the training data"
        short = f"; {each['num_too_short']} are too short to be looked for" if each["num_too_short"] else ""
        lines.append(f"{said}, by {each['ngram']} words in a row{short}")
    if left_out := summary.get("not_searched"):
        lines.append(f"not searched for test questions, though trained on: {', '.join(left_out)}")
    return lines


def _with_interval(value: dict[str, float]) -> tuple[str, str]:
    return f"{value['value']:.3f}", f"[{value['low']:.3f}, {value['high']:.3f}]"


def held_out_lines(run: RunDir) -> list[str]:
    """Return the results of the run's evaluations; empty if there are none."""
    if run.evaluation.exists():
        shown = [wrap(line) for line in table(_read_summary(run.evaluation))]
        return ["Held out", *shown, f"  {run.transcripts}"]
    found = read_evaluations(run)
    if not found:
        return []
    most = max(next(reversed(found.values()))["pass_at"], key=int)
    rows = [
        (
            str(step),
            *_with_interval(each["greedy"]),
            *_with_interval(each["pass_at"]["1"]),
            f"{each['pass_at'][most]['value']:.3f}" if most in each["pass_at"] else "-",
            f"{each['response_length']:.1f}",
        )
        for step, each in found.items()
    ]
    headings = ("step", "greedy", "", "pass@1", "", f"pass@{most}", "length")
    table_ = format_table(headings, rows, right=range(len(headings)), indent="  ")
    lines = [f"Held out: {_asked(next(reversed(found.values())))}", *table_.splitlines()]
    first, last = min(found), max(found)
    return lines + (_before_and_after(run, first, last) if first != last else [])


def first_and_newest(run: RunDir) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the evaluation before the first step, if another followed, and the newest; None if missing."""
    if run.evaluation.exists():
        return None, _read_summary(run.evaluation)
    found = read_evaluations(run)
    return found.get(0) if len(found) > 1 else None, next(reversed(found.values()), None)


def results(run: RunDir) -> list[tuple[str, str]]:
    """Return the newest evaluation of a run as `figures` does; empty if there is none."""
    summary = first_and_newest(run)[1]
    return figures(summary) if summary else []


def newest_accuracy(run: RunDir) -> str | None:
    """Return pass@1 of the newest evaluation with its number of questions, by benchmark if there are several.

    None if there is none, or it cannot be read.
    """
    try:
        summary = first_and_newest(run)[1]
        tasks = {} if summary is None else summary.get("tasks") or {"": summary}
        shown = [
            f"{name} {each['pass_at']['1']['value']:.3f} (n={each['num_items']})"
            for name, each in tasks.items()
        ]
    except (R1hpcError, OSError, KeyError):
        return None
    return ", ".join(shown).strip() or None


def figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return greedy accuracy and pass@1 as (name, value with its interval); with several test files or tasks
    those of each follow, by its name."""
    tasks = summary.get("tasks", {})
    each = [("", summary), *((f"{label} ", task) for label, task in tasks.items() if len(tasks) > 1)]
    return [
        (f"{label}{name}", " ".join(_with_interval(value)))
        for label, one in each
        for name, value in (("greedy", one["greedy"]), ("pass@1", one["pass_at"]["1"]))
    ]


def _read_summary(path: Path) -> dict[str, Any]:
    """Read evaluation.json; a StateError names the file and what is wrong in it."""
    summary: dict[str, Any] = read_json(path, EvaluationSummary)
    if not _has_samples(summary):
        raise StateError(f"{path}: pass_at is not by a number of samples, from 1; restore or remove it")
    return summary


def _has_samples(summary: dict[str, Any]) -> bool:
    """True if pass@k is there for k=1, and otherwise with numbers, as `sentence` and `table` read it."""
    each = [summary, *summary.get("tasks", {}).values()]
    ks = [one["pass_at"].keys() for one in each]
    votes = [one["maj_at"].keys() for one in each if one.get("maj_at")]
    return all(
        "1" in k and k == ks[0] and all(re.fullmatch("[0-9]{1,9}", each) for each in k) for k in [*ks, *votes]
    )


def _before_and_after(run: RunDir, first: int, last: int) -> list[str]:
    """Return items that were answered wrongly at first and correctly at the end."""
    before = {a["index"]: a for a in iter_records(answers_path(run, first), AnswerLine)}
    lines = []
    for after in iter_records(answers_path(run, last), AnswerLine):
        was = before.get(after["index"])
        if was is None or was["greedy_correct"] or not after["greedy_correct"]:
            continue
        wrong = f"step {first:<5} {_short(was['greedy'])}  wrong, expected {_short(was['expected'])}"
        right = f"step {last:<5} {_short(after['greedy'])}  right"
        lines.append(wrap(_short(after["prompt"]), "  "))
        lines += [wrap(line, "    ", " " * 15) for line in (wrong, right)]
        if len(lines) >= 3 * _MOST_SHOWN:
            break
    return [*(["Learned"] if lines else []), *lines]


def _short(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 3]}..."
