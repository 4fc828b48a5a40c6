"""The picture of a reinforcement-learning run: does it learn, at what length, what is left to learn from.

draw_reward(run, summary, run.report / "reward.png")
"""

from pathlib import Path
from typing import Any

from r1hpc.base.rundir import RunDir
from r1hpc.reporting.plots import BLUE, GREEN, GREY, RED, bands, figure_of, finish, step_spans
from r1hpc.telemetry.evaluations import read_evaluations
from r1hpc.telemetry.summary import RunSummary


def has_rewards(summary: RunSummary) -> bool:
    """Whether the run's steps were rewarded."""
    return any("reward" in (step.extra or {}) for step in summary.steps.effective.values())


def draw_reward(run: RunDir, summary: RunSummary, path: Path) -> None:
    """Accuracy and reward with the held-out evaluations; response length by outcome; groups and entropy."""
    steps = list(summary.steps.effective.values())
    numbers = [step.global_step for step in steps]

    def column(name: str) -> list[float]:
        return [_number(step.value(name)) for step in steps]

    with figure_of(3, (10, 7.4), (2.4, 1.3, 1.3)) as (figure, (top, middle, bottom)):
        top.plot(numbers, column("accuracy"), color=BLUE, lw=1.6, label="accuracy of the samples")
        top.plot(numbers, column("reward"), color=GREY, lw=1.0, ls="--", label="reward")
        _evaluations(run, top)
        top.set_ylim(bottom=0)
        middle.plot(numbers, column("response_length_correct"), color=GREEN, lw=1.4, label="correct answers")
        middle.plot(numbers, column("response_length_wrong"), color=RED, lw=1.4, label="wrong answers")
        middle.set_ylim(bottom=0)
        bottom.plot(
            numbers, column("zero_variance_share"), color=GREY, lw=1.4, label="groups that teach nothing"
        )
        bottom.plot(numbers, column("entropy"), color=BLUE, lw=1.4, label="entropy (nats)")
        bottom.set_ylim(bottom=0)
        spans = step_spans(summary)
        for axes in (top, middle, bottom):
            bands(axes, spans, labels=axes is top)
            axes.legend(loc="best", fontsize=8)
        top.set_ylabel("accuracy, reward")
        middle.set_ylabel("tokens")
        bottom.set_ylabel("share, nats")
        bottom.set_xlabel("optimizer step")
        finish(figure, top, f"{run.run_id}: reward", path)


def _evaluations(run: RunDir, axes: Any) -> None:
    """Greedy accuracy on held-out items, with its 95 % interval."""
    lines = {step: summary["greedy"] for step, summary in read_evaluations(run).items()}
    if not lines:
        return
    xs = sorted(lines)
    values = [lines[x]["value"] for x in xs]
    below = [max(0.0, lines[x]["value"] - lines[x]["low"]) for x in xs]
    above = [max(0.0, lines[x]["high"] - lines[x]["value"]) for x in xs]
    axes.errorbar(
        xs,
        values,
        yerr=[below, above],
        fmt="o",
        color=GREEN,
        ms=5,
        capsize=3,
        label="held-out, greedy",
        zorder=5,
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
