"""A base in 4 bits under adapters: real bitsandbytes, peft and DeepSpeed, attempts in processes of their own."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema import RunConfig
from r1hpc.train.distributed import Group
from r1hpc.train.engine import build_engine, deepspeed_config
from r1hpc.train.export import export_model, weights_of
from r1hpc.train.identity import Identity, precision_of
from r1hpc.train.nf4 import dequantized, held_bytes, is_nf4
from r1hpc.train.policy import Reference, base_facts, build_policy, placement
from r1hpc.train.snapshot import Snapshots
from tests.train.two_ranks import gathered, run_on_two_ranks

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.xdist_group("qlora")  # its fixtures are dear

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 32,
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
STAGES = (0, 1, 2, 3)


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
    lie = placement(config, Group(0, 0, 1, torch.device("cpu")), divided=False)
    return build_policy(config, shape_in(Path(config.model.path or "")), lie)


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


def take_step(engine: Any, number: int, group: Group) -> str:
    """The loss of a step of its own batch, to the last bit."""
    draws = torch.Generator().manual_seed(10 * number + group.rank)
    ids = torch.randint(64, (2, 16), generator=draws)
    engine.set_gradient_accumulation_boundary(True)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach()).hex()


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
        with Reference(None, "the weights before").policy(engine) as reference:
            seen["reference"] = logits(reference)
        seen["losses"] = [take_step(engine, number, group) for number in range(3, 6)]
        seen["trained"] = logits(engine)
        seen["digest after"] = digest(engine.module)
        export_model(engine.module, group, folder / f"exported-{stage}", None)
        if group.rank == 0:
            torch.save(seen, folder / f"{stage}.pt")


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
