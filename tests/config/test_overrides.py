"""Dotted overrides, good and bad, as tables."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import ConfigError
from r1hpc.base.units import parse_time
from r1hpc.config.load import as_layer, known_keys, load, restore
from r1hpc.config.other_names import _HERE, name_here
from r1hpc.config.schema.run import Precision, RunConfig


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
        ("data.path='/x/${train.lr}-${train.precision}'", "/x/0.0003-bf16"),
        ("train.num_steps='20'", 20),
        ("resources.exclusive='on'", True),
        ("resources.comment=7", "7"),
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
        ("script.cad=x", "did you mean 'script.cwd'"),
        ("rollout.to_pk=2", "did you mean 'rollout.top_k'"),
        ("resources.node=2", "did you mean 'resources.nodes'"),
        ("cluster.partion=x", "did you mean 'cluster.partition'"),
        ("train.num_steps", "is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("train=3", r"train is a section: give its keys, as in train\.NAME=VALUE"),
        ("train.num_steps=many", "train.num_steps is 'many': it must be a whole number"),
        ("train.num_steps=1.5", "train.num_steps is 1.5: it must be a whole number"),
        ("train.num_steps=", "train.num_steps is None: it must be a whole number"),
        ("train.num_steps=0", "train.num_steps is 0: it must be at least 1"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=-1", "train.lr is -1"),
        ("train.lr=.inf", "train.lr is inf"),
        ("train.lr=.nan", "train.lr is nan"),
        ("train.precision=int8", "train.precision is 'int8': it must be one of bf16, fp16, fp32, fp8"),
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
        ("resources.time='0'", "resources.time is '0': it must be above 0"),
        ("resources.time=tomorrow", "time 'tomorrow' is not one of"),
        ("resources.exclusive=perhaps", "resources.exclusive is 'perhaps': it must be true or false"),
        ("task.options={a: {null: 1}}", "task.options.a has the key None, which is not text"),
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
        ("data.path=${oc.env:HOME}", r"data\.path holds a \${ that is no reference"),
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


def test_online_weights_are_gone_and_old_runs_that_name_them_are_read() -> None:
    with pytest.raises(ConfigError, match=r"'data.mix.online': here it is data.mix.schedule \(weights"):
        load(None, ["data.mix.online=odm"])
    layer = as_layer(load(None, ["data.mix.schedule=[{from_step: 9, weights: {a: 1}}]"]))
    old = layer | {"data": layer["data"] | {"mix": {**layer["data"]["mix"], "online": "none", "every": 500}}}
    assert as_layer(restore(old)) == layer


def test_known_keys_are_those_of_the_schema() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {"stage", "train.lr", "resources.sbatch", "cluster.environment"} <= set(keys)
    config = RunConfig()
    for key in keys:
        _value(config, key)


@settings(max_examples=40)
@given(seconds=st.integers(60, 10**7))
def test_a_time_limit_may_be_given_in_any_notation(seconds: int) -> None:
    minutes, rest = divmod(seconds, 60)
    assert parse_time(load(None, [f"resources.time={minutes}:{rest:02d}"]).resources.time or "") == seconds


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
        ("train.learning_rat=1", r"'train.learning_rat' \(is train.lr meant\?\)$"),
        ("train.qqq=5", "'train.qqq'; python -m r1hpc.settings lists all$"),
    ],
)
def test_a_key_under_the_name_of_another_library_is_told_its_own(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(overrides=[override])


def test_the_page_for_those_who_come_from_trl_names_settings_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming-from-trl.md").read_text()
    page = page.replace("metrics/train.jsonl", "")
    named = set(re.findall(r"\b((?:train|rl|rollout|reward|model)\.\w+)", page))
    assert len(named) > 25
    assert named <= {*known_keys()}
    for theirs, ours in re.findall(r"^\| `(\w+)`[^|]* \| `(\w+\.\w+)`", page, re.MULTILINE):
        assert ours in (name_here(theirs) or ""), theirs


def test_names_of_other_libraries_lead_to_settings_that_exist() -> None:
    """Each stands for a flag of `submit`, or begins with a key of the schema."""
    for here in _HERE.values():
        key = re.match(r"[\w.]+", here)
        assert here.startswith("--") or (key is not None and key[0] in known_keys()), here


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
