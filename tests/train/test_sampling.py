"""The sampler against plain forwards of the same model, and the random streams it draws from."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rollout import torch_engine
from r1hpc.train.rollout.torch_engine import (
    Request,
    Samples,
    TorchSampler,
    choose,
    fingerprint,
    streams,
    uniforms,
)

IDS = SpecialIds(pad=0, eos=1)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "qwen2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
}


def network(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=20,
        initializer_range=0.3,
        use_cache=False,
        eos_token_id=1,
        bos_token_id=None,
        **CONFIGS[family],
    )
    return AutoModelForCausalLM.from_config(config)


def sampler(model: Any, poll_every: int = 16) -> TorchSampler:
    engine = TorchSampler(
        Group(0, 0, 1, torch.device("cpu")), IDS, zero_stage=0, replica=lambda: model, poll_every=poll_every
    )
    engine.sync_weights(model)
    return engine


def sample(model: Any, prompts: list[list[int]], num: int = 4, temperature: float = 1.0) -> Samples:
    request = Request(prompts, streams(7, range(len(prompts)), num), num, 12, temperature)
    samples = sampler(model).sample(request, lambda: False)
    assert samples is not None
    return samples


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_plain_forward(family: str, temperature: float) -> None:
    model = network(family)
    samples = sample(model, PROMPTS, temperature=temperature)
    assert {bool(e) for e in samples.ended} == {True, False}, "both kinds of end are wanted here"
    for row, length in enumerate(samples.lengths):
        prompt, completion = PROMPTS[row // 4], samples.tokens[row, :length].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        plain = (logits / temperature).log_softmax(-1)[range(int(length)), completion]
        assert samples.logprobs[row, :length] == pytest.approx(plain.numpy(), abs=2e-5)
        assert (samples.tokens[row, length:] == IDS.pad).all()
        assert samples.ended[row] == (completion[-1] == IDS.eos)
        assert IDS.eos not in completion[:-1]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_completion_does_not_depend_on_its_neighbours(family: str) -> None:
    model = network(family)
    together = sample(model, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        request = Request([prompt], streams(7, [index], 4), 4, 12, 1.0)
        alone = sampler(model).sample(request, lambda: False)
        assert alone is not None
        for j in range(4):
            length = alone.lengths[j]
            assert length == together.lengths[index * 4 + j]
            assert alone.tokens[j, :length].tolist() == together.tokens[index * 4 + j, :length].tolist()


def test_greedy_takes_the_likeliest_token() -> None:
    model = network("gpt2")
    samples = sample(model, PROMPTS[:1], num=1, temperature=0)
    ids = list(PROMPTS[0])
    for token in samples.tokens[0, : samples.lengths[0]]:
        with torch.no_grad():
            assert int(token) == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(int(token))


def test_asked_to_stop_it_gives_nothing_and_leaves_the_model_in_training() -> None:
    model = network("gpt2").train()
    answers = iter([False, True])
    request = Request(PROMPTS, streams(0, range(3), 4), 4, 12, 1.0)
    assert sampler(model, poll_every=1).sample(request, lambda: next(answers)) is None
    assert model.training


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1e9]]).expand(20000, 4)
    tokens, logprobs = choose(logits, 1.0, streams(3, range(20000), 1), 5)
    shares = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.012, rtol=0)
    assert shares[3] == 0
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[tokens])


def test_random_streams_are_functions_of_seed_item_and_number() -> None:
    keys = streams(1, [4, 5], 3)
    assert keys.tolist() == [*streams(1, [4], 3).tolist(), *streams(1, [5], 3).tolist()]
    assert len({*keys.tolist(), *streams(2, [4, 5], 3).tolist()}) == 12
    draws = np.array([uniforms(streams(0, range(1000), 8), t) for t in range(8)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.05


def test_a_fingerprint_tells_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("gpt2")
    before = fingerprint(model)
    for size in (1, 1000):  # however much of a tensor is added up at once
        monkeypatch.setattr(torch_engine, "_SUMMED", size)
        assert fingerprint(model) == before
    assert fingerprint(network("gpt2")) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] *= 1 + 2**-22
    assert fingerprint(model) != before
