"""A head asked in chunks against the whole logits: the same loss and gradients, and far less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1hpc.config.schema.run import ModelConfig, Precision
from r1hpc.train.model.model import build_model, wrap_lora
from r1hpc.train.model.output_head import OutputHead, Scores
from r1hpc.train.parallel.distributed import Group
from tests.train.live_bytes import LiveBytes
from tests.train.two_ranks import engine_around, gathered, run_on_two_ranks

VOCAB = 96
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WIDE |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 1}
WIDE |= {"pad_token_id": 0, "initializer_range": 0.3}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": VOCAB}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **WIDE, "tie_word_embeddings": False},
    "qwen2, tied": {"model_type": "qwen2", **WIDE, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gemma2, capped": {"model_type": "gemma2", **WIDE, "head_dim": 8, "final_logit_softcapping": 0.5},
    "granite, scaled": {"model_type": "granite", **WIDE, "logits_scaling": 3.0},
}
IDS = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
CHOSEN = torch.rand((3, 11), generator=torch.Generator().manual_seed(1)) < 0.6


def built(name: str, **settings: Any) -> Any:
    attention = "eager" if name.startswith("gemma2") else "sdpa"  # transformers refuses it sdpa
    return build_model(ModelConfig(attn_implementation=attention, **settings), FAMILIES[name], seed=3)


def asked(network: Any, chunk: int | None, chosen: Tensor | None = CHOSEN, **how: Any) -> Scores:
    head = OutputHead(network, chunk)
    positions = None if chosen is None else flat(chosen)
    return head.scores(lambda: network(input_ids=IDS[:, :-1]).logits, IDS[:, 1:], positions, **how)


def flat(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero()[:, 0]


def plain(network: Any, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies out of the whole logits, by their definitions."""
    p = (network(input_ids=IDS[:, :-1]).logits.double() / temperature).softmax(-1)
    logprobs = p.gather(-1, IDS[:, 1:, None])[..., 0].log()
    return logprobs[chosen], -(p * p.log()).sum(-1)[chosen]


def gradients(network: Any, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float = 1e-6) -> None:
    """Each gradient within `most` of its size."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).norm()) <= most * float(theirs[name].norm()), name


@pytest.mark.parametrize("chunk", [1, 5, 0, None])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_logits(name: str, chunk: int | None) -> None:
    """Relative difference at most 1e-6 in fp32, entropies with their gradient too."""
    network = built(name, activation_checkpointing=True)
    logprobs, entropies = plain(network, CHOSEN, 0.7)
    expected = gradients(network, -logprobs.mean() - 0.1 * entropies.mean())
    found = asked(network, chunk, temperature=0.7, with_entropies=True, differentiate_entropies=True)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropies.double(), entropies, rtol=1e-6, atol=1e-6)
    assert_same(gradients(network, -found.logprobs.mean() - 0.1 * found.entropies.mean()), expected)


def test_again_with_the_same_head_it_is_the_same() -> None:
    """What the first call finds out of the family is used from the second on."""
    for name in FAMILIES:
        network = built(name)
        head = OutputHead(network, 4)
        first, second = (
            head.scores(lambda: network(input_ids=IDS[:, :-1]).logits, IDS[:, 1:]).logprobs  # noqa: B023
            for _ in range(2)
        )
        assert torch.equal(first, second)
        assert network(input_ids=IDS).logits.shape == (*IDS.shape, VOCAB)  # and others get whole logits


def test_entropies_without_gradient_teach_nothing() -> None:
    network = built("llama")
    found = asked(network, 5, with_entropies=True)
    only = gradients(network, asked(network, 5).logprobs.sum())
    assert_same(gradients(network, found.logprobs.sum() + found.entropies.sum()), only, 0)


@pytest.mark.parametrize("name", ["llama", "gemma2, capped"])
def test_where_nothing_is_chosen_every_weight_has_a_gradient_of_zero(name: str) -> None:
    network = built(name)
    found = asked(network, 5, torch.zeros_like(CHOSEN))
    assert found.logprobs.shape == (0,)
    assert {float(g.abs().max()) for g in gradients(network, found.logprobs.sum()).values()} == {0.0}
    assert len(gradients(network, asked(network, 5).logprobs.sum())) == len(dict(network.named_parameters()))


def test_adapters_on_the_head_count() -> None:
    network = wrap_lora(built("llama"), ModelConfig(lora_rank=2, lora_targets=["lm_head", "q_proj"]))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    logprobs, _ = plain(network, CHOSEN, 1.0)
    expected = gradients(network, logprobs.sum())
    assert_same(gradients(network, asked(network, 5).logprobs.sum()), expected)
    assert any("lm_head" in name for name in expected)


@pytest.mark.parametrize("with_entropies", [False, True])
def test_no_more_than_a_chunk_of_logits_is_ever_held(with_entropies: bool) -> None:
    """Of 1,024 tokens over a vocabulary of 8,192: 33.6 MB in fp32, three times that for the whole loss."""
    config = {**FAMILIES["llama"], "vocab_size": 8192, "num_hidden_layers": 1}
    network = build_model(ModelConfig(activation_checkpointing=True), config, seed=3)
    ids = torch.randint(2, 8192, (4, 257), generator=torch.Generator().manual_seed(0))
    network.zero_grad(set_to_none=False)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peaks = {}
    for chunk in (0, 64):
        with LiveBytes() as live:
            head = OutputHead(network, chunk)
            run = lambda: network(input_ids=ids[:, :-1]).logits  # noqa: E731
            scores = head.scores(run, ids[:, 1:], with_entropies=with_entropies)
            scores.logprobs.sum().backward()  # type: ignore[no-untyped-call]
        peaks[chunk] = live.peak
    tensor = 1024 * 8192 * 4
    assert peaks[0] >= 3 * tensor
    assert peaks[64] < tensor / 2  # a chunk is a sixteenth; the rest are the head's own gradients


def train_both(group: Group, folder: Path) -> None:
    """Under each ZeRO stage the weights after a step, by whole logits and by chunks."""
    for stage in (0, 1, 2, 3):
        for chunk in (0, 3):
            engine = engine_around(built("llama", activation_checkpointing=True), stage, Precision.fp32)
            head = OutputHead(engine.module, chunk)
            for step in range(2):
                # Rank 1 has no token in the second step, and takes part all the same.
                chosen = torch.zeros_like(CHOSEN) if group.rank == 1 and step == 1 else CHOSEN
                run = lambda: engine(input_ids=IDS[:, :-1]).logits  # noqa: B023, E731
                engine.backward(-head.scores(run, IDS[:, 1:], flat(chosen)).logprobs.sum())
                engine.step()
            whole = gathered(engine.module)
            if group.rank == 0:
                torch.save(whole, folder / f"{stage}-{chunk}.pt")


def test_under_every_zero_stage(tmp_path: Path) -> None:
    run_on_two_ranks(train_both, tmp_path)
    for stage in (0, 1, 2, 3):
        whole, chunked = (torch.load(tmp_path / f"{stage}-{chunk}.pt") for chunk in (0, 3))
        for name, weight in whole.items():
            torch.testing.assert_close(chunked[name], weight, rtol=1e-4, atol=1e-5)
