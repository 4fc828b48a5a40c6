"""Documents side by side in a row: the loss of each as if it were alone, whatever the family of the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.train.model.model import build_model, wrap_lora
from r1hpc.train.supervised.sft import check_apart, packed_form

VOCAB = 48
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
WIDE |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 1}
WIDE |= {"pad_token_id": 0, "initializer_range": 0.2}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **WIDE},
    "qwen2": {"model_type": "qwen2", **WIDE},
    "qwen3": {"model_type": "qwen3", **WIDE, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", **WIDE, "n_positions": 64, **NO_DROPOUT},
    "gpt_neox": {"model_type": "gpt_neox", **WIDE},
    # Attends to the last four tokens alone.
    "mistral": {"model_type": "mistral", **WIDE, "sliding_window": 4},
    "mixtral": {"model_type": "mixtral", **WIDE, "num_local_experts": 4},
}
MAMBA = {
    "model_type": "mamba",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "state_size": 8,
}
LENGTHS = ((9, 5, 2), (7, 8))


class Engine:
    """In place of a DeepSpeedEngine, whose arithmetic is not the question here: calls the module."""

    def __init__(self, module: Any) -> None:
        self.module, self.device = module, torch.device("cpu")
        self.eval, self.train = module.eval, module.train

    def __call__(self, **arguments: Any) -> Any:
        return self.module(**arguments)


def documents() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(2, VOCAB, (n,), generator=generator) for n in row] for row in LENGTHS]


def packed() -> tuple[Tensor, Tensor]:
    """Ids and positions (2, 18), with padding as the loader leaves it."""
    ids, positions = torch.zeros(2, 18, dtype=torch.long), torch.zeros(2, 18, dtype=torch.long)
    for line, row in enumerate(documents()):
        parts = [torch.arange(len(document)) for document in row]
        total = sum(LENGTHS[line])
        ids[line, :total] = torch.cat(row)
        positions[line] = torch.cat([*parts, torch.arange(18 - total)])
    return ids, positions


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Of each next token of one document."""
    return -logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def built(name: str, **settings: Any) -> Any:
    return build_model(ModelConfig(**settings), FAMILIES[name], seed=3).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "gate", "gate_norm", "sigmoid_bias"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_a_document_is_that_of_it_alone(name: str, attention: str) -> None:
    network = built(name, attn_implementation=attention)
    ids, positions = packed()
    logits = network(input_ids=ids, position_ids=positions).logits
    check_apart(Engine(network), attention)
    for line, row in enumerate(documents()):
        end = 0
        for document in row:
            begin, end = end, end + len(document)
            alone = losses(network(input_ids=document[None]).logits[0], document)
            torch.testing.assert_close(losses(logits[line, begin:end], document), alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_positions_the_documents_see_one_another() -> None:
    """What the tests above would miss if the model were blind to everything."""
    network = built("llama")
    ids, positions = packed()
    apart, together = network(input_ids=ids, position_ids=positions).logits, network(input_ids=ids).logits
    assert float((apart[0, 9:14] - together[0, 9:14]).abs().max()) > 0.1


@torch.no_grad()
def test_with_adapters() -> None:
    settings = ModelConfig(lora_rank=2)
    network = wrap_lora(built("llama"), settings).eval()
    check_apart(Engine(network), "sdpa")


@torch.no_grad()
def test_flash_attention_gets_one_row() -> None:
    """It has not run here (no GPU): what it would get is given to sdpa."""
    network = built("llama")
    ids, positions = packed()
    form = packed_form("flash_attention_2")
    rows = network(input_ids=ids, position_ids=positions).logits
    flat = network(input_ids=form(ids), position_ids=form(positions)).logits
    torch.testing.assert_close(flat.view_as(rows), rows, rtol=1e-5, atol=1e-5)


class Forgetful(torch.nn.Module):
    """A llama that is not told the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = built("llama")

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        return self.inner(input_ids=input_ids)


def test_a_model_that_lets_documents_see_one_another_is_refused() -> None:
    mamba = build_model(ModelConfig(attn_implementation="eager"), MAMBA, seed=3)
    for network in (mamba, Forgetful()):
        with pytest.raises(ConfigError, match=r"data\.packing=false"):
            check_apart(Engine(network), "sdpa")


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    network = built("llama").train()
    check_apart(Engine(network), "sdpa")
    assert network.training
