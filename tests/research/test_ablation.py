"""Ablations: which arms, what they share, what is refused; a tiny one is killed in between and run again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.base.errors import ConfigError, R1hpcError, UsageError
from r1hpc.config import load
from r1hpc.config.assets import find_job
from r1hpc.submission.chain.folder import ChainDir, supervisor_pid
from r1hpc.tasks.text.tokenizer import character_tokenizer
from r1hpc.telemetry.records.attempts import read_history
from research.ablation import __main__ as ablate
from research.ablation.results import read_results
from research.ablation.study import _write_study, chain_stages, open_study, overrides_of_kind
from tests.runs import wait_until
from tests.submission.fake_slurm import FakeSlurm

_JOB = find_job("r1")
_HERE = ("--executor", "local", "resources.ranks_per_node=1")
_TINY = (
    *("limits.max_crashes=0", "rl:train.micro_batch_size=8", "rl:train.hang_timeout_s=120"),
    *("rl:train.num_steps=2", "rl:train.global_batch_size=16", "rl:rollout.num_prompts=4"),
    *("rl:rollout.num_generations=4", "rl:evaluate.num_items=8", "rl:evaluate.num_samples=2"),
)


def listed(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> dict[str, Any]:
    """What a dry run says, as an object."""
    assert ablate.main([*words, *_HERE, "--dry-run", "--json", "--run-root", str(root)]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def stages_of(answer: dict[str, Any], seed: int) -> list[str]:
    return [stage["stage"].split("-")[0] for stage in answer["stages"] if stage["seed"] == seed]


# Which arms


def test_rewards_share_the_cold_start_of_their_seed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer = listed(capsys, tmp_path / "runs", "reward", "--seeds", "2")
    arms = ["rule", "0.6_0.3_0.1", "0.3_0.6_0.1", "0.2_0.7_0.1", "0.1_0.8_0.1", "0.2_0_0.8"]
    assert stages_of(answer, 0) == stages_of(answer, 1) == ["traces", "sft", *arms]
    starts = {stage["stage"] for stage in answer["stages"] if stage["stage"].startswith("sft-")}
    assert len(starts) == 2, "each seed has a cold start of its own"
    needs = {tuple(stage["needs"]) for stage in answer["stages"] if stage["stage"] == "0.2_0_0.8"}
    assert needs == {(start,) for start in starts}
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


def test_attentions_have_a_cold_start_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = listed(capsys, tmp_path, "attention", "--seeds", "1")
    assert stages_of(answer, 0).count("sft") == 4
    assert [arm["arm"] for arm in answer["arms"]] == ["softmax", "gate", "gate_norm", "sigmoid_bias"]


def test_softmax_and_fp32_start_where_the_rewards_do() -> None:
    """So that one cold start a seed serves all four ablations."""
    found = {}
    for name, baseline in (("reward", "rule"), ("attention", "softmax"), ("precision", "fp32")):
        study = open_study(Path("nowhere"), name, _JOB, (), None)
        arm = next(arm for arm in study.arms if arm.name == baseline)
        found[name] = study.cold_start(arm, 0)
        assert study.cold_start(arm, 1) != found[name]
    assert len(set(found.values())) == 1


def test_the_arms_of_a_seed_differ_in_nothing_but_their_settings() -> None:
    study = open_study(Path("nowhere"), "algorithm", _JOB, ("rl:train.num_steps=40",), None)
    stages = [stage for stage in chain_stages(study, 3) if stage["stage"] == "rl"]
    grpo, dr_grpo, ppo, dapo, gspo, *_ = stages
    assert {stage["train"]["num_steps"] for stage in stages} == {40}
    assert all({s[k]["seed"] for s in stages} == {3} for k in ("train", "data", "task"))
    for other in stages[1:]:
        assert {key for key in grpo if grpo[key] != other[key]} == {"name", "rl"}
    assert not dr_grpo["rl"]["scale_advantage"]
    assert ppo["rl"]["algorithm"] == "ppo"
    assert dapo["rl"]["max_resamples"] == 3
    assert gspo["rl"]["ratio"] == "sequence"


def test_the_arms_of_the_algorithms_are_the_presets() -> None:
    """Beside the KL, which all leave out, and the critic's rate."""
    study = open_study(Path("nowhere"), "algorithm", _JOB, (), None)
    presets = {"grpo": "r1", "ppo": "seed"}
    for stage in chain_stages(study, 0):
        if stage["stage"] == "rl":
            name = presets.get(stage["name"], stage["name"])
            preset = load.read_yaml(load.assets("configs") / "rl" / f"{name}.yaml")["rl"]
            answer = {key: preset[key] for key in preset if key not in ("kl_coef", "critic_lr")}
            assert {key: stage["rl"][key] for key in answer} == answer


def test_a_study_goes_on_with_the_arms_it_was_begun_with(tmp_path: Path) -> None:
    begun = open_study(tmp_path, "algorithm", _JOB, (), ["dapo"])
    _write_study(begun)
    again = open_study(tmp_path, "algorithm", _JOB, (), None)
    assert [arm.name for arm in again.arms] == [arm.name for arm in begun.arms] == ["grpo", "dapo"]
    with pytest.raises(UsageError, match="was begun with arms"):
        open_study(tmp_path, "algorithm", _JOB, (), ["ppo"])


def test_weights_that_are_given_need_no_cold_start(tmp_path: Path) -> None:
    study = open_study(tmp_path, "reward", _JOB, (f"rl:model.path={tmp_path}/model",), None)
    stages = chain_stages(study, 0)
    assert [stage["stage"] for stage in stages] == ["rl"] * 6
    assert {stage["model"]["path"] for stage in stages} == {f"{tmp_path}/model"}


def test_on_slurm_every_arm_waits_for_its_cold_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", f"{slurm.bin}{os.pathsep}{os.environ['PATH']}")
    words = ["reward", "--arms", "0.6_0.3_0.1", "--seeds", "2", "--executor", "slurm", *_HERE[2:], "--json"]
    assert ablate.main([*words, "--run-root", str(tmp_path / "runs")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["complete"] is False
    jobs = [(Path(job.folder).name.split("-")[0], job.dependency) for job in slurm.jobs()]
    assert jobs == [
        *(("traces", ""), ("sft", "afterok:1"), ("rule", "afterok:2"), ("0.6_0.3_0.1", "afterok:2")),
        *(("traces", ""), ("sft", "afterok:5"), ("rule", "afterok:6"), ("0.6_0.3_0.1", "afterok:6")),
    ]
    assert ablate.main([*words, "--run-root", str(tmp_path / "runs")]) == 0
    assert len(slurm.jobs()) == 8, "what is in the queue is not submitted again"


def test_over_the_budget_it_goes_on_where_somebody_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", f"{slurm.bin}{os.pathsep}{os.environ['PATH']}")
    root = tmp_path / "runs"
    root.mkdir()
    (root / "budget.yaml").write_text("gpu_hours: 0.0001\n")
    words = [
        "reward",
        "--arms",
        "0.6_0.3_0.1",
        "--seeds",
        "1",
        "--executor",
        "slurm",
        "--run-root",
        str(root),
    ]
    words += ["--gpus-per-node", "1", "--nodes", "1", "--time", "1:00:00"]
    with pytest.raises(R1hpcError, match="--over-budget REASON"):
        ablate.main(words)
    assert slurm.jobs() == []
    assert ablate.main([*words, "--over-budget", "the deadline"]) == 0
    run = Path(slurm.jobs()[0].folder) / "attempts.jsonl"
    assert json.loads(run.read_text().splitlines()[0])["over_budget"] == "the deadline"


# Refusals


def refusal(root: Path, *words: str) -> str:
    with pytest.raises((UsageError, ConfigError)) as caught:
        ablate.main([*words, *_HERE, "--dry-run", "--run-root", str(root)])
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("rewards",), "did you mean 'reward'?"),
        ((), "which ablation? There are: attention, reward, precision, algorithm"),
        (("reward", "smoke", "more"), "at most one job file"),
        (("reward", "smoke"), "has no stage of kind traces, sft, rl"),
        (("attention", "--arms", "gated"), "did you mean 'gate'?"),
        (("attention", "--arms", "softmax"), "nothing beside the baseline softmax"),
        (("precision", "--arms", "fp16"), "arm fp16: fp16 needs a GPU"),
        (("precision", "--arms", "fp8"), "compute capability 8.9 (Ada) or 9.0 (Hopper)"),
        (("reward", "grpo:train.lr=1"), "has the kinds of stage traces, sft, rl"),
        (("attention", "rl:model.path=/some/model"), "leave rl:model.path out"),
        (("reward", "train.lt=1"), "unknown key 'train.lt'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    assert expected in refusal(tmp_path, *words)


def test_precision_leaves_out_what_this_hardware_lacks_and_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer = listed(capsys, tmp_path, "precision", "--seeds", "1")
    assert [arm["arm"] for arm in answer["arms"]] == ["fp32", "bf16"]
    assert set(answer["refused"]) == {"fp16", "fp8"}


@pytest.mark.parametrize(("kind", "reason"), [("a100-80gb", "an A100 is 8.0"), ("h100", "pretrain and sft")])
def test_on_gpus_fp16_runs_and_fp8_is_refused_by_the_card(kind: str, reason: str) -> None:
    places = ["resources.gpus_per_node=8", f"cluster.gpu_type={kind}"]
    study = open_study(Path("nowhere"), "precision", _JOB, (), None, places)
    assert [arm.name for arm in study.arms] == ["fp32", "bf16", "fp16"]
    assert reason in study.refused["fp8"]


def test_the_command_on_record_is_of_this_experiment(tmp_path: Path) -> None:
    words = ["rl:train.num_steps=160"]
    job = find_job("countdown")
    study = open_study(tmp_path / "s", "algorithm", job, words, None, every=20)
    command = read_results(study, (0, 1)).provenance["command"]
    assert command == (
        "python -m research.ablation algorithm countdown --seeds 2 --every 20 rl:train.num_steps=160"
    )


def test_a_cold_start_teaches_one_form_of_answers(tmp_path: Path) -> None:
    """Demonstrations are in the form of reward.answer_in."""
    starts = []
    for form in ("tags", "boxed"):
        study = open_study(tmp_path / form, "reward", _JOB, [f"reward.answer_in={form}"], None)
        starts.append(study.cold_start(study.arms[0], 0))
    assert starts[0] != starts[1]


def test_overrides_reach_all_kinds_or_one() -> None:
    given = ["train.lr=1", "rl:train.lr=2", "sft:train.lr=3"]
    assert overrides_of_kind("rl", given) == ["train.lr=1", "train.lr=2"]
    assert overrides_of_kind("traces", given) == ["train.lr=1"]


def test_a_cold_start_that_another_ablation_has_finished_is_used(tmp_path: Path) -> None:
    study = open_study(tmp_path / "ablate-algorithm", "algorithm", _JOB, (), None)
    name = study.cold_start(study.arms[0], 1)
    there = tmp_path / "ablate-reward" / "seed1" / name
    there.mkdir(parents=True)
    assert "sft" in [stage["stage"] for stage in chain_stages(study, 1)], "it is not finished"
    (there / "FINISHED").touch()
    stages = chain_stages(study, 1)
    assert [stage["stage"] for stage in stages] == ["rl"] * 7
    assert {stage["model"]["path"] for stage in stages} == {str(there / "model")}
    assert len(chain_stages(study, 0)) == 9, "of another seed"


# One that runs


def write_model(folder: Path) -> Path:
    """Untrained weights of six thousand parameters, with their tokenizer."""
    values = load.read_yaml(load.assets("configs") / "model" / "tiny_gpt2.yaml")["model"]["config"]
    tokenizer = character_tokenizer()
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": tokenizer.get_vocab_size()}
    config = AutoConfig.for_model(**{**values, **small})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.timeout(600)
def test_killed_in_an_arm_it_goes_on_there_and_finished_arms_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "runs", tmp_path / "reward.json"
    words = ["reward", "--arms", "0.6_0.3_0.1", "--seeds", "1", "--run-root", str(root), *_HERE, *_TINY]
    words.append(f"rl:model.path={write_model(tmp_path / 'model')}")
    monkeypatch.setenv("R1HPC_FAILPOINT", "update.begin:kill9::2")
    assert ablate.main(words) == 1
    assert "0 of 2 arms are finished" in capsys.readouterr().out
    chain = ChainDir(root / "ablate-reward" / "seed0")
    wait_until("end of the supervisor", lambda: supervisor_pid(chain) is None, 60)

    monkeypatch.delenv("R1HPC_FAILPOINT")
    assert ablate.main([*words, "--json", "--out", str(out)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["complete"] is True
    rule, composite = answer["arms"]
    assert composite["difference"]["pass_at_1"]["n"] == 1
    assert rule["outcomes"][0]["num_completions"] == 2 * 16
    assert str(chain.path) not in out.read_text(), "results tell of no place"
    assert attempts_of(chain) == {"rule": 2, "0.6_0.3_0.1": 2}  # the second arm needs nothing of the first

    assert ablate.main(words) == 0
    assert "2 of 2 arms are finished" in capsys.readouterr().out
    assert attempts_of(chain) == {"rule": 2, "0.6_0.3_0.1": 2}
    with pytest.raises(UsageError, match="was begun with overrides"):
        ablate.main([*words, "rl:train.lr=1e-3"])


def attempts_of(chain: ChainDir) -> dict[str, int]:
    return {name: len(read_history(chain.stage(name)).attempts) for name in ("rule", "0.6_0.3_0.1")}
