"""A base in 4 bits under adapters: real bitsandbytes, peft and DeepSpeed, each attempt in new processes."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.base.errors import ConfigError
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.checkpoint.deepspeed_io import CheckpointFiles
from r1hpc.train.checkpoint.identity import Identity, base_facts, precision_of
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.model.export import export_model, weights_of
from r1hpc.train.model.low_precision import is_nf4, load_adapters
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import build_engine, deepspeed_config
from r1hpc.train.parallel.errors import ResumeError
from r1hpc.train.rollout.policy import build_policy, placement, without_adapters
from r1hpc.train.rollout.torch_engine import TorchSampler
from tests.train.two_ranks import gathered, run_on_two_ranks, take_step

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.xdist_group("qlora")  # its fixtures are dear

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}


IDS = torch.tensor([[1, 5, 2, 7, 3, 3, 9, 60], [4, 4, 8, 1, 0, 6, 2, 33]])
STAGES = (0, 2, 3)


def model_folder(folder: Path, family: str = "llama") -> Path:
    """A model with weights that matter, as its folder."""
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[family]))
    for parameter in network.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(folder)
    return folder


def configured(model: Path, stage: int = 1, *words: str) -> RunConfig:
    asked = [f"model.path={model}", "model.lora_rank=4", "model.base_quantization=nf4", "stage=sft"]
    asked += ["train.lr=1e-2", "train.max_grad_norm=1.0", f"deepspeed.zero_stage={stage}", *words]
    if stage == 3:
        # Small enough that ZeRO 3 really parts the parameters of a tiny model.
        asked += ["model.activation_checkpointing=true"]
        asked += ["deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=40"]
    return load.load(None, asked)


def shape_in(model: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((model / "config.json").read_text())
    return values


def alone(config: RunConfig) -> Any:
    """The wrapped model in this process, without DeepSpeed."""
    place = placement(config, Group(0, 0, 1, torch.device("cpu")), divided=False)
    return build_policy(config, shape_in(Path(config.model.path or "")), place)


@torch.no_grad()
def logits(network: Any) -> Tensor:
    found: Tensor = network(input_ids=IDS).logits.float()
    return found


def digest(network: Any) -> str:
    """Of the frozen weights as they lie in memory, and of their scales."""
    bits = hashlib.sha256()
    for name, value in gathered(network).items():
        if is_nf4(network.get_parameter(name)):
            bits.update(value.view(torch.uint8).numpy().tobytes())
            bits.update(network.get_parameter(name).quant_state.absmax.numpy().tobytes())
    return bits.hexdigest()


def built(group: Group, folder: Path, stage: int) -> tuple[Any, Snapshots]:
    config = configured(folder.parent / "model", stage)
    network = build_policy(config, shape_in(folder.parent / "model"), placement(config, group, divided=True))
    asked = deepspeed_config(config, world_size=group.world_size, on_gpu=False, load_universal=False)
    engine = build_engine(network, asked)
    store = CheckpointStore(folder.parent / f"checkpoints-{stage}")
    precision = precision_of(config.train, "nf4")
    identity = Identity(
        "data", "plan", 4, "model", precision, stage, group.world_size, base_facts(config, group)
    )
    return engine, Snapshots(store, group, 1, "t", identity, store.root)


def begun(group: Group, folder: Path) -> None:
    for stage in STAGES:
        engine, ours = built(group, folder, stage)
        if group.rank == 0:
            CheckpointStore(ours._store.root).begin(1, "t")
        group.barrier()
        seen: dict[str, Any] = {"digest": digest(engine.module), "before": logits(engine)}
        for number in range(3):
            take_step(engine, number, group)
        ours.save(engine, 3, {"seed": 0}, hurry=False, write_more=lambda folder: None)
        ours.finish()
        with without_adapters(engine.module):
            seen["reference"] = logits(engine.module)
        seen["losses"] = [take_step(engine, number, group) for number in range(3, 6)]
        seen["trained"] = logits(engine)
        seen["digest after"] = digest(engine.module)
        if stage == 3:
            seen["sampled by"] = logits(replica_of(engine.module, group, folder))
        export_model(engine.module, group, folder / f"exported-{stage}", None)
        if group.rank == 0:
            torch.save(seen, folder / f"{stage}.pt")


def replica_of(network: Any, group: Group, folder: Path) -> Any:
    """What ZeRO 3 samples with, the second time it is filled."""
    config = configured(folder.parent / "model", 3)

    def build() -> Any:
        return build_policy(
            config, shape_in(folder.parent / "model"), placement(config, group, divided=False)
        )

    sampler = TorchSampler(group, SpecialIds(0, 1), zero_stage=3, replica=build)
    sampler.sync_weights(network)
    sampler.release()
    sampler.sync_weights(network)
    return sampler._network


def gone_on(group: Group, folder: Path) -> None:
    for stage in STAGES:
        engine, ours = built(group, folder, stage)
        newest = ours.choose()
        assert newest is not None
        ours.load(engine, newest)
        seen: dict[str, Any] = {"digest": digest(engine.module)}
        seen["losses"] = [take_step(engine, number, group) for number in range(3, 6)]
        seen["trained"] = logits(engine)
        if group.rank == 0:
            torch.save(seen, folder / f"{stage}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `first` and `second`: what two attempts in processes of their own saw."""
    folder = tmp_path_factory.mktemp("qlora")
    model_folder(folder / "model")
    for name, body in (("first", begun), ("second", gone_on)):
        (folder / name).mkdir()
        run_on_two_ranks(body, folder / name)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_process_goes_on_to_the_bit(trained: Path, stage: int) -> None:
    first, second = (torch.load(trained / name / f"{stage}.pt") for name in ("first", "second"))
    assert second["losses"] == first["losses"]
    assert torch.equal(second["trained"], first["trained"])
    assert first["digest"] == first["digest after"] == second["digest"], "the base is the same bits"
    assert len({*first["losses"]}) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_is_the_base_without_adapters(trained: Path, stage: int) -> None:
    seen = torch.load(trained / "first" / f"{stage}.pt")
    assert torch.equal(seen["reference"], seen["before"])
    assert not torch.equal(seen["trained"], seen["before"])


def test_what_zero_3_samples_with_is_the_policy(trained: Path) -> None:
    seen = torch.load(trained / "first" / "3.pt")
    assert torch.equal(seen["sampled by"], seen["trained"])


@pytest.mark.parametrize("stage", STAGES)
def test_merged_it_computes_what_the_adapters_did(trained: Path, stage: int) -> None:
    seen = torch.load(trained / "first" / f"{stage}.pt")
    folder = trained / "first" / f"exported-{stage}"
    values = shape_in(folder)
    assert "quantization_config" not in values
    assert values["dtype"] == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    difference = logits(merged) - seen["trained"]
    assert difference.norm() < 0.05 * (seen["trained"] - seen["before"]).norm(), "of what was learnt"
    assert difference.abs().max() < 2**-5 * seen["trained"].abs().max(), "four steps of bf16"


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_adapters_alone(trained: Path, stage: int) -> None:
    """Of each trained number 12 bytes of fp32 copy and moments, below ZeRO 3 its 2 of bf16."""
    names = {
        name
        for path in (trained / f"checkpoints-{stage}").rglob("*model_states.pt")
        for name in torch.load(path, weights_only=False)["module"]
    }
    assert not [name for name in names if ".lora_" not in name]
    network = alone(configured(trained / "model"))
    num_trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    files = (trained / f"checkpoints-{stage}").rglob("*.pt")
    tensors = sum(path.stat().st_size for path in files if not path.name.startswith("streams"))
    assert 12 * num_trained < tensors


def test_of_a_tied_head_nothing_is_left_either(tmp_path: Path) -> None:
    """DeepSpeed leaves a frozen weight out by the first of its names (exclude_frozen_parameters)."""
    network = alone(configured(model_folder(tmp_path / "model", "gpt2")))
    engine = SimpleNamespace(module=network, checkpoint_engine=None)
    files = CheckpointFiles(Group(0, 0, 1, torch.device("cpu")), 1, asynchronous=False, ranks_per_node=1)
    files.attach(engine)
    left_out = {name for name, p in network.named_parameters() if not p.requires_grad}
    given = {name: value for name, value in network.state_dict().items() if name not in left_out}
    assert [name for name in given if ".lora_" not in name], "the second name of the embedding"
    files.save({"module": given}, str(tmp_path / "mp_rank_00_model_states.pt"))
    saved = torch.load(tmp_path / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert saved
    assert not [name for name in saved if ".lora_" not in name]
    load_adapters(saved, network)


@pytest.mark.parametrize("family", SHAPES)
def test_every_linear_layer_but_the_head_lies_in_4_bits(tmp_path: Path, family: str) -> None:
    network = alone(configured(model_folder(tmp_path / "model", family)))
    quantized = [name for name, p in network.named_parameters() if is_nf4(p)]
    assert len(quantized) == {"llama": 14, "gpt2": 4}[family]
    assert not [name for name in quantized if "lm_head" in name or "emb" in name or "wte" in name]
    assert all(p.requires_grad == (".lora_" in name) for name, p in network.named_parameters())


@pytest.mark.parametrize("family", SHAPES)
def test_a_weight_is_the_nearest_of_16_in_its_block(tmp_path: Path, family: str) -> None:
    """The 16 values of the paper's appendix E, times the largest magnitude of 64 neighbours."""
    from bitsandbytes.functional import get_4bit_type

    path = model_folder(tmp_path / "model", family)
    exact = {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(path).named_parameters()}
    network, code = alone(configured(path, 1, "train.precision=fp32")), get_4bit_type("nf4", device="cpu")
    found = {w.name: w for w in weights_of(network) if is_nf4(w.tensor)}
    assert found
    for name, weight in found.items():
        with weight.whole() as value:
            ours, theirs = ((w.T if weight.is_turned else w).reshape(-1, 64) for w in (value, exact[name]))
        scale = theirs.abs().amax(1, keepdim=True)
        nearest = code[(theirs[..., None] / scale[..., None] - code).abs().argmin(-1)] * scale
        torch.testing.assert_close(ours, nearest, rtol=1e-6, atol=0)


def test_a_row_of_broken_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes 0.50.2 dequantises it with the scales of other blocks on a CPU."""
    monkeypatch.setitem(SHAPES["llama"], "intermediate_size", 96)
    with pytest.raises(ConfigError, match=r"linear layers of 96 inputs"):
        alone(configured(model_folder(tmp_path / "model")))


def held_bytes(network: torch.nn.Module) -> int:
    """Return the bytes of all parameters, with the scales of those in four bits."""
    parameters: list[Any] = list(network.parameters())
    scales = sum(p.quant_state.absmax.nbytes for p in parameters if is_nf4(p))
    return int(sum(p.nbytes for p in parameters) + scales)


def test_it_is_held_in_9_sixteenths_of_a_byte_a_weight(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model")
    four_bits, plain = (
        held_bytes(alone(configured(path, 1, *words))) for words in ((), ("model.base_quantization=none",))
    )
    layers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).model.layers.parameters())
    norms = 4 * 64
    assert plain - four_bits == (layers - norms) * (2 - 0.5 - 4 / 64)


def test_asked_in_between_it_still_trains(tmp_path: Path) -> None:
    """Asked in eval mode on a CPU with AVX512-BF16, a layer of bitsandbytes would repack its weight."""
    network = alone(configured(model_folder(tmp_path / "model")))
    before = digest(network)
    asked = logits(network.eval())
    assert torch.equal(logits(network.train()), asked)
    network(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert digest(network) == before


def test_a_checkpoint_is_of_its_base(tmp_path: Path) -> None:
    """It does not hold the frozen weights: others under the same name would be taken for them."""
    config = configured(model_folder(tmp_path / "model"))
    group = Group(0, 0, 1, torch.device("cpu"))
    before = base_facts(config, group)
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama"])).save_pretrained(
        tmp_path / "model"
    )
    assert base_facts(config, group) != before
    assert base_facts(load.load(None, []), group) == {}, "as in checkpoints of before"
    assert precision_of(config.train, "nf4") == "bf16 on nf4"


def test_without_bitsandbytes_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"r1hpc\[qlora\]"):
        alone(configured(model_folder(tmp_path / "model")))


def test_other_weights_are_not_taken_for_adapters(tmp_path: Path) -> None:
    network = alone(configured(model_folder(tmp_path / "model")))
    adapters = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    load_adapters(adapters, network)
    name = next(iter(adapters))
    with pytest.raises(ResumeError, match=f"it holds {name}x"):
        load_adapters({**adapters, f"{name}x": adapters[name]}, network)
    del adapters[name]
    with pytest.raises(ResumeError, match=f"it lacks {name}"):
        load_adapters(adapters, network)
