"""Shares are exact in every batch, and each source is visited item by item, epoch by epoch."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.data.read.loader import BatchLoader
from r1hpc.data.read.mixture import Change, Mixture, divide
from r1hpc.data.read.open_plan import DocumentMixture, open_plan
from r1hpc.data.read.order import SamplePlan
from r1hpc.data.read.reader import TokenDataset, open_dataset
from r1hpc.data.read.sft_documents import open_traces
from r1hpc.data.read.sft_loader import TraceLoader
from tests.corpus.corpus import text, write_recipe
from tests.corpus.tracefiles import pairs, trace_source, write_traces

SIZES, WEIGHTS, BATCH = (70, 10_000, 300), (0.3, 0.4, 0.3), 64


def mixture(**changes: Any) -> Mixture:
    chosen: dict[str, Any] = {"sizes": SIZES, "weights": WEIGHTS, "batch": BATCH, "seed": 3}
    return Mixture(**(chosen | changes))


def counts(mixed: Mixture, first_batch: int, batches: int) -> npt.NDArray[np.int64]:
    """Samples of each source, by batch."""
    ids = np.arange(first_batch * mixed.batch, (first_batch + batches) * mixed.batch)
    sources = mixed.locate(ids)[0].reshape(batches, mixed.batch)
    return np.stack([(sources == number).sum(axis=1) for number in range(len(mixed.sizes))], axis=1)


@pytest.mark.parametrize("first", [0, 1, 10**12])
def test_every_batch_holds_each_source_to_a_sample(first: int) -> None:
    exact = np.array(WEIGHTS) * BATCH
    found = counts(mixture(), first, 200)
    assert (np.abs(found - exact) < 1).all()
    assert np.abs(found.mean(axis=0) / BATCH - WEIGHTS).max() < 1e-3
    sources = mixture().locate(np.arange(first * BATCH, (first + 1) * BATCH))[0].tolist()
    assert 1 + sum(a != b for a, b in pairwise(sources)) > BATCH // 3, "sources lie mixed, not in runs"


@settings(max_examples=40)
@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=9),
    st.integers(1, 300),
    st.integers(0, 10**9),
)
def test_any_weights_and_batch_sizes_are_exact(weights: list[float], batch: int, first: int) -> None:
    mixed = mixture(sizes=(50,) * len(weights), weights=tuple(weights), batch=batch)
    exact = np.array(weights) / sum(weights) * batch
    assert (np.abs(counts(mixed, first, 20) - exact) < 1 + 1e-6).all()


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_shares_of_a_million_samples(batch: int) -> None:
    weights = np.array([0.3, 0.4, 0.28, 0.02])
    mixed = mixture(sizes=(10**6,) * 4, weights=tuple(weights), batch=batch)
    segment = mixed._segments[0][0]
    batches = 10**6 // batch
    for first in (0, 12_345):
        taken = segment.taken(first + batches) - segment.taken(first)
        assert np.abs(taken / (batches * batch) - weights).max() < 1e-4


def test_each_source_visits_every_item_equally_often() -> None:
    """Source 0 gives 19 or 20 of each 64: after 35 batches 672 = 9.6 epochs of its 70."""
    sources, items = mixture().locate(np.arange(35 * BATCH))
    seen = Counter(zip(sources.tolist(), items.tolist(), strict=True))
    of_first = [seen[0, item] for item in range(70)]
    assert max(of_first) - min(of_first) <= 1
    assert sum(of_first) == 672
    assert max(seen[1, item] for item in range(10_000)) == 1


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=30), st.integers(0, 2**63 - 1))
def test_a_sample_does_not_depend_on_its_batch(ids: list[int], seed: int) -> None:
    mixed = mixture(seed=seed)
    sources, items = mixed.locate(np.array(ids))
    for number, sample in enumerate(ids):
        source, item = mixed.locate(np.array([sample]))
        assert (int(source[0]), int(item[0])) == (sources[number], items[number])
    assert all(0 <= item < SIZES[source] for source, item in zip(sources, items, strict=True))


def test_a_source_is_left_out_when_it_was_seen_often_enough() -> None:
    mixed = mixture(sizes=(100, 400, 200), weights=(0.5, 0.25, 0.25), batch=10, max_epochs=2.0)
    assert mixed.num_samples == 1400
    sources, items = mixed.locate(np.arange(1400))
    seen = Counter(zip(sources.tolist(), items.tolist(), strict=True))
    assert set(seen.values()) == {2}
    assert len(seen) == 700
    assert (sources[400:] != 0).all()
    between = [(sources[start : start + 10] == 1).sum() for start in range(400, 900, 10)]
    assert set(between) == {5}, "the others keep their shares among themselves"
    with pytest.raises(
        UsageError, match=r"ends after 1,400 samples.*but 1,401 are wanted; raise mix.max_epochs"
    ):
        mixed.check_reaches(1401)
    with pytest.raises(UsageError, match="ends after"):
        mixed.locate(np.array([1400]))


def test_changed_weights_leave_the_past_alone_and_no_item_out() -> None:
    """A change is a segment appended at the edge of a batch: what was drawn before stays what it was."""
    change = Change(20 * BATCH, (0.1, 0.8, 0.1))
    before, after = mixture(), mixture(changes=(change,))
    ids = np.arange(20 * BATCH)
    for a, b in zip(before.locate(ids), after.locate(ids), strict=True):
        assert np.array_equal(a, b)
    assert (np.abs(counts(after, 20, 50) - np.array(change.weights) * BATCH) < 1).all()
    sources, items = after.locate(np.arange(60 * BATCH))
    of_first = Counter(items[sources == 0].tolist())
    assert max(of_first.values()) - min(of_first.values()) <= 1, (
        "the stream of a source goes on across the change"
    )


def test_hash_names_everything_the_order_depends_on() -> None:
    plans = [
        mixture(),
        mixture(seed=4),
        mixture(weights=(0.3, 0.3, 0.4)),
        mixture(batch=32),
        mixture(max_epochs=9.0),
        mixture(changes=(Change(BATCH, WEIGHTS),)),
    ]
    assert len({DocumentMixture("x", item).plan_hash for item in plans}) == len(plans)
    same = mixture(weights=(3.0, 4.0, 3.0))
    assert DocumentMixture("x", same).plan_hash == DocumentMixture("x", plans[0]).plan_hash


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.integers(1, 2000))
def test_divide(weights: list[float], total: int) -> None:
    found = divide(total, weights)
    assert sum(found) == total
    exact = [total * weight / sum(weights) for weight in weights]
    assert all(abs(share - wanted) < 1 for share, wanted in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, 1.0)}, "2 weights for 3 sources"),
        ({"weights": (1.0, 1.0, -1.0)}, "must be positive"),
        ({"weights": (1.0, 1.0, float("nan"))}, "must be positive"),
        ({"sizes": (5, 0, 5), "names": ("a", "b", "c")}, "source b has nothing to sample"),
        ({"seed": -1}, "seed"),
        ({"batch": 0}, "at least 1 sample"),
        ({"changes": (Change(BATCH + 1, WEIGHTS),)}, "multiples of the global batch size 64"),
        ({"changes": (Change(BATCH, (1.0,)),)}, "1 weights for 3 sources"),
    ],
)
def test_impossible_mixtures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixture(**changes)


# --- of a dataset ---------------------------------------------------------------------------------

SEQ_LEN = 16


def build_sources(
    folder: Path, mix: dict[str, Any] | None, sizes: tuple[int, ...] = (3, 10, 40)
) -> TokenDataset:
    """A dataset of text files in one folder for each source."""
    sources = []
    for number, size in enumerate(sizes):
        (folder / f"s{number}").mkdir(parents=True, exist_ok=True)
        for n in range(size):
            (folder / f"s{number}" / f"{n:03d}.txt").write_text(text(1000 * number + n, 50))
        sources.append({"name": f"s{number}", "kind": "text", "root": f"s{number}", "glob": "*.txt"})
    recipe = write_recipe(folder, sources=sources, mix=mix, part_bytes=2000)
    return open_dataset(build_dataset(recipe, folder / "out").path)


def source_of_samples(dataset: TokenDataset, starts: npt.NDArray[np.int64]) -> list[str]:
    return [dataset.doc_of(int(start)).source for start in starts]


def test_a_dataset_is_mixed_as_its_recipe_says_on_any_number_of_ranks(tmp_path: Path) -> None:
    weights = {"s0": 0.3, "s1": 0.4, "s2": 0.3}
    dataset = build_sources(tmp_path, {"by": "tokens", "weights": weights})
    plan = open_plan(dataset, SEQ_LEN, 5, 24)
    whole: list[npt.NDArray[np.int64]] = []
    for world_size in (1, 2, 3, 8):
        steps = []
        for step in (0, 7):
            batches = [
                BatchLoader(
                    dataset, plan, global_batch_size=24, micro_batch_size=1, rank=rank,
                    world_size=world_size, prefetch=False,
                ).batch(step)
                for rank in range(world_size)
            ]  # fmt: skip
            ids = np.concatenate([batch.sample_ids.ravel() for batch in batches])
            rows = np.concatenate([batch.tokens.reshape(-1, SEQ_LEN + 1) for batch in batches])
            steps.append(rows[np.argsort(ids)])
            found = Counter(source_of_samples(dataset, plan.window_starts(np.sort(ids))))
            assert all(abs(found[name] - share * 24) < 1 for name, share in weights.items())
        whole.append(np.stack(steps))
    assert all(np.array_equal(other, whole[0]) for other in whole[1:])


def test_windows_stay_inside_their_source(tmp_path: Path) -> None:
    dataset = build_sources(tmp_path, {"weights": {"s0": 1.0, "s1": 1.0, "s2": 1.0}})
    plan = open_plan(dataset, SEQ_LEN, 0, 30)
    for start in plan.window_starts(np.arange(600)).tolist():
        assert dataset.doc_of(start).source == dataset.doc_of(start + SEQ_LEN).source


def test_temperature_and_sizes_make_the_shares(tmp_path: Path) -> None:
    dataset = build_sources(tmp_path, {"temperature": 2.0})
    tokens = np.array([source["num_tokens"] for source in dataset.manifest.content["sources"]])
    plan = open_plan(dataset, SEQ_LEN, 0, 1000)
    found = Counter(source_of_samples(dataset, plan.window_starts(np.arange(1000))))
    expected = np.sqrt(tokens) / np.sqrt(tokens).sum() * 1000
    assert all(abs(found[f"s{n}"] - share) < 1 for n, share in enumerate(expected))


def test_a_run_longer_than_the_mixture_is_refused_before_it_begins(tmp_path: Path) -> None:
    dataset = build_sources(tmp_path, {"max_epochs": 1})
    windows = sum((s["num_tokens"] - 1) // SEQ_LEN for s in dataset.manifest.content["sources"])
    with pytest.raises(UsageError, match="the mixture ends after"):
        open_plan(dataset, SEQ_LEN, 0, 8, num_samples=windows + 8)
    assert open_plan(dataset, SEQ_LEN, 0, 8, num_samples=windows // 2).seq_len == SEQ_LEN
    with pytest.raises(UsageError, match=r"source s0 has nothing to sample.*lower data\.seq_len"):
        open_plan(dataset, 10_000, 0, 8)


def test_without_a_mixture_the_order_is_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text(text(1, 500))
    dataset = open_dataset(build_dataset(write_recipe(tmp_path), tmp_path / "out").path)
    assert open_plan(dataset, SEQ_LEN, 3, 8) == SamplePlan(dataset.id, dataset.num_tokens, SEQ_LEN, 3)


def test_traces_are_mixed_by_documents_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    for n, count in enumerate((5, 40)):
        write_traces(tmp_path / f"{n}.jsonl", pairs(count, 100 * n))
    sources = [trace_source(name=f"s{n}", glob=f"{n}.jsonl") for n in range(2)]
    mix = {"by": "documents", "weights": {"s0": 3, "s1": 1}}
    recipe = write_recipe(tmp_path, sources=sources, mix=mix)
    dataset = open_traces(build_dataset(recipe, tmp_path / "out").path)
    assert dataset.source_documents == (5, 40)

    def loader(rank: int, world_size: int) -> TraceLoader:
        return TraceLoader(
            dataset, global_batch_size=1000, micro_batch_size=250, rank=rank, world_size=world_size,
            seed=0, pad_id=0, seq_len=64,
        )  # fmt: skip

    whole = loader(0, 1).batch(2)
    assert int((whole.document_ids < 5).sum()) == 750
    assert sum(loader(rank, 4).batch(2).checksum for rank in range(4)) == whole.checksum


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"weights": {"s0": 1.0}}, "says nothing of source 's1'"),
        ({"weights": {"s0": 1, "s1": 1, "s3": 1}}, "names no source 's3'"),
        ({"weights": {"s0": 0, "s1": 1, "s2": 1}}, r"mix.weights.s0 must be a positive number"),
        ({"weights": {"s0": "a", "s1": 1, "s2": 1}}, r"mix.weights.s0 must be float"),
        ({"weights": {"s0": 0.3, "s1": 4, "s2": 0.3}}, r"sum to 4.6, .*s0 6.5%, s1 87.0%, s2 6.5%"),
        ({"by": "bytes"}, r"mix.by must be one of tokens, documents"),
        ({"temperature": 0}, r"mix.temperature must be a positive number"),
        ({"max_epochs": -1}, r"mix.max_epochs must be a positive number"),
        ({"weigths": {}}, r"did you mean 'weights'"),
    ],
)
def test_bad_mixtures_are_named(tmp_path: Path, mix: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_sources(tmp_path, mix)


@pytest.mark.parametrize("weights", [(0.33, 0.33, 0.33), (33.4, 33.3, 33.3), (3, 4, 3)])
def test_shares_percents_and_parts_are_taken(tmp_path: Path, weights: tuple[float, ...]) -> None:
    assert build_sources(
        tmp_path, {"weights": dict(zip(("s0", "s1", "s2"), weights, strict=True))}
    ).num_tokens
