"""YAML files and dotted overrides, good and bad, as tables."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import ConfigError
from r1hpc.base.units import parse_time
from r1hpc.config.load import assets, find_job, known_keys, load, read, read_yaml, save
from r1hpc.config.schema import Precision, RunConfig


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
        ("data.seed=99999999999999999999", "data.seed is 9+: it must lie between"),
        ("train.seed=-1", "train.seed is -1: it must lie between"),
        ("data.verify=never", "data.verify is 'never': it must be one of once, every"),
        ("data.recipe=null", "data.path=DIR"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage is 4: it must be one of 0, 1, 2, 3"),
        ("checkpoint.keep=1", "keep at least 2"),
        ("checkpoint.save_every=0", "checkpoint.save_every is 0"),
        ("monitor.period_s=0.1", "NVML has nothing new below 0.5 s"),
        ("resources.nodes=0", "resources.nodes is 0"),
        ("resources.nodes=[1]", "resources.nodes"),
        ("resources.gpus_per_node=-1", "resources.gpus_per_node is -1"),
        ("resources.time='0'", "resources.time is 0"),
        ("resources.time=tomorrow", "time 'tomorrow' is not one of"),
        ("resources.exclusive=perhaps", "resources.exclusive"),
        ("resources.sbatch=[a]", r"a list stands where .* in resources\.sbatch=\[a\]"),
        ("cluster.setup={a: b}", "a list stands where"),
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
        ("resources: {sbatch: [a]}", "a list stands where"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(_job(tmp_path, text))
    assert not (tmp_path / "hacked").exists()


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
    with pytest.raises(ConfigError, match=r"no job 'smok' \(did you mean 'smoke'\?\); there are: .*smoke"):
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


def test_loading_imports_no_torch() -> None:
    code = "import r1hpc.config.load, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "deepspeed"} & set(done.stdout.split())
