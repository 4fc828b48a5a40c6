"""Every millisecond of an attempt in one part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.telemetry.diagnosis.timeline import Part, Span, Split, spans_of, split_time
from r1hpc.telemetry.records.attempts import Attempt

MOMENTS = st.integers(-50, 150)
SPANS = st.lists(st.builds(Span, st.sampled_from(list(Part)), MOMENTS, MOMENTS), max_size=12)


@given(SPANS)
def test_the_parts_are_what_each_millisecond_says(spans: list[Span]) -> None:
    """Against a count of the milliseconds one by one: the first of the parts that cover it has it."""
    counts = dict.fromkeys(Part, 0)
    for moment in range(100):
        counts[min((s.part for s in spans if s.begin <= moment < s.end), default=Part.idle)] += 1
    split = split_time(spans, 0, 100)
    assert split == Split(**{part.name: count for part, count in counts.items()})
    assert split.allocated == 100


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], Split(idle=10)),
        ([Span(Part.startup, 0, 4), Span(Part.useful, 4, 9)], Split(useful=5, startup=4, idle=1)),
        ([Span(Part.save, 3, 8), Span(Part.useful, 0, 5)], Split(useful=5, save=3, idle=2)),
        ([Span(Part.lost, -5, 3), Span(Part.useful, 8, 99)], Split(useful=2, lost=3, idle=5)),
    ],
)
def test_overlaps_and_ends(spans: list[Span], expected: Split) -> None:
    assert split_time(spans, 0, 10) == expected


def test_a_split_in_hours_of_its_gpus() -> None:
    split = (Split(useful=3_600_000, idle=1_800_000) + Split(lost=3_600_000)) * 8
    assert split.in_hours() == {
        "useful": 8.0,
        "lost": 8.0,
        "startup": 0.0,
        "save": 0.0,
        "idle": 4.0,
        "allocated": 20.0,
    }


def test_an_evaluation_between_two_steps_is_no_idling() -> None:
    attempt = Attempt(1, None, 0.0, 50.0, 1, 0, None, None, None)
    evaluation = {"event": "evaluation", "time": 30.0, "seconds": 4.0, "global_step": 2}
    assert Span(Part.useful, 26_000, 30_000) in list(spans_of(attempt, 50.0, (), (), (evaluation,)))
