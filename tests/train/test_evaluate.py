"""Held-out answers: the same however the items are batched, and none where nothing is asked."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.rl import EvaluateConfig, RewardConfig, RolloutConfig
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.tasks.problems.benchmark import Benchmarks, with_counted_sets
from r1hpc.tasks.problems.task import ChainSum
from r1hpc.tasks.rewards import Scorer
from r1hpc.tasks.text.format import PromptForm, encode
from r1hpc.tasks.text.tokenizer import character_tokenizer, special_ids
from r1hpc.telemetry.records.evaluations import read_evaluations, table
from r1hpc.train.generate.evaluate import Answer, HeldOut, answer, summarise
from r1hpc.train.rollout.judge import Judge
from r1hpc.train.rollout.torch_engine import Request, Samples

_LONGEST = 8


class Parrot:
    """An engine that answers 0 or 1, by the stream: a mock, as no model is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.weights = "parrot"

    def sync_weights(self, network: Any) -> str:
        return self.weights

    def release(self) -> None: ...

    def facts(self) -> dict[str, float]:
        return {}

    def sample(self, request: Request, should_stop: Any) -> Samples | None:
        assert request.prompts, "nothing was asked"
        self.batches.append(len(request.prompts))
        rows: list[Sequence[int]] = []
        for at, prompt in enumerate(request.prompts):
            for member in range(request.num_generations):
                stream = int(request.streams[at * request.num_generations + member])
                text = f"<think></think><answer>{stream % 2}</answer>"
                rows.append([*encode(TOKENIZER, text), 1][:_LONGEST] if prompt else [1])
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), _LONGEST), np.int32)
        for line, row in enumerate(rows):
            tokens[line, : len(row)] = row
        return Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, np.ones(len(rows), np.bool_))


TOKENIZER = character_tokenizer()
IDS = special_ids(TOKENIZER, ModelConfig(tokenizer="characters"))


def answers(
    indices: Sequence[int],
    prompts_per_batch: int,
    stop_after: int | None = None,
    tokenizer: Tokenizer = TOKENIZER,
) -> tuple[Any, Parrot]:
    engine, looks = Parrot(), iter(range(1000))
    config = RunConfig(
        rollout=RolloutConfig(
            max_prompt_length=16, max_completion_length=_LONGEST, prompts_per_batch=prompts_per_batch
        ),
        evaluate=EvaluateConfig(num_samples=4),
    )
    with Scorer(RewardConfig(), task := ChainSum(0, {}), max_completion_length=_LONGEST) as scorer:
        judge = Judge(config, task, tokenizer, PromptForm(), engine, scorer, IDS)
        found = answer(judge, config, indices, lambda: stop_after is not None and next(looks) >= stop_after)
    return found, engine


def test_batches_change_nothing() -> None:
    whole, together = answers(range(7), 0)
    cut, apart = answers(range(7), 2)
    assert whole == cut
    assert together.batches == [7, 7]
    assert apart.batches == [2, 2, 2, 1] * 2


def test_tags_that_are_special_tokens_are_read_all_the_same() -> None:
    content = json.loads(TOKENIZER.to_str())
    for token in content["added_tokens"]:
        token["special"] = True
    special = Tokenizer.from_str(json.dumps(content))
    assert "<answer>" not in special.decode(encode(special, "<answer>1</answer>"))
    found, _ = answers(range(7), 0, tokenizer=special)
    assert found == answers(range(7), 0)[0]
    assert any(one.num_correct for one in answers(range(200), 0, tokenizer=special)[0])


def test_a_rank_without_items_answers_nothing() -> None:
    found, engine = answers((), 0)
    assert found == []
    assert engine.batches == []


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_asked_to_stop_between_judgements_it_leaves(stop_after: int) -> None:
    assert answers(range(7), 2, stop_after)[0] is None


def test_the_summary_counts_samples_and_items() -> None:
    found: list[Answer] = answers(range(40), 0)[0]
    summary = summarise(found)
    assert summary["num_items"] == 40
    assert summary["num_samples"] == 4
    assert list(summary["pass_at"]) == ["1", "2", "4"]
    right = sum(one.num_correct for one in found)
    assert summary["pass_at"]["1"]["value"] == pytest.approx(right / 160)
    assert summary["thinking_share"] == 0


def said(index: int, votes: list[tuple[str | None, bool]], task: str = "") -> Answer:
    return Answer(
        index=index,
        prompt=f"{index}?",
        expected="1",
        greedy="",
        greedy_correct=votes[0][1],
        greedy_length=1,
        well_formed=True,
        num_samples=len(votes),
        num_correct=sum(right for _, right in votes),
        sample="",
        mean_length=1.0,
        truncated=0,
        task=task,
        votes=[list(vote) for vote in votes],
    )


def test_the_majority_of_the_first_k_samples() -> None:
    one, half, two, none = ("1", True), ("1.0", True), ("2", False), (None, False)
    found = [
        said(0, [two, one, half, two]),  # right answers count together; a tie goes to what came first
        said(1, [one, two, two, half]),
        said(2, [none, none, one, none]),  # who says nothing has no vote
        said(3, [none, none, none, none]),
    ]
    values = {k: share["value"] for k, share in summarise(found)["maj_at"].items()}
    assert values == {"1": 0.25, "2": 0.25, "4": 0.5}
    assert summarise([replace(found[0], votes=[])])["maj_at"] is None


def test_each_task_is_summed_up_apart_with_intervals_over_questions() -> None:
    right, wrong = ("1", True), ("2", False)
    answers = [said(i, [right] * 8, "a") for i in range(10)] + [said(i, [wrong] * 8, "b") for i in range(5)]
    summary = summarise(answers)
    assert list(summary["tasks"]) == ["a", "b"]
    assert [part["num_questions"] for part in summary["tasks"].values()] == [10, 5]
    assert [part["greedy"]["value"] for part in summary["tasks"].values()] == [1.0, 0.0]
    # Of 10 questions, not of 80 samples (Wilson: 1 / (1 + z^2 / n)).
    assert summary["tasks"]["a"]["greedy"]["low"] == pytest.approx(1 / (1 + 1.959964**2 / 10))
    # A question that was asked again is no other one, and makes no interval narrower.
    mixed = [said(i, [right, wrong, *[right if i % 2 else wrong] * 6]) for i in range(10)]
    once, twice = summarise(mixed), summarise([*mixed, *mixed])
    assert (twice["num_items"], twice["num_questions"]) == (20, 10)
    assert table(once)[0].endswith("(10 held-out items)")
    assert table(twice)[0].endswith("(20 held-out items, 10 distinct)")
    assert table(summarise([*answers, *answers]))[-1] == "30 questions were asked, 15 distinct"
    assert twice["greedy"] == pytest.approx(once["greedy"])
    for share in ("pass_at", "maj_at"):
        assert all(twice[share][k] == pytest.approx(once[share][k]) for k in ("1", "8"))
    rows = table(summary)
    assert len({len(row) for row in rows}) == 1
    assert rows[1].split()[:3] == ["a", "10", "1.000"]


def _alone(folder: Path, config: RunConfig) -> Any:
    """A job of one rank, as far as an evaluation asks for it."""
    run = RunDir(folder)
    run.metrics.mkdir(parents=True)
    group = SimpleNamespace(
        rank=0, world_size=1, broadcast=lambda value: value, gather=lambda value: [value], all_sum=list
    )
    return SimpleNamespace(config=config, group=group, run=run, attempt=1)


def test_stage_rl_prints_a_row_for_each_test_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets: dict[str, Any] = {}
    for name, count in (("sums", 3), ("more", 2)):
        rows = [{"question": f"{n}+0=", "answer": "1"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets[name] = {"path": str(tmp_path / f"{name}.jsonl"), "template": "{question}"}
    config = with_counted_sets(
        RunConfig(
            stage="rl",
            rollout=RolloutConfig(max_prompt_length=16, max_completion_length=_LONGEST),
            evaluate=EvaluateConfig(sets=sets, num_samples=1),
        )
    )
    benchmarks = Benchmarks.of(config)
    assert benchmarks is not None
    job, task = _alone(tmp_path / "run", config), ChainSum(0, {})
    with Scorer(RewardConfig(), task, benchmarks, max_completion_length=_LONGEST) as scorer:
        judge = Judge(config, task, TOKENIZER, PromptForm(), Parrot(), scorer, IDS, benchmarks)
        assert HeldOut(job, judge, lambda: False).evaluate(torch.nn.Module(), 7)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 7: greedy ")
    assert printed[1:] == table(read_evaluations(job.run)[7])
    assert [line.split()[:2] for line in printed[2:]] == [["sums", "3"], ["more", "2"]]


def test_what_is_on_record_of_other_weights_is_done_again(tmp_path: Path) -> None:
    """A crash may lose the weights that were evaluated, and they need not come out the same again."""
    engine = Parrot()
    config = RunConfig(
        stage="rl",
        rollout=RolloutConfig(max_prompt_length=16, max_completion_length=_LONGEST),
        evaluate=EvaluateConfig(num_items=3, num_samples=1),
    )
    job = _alone(tmp_path, config)
    run = job.run
    with Scorer(RewardConfig(), task := ChainSum(0, {}), max_completion_length=_LONGEST) as scorer:
        judge = Judge(config, task, TOKENIZER, PromptForm(), engine, scorer, IDS)
        held_out = HeldOut(job, judge, lambda: False)
        for weights, asked in (("first", 2), ("first", 2), ("second", 4), ("second", 4)):
            engine.weights = weights
            assert held_out.evaluate(torch.nn.Module(), 7)
            assert len(engine.batches) == asked
    assert read_evaluations(run)[7]["policy"] == "second"
    line = json.loads(run.rl_evaluations.read_text().splitlines()[0])
    del line["policy"]  # of an older version: left as it is
    run.rl_evaluations.write_text(json.dumps(line) + "\n")
    engine.weights = "third"
    assert held_out.evaluate(torch.nn.Module(), 7)
    assert len(engine.batches) == 4
