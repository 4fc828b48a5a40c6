"""The exchanged attentions compute what they say, see no future, and decode with a cache as without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import sdpa_attention

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.train.model import attention
from r1hpc.train.model.attention import GAMMA, OURS, add_gates
from r1hpc.train.model.model import build_model

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 32,
    "vocab_size": 24,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
LLAMA: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 24, "model_type": "llama"}
MODELS: dict[str, dict[str, Any]] = {"gpt2": GPT2, "llama": LLAMA, "qwen2": {**LLAMA, "model_type": "qwen2"}}
NAMES = ("softmax", *OURS)
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
"""An attention mask with padding on the left."""

over_models = pytest.mark.parametrize("kind", MODELS)
over_names = pytest.mark.parametrize("name", NAMES)


def build(kind: str, name: str, **settings: Any) -> Any:
    network = build_model(ModelConfig(attn_implementation=name), {**MODELS[kind], **settings}, seed=1)
    for layer, gamma in enumerate(gammas(network)):
        nn.init.constant_(gamma, 0.5 + layer)
    return network.double().eval()


def gammas(network: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in network.named_parameters() if name.endswith(GAMMA)]


def ids(batch: int = 2, seq_len: int = 7) -> Tensor:
    return torch.randint(24, (batch, seq_len), generator=torch.Generator().manual_seed(5))


def by_hand(name: str, gamma: float, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """One attention, number by number, in float64. Shapes as transformers', result (batch, n, heads, d)."""
    batch, heads, num_queries, head_dim = query.shape
    shared = heads // key.shape[1]
    output = torch.zeros(batch, num_queries, heads, head_dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(num_queries):
                visible = [k for k in range(key.shape[2]) if seen[b, 0, q, k]]
                weights = {}
                for k in visible:
                    score = float(query[b, h, q] @ key[b, h // shared, k]) / head_dim**0.5
                    if name == "sigmoid_bias":
                        weights[k] = 1 / (1 + len(visible) * torch.e ** (-score))
                    else:
                        weights[k] = 1 / (1 + torch.e ** (-gamma * score))
                total = sum(weights.values()) if name == "gate_norm" else 1.0
                for k, weight in weights.items():
                    output[b, q, h] += weight / total * value[b, h // shared, k]
    return output


def layer_with(gamma: float) -> nn.Module:
    layer = nn.Module()
    layer.register_parameter(GAMMA, nn.Parameter(torch.tensor([gamma], dtype=torch.float64)))
    return layer


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_against_the_formula(name: str, num_key_value_heads: int) -> None:
    source = torch.Generator().manual_seed(2)
    query = 3 * torch.randn(2, 4, 3, 8, dtype=torch.float64, generator=source)
    key, value = torch.randn(2, 2, num_key_value_heads, 5, 8, dtype=torch.float64, generator=source)
    seen = torch.ones(3, 5, dtype=torch.bool).tril(diagonal=2) & torch.tensor([False] + [True] * 4)
    seen = torch.stack([seen, torch.ones(3, 5, dtype=torch.bool).tril(diagonal=2)])[:, None]
    expected = by_hand(name, 0.7, query, key, value, seen)
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    for mask in (seen, additive):
        output, _ = getattr(attention, name)(layer_with(0.7).eval(), query, key, value, mask)
        torch.testing.assert_close(output, expected)
    full = torch.ones_like(seen)
    output, _ = getattr(attention, name)(layer_with(0.7).eval(), query, key, value, None)
    torch.testing.assert_close(output, by_hand(name, 0.7, query, key, value, full))


@pytest.mark.parametrize("name", OURS)
def test_a_query_that_sees_nothing_is_finite_and_so_are_its_gradients(name: str) -> None:
    query, key, value = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3))
    seen = torch.tensor([[[[False, False], [False, True]]]])
    output, _ = getattr(attention, name)(layer_with(0.5), query, key, value, seen)
    output.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (query, key, value))


@over_models
@over_names
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(kind: str, name: str) -> None:
    network, some = build(kind, name), ids()
    other = some.clone()
    other[:, 4] = (other[:, 4] + 1) % 24
    before, after = network(input_ids=some).logits, network(input_ids=other).logits
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-13)
    assert (before[:, 4:] - after[:, 4:]).abs().min(dim=-1).values.max() > 1e-9
    shorter = network(input_ids=some[:, :4]).logits
    torch.testing.assert_close(before[:, :4], shorter, rtol=0, atol=1e-13)


@over_models
@over_names
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(kind: str, name: str) -> None:
    network, some = build(kind, name), ids()
    positions = (PADDED.cumsum(-1) - 1).clamp_min(0)
    padded = network(input_ids=some, attention_mask=PADDED, position_ids=positions).logits
    torch.testing.assert_close(padded[0, 3:], network(input_ids=some[:1, 3:]).logits[0])
    torch.testing.assert_close(padded[1], network(input_ids=some[1:]).logits[0])


@over_models
@over_names
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(kind: str, name: str) -> None:
    network, some = build(kind, name), ids()
    positions = (PADDED.cumsum(-1) - 1).clamp_min(0)
    full = network(input_ids=some, attention_mask=PADDED, position_ids=positions).logits
    cache, step_logits, start = None, [], 0
    for end in (3, 5, 6, 7):  # a prompt, two tokens at once, then one by one
        answer = network(
            input_ids=some[:, start:end],
            attention_mask=PADDED[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = answer.past_key_values, end
        step_logits.append(answer.logits)
    seen = PADDED.bool()
    torch.testing.assert_close(torch.cat(step_logits, dim=1)[seen], full[seen])


@over_models
@pytest.mark.parametrize("name", ["gate", "gate_norm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_gamma(kind: str, name: str, checkpointing: bool) -> None:
    settings = ModelConfig(attn_implementation=name, activation_checkpointing=checkpointing)
    network = build_model(settings, MODELS[kind], seed=1)
    assert [gamma.item() for gamma in gammas(network)] == [0.5, 0.5]
    network(input_ids=ids(), labels=ids()).loss.backward()
    assert all(gamma.grad is not None and gamma.grad.abs() > 0 for gamma in gammas(network))


def test_softmax_is_sdpa() -> None:
    assert torch.equal(*(build("llama", name)(input_ids=ids()).logits for name in ("softmax", "sdpa")))


@pytest.mark.parametrize(
    ("dtype", "capability", "shared"),
    [(torch.float32, (8, 0), False), (torch.bfloat16, (8, 0), True), (torch.float16, (7, 5), False)],
)
def test_keys_are_repeated_where_no_fused_kernel_shares_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], shared: bool
) -> None:
    """There is no GPU here: a tensor says that it lies on one."""

    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    key = torch.zeros(1, 2, 4, 8, dtype=dtype)
    assert sdpa_attention.use_gqa_in_sdpa(None, key.as_subclass(OnGpu), key) is shared
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key), "on a CPU they are shared as before"


def test_the_arms_of_an_ablation_start_from_the_same_weights() -> None:
    one, other = (dict(build("qwen2", name).named_parameters()) for name in ("sdpa", "gate"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(other) == len(one) + 2


def test_attention_dropout_acts_in_training_only() -> None:
    network = build("llama", "gate", attention_dropout=0.5)
    assert torch.equal(network(input_ids=ids()).logits, network(input_ids=ids()).logits)
    network.train()
    assert not torch.equal(network(input_ids=ids()).logits, network(input_ids=ids()).logits)


def test_dropout_comes_from_the_config() -> None:
    for given, expected in (({}, 0.1), ({"attn_pdrop": 0.0, "resid_pdrop": 0.2, "embd_pdrop": 0.3}, 0.0)):
        network: Any = build_model(ModelConfig(), {**GPT2, **given}, seed=1)
        block = network.transformer.h[0]
        assert block.attn.attn_dropout.p == expected
        assert block.attn.resid_dropout.p == block.mlp.dropout.p == given.get("resid_pdrop", 0.1)
        assert network.transformer.drop.p == given.get("embd_pdrop", 0.1)


def test_a_folder_without_gammas_starts_at_the_initial_ones(tmp_path: Path) -> None:
    plain = build_model(ModelConfig(), LLAMA, seed=1)
    plain.save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), attn_implementation="gate")
    network = build_model(settings, LLAMA, seed=2)
    assert [gamma.item() for gamma in gammas(network)] == [0.5, 0.5]
    state = {**plain.state_dict(), f"model.layers.1.self_attn.{GAMMA}": torch.tensor([0.75])}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    network = build_model(settings, LLAMA, seed=2)
    assert [gamma.item() for gamma in gammas(network)] == [0.5, 0.75]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'sigmoid'; known: eager, .*gate, gate_norm, .*sigmoid_bias"):
        build_model(ModelConfig(attn_implementation="sigmoid"), LLAMA, seed=1)


def test_a_model_with_attention_built_in_is_refused() -> None:
    mamba = {"model_type": "mamba", "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match="MambaForCausalLM does not take its attention"):
        build_model(ModelConfig(attn_implementation="gate"), mamba, seed=1)


def test_a_family_without_fused_attention_is_told_to_take_eager() -> None:
    gemma = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ConfigError, match=r"=sdpa: .*Take model\.attn_implementation=eager"):
        build_model(ModelConfig(), gemma, seed=1)


def test_what_is_not_computed_is_refused() -> None:
    gemma = {**LLAMA, "model_type": "gemma2", "head_dim": 8}
    network = build_model(ModelConfig(attn_implementation="gate"), gemma, seed=1)
    with pytest.raises(ConfigError, match="needs softcap"):
        network(input_ids=ids())


def test_without_gates_the_error_says_where_they_come_from() -> None:
    config = AutoConfig.for_model(**LLAMA)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="gate_norm")
    with pytest.raises(ConfigError, match="add_gates"):
        network(input_ids=ids())
    add_gates(network, "gate_norm")
    assert network(input_ids=ids()).logits.isfinite().all()
