"""Models that a run cannot be right with, refused before the queue."""

from typing import Any

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.train.checks.model import check_models

_PHI = {
    "model_type": "phi3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}


def _asks(*overrides: str) -> RunConfig:
    return load.load(
        None,
        [
            "stage=generate",
            "model.path=to-come",
            "task.name=chain_sum",
            "model.tokenizer=characters",
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    ("longest", "change", "is_refused"),
    [
        (49, {}, True),
        (48, {}, False),
        (49, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, False),
        (
            49,
            {
                "original_max_position_embeddings": None,
                "rope_parameters": {**_LONG, "original_max_position_embeddings": 64},
            },
            True,
        ),
    ],
)
def test_a_cache_of_two_rotations_is_refused(longest: int, change: dict[str, Any], is_refused: bool) -> None:
    """The sampler keeps what it rotated by the short factors, once the long ones count."""
    config = _asks("rollout.max_prompt_length=16", f"rollout.max_completion_length={longest}")
    model = {
        key: value
        for key, value in ({**_PHI, "rope_parameters": _LONG} | change).items()
        if value is not None
    }
    if not is_refused:
        check_models(config, model, None)
        return
    with pytest.raises(ConfigError, match=r"longrope.*64 tokens.*65 together"):
        check_models(config, model, None)


def test_a_slip_in_the_name_of_a_shape_is_noted() -> None:
    config = load.load("smoke", ["model.config.num_hidden_layer=48", "model.config.rope_theta=1e4"])
    (note,) = check_models(config, None, None)
    assert note == "model.config.num_hidden_layer changes no shape: did you mean num_hidden_layers?"


def test_dropout_is_refused_in_rl_with_the_words_that_end_it() -> None:
    rl = ["stage=rl", "rollout.num_generations=4"]
    drops = {**_PHI, "resid_pdrop": 0.1, "attention_dropout": 0.0}
    with pytest.raises(ConfigError, match=r"dropout \(resid_pdrop\).* add model\.config\.resid_pdrop=0"):
        check_models(_asks(*rl), drops, None)
    check_models(_asks(*rl, "model.config.resid_pdrop=0"), drops, None)
    check_models(_asks(*rl, "rollout.max_logprob_difference=1"), drops, None)
    check_models(_asks(), drops, None)
