"""Reinforcement learning in small: what the sampler thinks of its tokens, and the trainer of the same."""

from benchmarks.gpu.place import Place, median
from benchmarks.gpu.table import Table, number, seconds


def run(place: Place) -> list[Table]:
    stages = (0,) if place.is_small else (0, 3)
    kinds = ("fp32",) if place.is_small else ("bf16", "fp32")
    rows = tuple(_row(place, kind, stage) for kind in kinds for stage in stages)
    header = ("precision", "ZeRO", "log-probability difference", "at most", "rollout", "update")
    notes = (
        "Mean |log-probability by the trainer - by the sampler| over the tokens of a step, nats: median and "
        "largest of the steps. rollout.max_logprob_difference ends a run beyond it.",
    )
    return [Table("GRPO: sampler and trainer", header, rows, notes)]


def _row(place: Place, kind: str, stage: int) -> tuple[str, ...]:
    steps = 2 if place.is_small else 20
    words = (f"train.num_steps={steps}", f"train.precision={kind}", f"deepspeed.zero_stage={stage}")
    made = place.run(f"rl-{kind}-zero{stage}", *words, "train.warmup_steps=1", job="rl_smoke")
    apart = [value for step in made.metrics() if (value := step.number("logprob_difference")) is not None]
    times = (seconds(median(made, "rollout_time_s")), seconds(median(made, "update_time_s")))
    return (
        kind,
        str(stage),
        number(median(made, "logprob_difference")),
        number(max(apart, default=None)),
        *times,
    )
