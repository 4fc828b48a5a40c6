"""Files of jobs, presets and cluster profiles: what is refused, what is found, and what wins over what."""

import re
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config.assets import assets, find_job
from r1hpc.config.load import load, read, read_yaml, save
from r1hpc.config.schema.run import RunConfig


def _job(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


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
        ("a: &a {lr: 1}\ntrain: *a", "anchors and aliases"),
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


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="anchors and aliases"):
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
    with pytest.raises(ConfigError, match="is a folder, and no job file"):
        load(tmp_path)
    (tmp_path / "config.yaml").touch()
    resume = rf"`submit --resume --run-root {tmp_path.parent} --run-name {tmp_path.name}`"
    with pytest.raises(ConfigError, match=rf"is a run, and no job file: to go on with it, {resume}"):
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

    def test_a_mapping_of_a_later_file_replaces_unless_it_says_merge(self, tmp_path: Path) -> None:
        (tmp_path / "preset.yaml").write_text("task: {options: {a: 1, b: {c: 2, d: 3}}}")
        replaced = load(_job(tmp_path, "include: [preset]\ntask: {options: {b: {c: 9}}}"))
        assert replaced.task.options == {"b": {"c": 9}}
        merged = load(_job(tmp_path, "include: [preset]\ntask: {options: !merge {b: {c: 9}}}"))
        assert merged.task.options == {"a": 1, "b": {"c": 9, "d": 3}}
        inner = load(_job(tmp_path, "include: [preset]\ntask: {options: !merge {b: !replace {c: 9}}}"))
        assert inner.task.options == {"a": 1, "b": {"c": 9}}
        alone = load(_job(tmp_path, "include: [rl/r1]\nreward: {terms: {accuracy: 1}}"))
        assert alone.reward.terms == {"accuracy": 1.0}

    def test_a_profile_adds_to_what_a_job_says_of_the_cluster(self, tmp_path: Path) -> None:
        profile = tmp_path / "site.yaml"
        profile.write_text("environment: {A: '1'}")
        job = _job(tmp_path, "cluster: {environment: {B: '2'}}")
        assert load(job, [], str(profile)).cluster.environment == {"A": "1", "B": "2"}

    def test_terms_in_a_file_are_all_the_terms(self, tmp_path: Path) -> None:
        assert load(_job(tmp_path, "reward: {terms: {accuracy: 2.0}}")).reward.terms == {"accuracy": 2.0}

    def test_a_name_with_dots_in_a_mapping_of_numbers(self) -> None:
        terms = load(None, ["reward.terms.rewards.py:brevity=0.2"]).reward.terms
        assert terms["rewards.py:brevity"] == 0.2
        assert load(None, ["model.config.model_type=x", "model.config.a.b=1"]).model.config["a"] == {"b": 1}


def test_an_include_is_found_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = _job(tmp_path, "include: [model/tiny]\nmodel: {config: !merge {num_hidden_layers: 7}}")
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
    if path.relative_to(assets("configs")).with_suffix("").parts[0] not in _NOT_OF_RUNS
]


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path, tmp_path: Path) -> None:
    name = path.relative_to(assets("configs")).with_suffix("")
    if name.parts[0] == "cluster":
        assert load(None, cluster=name.name).cluster.name == name.name
    else:
        assert isinstance(load(_job(tmp_path, f"include: [{name}]")), RunConfig)


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


def test_a_path_in_the_home_folder_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands it in `data.path=~/x`, nor in a file."""
    monkeypatch.setenv("HOME", "/home/me")
    found = load(
        None,
        ["data.path=~/x", "data.traces=[~/a, b]", "cluster.setup=[~/env.sh]", "cluster.python=~/bin/python"],
    )
    assert (found.data.path, found.data.traces) == ("/home/me/x", ["/home/me/a", "b"])
    assert found.cluster.setup == ["~/env.sh"], "the shell's"
    assert found.cluster.python == "/home/me/bin/python"


@pytest.mark.parametrize("home", ["", None])
def test_without_a_home_folder_none_is_made_up(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    """`~/x` would be a folder called `~`, or one under the root."""
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.getuid", lambda: 987_654)  # nobody's
    else:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(UsageError, match="~/x cannot be found, since HOME is empty: write the full path"):
        load(None, ["data.path=~/x"])


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("data.path=${train.${model.path}}", "data.path holds a ${ that is no reference"),
        ("data.path=${train.", "data.path holds a ${ that is no reference"),
        ("data.path=${train}", "only a key with a plain value can be referred to"),
        ("data.path=${train.nope}", "only a key with a plain value can be referred to"),
        ("data.path=${resources.job_name}", "only a key with a plain value can be referred to"),
        ("data.path=${data.path}", "only a key with a plain value can be referred to"),
    ],
)
def test_a_reference_leads_to_a_plain_value(item: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(None, [item])


def test_a_value_that_must_be_given_is_not_the_default() -> None:
    for items in (["train.lr=???"], ["data.path=???"], ["notify.url=${model.path}", "model.path=???"]):
        with pytest.raises(ConfigError, match=r"write its value|write the value itself"):
            load(None, items)


def test_an_escaped_reference_is_left_to_the_script() -> None:
    found = load(None, ["stage=script", "script.path=/x.py", "script.args=['\\${HOME}/x', '${stage}']"])
    assert found.script.args == ["${HOME}/x", "script"]


def test_a_setting_that_is_gone_is_called_that() -> None:
    with pytest.raises(ConfigError, match=r"'cluster\.network_gbit_s', which is gone: leave it out"):
        load(None, ["cluster.network_gbit_s=10"])


def test_a_reference_to_what_the_command_line_sets() -> None:
    found = load(None, ["data.seed=${train.seed}", "train.seed=7", "model.config={model_type: '${stage}'}"])
    assert (found.data.seed, found.model.config) == (7, {"model_type": "pretrain"})


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("{zero_optimization: {reduce_bucket_size: auto}}", "reduce_bucket_size is auto, which Hugging Face"),
        ("{zero_optimization: 3}", "zero_optimization is a section"),
        (
            "{zero_optimization: {stage3_max_live_parameters: [1]}}",
            "stage3_max_live_parameters must be a number",
        ),
    ],
)
def test_what_deepspeed_would_refuse_of_its_own_is_refused_here(extra: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(None, [f"deepspeed.extra={extra}"]).deepspeed.check_new()
