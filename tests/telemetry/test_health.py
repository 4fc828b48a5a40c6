"""The named ways in which RL goes wrong, each on a window made for it and on one that is nearly so."""

from typing import Any

import pytest

from r1hpc.telemetry.diagnosis.rl_health import MIN_STEPS, health_warnings, held_out_warnings
from r1hpc.telemetry.records.metrics import Step

HEALTHY = {
    "reward": 0.6,
    "accuracy": 0.5,
    "reward_format": 0.9,
    "entropy": 0.8,
    "response_length": 100.0,
    "response_length_correct": 90.0,
    "response_length_wrong": 110.0,
    "truncated_share": 0.02,
    "scoring_failed_share": 0.0,
    "zero_variance_share": 0.3,
    "logprob_difference": 0.004,
}


def window(num_steps: int = 40, **ends: Any) -> list[Step]:
    """Healthy steps in which some keys go evenly from one value to another."""
    steps = []
    for i in range(num_steps):
        moving = {key: a + (b - a) * i / (num_steps - 1) for key, (a, b) in ends.items()}
        steps.append(Step(i + 1, 1, extra={**HEALTHY, **moving}))
    return steps


def with_values(step: Step, **values: Any) -> Step:
    return step._replace(extra={**(step.extra or {}), **values})


def codes(steps: list[Step]) -> list[str]:
    return [finding.code for finding in health_warnings(steps)]


def test_a_healthy_window_says_nothing() -> None:
    assert codes(window()) == []
    assert codes(window(reward=(0.1, 0.9), accuracy=(0.0, 0.8), entropy=(1.2, 0.3))) == []


@pytest.mark.parametrize(
    ("steps", "expected", "words"),
    [
        (window(reward_format=(0.9, 0.1)), "format_loss", "fell from 0.81 to 0.19"),
        (
            window(reward_format=(0.6, 1.0), accuracy=(0.3, 0.0), reward=(0.4, 0.1)),
            "format_collapse",
            "95% of the answers are well formed while the accuracy fell from 0.27 to 0.03",
        ),
        (window(response_length=(100, 160)), "length_hacking", "grew from 107 to 153 tokens"),
        (
            window(response_length=(100, 20), reward=(0.6, 0.7), accuracy=(0.5, 0.3)),
            "length_hacking",
            "shrank from 91 to 29 tokens",
        ),
        (window(entropy=(0.8, -0.06)), "entropy_collapse", "at an accuracy of 0.50"),
        (window(logprob_difference=(0.08, 0.08)), "sampler_mismatch", "differ by 0.080 nats per token"),
        (window(zero_variance_share=(0.9, 0.9)), "no_signal", "in 90% of the groups"),
        (
            window(reward_format=(0.6, 1.0), accuracy=(0.0, 0.0)),
            "nothing_right",
            "not one completion of these steps was right; 95% of them were well formed",
        ),
        (window(truncated_share=(0.1, 0.5)), "truncation", "45% of the completions are cut off"),
        (window(scoring_failed_share=(0.05, 0.05)), "scoring_failed", "failed on 5% of the completions"),
    ],
)
def test_what_goes_wrong_is_named_with_its_figures(steps: list[Step], expected: str, words: str) -> None:
    found = health_warnings(steps)
    assert [finding.code for finding in found] == [expected]
    assert words in found[0].sentence
    assert found[0].advice


@pytest.mark.parametrize(
    "steps",
    [
        window(reward_format=(0.9, 0.55)),
        window(reward_format=(0.2, 0.02)),  # never learnt
        window(response_length=(100, 125)),
        window(response_length=(100, 200), reward=(0.3, 0.7), accuracy=(0.2, 0.6)),  # longer, and better
        window(response_length=(100, 20), reward=(0.6, 0.9), accuracy=(0.5, 0.6)),  # shorter, and better
        window(entropy=(0.8, 0.1)),
        window(entropy=(0.04, 0.03)),  # it was so from the beginning: a small answer space
        window(entropy=(0.8, -0.06), accuracy=(0.9, 0.99)),  # solved: it may be sure
        window(logprob_difference=(0.03, 0.03)),
        window(zero_variance_share=(0.7, 0.7)),
        window(truncated_share=(0.2, 0.2)),
        window(scoring_failed_share=(0.04, 0.04)),
        window(MIN_STEPS - 1, reward_format=(0.9, 0.0)),  # too few to tell
    ],
)
def test_what_is_nearly_wrong_is_not_told(steps: list[Step]) -> None:
    assert codes(steps) == []


def test_one_bad_step_is_no_collapse() -> None:
    steps = window()
    steps[-1] = with_values(steps[-1], reward_format=0.0, truncated_share=1.0)
    assert codes(steps) == []


def test_steps_without_the_keys_or_with_none_are_not_judged() -> None:
    assert codes([Step(i, 1, loss=2.0) for i in range(50)]) == []
    assert codes([with_values(step, response_length_wrong=None) for step in window()]) == []
    lengthening = window(response_length=(100, 160))
    lengthening = [with_values(step, response_length_wrong=None) for step in lengthening]
    assert codes(lengthening) == ["length_hacking"]


def test_a_rollout_that_serves_several_updates_has_one_difference() -> None:
    steps = window(logprob_difference=(0.08, 0.08))
    for i, step in enumerate(steps):
        steps[i] = step if i % 4 == 0 else with_values(step, logprob_difference=None)
    assert codes(steps) == ["sampler_mismatch"]


def _evaluation(value: float) -> dict[str, Any]:
    figure = {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}
    return {"greedy": figure, "pass_at": {"1": figure, "4": figure}}


def test_a_collapse_of_the_held_out_accuracy_is_named() -> None:
    fell = held_out_warnings({0: _evaluation(0.3), 20: _evaluation(0.75), 40: _evaluation(0.0)})
    assert [finding.code for finding in fell] == ["held_out_collapse"]
    assert "held-out pass@4 fell from 0.750 [0.650, 0.850] after step 20 to 0.000" in fell[0].sentence
    assert held_out_warnings({0: _evaluation(0.3), 20: _evaluation(0.75), 40: _evaluation(0.6)}) == []
    assert held_out_warnings({0: _evaluation(0.3)}) == []
