"""YAML files and dotted overrides, good and bad, as tables."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import ConfigError
from r1hpc.base.units import parse_time
from r1hpc.config.load import (
    as_layer,
    assets,
    find_job,
    known_keys,
    load,
    read,
    read_yaml,
    renew,
    save,
    write_yaml,
)
from r1hpc.config.other_names import _HERE
from r1hpc.config.schema import Precision, RunConfig, TrainConfig


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1HPC_CLUSTER", raising=False)


def _job(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_steps=20", 20),
        ("train.lr=1e-4", 1e-4),
        ("train.lr=3E-5", 3e-5),
        ("train.lr=1.5e-4", 1.5e-4),
        ("train.lr=.5", 0.5),
        ("train.lr=1", 1.0),
        ("train.precision=fp16", Precision.fp16),
        ("train.gradient_accumulation_steps=", None),
        ("train.gradient_accumulation_steps=null", None),
        ("train.gradient_accumulation_steps=4", 4),
        ("data.path=/scratch/a b=c", "/scratch/a b=c"),
        ("resources.time='1-12:00:00'", "1-12:00:00"),
        ('resources.mem="0"', "0"),
        # What YAML 1.1 would make of these: 43200 (minutes!), 83, True, a date, 16.
        ("resources.time=12:00:00", "12:00:00"),
        ("resources.job_name=0123", "0123"),
        ("resources.partition=on", "on"),
        ("resources.partition=no", "no"),
        ("resources.job_name=2026-01-01", "2026-01-01"),
        ("resources.comment=0x10", "0x10"),
        ("data.path=${train.num_steps}", "100"),
        (
            "cluster.setup=['source ${HOME}/x; echo $((1+1)) \\\\${a']",
            ["source ${HOME}/x; echo $((1+1)) \\\\${a"],
        ),
        ("resources.exclusive=true", True),
        ("resources.sbatch={gres: gpu:4}", {"gres": "gpu:4"}),
        ("resources.sbatch.gres=gpu:4", {"gres": "gpu:4"}),
        ("cluster.setup=[module load cuda, source x]", ["module load cuda", "source x"]),
        ("model.config={model_type: llama, hidden_size: 64}", {"model_type": "llama", "hidden_size": 64}),
    ],
)
def test_good_overrides(override: str, expected: Any) -> None:
    key = override.partition("=")[0].replace("sbatch.gres", "sbatch")
    value = _value(load(None, [override]), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.nmu_steps=2", r"'train.nmu_steps' \(did you mean 'train.num_steps'\?\)"),
        ("trian.lr=2", "unknown key 'trian'"),
        ("resources.node=2", "did you mean 'resources.nodes'"),
        ("cluster.partion=x", "did you mean 'cluster.partition'"),
        ("train.num_steps", "is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("train=3", r"train is a section: give its keys, as in train\.NAME=VALUE"),
        ("train.num_steps=many", "train.num_steps"),
        ("train.num_steps=1.5", "train.num_steps"),
        ("train.num_steps=", "num_steps"),
        ("train.num_steps=0", "train.num_steps is 0: it must be at least 1"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=-1", "train.lr is -1"),
        ("train.lr=.inf", "train.lr is inf"),
        ("train.lr=.nan", "train.lr is nan"),
        ("train.precision=int8", "train.precision"),
        ("train.warmup_steps=-1", "train.warmup_steps is -1"),
        ("train.min_lr_fraction=1.5", "train.min_lr_fraction is 1.5"),
        ("data.seq_len=1", "data.seq_len is 1"),
        ("data.seed=99999999999999999999", "data.seed is out of range: it must lie between"),
        ("train.seed=-1", "train.seed is -1: it must be at least 0"),
        ("data.verify=never", "data.verify is 'never': it must be one of once, every"),
        ("data.recipe=null", "data.path=DIR"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage is 4: it must be one of 0, 1, 2, 3"),
        ("checkpoint.keep=1", "checkpoint.keep is 1: it must be at least 2"),
        ("checkpoint.save_every=0", "checkpoint.save_every is 0"),
        ("monitor.period_s=0.1", "monitor.period_s is 0.1: it must be at least 0.5"),
        ("resources.nodes=0", "resources.nodes is 0"),
        ("resources.nodes=[1]", "resources.nodes"),
        ("resources.gpus_per_node=-1", "resources.gpus_per_node is -1"),
        ("resources.time='0'", "resources.time is 0"),
        ("resources.time=tomorrow", "time 'tomorrow' is not one of"),
        ("resources.exclusive=perhaps", "resources.exclusive"),
        ("resources.sbatch=[a]", r"resources\.sbatch is a mapping: write resources\.sbatch={NAME: VALUE}"),
        ("cluster.setup={a: b}", "cluster.setup is a list: write"),
        ("cluster.setup=[[]]", r"cluster.setup\[0\] is one value, not a list"),
        ("resources.sbatch.gres={}", "resources.sbatch.gres is one value, not a mapping"),
        ("train.lr={a: b}", "train.lr is one value, not a mapping"),
        ("train.beta1=1", "train.beta1 is 1.0: it must be at least 0 and below 1"),
        ("train.beta2=.nan", "train.beta2 is nan: it must be a finite number"),
        ("train.weight_decay=-1", "train.weight_decay is -1"),
        ("train.weight_decay=.inf", "must be a finite number"),
        ("monitor.period_s=.inf", "must be a finite number"),
        ("limits.max_gpu_hours=0", "limits.max_gpu_hours is 0.0: it must be above 0"),
        ("limits.max_crashes=-2", "limits.max_crashes is -2: it must be at least -1"),
        ("reward.terms.accuracy=.nan", "reward.terms.accuracy is nan: it must be a finite number"),
        ("reward.terms.accuracy=-1", "it would reward the opposite"),
        ("task.options.x=.inf", "task.options.x is inf"),
        ("model.attn_implementation=sdap", r"it must be one of eager, sdpa, .*did you mean 'sdpa'"),
        ('model.path="a\\0b"', "model.path holds a character that no file can hold"),
        ("task.options={a: 1, a: 2}", "the key 'a' is given twice"),
        ("data.path=${oc.env:HOME}", r"data\.path holds \${oc\.env:…}: only other keys can be referred to"),
        ("task.options={a: [{b: '${oc.env:HOME}'}]}", r"task\.options\.a\.b holds"),
        ("train=!replace {lr: 1}", "!replace is for a mapping such as reward.terms, not for train"),
        ("train.num_steps=" + "9" * 5000, "the value is not valid YAML"),
        ("data.path=" + "[" * 5000, "the value is not valid YAML"),
        ("cluster.setup=x", "setup"),
        ("stage=dance", "stage is 'dance'"),
        ("model.config={hidden_size: 3}", "model_type"),
        ("data.path=[", "the value is not valid YAML"),
        ("data.path=!!python/object/apply:os.system [id]", "the value is not valid YAML"),
        ("data.path=&a [*a]", "the value is not valid YAML"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message) as caught:
        load(None, [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_key_cannot_drive_the_terminal() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, ["train.\x1b[31mlr=1"])
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1e-4, learning_rate: 3}", "unknown key 'train.learning_rate'"),
        ("trian: {lr: 1e-4}", "unknown key 'trian'"),
        ("train: 3", "train is a section"),
        ("- a\n- b", "must hold keys and values, not a list"),
        ("just words", "must hold keys and values, not a str"),
        ("train: {lr: [}", "is not valid YAML"),
        ("train: !!python/object/apply:os.system ['touch hacked']", "is not valid YAML"),
        ("train: !!python/name:os.system", "is not valid YAML"),
        ("a: &a {lr: 1}\ntrain: *a", "aliases are not allowed"),
        (
            "include: [model/tinny]",
            r"'model/tinny', which is not in configs/ \(did you mean 'model/tiny'\?\)",
        ),
        ("train: {num_steps: many}", "train.num_steps"),
        ("include: model/tiny", "include must be a list"),
        ("include: 3", "include must be a list"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("resources: {sbatch: [a]}", "resources.sbatch is a mapping"),
        ("train: {lr: 1.0}\ntrain: {lr: 2.0}", "the key 'train' is given twice"),
        ("task: {options: {a: 1, a: 2}}", "the key 'a' is given twice"),
        (
            "reward: !replace {terms: {accuracy: 1}}",
            "!replace is for a mapping such as reward.terms, not for reward",
        ),
        ("reward: {terms: !replace [accuracy]}", "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(_job(tmp_path, text))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[{from_step: 2, weights: {2024: 1}}]", r"weights has the key 2024: the name of a source is text"),
        ("[{from_step: 2, weights: {a: .inf}}]", r"weights.a is inf: it must be a number"),
        ("[{from_step: 2}]", r"schedule\[0\].weights is None: give each source its weight"),
        ("[{weights: {a: 1}}]", r"schedule\[0\].from_step is None: it must be a whole number above 0"),
        ("[{from_step: 0, weights: {a: 1}}]", "from_step is 0: it must be a whole number above 0"),
        (
            "[{from_step: 5, weights: {a: 1}}, {from_step: 5, weights: {a: 2}}]",
            r"\[1\].from_step is 5.*above 5",
        ),
        ("[{from_step: 2, weights: {a: -1}}]", r"weights.a is -1: it must be a number, at least 0"),
        ("[{from_step: 2, weights: {a: x}}]", r"weights.a is 'x': it must be a number"),
        ("[{from_step: 2, weights: {a: .nan}}]", r"must be a (finite )?number"),
        ("[{from_step: 2, weights: {a: 0}}]", "weights are all 0: give one source some weight"),
        ("[{from: 2, weights: {a: 1}}]", "has no key 'from': it is {from_step: N"),
        ("[3]", r"data.mix.schedule\[0\] is a mapping"),
        ("{2: {a: 1}}", "data.mix.schedule is a list"),
    ],
)
def test_bad_schedules_of_weights(schedule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [f"data.mix.schedule={schedule}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.mix.online=exp4"], "data.mix.online is 'exp4': it must be one of none, odm"),
        (["data.mix.online=odm", "data.mix.every=50", "checkpoint.save_every=20"], "every=50 is no multiple"),
        (
            ["data.mix.online=odm", "data.mix.schedule=[{from_step: 9, weights: {a: 1}}]"],
            "data.mix.online=odm and data.mix.schedule from step 9 on both change the weights",
        ),
    ],
)
def test_bad_online_weights(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, settings)
    assert load(None, ["data.mix.online=odm", "data.mix.schedule=[{from_step: 1, weights: {a: 1}}]"])


def test_a_schedule_of_weights_is_frozen_as_it_is(tmp_path: Path) -> None:
    config = load(None, ["data.mix.schedule=[{from_step: 7, weights: {web: 0.25, math: 1}}]"])
    save(config, tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == config
    assert config.data.mix.schedule == [{"from_step": 7, "weights": {"web": 0.25, "math": 1}}]
    with pytest.raises(ConfigError, match="has no use in stage rl: remove it"):
        load(None, ["stage=rl", "data.mix.schedule=[{from_step: 7, weights: {web: 1}}]"])


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="aliases are not allowed"):
        load(_job(tmp_path, "\n".join(lines)))


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load(_job(tmp_path, "#" * (1 << 20) + "\ntrain: {lr: 1}"))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00train")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(path)


def test_a_folder_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no job"):
        load(tmp_path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(_job(tmp_path, "")) == load() == RunConfig()


def test_later_wins(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("train: {lr: 1.0, num_steps: 1, seed: 1, print_every: 1}")
    (tmp_path / "second.yaml").write_text("train: {lr: 2.0, num_steps: 2, seed: 2}")
    job = _job(tmp_path, "include: [first, second.yaml]\ntrain: {lr: 3.0, num_steps: 3}")
    train = load(job, ["train.lr=4.0"]).train
    assert (train.lr, train.num_steps, train.seed, train.print_every) == (4.0, 3, 2, 1)


class TestWhatIsReplaced:
    """What a person says wins over every preset."""

    def test_a_path_replaces_the_model_of_the_presets(self, tmp_path: Path) -> None:
        job = _job(tmp_path, "include: [model/tiny_gpt2]\nmodel: {path: mine}")
        for config in (load(job), load("rl_smoke", ["model.path=mine"])):
            assert (config.model.path, config.model.config, config.model.tokenizer) == ("mine", {}, None)

    def test_changes_beside_a_path_stay_in_any_order(self, tmp_path: Path) -> None:
        change = "model.config.num_hidden_layers=2"
        for overrides in ([change, "model.path=mine"], ["model.path=mine", change]):
            assert load("smoke", overrides).model.config == {"num_hidden_layers": 2}
        job = _job(tmp_path, "include: [model/tiny]\nmodel: {path: mine, config: {rope_theta: 1.0}}")
        assert load(job).model.config == {"rope_theta": 1.0}

    def test_the_model_of_a_frozen_run_is_read_as_it_is(self, tmp_path: Path) -> None:
        config = load("rl_smoke", ["model.path=mine", "model.config.n_head=4", "model.tokenizer=t.json"])
        save(config, tmp_path / "config.yaml")
        assert read(tmp_path / "config.yaml") == load(tmp_path / "config.yaml") == config

    def test_an_equals_sign_replaces_a_mapping_and_a_dot_changes_it(self) -> None:
        terms = load("rl_smoke", ["reward.terms={accuracy: 1.0}"]).reward.terms
        assert terms == {"accuracy": 1.0}
        terms = load("rl_smoke", ["reward.terms.format=0.5"]).reward.terms
        assert terms == {"accuracy": 1.0, "format": 0.5, "diversity": 0.1}
        assert load(None, ["reward.terms.format=0.5"]).reward.terms == {"accuracy": 1.0, "format": 0.5}
        assert load("rl_smoke", ["reward={terms: {accuracy: 2.0}}"]).reward.terms == {"accuracy": 2.0}
        assert load("rl_smoke", ["reward={gate_format: false}"]).reward.terms["diversity"] == 0.1

    def test_files_are_merged_unless_the_later_says_replace(self, tmp_path: Path) -> None:
        (tmp_path / "preset.yaml").write_text("task: {options: {a: 1, b: {c: 2, d: 3}}}")
        merged = load(_job(tmp_path, "include: [preset]\ntask: {options: {b: {c: 9}}}"))
        assert merged.task.options == {"a": 1, "b": {"c": 9, "d": 3}}
        inner = load(_job(tmp_path, "include: [preset]\ntask: {options: {b: !replace {c: 9}}}"))
        assert inner.task.options == {"a": 1, "b": {"c": 9}}
        whole = load(_job(tmp_path, "include: [preset]\ntask: {options: !replace {z: 9}}"))
        assert whole.task.options == {"z": 9}

    def test_terms_in_a_file_are_all_the_terms(self, tmp_path: Path) -> None:
        assert load(_job(tmp_path, "reward: {terms: {accuracy: 2.0}}")).reward.terms == {"accuracy": 2.0}

    def test_a_name_with_dots_in_a_mapping_of_numbers(self) -> None:
        terms = load(None, ["reward.terms.rewards.py:brevity=0.2"]).reward.terms
        assert terms["rewards.py:brevity"] == 0.2
        assert load(None, ["model.config.model_type=x", "model.config.a.b=1"]).model.config["a"] == {"b": 1}


def test_a_range_that_was_narrowed_keeps_an_old_run_readable(tmp_path: Path) -> None:
    save(dataclasses.replace(RunConfig(), train=TrainConfig(beta1=2.0)), tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml").train.beta1 == 2.0
    with pytest.raises(ConfigError, match="beta1 is 2"):
        load(tmp_path / "config.yaml")


def test_an_include_is_found_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = _job(tmp_path, "include: [model/tiny]\nmodel: {config: {num_hidden_layers: 7}}")
    config = load(job).model.config
    assert config["num_hidden_layers"] == 7
    assert config["hidden_size"] == 96


class TestClusterProfile:
    def test_by_name_and_by_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        named = load(None, cluster="example_a100")
        assert named.cluster.gpus_per_node == 8
        monkeypatch.setenv("R1HPC_CLUSTER", "example_a100")
        assert load() == named

    def test_by_path_and_below_overrides(self, tmp_path: Path) -> None:
        profile = tmp_path / "here.yaml"
        profile.write_text("name: here\npartition: big\naccount: mine")
        config = load(_job(tmp_path, "train: {lr: 2.0}"), ["cluster.account=ours"], cluster=str(profile))
        assert (config.cluster.name, config.cluster.partition, config.cluster.account) == (
            "here",
            "big",
            "ours",
        )

    def test_it_may_hold_only_cluster_keys(self, tmp_path: Path) -> None:
        profile = tmp_path / "here.yaml"
        profile.write_text("train: {lr: 1}")
        with pytest.raises(ConfigError, match=r"unknown key 'cluster\.train'"):
            load(None, cluster=str(profile))

    def test_an_unknown_one_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'example_a100'"):
            load(None, cluster="example_a10")


def test_find_job() -> None:
    smoke = assets("jobs") / "smoke.yaml"
    assert find_job("smoke") == find_job("smoke.yaml") == smoke
    assert find_job("jobs/smoke.yaml").samefile(smoke)
    with pytest.raises(
        ConfigError, match=r"no job 'smok' \(did you mean 'smoke'\?\), and .* in jobs/ there are: .*smoke"
    ):
        find_job("smok")
    with pytest.raises(ConfigError, match=r"no job 'mine/smoke\.yaml'"):  # never ours instead of theirs
        find_job("mine/smoke.yaml")


@pytest.mark.parametrize("job", sorted(path.stem for path in assets("jobs").glob("*.yaml")))
def test_every_shipped_job_loads(job: str) -> None:
    if "stages" in read_yaml(find_job(job)):
        with pytest.raises(ConfigError, match="is a chain of stages"):  # see tests/chain
            load(job)
    else:
        assert load(job).train.num_steps > 0


_NOT_OF_RUNS = ("budget", "campaign")
_CONFIGS = [
    path
    for path in sorted(assets("configs").rglob("*.yaml"))
    if path.relative_to(assets("configs")).with_suffix("").parts[0] not in _NOT_OF_RUNS  # see tests/hours
]


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path, tmp_path: Path) -> None:
    name = path.relative_to(assets("configs")).with_suffix("")
    if name.parts[0] == "cluster":
        assert load(None, cluster=name.name).cluster.name == name.name
    else:
        assert isinstance(load(_job(tmp_path, f"include: [{name}]")), RunConfig)


_TEXT = st.text(max_size=20).filter(lambda text: "\x00" not in text)


@settings(deadline=None, max_examples=40)
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


def test_known_keys_are_those_of_the_schema() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {"stage", "train.lr", "resources.sbatch", "cluster.environment"} <= set(keys)
    config = RunConfig()
    for key in keys:
        _value(config, key)


@settings(deadline=None, max_examples=40)
@given(seconds=st.integers(60, 10**7))
def test_a_time_limit_may_be_given_in_any_notation(seconds: int) -> None:
    minutes, rest = divmod(seconds, 60)
    assert parse_time(load(None, [f"resources.time={minutes}:{rest:02d}"]).resources.time or "") == seconds


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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=1", "unknown key 'train.learning_rate': here it is train.lr$"),
        ("num_train_epochs=1", "'num_train_epochs': here it is train.num_steps"),
        ("train.per_device_train_batch_size=1", "here it is train.micro_batch_size"),
        ("rl.beta=0.1", "here it is rl.kl_coef$"),
        ("rollout.max_new_tokens=9", "here it is rollout.max_completion_length$"),
        ("model.name_or_path=x", "here it is model.path$"),
        ("train.save_steps=5", "here it is checkpoint.save_every$"),
        ("train.warmup_step=5", r"'train.warmup_step' \(did you mean 'train.warmup_steps'\?\)$"),
        ("train.qqq=5", "'train.qqq'; python -m r1hpc.settings lists all$"),
    ],
)
def test_a_key_under_the_name_of_another_library_is_told_its_own(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(overrides=[override])


def test_names_of_other_libraries_lead_to_settings_that_exist() -> None:
    """Each stands for a flag of `submit`, or begins with a key of the schema."""
    for here in _HERE.values():
        key = re.match(r"[\w.]+", here)
        assert here.startswith("--") or (key is not None and key[0] in known_keys()), here


def test_a_job_that_is_not_there_and_one_that_is_no_yaml_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"no job 'mine\.yaml', and no such file in {tmp_path}; in jobs/ there"
    ):
        find_job("mine.yaml")
    (tmp_path / "mine.yaml").write_text("data: [\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid YAML") as refused:
        load("mine.yaml")
    assert 'in "mine.yaml", line 2' in str(refused.value)


@pytest.mark.parametrize(
    ("extra", "setting"),
    [
        ("{zero_optimization: {stage: 3}}", "zero_optimization.stage is set by deepspeed.zero_stage"),
        ("{train_batch_size: 8}", "train_batch_size is set by train.global_batch_size"),
        ("{bf16: {enabled: true}}", "bf16.enabled is set by train.precision"),
    ],
)
def test_a_deepspeed_key_that_has_a_setting_here_is_refused(extra: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(setting)):
        load("smoke", [f"deepspeed.extra={extra}"]).deepspeed.check_new()
    load("smoke", ["deepspeed.extra={zero_optimization: {overlap_comm: true}}"]).deepspeed.check_new()
