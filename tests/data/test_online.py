"""Online Data Mixing: against its formula written out, and a planted easy and a planted hard source."""

import json
import math

import pytest

from r1hpc.data.read.mixture import OnlineWeights


def by_the_paper(losses: list[list[float]], smoothing: float) -> list[list[float]]:
    """arXiv 2312.02406 with uniform prior; every source is seen at every turn, in exactly its share."""
    count = len(losses[0])
    rewards, weights = [0.0] * count, [1 / count] * count
    explored = [1 / count]  # e_0
    found = []
    for turn, seen in enumerate(losses, start=1):
        explored.append(min(1 / count, math.sqrt(math.log(count) / (count * turn))))
        for number, loss in enumerate(seen):
            estimate = weights[number] * loss / weights[number]
            rewards[number] = smoothing * rewards[number] + (1 - smoothing) * estimate
        raised = [math.exp(explored[turn - 1] * reward) for reward in rewards]
        weights = [(1 - count * explored[turn]) * each / sum(raised) + explored[turn] for each in raised]
        found.append(weights)
    return found


def test_its_weights_are_the_papers() -> None:
    losses = [[5.0 / turn, 6.0, 4.0 + turn % 3] for turn in range(1, 40)]
    odm = OnlineWeights((1, 1, 1), 0.9)
    for seen, wanted in zip(losses, by_the_paper(losses, 0.9), strict=True):
        odm.observe([loss * 100 for loss in seen], [100] * 3)
        assert odm.turn() == pytest.approx(wanted, abs=1e-4)


def turns(odm: OnlineWeights, num: int, *losses: float) -> list[tuple[float, ...]]:
    found = []
    for _ in range(num):
        odm.observe(losses, [1.0] * len(losses))
        found.append(odm.turn())
    return found


def test_the_hard_source_gains_and_the_easy_one_loses() -> None:
    found = turns(OnlineWeights((0.5, 0.5), 0.5), 12, 0.2, 3.2)
    hard = [weights[1] for weights in found]
    assert hard[0] == 0.5, "nothing but exploration at the first turn"
    assert hard[:3] == sorted(hard[:3])
    assert all(0.57 < share < 0.62 for share in hard[2:]), "what it can gain is bounded by the exploration"
    assert all(sum(weights) == pytest.approx(1) for weights in found)


def test_it_begins_at_the_weights_of_the_recipe_and_returns_there_where_losses_are_alike() -> None:
    found = turns(OnlineWeights((3, 6, 1), 0.9), 30, 2.0, 2.0, 2.0)
    assert set(found) == {(0.3, 0.6, 0.1)}


def test_a_source_that_was_not_seen_keeps_its_reward_and_one_of_weight_zero_stays_out() -> None:
    odm = OnlineWeights((1, 1, 0), 0.5)
    turns(odm, 5, 1.0, 3.0, 0.0)
    before = odm.state()["rewards"]
    odm.observe([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    weights = odm.turn()
    assert odm.state()["rewards"][1] == before[1]
    assert weights[2] == 0


def test_alone_there_is_nothing_to_choose() -> None:
    assert set(turns(OnlineWeights((2,), 0.9), 3, 4.0)) == {(1.0,)}


def test_it_goes_on_from_its_state_to_the_bit_and_last_bits_of_losses_do_not_matter() -> None:
    straight, broken, noisy = (OnlineWeights((0.3, 0.7), 0.9) for _ in range(3))
    for turn in range(20):
        losses = [math.sin(turn) + 2, 1 / (turn + 0.3)]
        for odm in (straight, broken):
            odm.observe(losses, [1.0, 1.0])
        noisy.observe([math.nextafter(loss, 9) for loss in losses], [1.0, 1.0])
        resumed = OnlineWeights((0.3, 0.7), 0.9)
        resumed.restore(json.loads(json.dumps(broken.state())))
        broken = resumed
        assert straight.turn() == broken.turn() == noisy.turn()
        assert straight.state() == broken.state()
