"""FP8 with the hardware emulated: the same casts and scales, multiplied in higher precision."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.base.errors import ConfigError
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.run import Precision, TrainConfig
from r1hpc.train.checkpoint.identity import Identity, precision_of
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.model.low_precision import compute_in_fp8, is_fp8
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import build_engine, deepspeed_config
from r1hpc.train.rollout.policy import build_policy, placement
from tests.fetched import TORCHAO, wheel
from tests.train.two_ranks import run_on_two_ranks, take_step

_SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_LARGEST = 448.0  # of float8_e4m3fn (arXiv 2209.05433, table 1)


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the path, of the ranks too."""
    folder = str(wheel(TORCHAO))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)


def llama(hidden_size: int = 32) -> AutoModelForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=1, num_attention_heads=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def rounded(matrix: torch.Tensor, dim: int | None) -> torch.Tensor:
    """To 8 bits and back: scaled so that the largest of a row, or of all, is 448."""
    wide = matrix.double()
    largest = wide.abs().amax() if dim is None else wide.abs().amax(dim, keepdim=True)
    scale = _LARGEST / largest
    if dim is not None:  # torchao's rowwise recipe takes powers of two, which lose nothing
        scale = 2.0 ** scale.log2().floor()
    return (wide * scale).to(torch.float8_e4m3fn).double() / scale


@pytest.mark.parametrize(("recipe", "dim"), [("tensorwise", None), ("rowwise", 1)])
def test_a_layer_multiplies_what_8_bits_leave(recipe: str, dim: int | None) -> None:
    network = llama()
    weight = network.model.layers[0].mlp.up_proj.weight
    compute_in_fp8(network, TrainConfig(fp8_recipe=recipe, fp8_emulate=True))
    layer = network.model.layers[0].mlp.up_proj
    assert is_fp8(layer)
    assert layer.weight is weight, "ZeRO's share, and the optimizer's, is of this very parameter"
    given = torch.randn(16, 32, dtype=torch.bfloat16)
    expected = rounded(given, dim) @ rounded(weight.detach(), dim).T
    exact = given.double() @ weight.detach().double().T
    found = layer(given).double()
    assert (found - expected).norm() / expected.norm() < 3e-3, "bf16 of the product, and no more"
    assert (found - exact).norm() / exact.norm() > 1e-2, "8 bits show"


def test_the_output_head_and_odd_sides_stay_as_they_are() -> None:
    network = llama()
    compute_in_fp8(network, TrainConfig(fp8_emulate=True))
    assert not is_fp8(network.lm_head)
    assert sum(map(is_fp8, network.modules())) == 7
    with pytest.raises(ConfigError, match="no layer of LlamaForCausalLM has sides that are multiples of 16"):
        compute_in_fp8(llama(hidden_size=24), TrainConfig(fp8_emulate=True))


def test_a_checkpoint_is_of_its_recipe() -> None:
    for recipe in ("rowwise", "tensorwise"):
        train = TrainConfig(precision=Precision.fp8, fp8_recipe=recipe)
        assert precision_of(train) == f"fp8 {recipe}"
    assert precision_of(TrainConfig()) == "bf16", "as in checkpoints of before"


def test_loaded_again_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Scales are of the moment: a checkpoint needs nothing more for them."""
    run_on_two_ranks(saved_and_loaded_under_each_stage, tmp_path)


def saved_and_loaded_under_each_stage(group: Group, folder: Path) -> None:
    for stage in (1, 2, 3):
        saved_and_loaded(group, folder / str(stage), stage)


def saved_and_loaded(group: Group, folder: Path, stage: int) -> None:
    words = ["train.precision=fp8", "train.fp8_emulate=true", "train.lr=1e-2"]
    words += ["model.activation_checkpointing=true"] if stage == 3 else []
    config = load.load(None, [*words, f"deepspeed.zero_stage={stage}"])
    network = build_policy(config, _SHAPE, placement(config, group, divided=True))
    asked = deepspeed_config(config, world_size=group.world_size, on_gpu=False, load_universal=False)
    engine = build_engine(network, asked)
    assert sum(map(is_fp8, engine.module.modules())) == 14
    store = CheckpointStore(folder / "checkpoints")
    if group.rank == 0:
        store.begin(1, "t")
    group.barrier()
    identity = Identity("data", "plan", 4, "model", precision_of(config.train), stage, group.world_size)
    ours = Snapshots(store, group, 1, "t", identity, store.root)
    before = [take_step(engine, number, group) for number in range(3)]
    ours.save(engine, 3, {"seed": 0}, hurry=False, write_more=lambda folder: None)
    ours.finish()
    undisturbed = [take_step(engine, number, group) for number in range(3, 6)]
    newest = ours.choose()
    assert newest is not None
    ours.load(engine, newest)
    assert [take_step(engine, number, group) for number in range(3, 6)] == undisturbed
    assert len({*before, *undisturbed}) == 6
