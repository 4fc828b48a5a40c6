"""Sentences and numbers about Slurm's warning windows."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.plan.save_time import (
    PreemptionRules,
    choose_signal_lead_s,
    expected_save_time_s,
    judge_window,
)

_CLUSTER = PreemptionRules(
    mode="REQUEUE",
    grace_s=120,
    kill_wait_s=30,
    sends_user_signal=False,
    max_batch_requeue=5,
)


def _judge(
    save_time_s: float | None, *, signal_lead_s: int = 120, save_every: int = 50, **change: Any
) -> str:
    rules = dataclasses.replace(_CLUSTER, **change)
    return "\n".join(judge_window(save_time_s, rules, signal_lead_s, save_every))


def test_a_save_that_fits() -> None:
    text = _judge(40)
    assert "preemption (REQUEUE): SIGTERM, then GraceTime: 120 s" in text
    assert "a save is expected to take 40 s: OK" in text
    assert "NOT ENOUGH" not in text


def test_a_save_that_only_just_fits_is_called_tight() -> None:
    assert "TIGHT" in _judge(100)


def test_a_save_that_does_not_fit_names_the_loss_and_the_way_out() -> None:
    text = _judge(300, save_every=500)
    assert "NOT ENOUGH; a preempted run loses up to 500 steps since its last periodic save" in text
    assert "save more often (checkpoint.save_every)" in text


def test_without_grace_only_kill_wait_is_left() -> None:
    text = _judge(20, grace_s=0)
    assert "GraceTime is 0: only KillWait, 30 s" in text
    assert "NOT ENOUGH" not in text
    assert "NOT ENOUGH" in _judge(40, grace_s=0)


def test_the_users_signal_takes_sigterms_place() -> None:
    assert "USR2 (send_user_signal), then GraceTime" in _judge(40, sends_user_signal=True)


@pytest.mark.parametrize("mode", ["OFF", "SUSPEND,GANG"])
def test_modes_that_do_not_end_a_run(mode: str) -> None:
    text = _judge(1000, mode=mode, signal_lead_s=3000)
    assert "NOT ENOUGH" not in text
    assert "requeue" not in text
    assert dataclasses.replace(_CLUSTER, mode=mode).warning_window_s is None


def test_before_the_dataset_is_known_the_windows_are_named() -> None:
    said = "time limit: USR2 120 s before it; preemption (REQUEUE): 120 s (SIGTERM, then GraceTime)"
    unknown = "how long a save takes is not known before the dataset is"
    assert _judge(None).splitlines() == [said, unknown]
    assert "preemption (OFF): nobody preempts this run" in _judge(None, mode="OFF")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("OFF", "preemption (OFF): nobody preempts this run"),
        (
            "SUSPEND,GANG",
            "preemption (SUSPEND,GANG): the run is suspended and continues later; nothing to save",
        ),
        ("GANG", "preemption (GANG): the run is suspended and continues later; nothing to save"),
    ],
)
def test_what_a_mode_without_a_window_means_for_the_run(mode: str, said: str) -> None:
    assert said in _judge(1, mode=mode).splitlines()


def test_who_requeues() -> None:
    assert "held after 5 times (MaxBatchRequeue); this one requests its requeue itself" in _judge(1)
    assert "leaves its job held" not in _judge(1)
    assert "then finishes leaves its job held: scancel it" in _judge(1, max_batch_requeue=1)
    assert "the job asks for it itself" in _judge(1, mode="CANCEL")
    assert "asks for it itself" in _judge(1, mode="CANCEL", grace_s=0)
    assert "requeue:" not in _judge(1, grace_s=0)


@given(save=st.floats(0, 1e4), window=st.integers(1, 10_000))
def test_never_ok_where_the_save_is_longer_than_the_window(save: float, window: int) -> None:
    text = _judge(save, grace_s=window, signal_lead_s=window)
    assert ("NOT ENOUGH" in text) == (save > window)


def test_save_time() -> None:
    assert expected_save_time_s(20 * 2**30, 2.0) == pytest.approx(15)


@given(save=st.floats(0, 1e5), limit=st.integers(1, 10**7))
def test_signal_lead(save: float, limit: int) -> None:
    lead = choose_signal_lead_s(save, limit)
    assert 1 <= lead <= max(1, limit // 4)
    if limit >= 4 * max(60, 2 * save + 31):
        assert lead >= min(65535, max(60, 2 * save))


@pytest.mark.parametrize(
    ("save_time_s", "time_limit_s", "lead"),
    [(5, 86400, 60), (40, 86400, 110), (40, None, 110), (5, 180, 45), (600, 3600, 900), (5, 2, 1)],
)
def test_signal_lead_by_example(save_time_s: float, time_limit_s: int | None, lead: int) -> None:
    assert choose_signal_lead_s(save_time_s, time_limit_s) == lead
