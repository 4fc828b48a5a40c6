"""The learning rate is a pure function of the step, so a resume has no scheduler to restore."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.config.schema.run import TrainConfig
from r1hpc.train.loop.step import learning_rate


def test_warm_up_then_cosine() -> None:
    train = TrainConfig(num_steps=110, warmup_steps=10, lr=1.0, min_lr_fraction=0.1)
    assert learning_rate(train, 1) == pytest.approx(0.1)
    assert learning_rate(train, 10) == 1.0
    assert learning_rate(train, 60) == pytest.approx(0.55)  # half-way down the cosine
    assert learning_rate(train, 110) == pytest.approx(0.1)


@given(step=st.integers(1, 5000), warmup=st.integers(0, 500), total=st.integers(501, 4000))
def test_it_stays_within_its_bounds_also_past_the_end(step: int, warmup: int, total: int) -> None:
    train = TrainConfig(num_steps=total, warmup_steps=warmup, lr=3e-4, min_lr_fraction=0.0)
    assert 0 <= learning_rate(train, step) <= 3e-4 * (1 + 1e-12)
