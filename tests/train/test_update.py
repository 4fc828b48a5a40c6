"""An update against the plain loss over all rows: what is left out, dealt and padded changes nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.config.schema.rl import RlConfig, RolloutConfig
from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rl.rollout import Experience, Rollout, Sums, Tally, deal
from r1hpc.train.rl.update import Updater
from r1hpc.train.rollout.groups import Groups

NUM_GROUPS, MEMBERS, LONGEST = 4, 4, 6
PROMPTS = [(5, 6, 7), (8, 9), (10,), (11, 12, 13)]


class PlainEngine:
    """In place of a DeepSpeedEngine, whose arithmetic is not the question here: calls the module."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.boundaries: list[bool] = []

    def __call__(self, **arguments: Any) -> Any:
        return self.module(**arguments)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)


def network() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=20,
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_positions=32,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config)


def groups(seed: int = 0) -> Groups:
    rng = np.random.default_rng(seed)
    n = NUM_GROUPS * MEMBERS
    lengths = rng.integers(1, LONGEST + 1, n).astype(np.int32)
    inside = np.arange(LONGEST)[None, :] < lengths[:, None]
    rewards = rng.integers(0, 2, n).astype(np.float64)
    rewards[:MEMBERS] = 1.0  # the first group teaches nothing
    return Groups(
        items=np.arange(NUM_GROUPS),
        tokens=np.where(inside, rng.integers(2, 20, (n, LONGEST)), 0).astype(np.int32),
        logprobs=np.where(inside, rng.normal(-2, 0.3, (n, LONGEST)), 0).astype(np.float32),
        versions=np.zeros((n, LONGEST), np.int32),
        lengths=lengths,
        ended=lengths < LONGEST,
        rewards=rewards,
        correct=rewards > 0,
        failed=np.zeros(n, np.bool_),
        terms={"accuracy": rewards},
    )


def updater_of(settings: RunConfig, engine: PlainEngine) -> Updater:
    return Updater(settings, Group(0, 0, 1, torch.device("cpu")), 0, engine.module, None)


def config(**rl: Any) -> RunConfig:
    return RunConfig(
        stage="rl",
        train=TrainConfig(global_batch_size=16, micro_batch_size=3, precision=Precision.fp32),
        rollout=RolloutConfig(num_prompts=NUM_GROUPS, num_generations=MEMBERS, max_completion_length=LONGEST),
        rl=RlConfig(num_iterations=2, **rl),
    )


def plain_loss(model: Any, experience: Experience, settings: RlConfig, old_model: Any = None) -> torch.Tensor:
    """Row by row, without padding: the mean over all tokens of the clipped loss, less rl.entropy_coef times
    the entropy.

    With `old_model` the ratio is to it, and a token weighs its probability by it over the sampler's, at
    most 2.
    """
    total, tokens = torch.zeros(()), 0
    for row, length in enumerate(experience.groups.lengths):
        if not experience.counts[row]:
            continue
        prompt = experience.prompt_of(row)
        completion = experience.groups.tokens[row, :length].tolist()
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[:, len(prompt) - 1 : -1]
        chosen = torch.tensor(completion)[:, None]
        every = logits[0].log_softmax(-1)
        logprobs = every.gather(-1, chosen)[:, 0]
        sampled = torch.from_numpy(experience.groups.logprobs[row, :length])
        old, importance = sampled, torch.ones(())
        if old_model is not None:
            with torch.no_grad():
                logits = old_model(input_ids=torch.tensor([[*prompt, *completion]])).logits
            old = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, chosen)[:, 0]
            importance = (old - sampled).exp().clamp(max=2.0)
        advantage = torch.from_numpy(experience.advantages[row, :length])
        ratio = (logprobs - old).exp()
        bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        total = total - (importance * torch.minimum(ratio * advantage, bounded * advantage)).sum()
        total = total + settings.entropy_coef * (every.exp() * every).sum()
        tokens += int(length)
    return total / tokens


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "rl", [{}, {"skip_tied_groups": False}, {"mask_truncated": True}, {"entropy_coef": 0.3}], ids=str
)
def test_the_ranks_together_have_the_plain_loss_and_its_gradient(world_size: int, rl: dict[str, Any]) -> None:
    settings = config(**rl)
    plain, found = network(), 0.0
    gradients = None
    for rank in range(world_size):
        model = network()
        engine = PlainEngine(model)
        updater = Updater(settings, Group(rank, rank, world_size, torch.device("cpu")), 0, model, None)
        experience = updater.prepare(engine, Rollout(groups(), "policy", NUM_GROUPS), PROMPTS)
        tally = Tally()
        for loss in updater.losses(engine, experience, updater.rows_of(experience, 0), True, tally):
            (loss / world_size).backward()  # type: ignore[no-untyped-call]
            found += float(loss.detach()) / world_size
        assert engine.boundaries == [False] * (len(engine.boundaries) - 1) + [True]
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        gradients = mine if gradients is None else [a + b for a, b in zip(gradients, mine, strict=True)]
    expected = plain_loss(plain, experience, settings.rl)
    expected.backward()  # type: ignore[no-untyped-call]
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert gradients is not None
    for ours, parameter in zip(gradients, plain.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(ours, parameter.grad.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("skip", "first"), [(True, MEMBERS), (False, 0)])
def test_a_tied_group_is_computed_only_where_it_is_asked_for(skip: bool, first: int) -> None:
    engine, tally = PlainEngine(network()), Tally()
    updater = updater_of(config(skip_tied_groups=skip), engine)
    experience = updater.prepare(engine, Rollout(groups(), "policy", NUM_GROUPS), PROMPTS)
    list(updater.losses(engine, experience, updater.rows_of(experience, 0), True, tally))
    assert Sums(*tally.numbers()).tokens == experience.groups.lengths[first:].sum()


def moved(model: Any) -> Any:
    """The model after some update."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("num_stale_rows", [0, 5, NUM_GROUPS * MEMBERS])
def test_mismatch_is_of_the_current_versions_tokens_and_drift_of_the_others(num_stale_rows: int) -> None:
    """A rollout of one update: its rows' tokens are of version 2 or 3, and it is trained from version 3."""
    engine, tally = PlainEngine(network()), Tally(has_staleness=True)
    settings = config(max_staleness=1, skip_tied_groups=False)
    settings = replace(settings, rl=replace(settings.rl, num_iterations=1))
    stale = np.arange(NUM_GROUPS * MEMBERS)[:, None] < num_stale_rows
    versions = np.where(stale, 2, np.full((NUM_GROUPS * MEMBERS, LONGEST), 3)).astype(np.int32)
    rollout = Rollout(replace(groups(), versions=versions), "policy", NUM_GROUPS, index=3)
    updater = updater_of(settings, engine)
    experience = updater.prepare(engine, rollout, PROMPTS)
    list(updater.losses(engine, experience, updater.rows_of(experience, 0), True, tally))
    sums = Sums(*tally.numbers())
    gaps = np.zeros(versions.shape)
    for row, length in enumerate(rollout.groups.lengths):
        prompt, completion = experience.prompt_of(row), rollout.groups.tokens[row, :length].tolist()
        with torch.no_grad():
            logits = engine(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        every = logits[len(prompt) - 1 : -1].log_softmax(-1)
        ours = every.gather(-1, torch.tensor(completion)[:, None])[:, 0].numpy()
        gaps[row, :length] = np.abs(ours - rollout.groups.logprobs[row, :length])
    lengths, is_stale = rollout.groups.lengths, stale[:, 0]
    assert sums.stale_tokens == lengths[is_stale].sum()
    assert sums.drift == pytest.approx(gaps[is_stale].sum(), rel=1e-5)
    current = lengths[~is_stale].sum()
    assert sums.mismatch() == (pytest.approx(gaps[~is_stale].sum() / current, rel=1e-5) if current else None)


def test_without_staleness_an_update_adds_up_what_it_did_before() -> None:
    """The ranks' sum has the old length, with the old values; no token is looked at for its version."""
    engine, tally = PlainEngine(network()), Tally()
    updater = updater_of(config(), engine)
    assert not updater.has_staleness
    assert not updater.corrects_importance
    rollout = Rollout(groups(), "policy", NUM_GROUPS, index=3)
    experience = updater.prepare(engine, rollout, PROMPTS)
    assert experience.is_stale is None
    list(updater.losses(engine, experience, updater.rows_of(experience, 0), True, tally))
    numbers = tally.numbers()
    assert len(numbers) == 9
    sums = Sums(*numbers)
    assert sums.mismatch() == sums.per_token(sums.difference)


@pytest.mark.parametrize("resumed", [False, True])
def test_importance_is_the_trainers_own_old_policy_over_the_samplers(resumed: bool) -> None:
    """At the second update, when the trainer's policy is no longer the one that sampled."""
    settings = config(importance_sampling="truncated")
    rollout, old = Rollout(groups(), "policy", NUM_GROUPS), PlainEngine(network())
    experience = updater_of(settings, old).prepare(old, rollout, PROMPTS)
    assert experience.old_logprobs is not None
    new = PlainEngine(moved(network()))
    updater = updater_of(settings, new)
    if resumed:  # between the two: the networks of before are gone
        kept = Rollout(groups(), "policy", NUM_GROUPS, old_logprobs=experience.old_logprobs)
        experience = updater.prepare(new, kept, PROMPTS)
    tally = Tally()
    found = sum(
        float(loss.detach())
        for loss in updater.losses(new, experience, updater.rows_of(experience, 1), False, tally)
    )
    expected = plain_loss(new.module, experience, settings.rl, old_model=network())
    assert found == pytest.approx(float(expected.detach()), abs=1e-6)
    sums = Sums(*tally.numbers())
    share = sums.effective_share()
    assert sums.importance_capped > 0
    assert share is not None
    assert 0 < share < 1


@pytest.mark.parametrize(
    ("engine", "wanted", "corrects"),
    [
        ("sampler", "auto", False),
        ("vllm", "auto", True),
        ("sampler", "truncated", True),
        ("vllm", "none", False),
    ],
)
def test_importance_is_corrected_where_vllm_samples_or_it_is_asked_for(
    engine: str, wanted: str, corrects: bool
) -> None:
    settings = RunConfig(
        stage="rl", rollout=RolloutConfig(engine=engine), rl=RlConfig(importance_sampling=wanted)
    )
    updater = updater_of(settings, PlainEngine(network()))
    assert updater.corrects_importance is corrects


@pytest.mark.parametrize(("precision", "clips"), [(Precision.bf16, False), (Precision.fp32, True)])
def test_in_half_precision_gspo_does_not_clip_the_rounding_of_the_sampler(
    precision: Precision, clips: bool
) -> None:
    """The sampler's log-probabilities are not the trainer's here; the policy is the same in both updates."""
    settings = config(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    settings = replace(settings, train=replace(settings.train, precision=precision))
    engine = PlainEngine(network())
    updater = updater_of(settings, engine)
    experience = updater.prepare(engine, Rollout(groups(), "policy", NUM_GROUPS), PROMPTS)
    for update in (0, 1):
        tally = Tally()
        list(updater.losses(engine, experience, updater.rows_of(experience, update), update == 0, tally))
        assert (Sums(*tally.numbers()).clipped > 0) is clips


def test_a_group_that_teaches_nothing_costs_nothing() -> None:
    settings = config()
    engine = PlainEngine(network())
    updater = updater_of(settings, engine)
    experience = updater.prepare(engine, Rollout(groups(), "policy", NUM_GROUPS), PROMPTS)
    tally = Tally()
    list(updater.losses(engine, experience, updater.rows_of(experience, 0), True, tally))
    teaching = np.abs(experience.advantages).max(1) > 0
    assert not teaching[:MEMBERS].any()
    assert Sums(*tally.numbers()).tokens == experience.groups.lengths[teaching].sum()


def test_every_row_is_dealt_once_and_every_rank_has_equally_many_micro_batches() -> None:
    lengths = np.arange(100, 117)
    for world_size in (1, 2, 3, 5):
        hands = [
            deal(lengths, np.arange(17), Group(r, r, world_size, torch.device("cpu")), 2)
            for r in range(world_size)
        ]
        assert len({len(hand) for hand in hands}) == 1
        dealt = sorted(int(row) for hand in hands for rows in hand for row in rows)
        assert dealt == list(range(17))


def test_updates_take_whole_groups_in_order_and_each_pass_takes_all() -> None:
    settings = config()
    settings = RunConfig(
        stage="rl", rollout=settings.rollout, rl=settings.rl, train=TrainConfig(global_batch_size=8)
    )
    assert updates_per_rollout(settings) == 4
    updater = updater_of(settings, PlainEngine(network()))
    experience = updater.prepare(None, Rollout(groups(), "policy", NUM_GROUPS), PROMPTS)
    taken = [updater.rows_of(experience, update).tolist() for update in range(4)]
    assert taken[0] + taken[1] == taken[2] + taken[3] == list(range(NUM_GROUPS * MEMBERS))


def test_the_ranks_add_up_as_many_numbers_as_before_where_nothing_is_left_out() -> None:
    tally = Tally()
    tally.add(tokens=torch.ones(()), importance_left_out=torch.ones(()))
    assert len(tally.numbers()) == len(Tally().numbers()) == 9
    mask = Tally(has_mask=True)
    mask.add(tokens=torch.ones(()), importance_left_out=torch.ones(()))
    assert Sums(*mask.numbers()).importance_left_out == 1
    assert len(mask.numbers()) == 10
    assert len(Tally(has_staleness=True).numbers()) == 12
