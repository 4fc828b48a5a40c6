"""The command: what scripts rely on, and answers that help."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.files import write_json
from r1hpc.estimate import main
from tests.recorded import RecordedRun

_CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_flags_alone(capsys: pytest.CaptureFixture[str]) -> None:
    known = "--layers 32 --hidden-size 4096 --seq-len 4096 --num-gpus 256 --precision bf16 --recompute full"
    more = "--global-batch-tokens 4M --micro-batch-size 2 --zero-stage 1 --gpu A100-SXM4-80GB"
    value = _json(capsys, "--params", "6.7e9", "--tokens", "2T", *known.split(), *more.split())
    assert value["gpu_hours"]["p10"] < value["gpu_hours"]["p50"] < value["gpu_hours"]["p90"]
    assert 100_000 < value["gpu_hours"]["p50"] < 400_000
    assert {"assumptions", "baselines", "memory"} <= set(value)
    assert value["flops"]["per_token"] == 6 * 6.7e9 + 12 * 32 * 4096 * 4096


def test_the_cache_of_rl_follows_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """70B with 8 of 64 heads: eight times as many sequences decode together as by the guess."""
    shape = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    write_json(tmp_path / "config.json", {**shape, "num_key_value_heads": 8})
    words = ("--params", "70B", "--rl-sequences", "100k", "--num-gpus", "64", "--gpu", "h100")
    guessed = _json(capsys, *words)
    exact = _json(capsys, *words, "--model-config", str(tmp_path / "config.json"))
    assert exact["gpu_hours"]["p50"] < guessed["gpu_hours"]["p50"]
    assert any("the model's shape is unknown" in note for note in guessed["notes"])
    assert not any("the model's shape is unknown" in note for note in exact["notes"])


def test_the_stack_is_an_assumption_and_narrows_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--params", "70B", "--tokens", "1T", "--gpu", "h100", "--num-gpus", "64", "--precision", "fp8")
    wide, torch, megatron = (
        _json(capsys, *words, *stack) for stack in ((), ("--stack", "torch"), ("--stack", "megatron"))
    )
    assert wide["assumptions"]["stack"] == "unknown"
    assert megatron["assumptions"]["stack"] == "megatron"
    assert megatron["assumptions"]["published_families"] == 1
    assert 1.2 < torch["gpu_hours"]["p50"] / megatron["gpu_hours"]["p50"] < 2
    assert wide["gpu_hours"]["p10"] < megatron["gpu_hours"]["p50"]
    assert torch["gpu_hours"]["p50"] < wide["gpu_hours"]["p90"]
    first, second = (each["gpu_hours"]["p90"] / each["gpu_hours"]["p10"] for each in (wide, megatron))
    assert first > second
    assert any("--stack" in note for note in wide["notes"])
    assert not any("--stack" in note for note in megatron["notes"])


def test_a_class_without_published_runs_has_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--params", "7B", "--tokens", "1T", "--gpu", "h100", "--stack", "deepspeed")
    fp8, bf16 = (_json(capsys, *words, "--precision", name) for name in ("fp8", "bf16"))
    assert any("no data" in note and "fp8, dense, deepspeed" in note for note in fp8["notes"])
    assert not any("no data" in note for note in bf16["notes"])
    first, second = (each["gpu_hours"]["p90"] / each["gpu_hours"]["p10"] for each in (fp8, bf16))
    assert first > second


def test_fp4_needs_blackwell(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--params", "70B", "--tokens", "1T", "--stack", "megatron", "--precision", "nvfp4")
    assert _json(capsys, *words, "--gpu", "gb200")["assumptions"]["precision"] == "fp4"
    with pytest.raises(UsageError, match="begins with Blackwell"):
        main([*words, "--gpu", "h100"])


def test_an_unknown_stack_is_refused_with_the_three(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"--stack is 'megatrom'.*megatron.*deepspeed, torch, megatron"):
        main(["--params", "7B", "--tokens", "1T", "--stack", "megatrom"])


def test_a_mixture_costs_what_its_active_parameters_cost(capsys: pytest.CaptureFixture[str]) -> None:
    dense = _json(capsys, "--params", "37B", "--tokens", "1T", "--gpu", "h800")
    moe = _json(capsys, "--params", "671B", "--active-params", "37B", "--tokens", "1T", "--gpu", "h800")
    assert moe["flops"] == dense["flops"]
    assert moe["gpu_hours"]["p50"] > dense["gpu_hours"]["p50"]


def test_the_article(capsys: pytest.CaptureFixture[str]) -> None:
    value = _json(capsys, "--params", "7B", "--data-gb", "100", "--method", "seed")
    assert value["gpu_hours"]["p50"] == 86
    assert "560" in value["notes"][0]
    assert _json(capsys, "--params", "7B", "--data-gb", "100")["baselines"]["seed_formula"] == 86


def test_a_job_file(capsys: pytest.CaptureFixture[str]) -> None:
    one = _json(capsys, "jobs/train.yaml", "--gpu", "h100")
    assert one["assumptions"]["stack"] == "deepspeed"
    with pytest.raises(UsageError, match="--stack does not go with"):
        main(["jobs/train.yaml", "--stack", "megatron"])
    assert one["assumptions"]["gpu"] == "H100-SXM-80GB"
    twice = _json(capsys, "jobs/train.yaml", "--gpu", "h100", "train.num_steps=20000")
    assert twice["flops"]["total"] == 2 * one["flops"]["total"]
    assert _json(capsys, "train", "--num-gpus", "16")["assumptions"]["num_gpus"] == 16
    assert _json(capsys, "train", "--method", "seed")["method"] == "seed"
    assert _json(capsys, "smoke")["node_hours"]["p50"] > 0


def test_preemptions_of_the_site_count_for_a_job_file_and_for_rl(capsys: pytest.CaptureFixture[str]) -> None:
    rl = ("--params", "1B", "--rl-sequences", "10k", "--num-gpus", "8")
    for words in (("train",), rl):
        often = _json(capsys, *words, "--preemptions-per-day", "12")
        assert often["gpu_hours"]["p50"] > 1.1 * _json(capsys, *words)["gpu_hours"]["p50"]
    assert main(["train", "--preemptions-per-day", "12"]) == 0
    assert "and 12 preemptions a day" in capsys.readouterr().out


def test_a_chain_is_estimated_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = _json(capsys, "r1", "grpo:train.num_steps=120")
    stages = {each["stage"]: each for each in value["stages"]}
    assert list(stages)[:3] == ["traces", "sft", "grpo"]
    assert value["not_estimated"] == ["traces"]
    assert value["gpu_hours"] is None
    known = [each["node_hours"] for each in stages.values() if each["node_hours"]]
    assert max(each["p50"] for each in known) < value["node_hours"]["p50"]
    assert value["node_hours"]["p90"] < sum(each["p90"] for each in known), "errors cancel in part"
    short = {each["stage"]: each for each in _json(capsys, "r1")["stages"]}
    assert stages["grpo"]["node_hours"]["p50"] > 1.4 * short["grpo"]["node_hours"]["p50"]
    assert not (tmp_path / "runs").exists(), "nothing is written"
    assert main(["r1"]) == 0
    assert "not estimated: traces" in capsys.readouterr().out


def test_a_plan_of_another_version_or_a_missing_one_is_refused(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "old")
    write_json(made.run.plan, {"num_steps": 40})
    with pytest.raises(StateError, match=r"another version.*--method flops"):
        main([str(made.run.path), "--method", "measured"])
    made.run.plan.unlink()
    with pytest.raises(StateError, match=r"plan.json is missing; or take --method flops"):
        main([str(made.run.path), "--method", "measured"])


def test_a_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mixtral"}))
    value = _json(capsys, "--model-config", str(path), "--tokens", "1T", "--num-gpus", "64")
    assert value["assumptions"]["active_params"] < value["assumptions"]["params"] / 3
    assert value["assumptions"]["shape"] == "exact"


def test_reinforcement_learning(capsys: pytest.CaptureFixture[str]) -> None:
    value = _json(capsys, "--params", "7B", "--rl-sequences", "100k", "--num-gpus", "8")
    assert value["phases"]["decode"] > 0


def test_flags_of_rl_that_change_something(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--params", "70B", "--rl-sequences", "100k", "--num-gpus", "64")
    dense = _json(capsys, *words)
    assert dense["assumptions"]["gpu_given"] is False
    for more in (("--active-params", "7B"), ("--precision", "fp32"), ("--recompute",), ("--gpu", "h100")):
        assert _json(capsys, *words, *more)["gpu_hours"] != dense["gpu_hours"]


def test_a_layout_without_a_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    value = _json(capsys, "--params", "7B", "--tokens", "1T", "--tensor-parallel", "8")
    assert value["assumptions"]["num_gpus"] == 208
    words = "--params 175B --tokens 300B --num-gpus 8 --tensor-parallel 8 --gpu a100-40gb"
    assert main(words.split()) == 0
    assert "nothing fits on 8 x A100-SXM4-40GB" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words",
    [
        "--params 7B --tokens 1T",
        "--params 7B --rl-sequences 9k --num-gpus 8",
        "--params 7B --data-gb 100 --method seed",
        "train",
        "train --method seed",
        "smoke",
        "r1",
    ],
)
def test_the_four_keys_that_scripts_read(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = _json(capsys, *words.split())
    assert set(value["gpu_hours"] or ("p10", "p50", "p90")) == {"p10", "p50", "p90"}
    assert (value["gpu_hours"] is None) == (words in ("smoke", "r1")), "CPU jobs cost node-hours"
    assert value["assumptions"]
    assert value["baselines"].keys() >= {"seed_formula", "6nd_at_35", "6nd_at_40", "6nd_at_50"}
    assert value["memory"]["smallest"]["total_gib"] > 0


def test_the_baselines_of_a_chain_are_sums(capsys: pytest.CaptureFixture[str]) -> None:
    value = _json(capsys, "r1")
    stages = [each for each in value["stages"] if each["baselines"]]
    assert value["baselines"]["6nd_at_40"] == pytest.approx(sum(s["baselines"]["6nd_at_40"] for s in stages))
    needs = [each["memory"]["smallest"]["total_gib"] for each in stages if each["memory"]]
    assert value["memory"]["smallest"]["total_gib"] == max(needs)
    assert value["assumptions"]["ranks"] == 2


def test_a_card_by_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--gpu", "rx7900", "--peak-tflops", "123", "--gpu-memory-gib", "24", "--num-gpus", "8"]
    value = _json(capsys, "--params", "1B", "--tokens", "20B", *given)
    assert value["assumptions"]["gpu"] == "rx7900"
    assert value["memory"]["usable_gib"] < 24


def test_a_number_given_wins_over_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    known = ["--params", "7B", "--tokens", "1T", "--gpu", "a100-80gb", "--num-gpus", "64"]
    value = _json(capsys, *known, "--gpu-memory-gib", "30")
    assert value["memory"]["usable_gib"] < 30 < _json(capsys, *known)["memory"]["usable_gib"]


def test_a_7b_on_one_16_gb_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--params", "7B", "--tokens", "25B", "--gpu", "v100-16gb", "--num-gpus", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing fits on one V100-SXM2-16GB" in said
    assert "from 16 GPUs on" in said
    assert "lora" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give a job file, or --params 7B --tokens 1T"),
        ("--params 7B", "give --tokens"),
        ("--params ٧B --tokens 1T", "is not a number such as 7B"),  # noqa: RUF001
        ("--params 7B --tokens 1T --gpu-memory-gib -1", "--gpu-memory-gib is -1: it must be above 0"),
        ("--tokens 1T --params=-7B", "--params is -7e"),
        ("--params 7B --tokens -5", "--tokens is -5"),
        ("--params 7B --tokens 1T --num-gpus 0", "--num-gpus is 0"),
        ("--params 7B --tokens 1T --gpu a10O", "did you mean 'A10"),
        ("--params 7B --tokens 1T --gpu a100-48gb", "not made with"),
        ("--params 7B --tokens 1T --gpu rx7900", "--peak-tflops"),
        ("--params 7 --tokens 1T --active-params 8", "more than --params"),
        ("--params seven --tokens 1T", "'seven' is not a number"),
        ("--params 7B --tokens 1T --precision fp8", "no FP8"),
        ("--params 7B --tokens 1T --save-s 0", "--save-s is 0"),
        ("--params 7B --tokens 1T --preemptions-per-day -1", "preemptions per day"),
        ("--params 7B --rl-sequences 10k", "needs --num-gpus"),
        ("--method measured", "needs a run"),
        ("runs/x --method measured train.num_steps=9", "is of a run as it is: leave train.num_steps=9 out"),
        ("runs/x --method measured --gpu h100", "--gpu does not go with --method measured"),
        ("train.num_steps=5 --params 7B --tokens 1T", "changes a job file"),
        ("a.yaml b.yaml", "two files"),
        ("nosuchjob", "no job 'nosuchjob'"),
        ("train --num-gpus 12", "not a multiple"),
        ("--parms 7B", "--params"),
        ("train --tokens 1T", "--tokens does not go with train, which settles it: give train.num_steps=N"),
        ("train --precision fp16", "give train.precision=NAME"),
        ("--params 7B --tokens 1T --preemptions-per-day 200", "an interruption every 7 min 12 s"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --preemptions-per-day 200", "an interruption every"),
        ("--params 7B --data-gb -3", "--data-gb is -3: it must be above 0"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --prompt-length nan", "--prompt-length is nan"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --logprob-passes -5", "--logprob-passes is -5"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --max-completion-length 0", "-completion-length is 0"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --recompute maybe", "--recompute is 'maybe'"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --precision fp8", "no FP8"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --active-params 8B", "more than --params"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --zero-stage 7", "--zero-stage does not go with"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --offload", "--offload does not go with --rl-sequences"),
        ("--params 7B --rl-sequences 9k --num-gpus 8 --seq-len 5", "--seq-len does not go with"),
        ("--params 7B --rl-sequences 9k --tokens 1T", "--tokens does not go with --rl-sequences"),
        (
            "--params 7B --tokens 1T --prompt-length 9",
            "go with pretraining or tuning: leave it out, or give --rl-sequences N too",
        ),
        ("--params 7B --model-config x.json --tokens 1T", "--params does not go with --model-config"),
        ("--params 7B --tokens 1T --data-gb 9", "--tokens and --data-gb both set the amount"),
        ("--params 7B --rl-sequences 9k --method seed", "knows no --rl-sequences"),
        ("--params 7B --tokens 1T --num-gpus 12 --tensor-parallel 8", "not a multiple of tensor x pipeline"),
        ("r1 --num-gpus 8", "STAGE:resources.nodes=N"),
        ("r1 --preemptions-per-day 2", "--preemptions-per-day does not go with the chain"),
        ("r1 --method seed", "the article's formula is for one run"),
        ("r1_a100 grpo:train.nosuch=1", "nosuch"),
    ],
)
def test_answers_that_help(words: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "r1hpc.estimate", *words.split()],
        cwd=_CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from r1hpc.estimate import main; "
        "main(['--params', '7B', '--tokens', '1T', '--num-gpus', '64', '--json']); "
        "print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: no site-packages at all
        cwd=_CHECKOUT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "numpy", "omegaconf", "yaml"} & set(done.stderr.split())
