"""Weights that change while a run goes on: shares, batches and the past stay exact, on any world size."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.sections import MixConfig
from r1hpc.corpus.build.build import build_dataset
from r1hpc.data.read.loader import BatchLoader
from r1hpc.data.read.mixture import Change, Mixture
from r1hpc.data.read.open_plan import WindowMixture, open_plan
from r1hpc.data.read.sft_documents import open_traces
from r1hpc.data.read.sft_loader import TraceLoader
from tests.corpus.corpus import write_recipe
from tests.corpus.tracefiles import pairs, trace_source, write_traces
from tests.data.test_mixture import SEQ_LEN, build_sources

BATCH = 1176
FIRST = (0.3, 0.4, 0.28, 0.02)
CHANGES = tuple(
    Change(batch * BATCH, weights)
    for batch, weights in (
        (7, (0.1, 0.1, 0.1, 0.7)),
        (8, (0.0, 0.5, 0.5, 0.0)),
        (100, (0.25, 0.25, 0.4, 0.1)),
        (400, (0.9, 0.05, 0.03, 0.02)),
    )
)


def mixture(**changes: Any) -> Mixture:
    chosen: dict[str, Any] = {
        "sizes": (10**6, 900, 10**5, 5000),
        "weights": FIRST,
        "batch": BATCH,
        "seed": 3,
        "changes": CHANGES,
    }
    return Mixture(**(chosen | changes))


def of_batches(mixed: Mixture, sources: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Samples of each source, by batch."""
    rows = sources.reshape(-1, mixed.batch)
    return np.stack([(rows == number).sum(axis=1) for number in range(len(mixed.sizes))], axis=1)


def asked(mixed: Mixture, batches: int) -> npt.NDArray[np.float64]:
    """The shares that each batch was asked for."""
    return np.array([mixed.weights_of(batch) for batch in range(batches)])


def test_a_million_samples_are_shared_to_a_thousandth_and_every_batch_to_a_sample() -> None:
    mixed, batches = mixture(), 10**6 // BATCH
    parts = np.array_split(np.arange(batches * BATCH), 100)
    found = of_batches(mixed, np.concatenate([mixed.locate(part)[0] for part in parts]))
    wanted = asked(mixed, batches)
    assert np.abs(found - wanted * BATCH).max() < 1
    assert np.abs(found.sum(axis=0) / (batches * BATCH) - wanted.mean(axis=0)).max() < 1e-3
    assert np.abs((found - wanted * BATCH).cumsum(axis=0)).max() < 2 + 10**6 / 65_536, "a sample a period"


def test_what_rounding_owes_is_carried_over_every_change() -> None:
    """3 % of a batch of 8 is a quarter of a sample: where each change forgot it, the source never had one."""
    changes = [
        Change(batch * 8, (0.47 + 0.01 * (batch % 2), 0.5 - 0.01 * (batch % 2), 0.03))
        for batch in range(1, 1000)
    ]
    mixed = mixture(sizes=(100,) * 3, weights=(0.47, 0.5, 0.03), batch=8, changes=tuple(changes))
    found = of_batches(mixed, mixed.locate(np.arange(8000))[0])
    assert np.abs(found.sum(axis=0) - asked(mixed, 1000).sum(axis=0) * 8).max() < 2


def test_a_change_leaves_the_past_alone_and_a_resting_source_where_it_was() -> None:
    before, after = mixture(changes=CHANGES[:2]), mixture()
    ids = np.arange(100 * BATCH)
    for a, b in zip(before.locate(ids), after.locate(ids), strict=True):
        assert np.array_equal(a, b)
    sources, items = after.locate(np.arange(104 * BATCH))
    of_last = items[sources == 3]
    assert set(sources[8 * BATCH : 100 * BATCH].tolist()) == {1, 2}
    assert len(set(of_last.tolist())) == len(of_last), "its stream goes on where it rested"


def test_a_mixture_ends_where_only_resting_sources_are_left() -> None:
    mixed = mixture(sizes=(100, 100), weights=(1.0, 0.0), batch=10, max_epochs=1.0, changes=())
    assert mixed.num_samples == 100
    later = mixture(
        sizes=(100, 100), weights=(1.0, 0.0), batch=10, max_epochs=1.0, changes=(Change(50, (0.5, 0.5)),)
    )
    assert later.num_samples == 200


# --- of a dataset ---------------------------------------------------------------------------------


def scheduled(*entries: tuple[int, dict[str, float]]) -> MixConfig:
    return MixConfig(schedule=[{"from_step": step, "weights": weights} for step, weights in entries])


def test_a_schedule_is_followed_on_any_number_of_ranks(tmp_path: Path) -> None:
    dataset = build_sources(tmp_path, {"weights": {"s0": 0.3, "s1": 0.4, "s2": 0.3}})
    weights = {"s0": 0.1, "s1": 0.1, "s2": 0.8}
    plan = open_plan(dataset, SEQ_LEN, 5, 24, mix=scheduled((4, weights), (9, {"s0": 1, "s1": 0, "s2": 1})))
    wanted = {3: (0.3, 0.4, 0.3), 4: (0.1, 0.1, 0.8), 8: (0.1, 0.1, 0.8), 9: (0.5, 0.0, 0.5)}
    whole = []
    for world_size in (1, 2, 3, 8):
        rows: list[Any] = []
        for step, shares in wanted.items():
            loaders = (
                BatchLoader(
                    dataset, plan, global_batch_size=24, micro_batch_size=1, rank=rank,
                    world_size=world_size, prefetch=False,
                )
                for rank in range(world_size)
            )  # fmt: skip
            batches = [loader.batch(step - 1) for loader in loaders]
            ids = np.sort(np.concatenate([batch.sample_ids.ravel() for batch in batches]))
            found = [dataset.doc_of(int(start)).source for start in plan.window_starts(ids)]
            assert all(abs(found.count(f"s{n}") - share * 24) < 1 for n, share in enumerate(shares)), step
            rows.append((ids.tolist(), sum(batch.checksum for batch in batches)))
        whole.append(rows)
    assert all(other == whole[0] for other in whole[1:])


def test_a_schedule_of_a_recipe_without_a_mixture_begins_with_the_sizes(tmp_path: Path) -> None:
    dataset = build_sources(tmp_path, None)
    sizes = [source["num_tokens"] for source in dataset.manifest.content["sources"]]
    plan = open_plan(dataset, SEQ_LEN, 0, 100, mix=scheduled((2, {"s0": 1, "s1": 1, "s2": 1})))
    assert isinstance(plan, WindowMixture)
    assert np.allclose(plan.mixture.weights_of(0), np.array(sizes) / sum(sizes))
    assert np.allclose(plan.mixture.weights_of(1), 1 / 3)


def test_from_step_one_takes_the_place_of_the_recipes_weights(tmp_path: Path) -> None:
    dataset = build_sources(tmp_path, {"weights": {"s0": 1, "s1": 1, "s2": 1}})
    plan = open_plan(dataset, SEQ_LEN, 0, 10, mix=scheduled((1, {"s0": 0.5, "s1": 0.5, "s2": 0})))
    assert isinstance(plan, WindowMixture)
    assert plan.mixture.weights == (0.5, 0.5, 0.0)
    assert plan.mixture.changes == ()


def test_traces_follow_a_schedule_too(tmp_path: Path) -> None:
    for n, count in enumerate((5, 40)):
        write_traces(tmp_path / f"{n}.jsonl", pairs(count, 100 * n))
    sources = [trace_source(name=f"s{n}", glob=f"{n}.jsonl") for n in range(2)]
    dataset = open_traces(build_dataset(write_recipe(tmp_path, sources=sources), tmp_path / "out").path)

    def loader(rank: int, world_size: int) -> TraceLoader:
        return TraceLoader(
            dataset, global_batch_size=40, micro_batch_size=5, rank=rank, world_size=world_size, seed=0,
            pad_id=0, seq_len=64, mix=scheduled((3, {"s0": 3, "s1": 1})),
        )  # fmt: skip

    for step, num_of_first in ((0, (4, 5)), (1, (4, 5)), (2, (30,))):
        batch = loader(0, 1).batch(step)
        assert int((batch.document_ids < 5).sum()) in num_of_first
        assert sum(loader(rank, 4).batch(step).checksum for rank in range(4)) == batch.checksum


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"s0": 1, "s1": 1, "s3": 1}, r"data.mix.schedule\[0\].weights names no source 's3'"),
        ({"s0": 1, "s1": 1}, r"data.mix.schedule\[0\].weights says nothing of source 's2'"),
    ],
)
def test_a_schedule_of_other_sources_is_refused(
    tmp_path: Path, weights: dict[str, float], message: str
) -> None:
    dataset = build_sources(tmp_path, {"weights": {"s0": 1, "s1": 1, "s2": 1}})
    with pytest.raises(UsageError, match=message):
        open_plan(dataset, SEQ_LEN, 0, 8, mix=scheduled((2, weights)))
