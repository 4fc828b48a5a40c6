"""sbatch/train.sh: what it adds to the job script, which run it takes, and whose code."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.shell import TRAIN, calls_of, place_functions, program, start_train


def test_without_slurm_train_sh_says_what_to_do() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", str(TRAIN)], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbatch sbatch/train.sh" in done.stderr
    assert "python -m r1hpc.submit" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_train_sh_takes_nothing_of_the_step_it_was_submitted_from(stage: Path) -> None:
    """As in `srun --pty -c 8 bash`: Slurm sets a SLURM_CPUS_PER_TASK that is there to 1."""
    (stage / "attempt").write_text("3\n")
    (stage / "run" / "site.sh").touch()
    answers = f"--prepare-only) echo 4 {stage}/run ;; begin) cat {stage}/attempt ;; *) exit 3 ;;"
    program(stage / "python", f'case "$3" in {answers} esac\n')
    leaked = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_MEM_PER_CPU": "4000", "SLURM_GPUS": "1"}
    program(stage / "srun", f'env > {stage}/known; echo "srun $*" >> {stage}/calls')
    start_train(stage, **leaked, SLURM_CPUS_PER_TASK="1", SLURM_JOB_CPUS_PER_NODE="128(x4)")
    known = dict(line.partition("=")[::2] for line in (stage / "known").read_text().splitlines())
    assert "OMP_NUM_THREADS" in known
    assert not leaked.keys() & known.keys()
    assert "--cpus-per-task=32" in next(call for call in calls_of(stage) if call.startswith("srun"))


@pytest.mark.parametrize(("recorded", "code"), [("", "."), ('{"event":', "."), ("{}\n", "runs/train-9/code")])
def test_a_half_made_run_is_made_anew_by_the_code_of_the_clone(stage: Path, recorded: str, code: str) -> None:
    for place in (".", "runs/train-9/code"):
        place_functions(stage / place, f"echo {place} >> {stage}/calls")
        (stage / place / "r1hpc" / "submit.py").touch()
    (stage / "runs" / "train-9" / "attempts.jsonl").write_text(recorded)
    program(stage / "python", f"echo $PYTHONPATH >> {stage}/calls; exit 2")
    start_train(stage)
    assert calls_of(stage) == [code, str(stage / code)]


def test_train_sh_outside_a_clone_takes_the_functions_of_the_installed_package(stage: Path) -> None:
    place_functions(stage / "site", f"echo installed >> {stage}/calls")
    (stage / "r1hpc").mkdir()
    program(
        stage / "python", f"[ $1 = -c ] && exec echo {stage}/site/r1hpc\necho $* >> {stage}/calls; exit 2"
    )
    (stage / "my").mkdir()
    start_train(stage, SLURM_SUBMIT_DIR=str(stage / "my"))
    assert calls_of(stage) == [
        "installed",
        f"-m r1hpc.submit --prepare-only --run-root {stage}/my/runs --run-name train-9",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("--run-name", "a", "--run-root", "my runs"),
        ("x.yaml", "--run-name=b", "train.lr=1", "--run-root=my runs", "--run-name=a"),
        ("t.py", "--run-root=my runs", "--run-name=a", "--", "--run-name", "of-the-script"),
    ],
)
def test_train_sh_finds_the_run_that_its_words_name(stage: Path, words: tuple[str, ...]) -> None:
    place_functions(stage / "my runs" / "a" / "code", f"echo a >> {stage}/calls; exit 1")
    (stage / "my runs" / "a" / "attempts.jsonl").write_text("{}\n")
    start_train(stage, *words)
    assert calls_of(stage) == ["a"]


def test_train_sh_leaves_a_script_its_own_words(stage: Path) -> None:
    program(stage / "python", f"echo $* > {stage}/calls; exit 2")
    start_train(stage, "t.py", "--", "--lr", "1e-4")
    where = f"--run-root {stage}/runs --run-name train-9"
    assert calls_of(stage) == [f"-m r1hpc.submit --prepare-only {where} t.py -- --lr 1e-4"]


def test_train_sh_has_no_successor_before_its_run_is_there(stage: Path) -> None:
    """It would be one without the job's arguments, or of a foreign RUN_DIR."""
    (stage / "run" / "job.sh").touch()
    program(stage / "python", "exit 1")
    program(stage / "sleep", "")
    program(stage / "sbatch", f"echo sbatch >> {stage}/calls")
    program(stage / "scontrol", "[ $1 != requeue ] || { echo 'presently disabled'; exit 1; }")
    assert "submit it again yourself" in start_train(stage, RUN_DIR=str(stage / "run"))
    assert not (stage / "calls").exists()
