"""The submit command with --resume: what goes on, and what would be another run. Without Slurm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.load import read
from r1hpc.config.yaml_files import write_yaml
from r1hpc.slurm.script import FUNCTIONS
from r1hpc.submission.order import Order
from r1hpc.submission.resume import reconfigured
from r1hpc.telemetry.records.attempts import record
from tests.commands.submitting import answer, fake_sbatch, submit
from tests.recorded import RecordedRun


def test_a_refused_resume_leaves_the_run_as_it_was(place: Path) -> None:
    fake_sbatch(place)
    assert submit(place, "jobs/smoke.yaml", "--run-name", "a").returncode == 0
    run = RunDir(place / "runs" / "a")
    run.attempts.write_text(
        '{"event": "submitted", "time": 1, "executor": "slurm", "job_id": "41"}\n'
        '{"event": "begin", "time": 2, "attempt": 1, "job_id": "41", "node_names": ["n"], "ranks": 1}\n'
        '{"event": "end", "time": 3, "attempt": 1, "cause": "finished", "requeued": false}\n'
    )
    write_json(run.finished, {"global_step": 40, "time": 3})
    run.save.touch()
    kept = [path for path in run.path.iterdir() if path.is_file() and path != run.submission_lock]
    before = {path.name: path.read_bytes() for path in kept}
    fake_sbatch(place, "echo 'sbatch: error: Invalid account' >&2; exit 1")
    done = submit(place, "--run-name", "a", "--resume", "--account", "typo", "train.num_steps=9000")
    assert (done.returncode, "Invalid account" in done.stderr) == (1, True), done.stderr
    assert {path.name: path.read_bytes() for path in kept} == before


def test_a_finished_evaluation_is_not_trained_on(place: Path) -> None:
    made = RecordedRun(place / "runs" / "a", num_steps=40)
    load.save(replace(read(made.run.config), stage="evaluate"), made.run.config)
    made.submit("local-1")
    made.attempt(1, 1, "finished")
    write_json(made.run.finished, {"time": made.clock})
    done = submit(place, "--run-name", "a", "--resume")
    assert (done.returncode, "train.num_steps" in done.stderr) == (2, False)
    assert "a is finished" in done.stderr
    assert "start another run" in done.stderr


def test_a_run_that_stopped_early_is_not_queued_for_nothing(place: Path) -> None:
    made = RecordedRun(place / "runs" / "a", num_steps=40)
    early = replace(read(made.run.config), stage="sft")
    early = replace(early, data=replace(early.data, validation_documents=8))
    load.save(replace(early, train=replace(early.train, early_stopping=2)), made.run.config)
    made.submit("local-1")
    made.begin()
    made.steps(1, 20)
    write_json(made.run.finished, {"global_step": 20, "time": made.clock})
    made.end("finished", 20)
    done = submit(place, "--run-name", "a", "--resume", "train.num_steps=80")
    assert done.returncode == 2
    assert f"a was ended by train.early_stopping, and its model is {made.run.model}" in done.stderr


@pytest.mark.parametrize("step", [1, 30])
def test_a_run_does_not_become_a_mixture_in_its_middle(place: Path, step: int) -> None:
    made = RecordedRun(place / "runs" / "a", num_steps=40)
    made.submit("local-1")
    made.attempt(1, 20, "stopped", committed=20)
    schedule = f"data.mix.schedule=[{{from_step: {step}, weights: {{text: 1}}}}]"
    done = submit(place, "--run-name", "a", "--resume", schedule)
    assert done.returncode == 2
    assert "a resume cannot turn a mixture on or off" in done.stderr


def test_a_name_is_taken_once_and_resumed_when_asked(place: Path) -> None:
    fake_sbatch(place)
    assert submit(place, "jobs/smoke.yaml", "--run-name", "a").returncode == 0
    again = submit(place, "jobs/smoke.yaml", "--run-name", "a")
    assert (again.returncode, "--resume" in again.stderr) == (2, True)
    (place / "runs" / "a" / "attempts.jsonl").write_text(
        '{"event": "submitted", "time": 1, "executor": "slurm", "job_id": "41"}\n'
        '{"event": "begin", "time": 2, "attempt": 1, "job_id": "41", "node_names": ["n"], "ranks": 1}\n'
        '{"event": "end", "time": 3, "attempt": 1, "cause": "crash", "requeued": false}\n'
    )
    code = (place / "runs" / "a" / "code" / "r1hpc" / "submit.py").stat().st_ino
    fake_sbatch(place, "echo 42")
    words = ("--run-name", "a", "--resume", "--nodes", "2", "train.num_steps=90", "--json")
    assert answer(submit(place, *words, "train.micro_batch_size=1"))["job_id"] == "42"
    config = load.read(place / "runs" / "a" / "config.yaml")
    assert (config.resources.nodes, config.train.num_steps, config.train.micro_batch_size) == (2, 90, 1)
    assert (place / "runs" / "a" / "code" / "r1hpc" / "submit.py").stat().st_ino == code


def test_a_run_of_an_earlier_version_gets_the_functions_of_its_new_job_script(place: Path) -> None:
    """As version 0.1.0 froze it; and taken back with a refused resume."""
    fake_sbatch(place)
    assert submit(place, "jobs/smoke.yaml", "--run-name", "a").returncode == 0
    run = RunDir(place / "runs" / "a")
    run.attempts.write_text(
        '{"event": "submitted", "time": 1, "executor": "slurm", "job_id": "41"}\n'
        '{"event": "begin", "time": 2, "attempt": 1, "job_id": "41", "node_names": ["n"], "ranks": 1}\n'
        '{"event": "end", "time": 3, "attempt": 1, "cause": "crash", "requeued": false}\n'
    )
    frozen = run.shell_functions
    assert frozen.read_bytes() == FUNCTIONS.read_bytes()
    frozen.unlink()
    (frozen.parent / "shell" / "contract.py").unlink()
    fake_sbatch(place, "echo 'sbatch: error: Invalid account' >&2; exit 1")
    assert submit(place, "--run-name", "a", "--resume").returncode == 1
    assert not frozen.exists()
    fake_sbatch(place, "echo 42")
    assert submit(place, "--run-name", "a", "--resume").returncode == 0
    assert frozen.read_bytes() == FUNCTIONS.read_bytes()
    assert frozen.stat().st_mode & 0o777 == 0o600
    assert "\nCONTRACT=1 #" in run.script.read_text()


@pytest.mark.parametrize("item", ["data.seq_len=64", "train.global_batch_size=48", "train.seed=3"])
def test_a_resume_does_not_become_another_run(place: Path, item: str) -> None:
    fake_sbatch(place)
    assert submit(place, "jobs/smoke.yaml", "--run-name", "a").returncode == 0
    before = (place / "runs" / "a" / "config.yaml").read_text()
    (place / "runs" / "a" / "attempts.jsonl").write_text(
        '{"event": "begin", "time": 2, "attempt": 1, "job_id": "41", "node_names": ["n"], "ranks": 1}\n'
        '{"event": "end", "time": 3, "attempt": 1, "cause": "crash", "requeued": false}\n'
    )
    done = submit(place, "--run-name", "a", "--resume", item)
    assert done.returncode == 2
    assert f"--resume cannot change {item.partition('=')[0]}" in done.stderr
    assert (place / "runs" / "a" / "config.yaml").read_text() == before


def test_of_vllm_a_resume_changes_memory_and_speed_and_keeps_what_a_run_of_before_has(place: Path) -> None:
    fake_sbatch(place)
    done = submit(place, "jobs/rl_smoke.yaml", "--run-name", "a", "--gpus-per-node", "0")
    assert done.returncode == 0, done.stderr
    config = place / "runs" / "a" / "config.yaml"
    config.write_text(config.read_text().replace("vllm_options: {}", "vllm_options: {max_model_len: 64}"))
    (place / "runs" / "a" / "attempts.jsonl").write_text(
        '{"event": "begin", "time": 2, "attempt": 1, "job_id": "41", "node_names": ["n"], "ranks": 1}\n'
        '{"event": "end", "time": 3, "attempt": 1, "cause": "crash", "requeued": false}\n'
    )
    resume = ("--run-name", "a", "--resume", "--dry-run")
    assert submit(place, *resume).returncode == 0
    assert submit(place, *resume, "rollout.vllm_options={gpu_memory_utilization: 0.4}").returncode == 0
    done = submit(place, *resume, "rollout.vllm_options={seed: 3}")
    assert done.returncode == 2
    assert "rollout.vllm_options.seed is for r1hpc to set, or may change what is sampled" in done.stderr


def test_a_resume_with_other_questions_is_refused(place: Path) -> None:
    fake_sbatch(place)
    pairs = [{"question": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(30)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ("stage=traces", "task.name=jsonl", "task.options={path: pairs.jsonl, template: '{question}'}")
    sizes = ("generate.num_items=4", "generate.items_per_part=2", "--gpus-per-node", "0")
    done = submit(place, "jobs/smoke.yaml", "--run-name", "a", *words, *sizes)
    assert done.returncode == 0, done.stderr
    (place / "runs" / "a" / "attempts.jsonl").write_text(
        '{"event": "begin", "time": 2, "attempt": 1, "job_id": "41", "node_names": ["n"], "ranks": 1}\n'
        '{"event": "end", "time": 3, "attempt": 1, "cause": "crash", "requeued": false}\n'
    )
    resume = ("--run-name", "a", "--resume", "--dry-run")
    assert submit(place, *resume).returncode == 0
    with (place / "pairs.jsonl").open("a") as file:
        file.write('{"question": "1", "answer": "1"}\n')
    done = submit(place, *resume)
    assert done.returncode == 2
    assert f"{place}/pairs.jsonl has changed since this run began with it" in done.stderr
    assert "put the old file back" in done.stderr


def test_a_profile_read_anew_yields_to_what_the_first_command_line_said(tmp_path: Path) -> None:
    """$R1HPC_CLUSTER is read at each submission; --cluster asks for it by name, and wins."""
    profile = tmp_path / "site.yaml"
    profile.write_text("{cpus_per_task: 100, network_interface: ib0}")
    made = RecordedRun(tmp_path / "a")
    load.save(load.load(None, ["cluster.cpus_per_task=25", "cluster.name=mine"]), made.run.config)
    said = ("cluster.cpus_per_task=25", "a:cluster.name=mine", "other:cluster.name=theirs")
    record(made.run, "submitted", executor="local", job_id="local-1", overrides=said)
    order = Order(run_root=tmp_path, run_name="a", resume=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("R1HPC_CLUSTER", str(profile))
        cluster = reconfigured(made.run, order).cluster
        assert (cluster.cpus_per_task, cluster.network_interface, cluster.name) == (25, "ib0", "mine")
        now = replace(order, overrides=("cluster.cpus_per_task=50",))
        assert reconfigured(made.run, now).cluster.cpus_per_task == 50
        asked = replace(order, cluster=str(profile))
        assert reconfigured(made.run, asked).cluster.cpus_per_task == 100


def test_a_run_begun_before_rl_kl_gradient_is_resumed_with_the_gradient_it_had(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "a")
    frozen = load.as_layer(load.load("rl_smoke", ["rl.kl_coef=0.01"]))
    del frozen["rl"]["kl_gradient"]
    write_yaml(made.run.config, frozen)
    order = Order(run_root=tmp_path, run_name="a", resume=True, overrides=("train.num_steps=99",))
    config = reconfigured(made.run, order)
    assert (config.rl.kl_gradient, config.train.num_steps) == ("value", 99)
    with pytest.raises(UsageError, match=r"cannot change rl\.kl_gradient"):
        reconfigured(made.run, replace(order, overrides=("rl.kl_gradient=corrected",)))


def test_a_resume_sets_notify_unless_its_code_is_older(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "a")
    frozen = load.as_layer(load.load("smoke"))
    write_yaml(made.run.config, frozen)
    words = ("notify.url=https://x.org", "cluster.environment.A=1")
    order = Order(run_root=tmp_path, run_name="a", resume=True, overrides=words)
    assert reconfigured(made.run, order).notify.url == "https://x.org"
    del frozen["notify"]
    write_yaml(made.run.config, frozen)
    with pytest.raises(UsageError, match=r"its own code, which is older and has no notify\.url: leave"):
        reconfigured(made.run, order)
    assert reconfigured(made.run, replace(order, overrides=words[1:])).cluster.environment == {"A": "1"}
