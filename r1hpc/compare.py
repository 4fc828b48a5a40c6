"""Compare two models question by question, from two evaluations on the same questions.

    python -m r1hpc.compare BASE NEW                 # runs of stage evaluate, or the last evaluation of rl
    python -m r1hpc.compare grpo@0 grpo@60           # one run at two steps

Using the same questions cancels their difficulty. It shows accuracy with the interval of the difference,
McNemar's test of the greedy answers, pass@k, length and tokens per correct answer. To compare models that are
not runs, evaluate each with `submit` (stage evaluate, model.path). To check that two runs are equal to the
bit: python -m r1hpc.report --compare.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import RUN_NAMES, choose_run, full_name
from r1hpc.base.cli import ArgumentParser, add_json, add_run_root, offer, print_json, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.tables import format_table, wrap

if TYPE_CHECKING:
    from r1hpc.tasks.statistics import Comparison, Difference

_HEADINGS = ("", "A", "B", "B - A", "")


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.compare", description=__doc__)
    for name in ("a", "b"):
        run = parser.add_argument(
            name, metavar=name.upper(), help="a run or a chain (its newest evaluation); RUN@STEP for a step"
        )
        offer(run, RUN_NAMES)
    add_run_root(parser)
    add_json(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.tasks.statistics import compare_answers

    (name_a, a), (name_b, b) = (_answers(given, arguments.run_root) for given in (arguments.a, arguments.b))
    found = compare_answers(a, b)
    by_task = _by_task(a, b)
    if arguments.json:
        shown = {"a": name_a, "b": name_b, "verdict": found.verdict or None, **asdict(found)}
        tasks = {name: {**asdict(each), "disagreements": len(each.disagreements)} for name, each in by_task}
        print_json({**shown, "disagreements": len(found.disagreements), "tasks": tasks})
        return 0
    lines = [f"A  {name_a}", f"B  {name_b}", f"{found.num_questions:,} questions in both"]
    for count, who in ((found.only_in_a, "A"), (found.only_in_b, "B")):
        lines += [f"  {count:,} more of {who} alone are left out"] if count else []
    rows = [*_rows(found), *(_row(name, each.accuracy) for name, each in by_task)]
    table = format_table(_HEADINGS, rows, right=range(1, len(_HEADINGS)), indent="  ")
    won = found.discordance
    p_values = (
        f"p {found.p_value:.2g} for the accuracy. Greedy answers right in A alone: {won.only_a}, in B "
        f"alone: {won.only_b}; McNemar p {won.p_value:.2g}"
    )
    said = [p_values, _verdict(found), *_beside_the_verdict(found, by_task)]
    print(*lines, "", table, "", *(wrap(each, hanging="  ") for each in said), sep="\n")
    return 0


def _answers(given: str, run_root: str | None) -> tuple[str, list[dict[str, Any]]]:
    from r1hpc.checkpoint.finished import check_folder
    from r1hpc.telemetry.diagnosis.summary import names_of
    from r1hpc.telemetry.records.evaluations import read_answers, results

    name, at, step = given.rpartition("@")
    if not at or "/" in step:  # a folder's name may contain @ too, such as user@site
        name, step = given, ""
    if step and not (step.isascii() and step.isdecimal()):
        raise UsageError(f"{printable(given)!r}: a step is a number, as in {printable(name)}@60")
    run = choose_run(name, run_root, lambda run: bool(results(run)))
    if names_of(run)[0] == "script":
        raise UsageError(
            f"{run.run_id} is the run of a script and has no evaluation: to compare the steps of two, "
            "python -m r1hpc.report --compare A B"
        )
    check_folder(run.evaluation)
    number, answers = read_answers(run, int(step) if step else None)
    return full_name(run) + ("" if number is None else f"@{number}"), answers


def _by_task(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[tuple[str, Comparison]]:
    """Compare each test file or task alone, if there are several in both."""
    from r1hpc.tasks.statistics import compare_answers

    labels = sorted({str(line.get("task", "")) for line in a} & {str(line.get("task", "")) for line in b})
    found = []
    for label in labels if len(labels) > 1 else ():
        of_it = ([line for line in lines if str(line.get("task", "")) == label] for lines in (a, b))
        with contextlib.suppress(UsageError):  # no question in both
            found.append((label, compare_answers(*of_it)))
    return found


def _beside_the_verdict(found: Comparison, by_task: list[tuple[str, Comparison]]) -> list[str]:
    """Return the numbers outside of the verdict whose own 95 % interval excludes no difference."""
    named = [("greedy accuracy", found.greedy)] if found.is_sampled else []
    named += [(f"pass@{k}", each) for k, each in found.pass_at.items()]
    named += [(f"accuracy of {label}", each.accuracy) for label, each in by_task]
    apart = [
        f"{name} {each.a:.3f} to {each.b:.3f} [{each.low:+.3f}, {each.high:+.3f}]"
        for name, each in named
        if each.low > 0 or each.high < 0
    ]
    if not apart:
        return []
    several = f"{len(named)} numbers were looked at, each by its own interval" * (len(named) > 1)
    return [f"The verdict is on accuracy, chosen beforehand. These differ too: {'; '.join(apart)}. {several}"]


def _rows(found: Comparison) -> list[list[str]]:
    what = "accuracy of the samples" if found.is_sampled else "accuracy of the greedy answers"
    rows = [_row(what, found.accuracy)]
    rows += [_row("greedy", found.greedy)] if found.is_sampled else []
    rows += [_row(f"pass@{k}", each) for k, each in found.pass_at.items()]
    rows.append(_row("tokens an answer", found.tokens, digits=1))
    costs = (
        f"{cost:.1f}" if cost is not None else "none is correct" for cost in found.tokens_a_correct_answer
    )
    return [*rows, ["tokens a correct answer", *costs, "", ""]]


def _row(what: str, figure: Difference, digits: int = 3) -> list[str]:
    interval = f"[{figure.low:+.{digits}f}, {figure.high:+.{digits}f}]"
    values = (f"{figure.a:.{digits}f}", f"{figure.b:.{digits}f}", f"{figure.b - figure.a:+.{digits}f}")
    return [what, *values, interval]


def _verdict(found: Comparison) -> str:
    gain = abs(found.accuracy.b - found.accuracy.a)
    if found.verdict:
        return f"{found.verdict.upper()} is better, by {gain:.1%} of the questions"
    if found.smallest is None:
        return "no difference: all questions were answered alike"
    return (
        f"no significant difference: this many questions show a difference of {found.smallest:.1%} in 8 "
        "cases of 10, a smaller one less often"
    )


if __name__ == "__main__":
    run_command(main)
