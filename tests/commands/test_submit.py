"""The submit command: what it prints, writes and refuses. Slurm is not needed, and not on PATH."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.base.files import read_json
from r1hpc.base.lock import held
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.tasks.problems.listed import held_out_key
from r1hpc.tasks.problems.task import is_held_out
from tests.commands.submitting import ROOT, answer, fake_sbatch, submit
from tests.plan.tensorfiles import llama_shapes, write_header


def test_a_dry_run_prints_plan_and_script_and_writes_nothing(place: Path) -> None:
    done = submit(place, "--nodes", "4", "--time", "12:00:00", "--dry-run", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    script, _, plan = done.stdout.partition("\n\nrun  ")  # the plan is what stays on the screen
    assert script.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=4" in script
    assert all(len(line) <= 80 for line in plan.splitlines()[1:] if " " in line.strip()), plan
    assert "#SBATCH --time=12:00:00" in done.stdout.splitlines()
    assert "srun " in done.stdout
    assert "GPUs per node: assumed 8" in done.stdout
    assert "384.0 GPU-hours per attempt (32 GPUs x 12 h 00 min)" in done.stdout
    assert not (place / "runs").exists()


def test_it_loads_only_what_a_submission_needs(place: Path) -> None:
    words = ["jobs/smoke.yaml", "--executor", "slurm", "--dry-run", "--run-root", str(place)]
    code = f"import sys; from r1hpc.submit import main; main({words}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    heavy = {"torch", "deepspeed", "transformers", "numpy", "zarr", "h5py", "matplotlib", "omegaconf"}
    assert not heavy & loaded
    assert "yaml" in loaded, "what is looked at are names of modules"


def test_json_is_one_object_with_the_agreed_keys(place: Path) -> None:
    done = submit(place, "jobs/smoke.yaml", "--executor", "slurm", "--dry-run", "--json", "--run-name", "a")
    result = answer(done)
    assert {"run_id", "run_dir", "executor", "job_id", "script", "plan", "estimate"} <= set(result)
    assert (result["run_id"], result["executor"], result["job_id"]) == ("a", "slurm", None)
    assert result["run_dir"] == str(place / "runs" / "a")
    assert result["plan"]["num_steps"] == 60
    assert result["script"] == result["script_text"]
    assert result["script"].startswith("#!/bin/bash\n")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "cluster.gpu_type=null",
            "A100-SXM4-80GB: .* cluster.gpu_type=a100-sxm4-80gb or a100-sxm4-40gb$",
        ),
        ("cluster.gpu_type=v100", "planned for V100-SXM2-32GB: say which"),
        ("cluster.gpu_type=a100-40gb", None),
        ("cluster.gpu_type=h100", None),
    ],
)
def test_the_card_that_is_planned_for_is_named_where_there_are_others(
    place: Path, word: str, said: str | None
) -> None:
    words = ("jobs/smoke.yaml", "--executor", "slurm", "--dry-run", "--json", "resources.gpus_per_node=4")
    notes = answer(submit(place, *words, "train.precision=fp32", word))["notes"]
    found = [note for note in notes if note.startswith("memory and hours are planned for")]
    assert len(found) == (said is not None)
    for note in found:
        assert re.search(str(said), note)


def test_a_prompt_is_shown_as_the_model_is_asked(place: Path) -> None:
    words = ("jobs/rl_smoke.yaml", "--executor", "local", "--dry-run")
    prompt = answer(submit(place, *words, "--json"))["prompt"]
    assert re.fullmatch(r"\d+=", prompt)
    assert f"asks     {prompt!r}" in submit(place, *words).stdout.splitlines()
    assert answer(submit(place, "jobs/smoke.yaml", "--dry-run", "--json"))["prompt"] is None


def test_job_files_overrides_and_flags_come_in_any_order(place: Path) -> None:
    words = ("-N", "2", "train.num_steps=30", "jobs/smoke.yaml", "-p", "gpu", "train.warmup_steps=3")
    result = answer(submit(place, *words, "--dry-run", "--json"))
    assert result["plan"]["num_steps"] == 30
    assert "#SBATCH --partition=gpu" in result["script_text"].splitlines()


def test_sbatch_variables_yield_to_flags_and_beat_the_job_file(place: Path) -> None:
    variables = {"SBATCH_TIMELIMIT": "1:00:00", "SBATCH_ACCOUNT": "env", "SBATCH_SIGNAL": "USR1"}
    result = answer(submit(place, "jobs/smoke.yaml", "-A", "flag", "--dry-run", "--json", **variables))
    lines = result["script_text"].splitlines()
    assert "#SBATCH --account=flag" in lines
    assert "#SBATCH --time=1:00:00" in lines
    assert "not used from the environment: SBATCH_SIGNAL" in result["notes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodse", "4"), "did you mean '--nodes'"),
        (("--comment", "a;b"), "--comment 'a;b' is refused because of ';'"),
        (("--job-name", "a\nb"), "--job-name"),
        (("--run-name", "../x"), "not a usable name"),
        (("--sbatch", "wrap=x"), "--sbatch wrap: not possible"),
        (("cluster.setup=[touch x]",), "configs/cluster/NAME.yaml"),
        (("resources.comment=$(touch canary)",), "--comment"),
        (("resources.partition='`touch canary`'",), "--partition"),
        (("cluster.python=python;touch canary",), "cluster.python"),
        (("a.yaml", "b.yaml"), "a run has one"),
        (("train.py", "--lr", "3"), "The script's own arguments go after --"),
        (("train.py", "{checkpoint}"), "The script's own arguments go after --"),
        (("--nodes", "four"), "not a whole number"),
        (("train.num_stesp=4",), "train.num_steps"),
        (("--resume",), "--resume goes with --run-name"),
        (("jobs/smoke.yaml", "--executor", "slurm"), "sbatch is not on PATH"),
        (("jobs/nope.yaml",), "no job"),
        (("jobs/smoke.yaml", "model.config.hidden_size=[1]"), "must be a whole number"),
        (("jobs/smoke.yaml", "model.config.vocab_size=many"), "must be a whole number"),
        (("jobs/smoke.yaml", "model.lora_rank=4"), "model.lora_rank has no use in stage pretrain"),
        (("jobs/rl_smoke.yaml", "task.name=chain_summ"), "did you mean 'chain_sum'"),
        (("jobs/rl_smoke.yaml", "task.options.num_term=3"), "did you mean 'num_terms'"),
        (("jobs/rl_smoke.yaml", "reward.terms.acuracy=1"), "did you mean 'accuracy'"),
        (("jobs/rl_smoke.yaml", "rollout.max_prompt_length=2"), "raise rollout.max_prompt_length"),
        (("jobs/rl_smoke.yaml", "model.tokenizer=null"), "no tokenizer: give model.tokenizer"),
        (("jobs/rl_smoke.yaml", "rollout.num_generations=1"), "needs 2 at least"),
        (("jobs/rl_smoke.yaml", "rl.algorithm=ppo", "model.lora_rank=4"), "rl.algorithm=grpo"),
        (("jobs/rl_smoke.yaml", "train.gradient_accumulation_steps=2"), "no use in stage rl"),
    ],
)
def test_what_is_asked_wrongly_is_named_and_leaves_nothing(
    place: Path, words: tuple[str, ...], said: str
) -> None:
    done = submit(place, *words)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in place.iterdir()) in (["bin"], ["bin", "runs"])
    assert not list((place / "runs").glob("*"))


def test_a_question_that_is_too_long_is_found_wherever_it_stands(place: Path) -> None:
    """It would end the run when its turn comes."""
    rows = [{"question": f"1 + {n}", "answer": f"{n + 1}"} for n in range(40)]
    rows[33]["question"] = "1 + " * 20 + "1"
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["jobs/rl_smoke.yaml", "task.name=jsonl"]
    words += [
        f"task.options={{path: {place}/sums.jsonl, template: '{{question}}'}}",
        "evaluate.num_items=1",
        "train.num_steps=200",
    ]
    done = submit(place, *words, "rollout.max_prompt_length=16")
    assert done.returncode == 2, done.stdout
    assert "a prompt has 81 tokens: raise rollout.max_prompt_length, now 16 ('1 + 1 + " in done.stderr
    assert f"{place}/sums.jsonl:34: " in done.stderr
    done = submit(place, *words, "rollout.max_prompt_length=16", "task.drop_longer=true", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "1 of 40 rows of" in done.stdout + done.stderr


def test_a_model_without_weights_is_refused_and_begun_from_scratch_when_asked(place: Path) -> None:
    model = place / "model"
    model.mkdir()
    shape = load.read_yaml(load.assets("configs") / "model" / "tiny.yaml")["model"]["config"]
    (model / "config.json").write_text(json.dumps({**shape, "vocab_size": 512}))
    words = ("jobs/smoke.yaml", "--executor", "slurm", "--dry-run", "--json", "model.path=model")
    done = submit(place, *words)
    assert done.returncode == 2
    assert f"model.path {model} has neither model.safetensors" in done.stderr
    assert "set model.from_scratch=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert answer(submit(place, *words, "model.from_scratch=true"))["plan"]["num_parameters"]
    write_header(model / "model.safetensors", llama_shapes({**shape, "vocab_size": 512}))
    assert submit(place, *words).returncode == 0


@pytest.mark.parametrize("stage", ["evaluate", "rl"])
def test_more_held_out_questions_than_a_file_has_are_refused(place: Path, stage: str) -> None:
    pairs = [{"question": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(30)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    there = sum(is_held_out(held_out_key(pair["question"])) for pair in pairs)
    own = "name: jsonl\n  options: {path: pairs.jsonl, template: '{question}'}"
    smoke = (load.assets("jobs") / "rl_smoke.yaml").read_text()
    (place / "own.yaml").write_text(smoke.replace("name: chain_sum\n  options: {num_terms: 3}", own))
    words = ("own.yaml", "--dry-run", "--json", "--executor", "slurm", f"stage={stage}")
    longer = "rollout.max_prompt_length=16"
    refused = submit(place, *words, longer, "evaluate.num_items=100")
    assert refused.returncode == 2
    assert f"evaluate.num_items is 100, but task jsonl has no more than {there} held-out" in refused.stderr
    assert answer(submit(place, *words, longer, f"evaluate.num_items={there}"))["plan"]


def test_a_run_root_that_cannot_be_made_is_named(place: Path) -> None:
    (place / "runs").touch()
    done = submit(place, "jobs/smoke.yaml", "--executor", "local")
    assert done.returncode == 2
    assert f"--run-root {place / 'runs'} is a file: name a folder" in done.stderr


def test_a_submission_freezes_first_and_prints_the_handles(place: Path) -> None:
    fake_sbatch(place, f"test -f {place}/runs/a/config.yaml -a -d {place}/runs/a/code && echo 41")
    words = ("jobs/smoke.yaml", "--run-name", "a", "train.num_steps=30")
    done = submit(place, *words, SLURM_JOB_ID="7", MASTER_PORT="1", HF_TOKEN="planted-secret")
    assert done.returncode == 0, done.stderr
    assert "job      41 (slurm)" in done.stdout
    assert "scancel 41" in done.stdout
    run = place / "runs" / "a"
    assert run.stat().st_mode & 0o077 == 0
    assert (run / "submitit" / "41_submitted.pkl").is_file()
    assert read_json(run / "plan.json")["num_steps"] == 30
    event = json.loads((run / "attempts.jsonl").read_text())
    assert (event["event"], event["job_id"], event["executor"]) == ("submitted", "41", "slurm")
    exported = (place / "env").read_text()
    assert "SLURM_JOB_ID" not in exported
    assert "MASTER_PORT" not in exported
    assert "planted-secret" not in exported + "".join(p.read_text() for p in run.rglob("*.json"))


def test_the_script_is_a_file_or_in_a_dry_run_the_text(place: Path) -> None:
    fake_sbatch(place)
    words = ("jobs/smoke.yaml", "--run-name", "a", "--executor", "slurm", "--json")
    dry, done = answer(submit(place, *words, "--dry-run")), answer(submit(place, *words))
    assert "#SBATCH --job-name=a" in dry["script"].splitlines()
    assert Path(done["script"]).read_text() == dry["script"]


def test_a_refused_submission_leaves_no_folder(place: Path) -> None:
    fake_sbatch(place, "echo 'sbatch: error: Invalid account' >&2; exit 1")
    done = submit(place, "jobs/smoke.yaml", "--run-name", "a")
    assert done.returncode == 1
    assert "Invalid account" in done.stderr
    assert not (place / "runs" / "a").exists()


def test_what_a_submission_left_that_was_cut_off_is_named(place: Path) -> None:
    fake_sbatch(place)
    run = RunDir(place / "runs" / "a")
    run.create()
    run.code.mkdir()
    words = ("jobs/smoke.yaml", "--run-name", "a")
    with held(run.submission_lock, "a", "a submission"):
        assert "continue it with --resume" in submit(place, *words).stderr
    done = submit(place, *words)
    assert (done.returncode, "was cut off has left" in done.stderr) == (2, True)
    assert run.code.is_dir(), "another submission may be at work in it, where no lock says so"


def test_a_full_disk_is_one_sentence_with_what_is_needed(place: Path) -> None:
    (place / "runs").mkdir()
    argv = [sys.executable, "-m", "r1hpc.submit", "jobs/smoke.yaml", "--executor", "local"]
    command = shlex.join([*argv, "--run-root", str(place / "runs")])
    script = f"mount -t tmpfs -o size=1m none {place}/runs && touch {place}/mounted && {command}"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=environ, capture_output=True, text=True)
    if not (place / "mounted").exists():
        pytest.skip(f"no file system of its own here: {done.stderr}")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"error: {place}/runs is full, or your quota there is: [\d.]+ [KM]iB are free, and a run's folder "
        r"needs [\d.]+ MiB before its first checkpoint; make room, or choose another --run-root\n",
        done.stderr,
    ), done.stderr


def test_prepare_only_belongs_into_a_job(place: Path) -> None:
    done = submit(place, "--prepare-only", "--run-name", "a")
    assert done.returncode == 2
    assert "inside a job" in done.stderr


def test_a_requeued_train_sh_finds_its_run_again(place: Path) -> None:
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_START_TIME": "1000",
        "SLURM_JOB_END_TIME": "4600",
        "SLURM_JOB_QOS": "scavenger",
    }
    words = ("jobs/train.yaml", "train.global_batch_size=480", "--prepare-only", "--run-name", "train-77")
    first = submit(place, *words, **job)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"4 {place}/runs/train-77\n"
    resources = load.read(place / "runs" / "train-77" / "config.yaml").resources
    assert (resources.nodes, resources.gpus_per_node, resources.time) == (3, 4, "01:00:00")
    assert resources.qos == "scavenger"
    assert submit(place, *words, **job).stdout == first.stdout
    other = submit(place, *words, **{**job, "SLURM_JOB_ID": "78"})
    assert (other.returncode, "--resume" in other.stderr) == (2, True)


@pytest.mark.parametrize("recorded", [None, "", '{"event": "subm'])
def test_a_train_sh_that_was_cut_off_makes_its_run_anew(place: Path, recorded: str | None) -> None:
    """Killed, or its disk was full, after the configuration was frozen and before it was on record."""
    words = ("jobs/smoke.yaml", "--prepare-only", "--run-name", "smoke-77")
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1"}
    assert submit(place, *words, **job).returncode == 0
    record = place / "runs" / "smoke-77" / "attempts.jsonl"
    record.unlink()
    if recorded is not None:
        record.write_text(recorded)
    again = submit(place, *words, **job)
    assert again.returncode == 0, again.stderr
    assert json.loads(record.read_text())["job_id"] == "77"
