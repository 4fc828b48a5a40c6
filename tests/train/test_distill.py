"""On-policy distillation against its formula, written here without the code's: loss and gradient, to 1e-6."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.config.schema.rl import RlConfig, RolloutConfig
from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.train.model.output_head import OutputHead, Teacher, divergence
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rl.rollout import Experience, Rollout, Sums, Tally
from r1hpc.train.rl.update import Updater
from r1hpc.train.rollout.policy import Reference
from tests.train.test_logits import FAMILIES, assert_same, built, gradients
from tests.train.test_update import MEMBERS, NUM_GROUPS, PROMPTS, PlainEngine, groups

Floats = npt.NDArray[np.float64]
BETAS = [1.0, 0.0, 0.3]
TEMPERATURE = 0.7


def softmax(logits: Floats) -> Floats:
    every = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(every / every.sum(-1, keepdims=True))


def by_hand(student: Floats, teacher: Floats, beta: float) -> tuple[Floats, Floats]:
    """Of logits (n, vocab): the divergence of each row, and its gradient by the student's logits.

    With q the student's probabilities and m the mixture, the derivative by q is (1 - beta) log(q / m): what
    comes from m adds up to a constant, which the softmax takes out again.
    """
    q, p = softmax(student), softmax(teacher)
    if beta == 1:
        found, slope = (q * np.log(q / p)).sum(-1), np.log(q / p)
    elif beta == 0:
        found, slope = (p * np.log(p / q)).sum(-1), -p / q
    else:
        m = beta * p + (1 - beta) * q
        found = beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)
        slope = (1 - beta) * np.log(q / m)
    return found, q * (slope - (q * slope).sum(-1, keepdims=True))


@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_and_its_gradient_are_those_of_the_formula(beta: float) -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 3, (50, 20))
    ours = torch.tensor(rng.normal(0, 3, (50, 20)), requires_grad=True)
    found = divergence(ours, torch.from_numpy(theirs), beta)
    found.sum().backward()  # type: ignore[no-untyped-call]
    expected, slope = by_hand(ours.detach().numpy(), theirs, beta)
    assert ours.grad is not None
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(ours.grad.numpy(), slope, rtol=0, atol=1e-12)


def test_what_one_vocabulary_has_beyond_the_other_is_left_out() -> None:
    """Qwen2.5's embeddings, for one: 151,936 rows of the small models, 152,064 of the large."""
    student, teacher = torch.randn(5, 12), torch.randn(5, 9)
    expected = divergence(student[:, :9], teacher, 1.0)
    assert torch.equal(divergence(student, teacher, 1.0), expected)
    assert torch.equal(divergence(student[:, :9], torch.cat([teacher, torch.ones(5, 4)], -1), 1.0), expected)


def test_towards_its_ends_the_mixture_pulls_like_the_two_divergences() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0, 1, (4, 9)), rng.normal(0, 1, (4, 9))
    for end, beta, share in ((0.0, 1e-6, 1e-6), (1.0, 1 - 1e-6, 1e-6)):
        _, slope = by_hand(ours, theirs, beta)
        _, expected = by_hand(ours, theirs, end)
        np.testing.assert_allclose(slope / share, expected, atol=1e-4)


def network(seed: int, width: int, vocab_size: int) -> Any:
    torch.manual_seed(seed)
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": vocab_size, "n_layer": 2, "n_embd": width, "n_head": 4, "n_positions": 32}
    config = AutoConfig.for_model("gpt2", initializer_range=0.3, use_cache=False, **shape, **drop)
    return AutoModelForCausalLM.from_config(config)


def config(beta: float, **train: Any) -> RunConfig:
    return RunConfig(
        stage="rl",
        train=TrainConfig(global_batch_size=16, micro_batch_size=3, precision=Precision.fp32, **train),
        rollout=RolloutConfig(
            num_prompts=NUM_GROUPS,
            num_generations=MEMBERS,
            max_completion_length=6,
            temperature=TEMPERATURE,
        ),
        rl=RlConfig(algorithm="distill", teacher="teacher", jsd_beta=beta),
    )


def plain(student: Any, teacher: Any, experience: Experience, beta: float) -> tuple[float, Floats]:
    """Row by row, without padding, in float64: the mean over all tokens; the student's gradients are added
    up in its parameters. And the divergence of each token, one after the other."""
    lengths = experience.groups.lengths
    every = []
    for row, length in enumerate(lengths):
        prompt = experience.prompt_of(row)
        ids = torch.tensor([[*prompt, *experience.groups.tokens[row, :length].tolist()]])
        ours = student(input_ids=ids).logits[0, len(prompt) - 1 : -1, :20]
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[0, len(prompt) - 1 : -1, :20].double().numpy()
        found, slope = by_hand(ours.detach().double().numpy() / TEMPERATURE, theirs / TEMPERATURE, beta)
        ours.backward(torch.from_numpy(slope / TEMPERATURE / lengths.sum()).to(ours))
        every.append(found)
    return float(np.concatenate(every).mean()), np.concatenate(every)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("beta", BETAS)
def test_an_update_has_the_loss_and_the_gradient_of_the_formula(beta: float, world_size: int) -> None:
    """A wider teacher whose embedding has more rows, logits in chunks, ranks together."""
    settings, teacher = config(beta, logits_chunk_tokens=5), network(1, 64, 24).eval()
    loss, found, sums = 0.0, [], []
    for rank in range(world_size):
        student = network(0, 32, 20)
        engine = PlainEngine(student)
        group = Group(rank, rank, world_size, torch.device("cpu"))
        updater = Updater(settings, group, 0, student, Reference(teacher, "teacher"))
        experience = updater.prepare(engine, Rollout(groups(), "policy", NUM_GROUPS), PROMPTS)
        tally = Tally()
        for part in updater.losses(engine, experience, updater.rows_of(experience, 0), True, tally):
            (part / world_size).backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach()) / world_size
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
        sums.append(tally.numbers())
    told = Sums(*np.sum(sums, 0))
    student = network(0, 32, 20)
    expected, every = plain(student, teacher, experience, beta)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert told.per_token(told.kl) == pytest.approx(every.mean(), abs=1e-6)
    assert told.tokens == len(every), "every completion teaches, whatever its reward"
    together = {name: sum((each[name] for each in found[1:]), found[0][name]) for name in found[0]}
    assert_same(together, {name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert all(p.grad is None for p in teacher.parameters())


CHOSEN = torch.rand((3, 11), generator=torch.Generator().manual_seed(1)) < 0.6
IDS = torch.randint(2, 96, (3, 12), generator=torch.Generator().manual_seed(0))


def logits_by_torch(network: Any) -> Tensor:
    """(num_chosen, vocab), tempered."""
    found: Tensor = network(input_ids=IDS[:, :-1]).logits[CHOSEN] / TEMPERATURE
    return found


@pytest.mark.parametrize("chunk", [1, 5, 0])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_change_their_logits_are_students_and_teachers_too(name: str, chunk: int) -> None:
    student, teacher = built(name), built("gemma2, capped" if name == "llama" else "granite, scaled").eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1
    positions, targets = CHOSEN.flatten().nonzero()[:, 0], IDS[:, 1:]
    with torch.no_grad():
        told = OutputHead(teacher, chunk).logits(
            lambda: teacher(input_ids=IDS[:, :-1]).logits, targets, positions
        )
        theirs = logits_by_torch(teacher)
    torch.testing.assert_close(told / TEMPERATURE, theirs)
    ours = logits_by_torch(student)
    expected, slope = by_hand(ours.detach().double().numpy(), theirs.double().numpy(), 0.3)
    wanted = gradients(student, (ours * torch.from_numpy(slope).to(ours)).sum())
    head = OutputHead(student, chunk)
    for _ in range(2):  # what the first call finds out of the family is used in the second
        found = head.scores(
            lambda: student(input_ids=IDS[:, :-1]).logits,
            targets,
            positions,
            temperature=TEMPERATURE,
            teacher=Teacher(told, 0.3),
        ).divergences
        np.testing.assert_allclose(found.detach().double().numpy(), expected, atol=1e-6)
        assert_same(gradients(student, found.sum()), wanted, 2e-6)
