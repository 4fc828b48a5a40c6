"""What is saved is read again as the same configuration, also where the schema has changed since."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import ConfigError
from r1hpc.config.load import as_layer, load, read, renew, save
from r1hpc.config.schema.run import Precision, RunConfig, TrainConfig
from r1hpc.config.yaml_files import read_yaml, write_yaml


def test_a_schedule_of_weights_is_frozen_as_it_is(tmp_path: Path) -> None:
    config = load(None, ["data.mix.schedule=[{from_step: 7, weights: {web: 0.25, math: 1}}]"])
    save(config, tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == config
    assert config.data.mix.schedule == [{"from_step": 7, "weights": {"web": 0.25, "math": 1}}]
    with pytest.raises(ConfigError, match="has no use in stage rl: remove it"):
        load(None, ["stage=rl", "data.mix.schedule=[{from_step: 7, weights: {web: 1}}]"])


def test_a_range_that_was_narrowed_keeps_an_old_run_readable(tmp_path: Path) -> None:
    save(dataclasses.replace(RunConfig(), train=TrainConfig(beta1=2.0)), tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml").train.beta1 == 2.0
    with pytest.raises(ConfigError, match="beta1 is 2"):
        load(tmp_path / "config.yaml")


_TEXT = st.text(max_size=20).filter(lambda text: "\x00" not in text)


@settings(max_examples=40)
@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-300, 1e300),
    precision=st.sampled_from(Precision),
    path=st.one_of(st.none(), _TEXT),
    environment=st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), _TEXT, max_size=3),
    setup=st.lists(_TEXT | st.text("\\\\${}:a'\"# ", max_size=8), max_size=3),
)
def test_save_and_read_give_the_same_object(
    tmp_path_factory: pytest.TempPathFactory,
    steps: int,
    lr: float,
    precision: Precision,
    path: str | None,
    environment: dict[str, str],
    setup: list[str],
) -> None:
    base = RunConfig()
    config = dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, num_steps=steps, lr=lr, precision=precision),
        data=dataclasses.replace(base.data, path=path),
        cluster=dataclasses.replace(base.cluster, environment=environment, setup=setup),
    )
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    save(config, file)
    assert read(file) == config
    assert file.stat().st_mode & 0o077 == 0


def test_the_saved_file_is_plain_yaml(tmp_path: Path) -> None:
    save(load("smoke", ["train.lr=1e-5"]), tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert sorted(content) == sorted(field.name for field in dataclasses.fields(RunConfig))
    assert content["train"]["precision"] == "bf16"


def test_a_configuration_is_frozen() -> None:
    config = load("smoke")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stage = "sft"  # type: ignore[misc]
    assert type(config) is RunConfig
    assert type(config.model.config) is dict


def test_a_run_that_goes_on_keeps_to_the_keys_its_frozen_code_knows(tmp_path: Path) -> None:
    """Its code may be of an earlier version, which refuses a key that it lacks."""
    path, config = tmp_path / "config.yaml", load("rl_smoke")
    older = as_layer(config)
    del older["task"]["first_item"], older["checkpoint"]["keep"], older["evaluate"]
    write_yaml(path, older)
    changed = load("rl_smoke", ["checkpoint.keep=5", "train.num_steps=99"])
    renew(changed, path)
    written = read_yaml(path)
    assert "first_item" not in written["task"]
    assert written["checkpoint"]["keep"] == 5, "what was asked for is not left out in silence"
    assert written["train"]["num_steps"] == 99
    assert read(path) == changed


def test_a_run_begun_before_rl_kl_gradient_keeps_the_gradient_it_had(tmp_path: Path) -> None:
    """New runs have the corrected one. The frozen code of the old run does not know the key."""
    path = tmp_path / "config.yaml"
    older = as_layer(load("rl_smoke"))
    assert older["rl"].pop("kl_gradient") == "corrected"
    write_yaml(path, older)
    frozen = read(path)
    assert frozen.rl.kl_gradient == "value"
    renew(dataclasses.replace(frozen, train=dataclasses.replace(frozen.train, num_steps=99)), path)
    assert "kl_gradient" not in read_yaml(path)["rl"]
    assert read(path).train.num_steps == 99


def test_a_run_that_goes_on_keeps_settings_removed_since(tmp_path: Path) -> None:
    """Its frozen code still mixes by them."""
    path, removed = tmp_path / "config.yaml", {"online": "odm", "every": 4, "smoothing": 0.5}
    older = as_layer(load("smoke"))
    older["data"]["mix"] |= removed
    write_yaml(path, older)
    renew(dataclasses.replace(read(path), stage="pretrain"), path)
    assert read_yaml(path)["data"]["mix"] == {"schedule": [], **removed}


def test_a_run_begun_before_rewards_is_still_readable(tmp_path: Path) -> None:
    older = as_layer(load("smoke"))
    del older["reward"]
    write_yaml(tmp_path / "config.yaml", older)
    assert read(tmp_path / "config.yaml") == load("smoke")
