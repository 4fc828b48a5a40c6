"""Find reinforcement learning that goes wrong, from a run's metrics per step.

Pure and cheap: `submit --follow` calls it after new steps, `diagnose` for those of an attempt. It compares
the window's newest steps with its oldest or its best; fewer than MIN_STEPS steps give no finding. Missing
keys are not judged. It reads: reward, accuracy, reward_format (mean of the unweighted term, 0 to 1), entropy
(nats per token), response_length and response_length_wrong (tokens), truncated_share, scoring_failed_share,
zero_variance_share, logprob_difference (mean absolute, nats per token).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from r1hpc.telemetry.diagnosis.rules import Finding, warning
from r1hpc.telemetry.records.metrics import Step

MIN_STEPS = 20
"""Rewards of single steps are noisy: a mean over fewer than five of them means little."""

FORMAT_LEARNT, FORMAT_KEPT = 0.3, 0.5
"""After reaching the first share of the format reward, less than the second share of that is a loss."""
FORM_ALONE, ACCURACY_HAD, ACCURACY_KEPT = 0.9, 0.05, 0.5
"""Nearly every answer is well formed, but accuracy is less than half of its best: form without content
(allenai/open-instruct issue 659)."""

LENGTH_GROWTH, LENGTH_SHRINKAGE = 1.3, 0.5
REWARD_GAIN = 0.02
"""Longer completions that earn less than this are padding: GRPO's length bias lengthens wrong answers (Liu et
al., arXiv 2503.20783). Below half the length at a falling accuracy, an efficiency reward is gamed."""

ENTROPY_FLOOR, ENTROPY_KEPT = 0.05, 0.2
"""Nats per token, and of the window's beginning. Near zero every group samples the same answer and there is
nothing left to learn from (Yu et al., arXiv 2503.14476; Cui et al., arXiv 2505.22617)."""
SOLVED = 0.95
"""Above this accuracy a policy may be as certain as it likes."""

LOGPROB_DIFFERENCE = 0.05
"""Nats per token: this uses up a quarter of a clip range of 0.2 before the first update."""

NO_SIGNAL_SHARE = 0.8
"""Share of groups whose members all earn the same: four fifths of the rollouts give no gradient."""

TRUNCATED_SHARE = 0.3
"""Share of completions cut at the limit, whose rewards do not reflect the answer they would have given."""

FAILED_SHARE = 0.05
"""Share of completions on which a reward function or the judge failed: a single slow answer is no defect."""


def health_warnings(steps: Sequence[Step]) -> list[Finding]:
    """Return the findings for a window of steps, oldest first."""
    if len(steps) < MIN_STEPS:
        return []
    window = _Window(steps)
    return [finding for rule in _RULES for finding in rule(window)]


def held_out_warnings(evaluations: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    """Return a warning if the newest evaluation (by step) is far below the best: their 95 % intervals are
    apart. It names the first figure that fell, of pass@k with the largest k, pass@1 and greedy accuracy."""
    if len(evaluations) < 2:
        return []
    newest = max(evaluations)
    most = max(evaluations[newest]["pass_at"], key=int)
    for name in dict.fromkeys((f"pass@{most}", "pass@1", "greedy")):
        figures = {step: one.get(name) or one["pass_at"].get(name[5:]) for step, one in evaluations.items()}
        shown = {step: figure for step, figure in figures.items() if figure}
        best = max(shown, key=lambda step: shown[step]["value"])
        before, now = shown[best], shown[newest]
        if now["high"] < before["low"]:
            was, newly = (
                f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}] after step {step}"
                for each, step in ((before, best), (now, newest))
            )
            advice = f"go back to a checkpoint near step {best}; lower train.lr or raise rl.kl_coef"
            sentence = f"held-out {name} fell from {was} to {newly}"
            return [warning("held_out_collapse", sentence, advice)]
    return []


class _Window:
    """Means over a quarter of the steps at either end, and the best of those in between."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._size = max(5, len(steps) // 4)

    def last(self, key: str) -> float | None:
        return _mean(self._steps[-self._size :], key)

    def best(self, key: str) -> float | None:
        starts = range(0, len(self._steps) - self._size + 1, self._size)
        means = [_mean(self._steps[i : i + self._size], key) for i in starts]
        return max((mean for mean in means if mean is not None), default=None)

    def pair(self, key: str) -> tuple[float, float] | None:
        """Return (first, last), None if either is missing."""
        first, last = _mean(self._steps[: self._size], key), self.last(key)
        return None if first is None or last is None else (first, last)


def _format_collapse(window: _Window) -> Iterable[Finding]:
    form, best, last = window.last("reward_format"), window.best("accuracy"), window.last("accuracy")
    if form is None or best is None or last is None:
        return
    if form >= FORM_ALONE and best >= ACCURACY_HAD and last < ACCURACY_KEPT * best:
        yield warning(
            "format_collapse",
            f"{form:.0%} of the answers are well formed while the accuracy fell from {best:.2f} to "
            f"{last:.2f}: the policy earns the format reward and nothing else",
            "go back to the last checkpoint before the fall; lower train.lr or reward.terms.format, and keep "
            "reward.gate_format=true",
        )


def _format_loss(window: _Window) -> Iterable[Finding]:
    best, last = window.best("reward_format"), window.last("reward_format")
    if best is None or last is None or best < FORMAT_LEARNT or last >= FORMAT_KEPT * best:
        return
    yield warning(
        "format_loss",
        f"the format reward fell from {best:.2f} to {last:.2f}: the policy unlearns to mark its answer",
        "go back to the last checkpoint before the fall; lower train.lr, raise reward.terms.format or "
        "rl.kl_coef",
    )


def _length_hacking(window: _Window) -> Iterable[Finding]:
    length, reward = window.pair("response_length"), window.pair("reward")
    accuracy = window.pair("accuracy") or reward
    if length is None or reward is None or accuracy is None or not length[0]:
        return
    growth, gain = length[1] / length[0], accuracy[1] - accuracy[0]
    if growth >= LENGTH_GROWTH and gain < REWARD_GAIN:
        wrong = window.pair("response_length_wrong")
        words = f", those of wrong answers from {wrong[0]:.0f} to {wrong[1]:.0f}" if wrong else ""
        yield warning(
            "length_hacking",
            f"completions grew from {length[0]:.0f} to {length[1]:.0f} tokens{words}, and the reward of the "
            f"answers went from {accuracy[0]:.2f} to {accuracy[1]:.2f}: length is paid for, not reasoning",
            "take rl.loss_level=token or constant with rl.scale_advantage=false, or reward efficiency_tokens",
        )
    elif growth <= LENGTH_SHRINKAGE and gain <= -REWARD_GAIN and reward[1] >= reward[0]:
        yield warning(
            "length_hacking",
            f"completions shrank from {length[0]:.0f} to {length[1]:.0f} tokens, the reward went from "
            f"{reward[0]:.2f} to {reward[1]:.2f} and the accuracy from {accuracy[0]:.2f} to "
            f"{accuracy[1]:.2f}: short wrong answers pay",
            "lower the weight of the efficiency reward, or give it to correct answers only",
        )


def _entropy_collapse(window: _Window) -> Iterable[Finding]:
    entropy, accuracy = window.pair("entropy"), window.last("accuracy")
    if entropy is None or (accuracy is not None and accuracy >= SOLVED):
        return
    if entropy[1] >= ENTROPY_FLOOR or entropy[1] >= ENTROPY_KEPT * entropy[0]:
        return
    at = "" if accuracy is None else f" at an accuracy of {accuracy:.2f}"
    yield warning(
        "entropy_collapse",
        f"the entropy fell from {entropy[0]:.3f} to {entropy[1]:.3f} nats per token{at}: the policy tries "
        "nothing new",
        "raise rl.clip_high (0.28), rollout.temperature or rl.kl_coef, or lower train.lr; go back to an "
        "earlier checkpoint",
    )


def _rollouts(window: _Window) -> Iterable[Finding]:
    """Find rollouts that teach nothing, or the wrong thing."""
    difference = window.last("logprob_difference")
    if difference is not None and difference >= LOGPROB_DIFFERENCE:
        yield warning(
            "sampler_mismatch",
            f"the sampler's and the trainer's log-probabilities differ by {difference:.3f} nats per token: "
            f"an untouched policy has a ratio that is off by {math.expm1(difference):.0%}",
            "use the same precision and kernels on both sides (train.precision, rollout.engine=sampler), and "
            "check that the weights are handed over at every rollout",
        )
    same, reward = window.last("zero_variance_share"), window.last("reward")
    if same is not None and same >= NO_SIGNAL_SHARE:
        earned = "" if reward is None else f" at a mean reward of {reward:.2f}"
        yield warning(
            "no_signal",
            f"in {same:.0%} of the groups all completions earn the same{earned}: they give no gradient",
            "take easier or harder items, more rollout.num_generations, or dynamic sampling "
            "(rl.max_resamples)",
        )
    # Form alone can pay, so the groups do differ and no other rule fires.
    if window.best("accuracy") == 0:
        form = window.last("reward_format")
        well_formed = "" if form is None else f"; {form:.0%} of them were well formed at last"
        yield warning(
            "nothing_right",
            f"not one completion of these steps was right{well_formed}",
            "read metrics/transcripts-*.txt: do they answer in the form that the verifier reads, and within "
            "rollout.max_completion_length? Then easier items, or a longer cold start",
        )
    cut = window.last("truncated_share")
    if cut is not None and cut >= TRUNCATED_SHARE:
        yield warning(
            "truncation",
            f"{cut:.0%} of the completions are cut off at rollout.max_completion_length",
            "raise rollout.max_completion_length, or leave them out of the loss (rl.mask_truncated=true)",
        )
    failed = window.last("scoring_failed_share")
    if failed is not None and failed >= FAILED_SHARE:
        yield warning(
            "scoring_failed",
            f"a reward function or the judge failed on {failed:.0%} of the completions: they count as wrong, "
            "or as 0 of that reward",
            "find the errors with `grep -r 'counts as wrong' RUN/logs`. Correct the code for a new run; "
            "after time-outs raise reward.timeout_s",
        )


_RULES = (_format_collapse, _format_loss, _length_hacking, _entropy_collapse, _rollouts)


def _mean(steps: Sequence[Step], key: str) -> float | None:
    """Average the steps that have the key: one without a wrong answer has no length of wrong answers."""
    values = [v for step in steps if (v := step.number(key)) is not None and math.isfinite(v)]
    return statistics.fmean(values) if values else None
