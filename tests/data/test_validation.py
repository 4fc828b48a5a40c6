"""Held-out documents: of each source its share, never trained on, the rest once per epoch."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.sections import MixConfig
from r1hpc.corpus.inspect.describe import SampleOrder, trace_sample
from r1hpc.data.format.manifest import digest
from r1hpc.data.read.open_plan import DocumentMixture
from r1hpc.data.read.sft_documents import Parting, hold_out, open_traces
from r1hpc.data.read.sft_loader import TraceLoader, document_order_id, open_document_plan
from tests.corpus.tracefiles import build_traces, expected_ids, pairs, trace_source, write_traces

TRACES = pairs(30)


@given(
    parts=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_a_document_is_trained_on_held_out_or_a_sibling(
    parts: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    parting = Parting(tuple(a + b for a, b in parts), tuple(b for _, b in parts), seed)
    held = parting.held_out.tolist()
    others = sorted({*range(sum(parting.all_sizes))} - {*held})
    siblings = data.draw(st.lists(st.sampled_from(others), unique=True, max_size=20))
    parting = replace(parting, siblings=tuple(sorted(siblings)))
    assert parting.held_out.tolist() == held
    trained = parting.training(np.arange(sum(parting.sizes))).tolist()
    assert sorted([*held, *siblings, *trained]) == list(range(sum(parting.all_sizes)))
    begin = 0
    for size, num in zip(parting.all_sizes, parting.num_held, strict=True):
        assert sum(begin <= document < begin + size for document in held) == num
        begin += size


def test_a_source_without_documents_gives_none(tmp_path: Path) -> None:
    """Its file is empty: nothing of it can be held out, or be trained on."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "b.jsonl").write_text("")
    sources = [trace_source(glob="a.jsonl"), trace_source(name="b", root="empty")]
    dataset = open_traces(build_traces(tmp_path, TRACES, sources=sources).path)
    parting = hold_out(dataset, 6, seed=3)
    assert (parting.sizes, len(parting.held_out)) == ((24, 0), 6)
    assert len({*parting.training(np.arange(24)).tolist(), *parting.held_out.tolist()}) == 30


def test_other_answers_to_a_held_out_prompt_are_not_trained_on(tmp_path: Path) -> None:
    """Several completions of each question, as rejection sampling keeps them, and one of another source."""
    asked = [(f"{number // 4}+1=", f"{number}") for number in range(40)]
    again = [(f"{number}+1=", "again") for number in range(10)]
    write_traces(tmp_path / "more" / "m.jsonl", again)
    sources = [trace_source(glob="a.jsonl"), trace_source(name="more", root="more")]
    dataset = open_traces(build_traces(tmp_path, asked, sources=sources).path)
    parting = hold_out(dataset, 5, seed=3)
    prompts = [prompt for prompt, _ in (*asked, *again)]
    held = {prompts[number] for number in parting.held_out}
    trained = parting.training(np.arange(sum(parting.sizes))).tolist()
    assert len(parting.held_out) == 5
    assert held
    assert not held & {prompts[number] for number in trained}
    assert {*prompts} - held == {prompts[number] for number in trained}
    with pytest.raises(UsageError, match=r"validation_documents is 35, .* [0-9]+ more of which share"):
        hold_out(dataset, 35, seed=3)


def test_without_siblings_an_order_is_named_as_it_was_before_anybody_looked_for_them(tmp_path: Path) -> None:
    """Checkpoints hold that name: the digest of the plan's and of these three."""
    parting = Parting((24, 6), (4, 2), 3)
    plan = open_document_plan(open_traces(build_traces(tmp_path, TRACES).path), 0, 8)
    before = {"plan": plan.plan_hash, "all_sizes": (24, 6), "num_held": (4, 2), "seed": 3}
    assert document_order_id(plan, parting) == digest(before)
    assert document_order_id(plan, replace(parting, siblings=(7,))) != digest(before)


def test_a_trace_follows_the_order_that_a_run_began_with(tmp_path: Path) -> None:
    """As it is without siblings, and as its checkpoints name it: without the changes of a schedule."""
    asked = [(f"{number // 4}=", f"{number}") for number in range(40)]
    dataset = open_traces(build_traces(tmp_path, asked).path)
    old = replace(hold_out(dataset, 4, 3), siblings=())
    entries = [{"from_step": step, "weights": {"traces": 1}} for step in (1, 3)]
    for mix in (MixConfig(), MixConfig(schedule=entries)):
        plan = open_document_plan(dataset, 3, 8, parting=old, mix=mix)
        base = plan.with_changes(()) if isinstance(plan, DocumentMixture) else plan
        order = SampleOrder(None, 3, 8, mix, validation_documents=4, plan_hash=document_order_id(base, old))
        samples = np.arange(16)
        expected = old.training(plan.documents(samples)).tolist()
        assert [trace_sample(dataset.path, n, order)[1][0]["number"] for n in range(16)] == expected
        anew = replace(order, plan_hash=None)
        assert [trace_sample(dataset.path, n, anew)[1][0]["number"] for n in range(16)] != expected


def test_a_run_goes_on_as_it_began_also_where_siblings_would_leave_nothing(tmp_path: Path) -> None:
    dataset = open_traces(build_traces(tmp_path, [("1+1=", f"{number}") for number in range(20)]).path)
    assert hold_out(dataset, 5, 3, lambda parting: True) == Parting((20,), (5,), 3)
    with pytest.raises(UsageError, match="15 more of which share a prompt"):
        hold_out(dataset, 5, 3)


def test_an_epoch_of_the_loader_is_the_rest(tmp_path: Path) -> None:
    dataset = open_traces(build_traces(tmp_path, TRACES).path)
    parting = hold_out(dataset, 6, seed=3)
    sizes: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    plain, parted = (
        TraceLoader(dataset, **sizes, seed=0, pad_id=300, seq_len=64, parting=each)
        for each in (None, parting)
    )
    seen = [document for step in range(3) for document in parted.batch(step).document_ids.flat]
    assert sorted([*seen, *parting.held_out]) == list(range(30))
    assert plain.order_id(plain.plan) != parted.order_id(parted.plan)
    with pytest.raises(UsageError, match="validation_documents is 30"):
        hold_out(dataset, 30, seed=3)


def test_a_trace_knows_what_is_held_out(tmp_path: Path) -> None:
    dataset = open_traces(build_traces(tmp_path, TRACES).path)
    sizes: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1}
    parting = hold_out(dataset, 6, seed=3)
    loader = TraceLoader(dataset, **sizes, seed=3, pad_id=300, seq_len=64, parting=parting)
    order = SampleOrder(seed=3, global_batch_size=8, validation_documents=6)
    for sample, document in enumerate(loader.batch(0).document_ids.flat):
        found, (traced,) = trace_sample(dataset.path, sample, order)
        assert (traced["number"], found["plan_hash"]) == (document, loader.order_id(loader.plan))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_held_out_document_once_over_the_ranks(tmp_path: Path, packing: bool, world_size: int) -> None:
    dataset = open_traces(build_traces(tmp_path, TRACES).path)
    held = hold_out(dataset, 7, seed=3).held_out
    ranks = [
        TraceLoader(
            dataset, global_batch_size=2 * world_size, micro_batch_size=2, rank=rank, world_size=world_size,
            seed=0, pad_id=300, seq_len=64, packing=packing,
        ).rows_of(held)
        for rank in range(world_size)
    ]  # fmt: skip
    assert len({tuple(len(rows.tokens) for rows in batches) for batches in ranks}) == 1
    found = [
        ids[mask].tolist()
        for batches in ranks
        for rows in batches
        for ids, mask in zip(rows.tokens, rows.loss_mask, strict=True)
    ]
    expected = [ids[begin:] for ids, begin in (expected_ids(TRACES[number]) for number in held)]
    assert sorted(chain.from_iterable(found)) == sorted(chain.from_iterable(expected))
