"""Rollout workers that could not sample, and trainers that cannot have any, are refused before the queue."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError, StateError, UsageError
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load, paths, plugins
from r1hpc.status import main as show_status
from r1hpc.submit import main as submit
from r1hpc.train.exchange.mailbox import Box
from r1hpc.train.rollout.worker import refuse_other_prompts

WITH_WORKERS = ("rl.max_staleness=2", "workers.patience_s=5")


def trainer_at(path: Path, *words: str) -> RunDir:
    """The folder of a trainer as `submit` leaves it, as far as a worker's submission reads it."""
    run = RunDir(path)
    run.create()
    config = paths.with_absolute_paths(load.load("jobs/rl_smoke.yaml", [*WITH_WORKERS, *words]))
    load.save(config, run.config)
    run.code.mkdir()
    plugins.freeze_plugins(paths.names_in(config), run.code, shutil.copyfile)
    plugins.freeze_files(paths.files_in(config), run.code)
    return run


@pytest.fixture
def trainer(tmp_path: Path) -> RunDir:
    return trainer_at(tmp_path / "trainer")


def refusal(*words: str, root: Path) -> str:
    """What `submit --dry-run` refuses; empty if it would submit."""
    try:
        assert submit([*words, "--executor", "local", "--dry-run", "--run-root", str(root)]) == 0
    except (ConfigError, StateError, UsageError) as error:
        return " ".join(str(error).split())
    return ""


def worker_error(trainer: RunDir, *words: str) -> str:
    where = f"workers.trainer={trainer.path}"
    return refusal("jobs/rollout.yaml", where, *words, root=trainer.path.parent / "runs")


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (WITH_WORKERS, ""),
        ((*WITH_WORKERS, "workers.silence_s=9", "train.precision=bf16"), ""),
        (("workers.patience_s=5",), "rl.max_staleness=0: take rl.max_staleness=1"),
        ((*WITH_WORKERS, "rl.max_resamples=2"), "rl.max_resamples=2: take rl.max_resamples=0"),
        ((*WITH_WORKERS, "rollout.engine=vllm"), "rollout.engine=vllm: take rollout.engine=sampler"),
        ((*WITH_WORKERS, "model.lora_rank=4"), "model.lora_rank=4: take model.lora_rank=0"),
        ((*WITH_WORKERS, "train.precision=fp8"), "train.precision=fp8: take train.precision=bf16"),
        ((*WITH_WORKERS, "rl.algorithm=ppo"), "Take rl.algorithm=grpo, or rl.max_staleness=0"),
        (
            (*WITH_WORKERS, "workers.idle_minutes=5"),
            "workers.idle_minutes=5.0 has no use in stage rl: remove",
        ),
        ((*WITH_WORKERS, "workers.trainer=there"), "has no use in stage rl: remove it"),
        (("workers.silence_s=5",), "workers.silence_s=5.0 has no use in a run of stage rl without workers."),
        ((*WITH_WORKERS, "workers.silence_s=1"), "workers.silence_s is 1.0: it must be at least 2"),
        (("rl.max_staleness=2", "workers.patience_s=0"), "workers.patience_s is 0.0: it must be above 0"),
        (("rl.max_staleness=2", "workers.patience_s=soon"), "workers.patience_s is 'soon': it must be a"),
    ],
)
def test_a_trainer_that_cannot_have_workers_is_refused(
    words: tuple[str, ...], refused: str, tmp_path: Path
) -> None:
    error = refusal("jobs/rl_smoke.yaml", *words, root=tmp_path)
    assert refused in error
    assert bool(error) == bool(refused)


def test_a_replay_cannot_have_workers(tmp_path: Path) -> None:
    recorded = trainer_at(tmp_path / "recorded")
    recorded.trained.mkdir()
    for rollout in range(6):
        recorded.record(rollout).touch()
        recorded.record(rollout).with_suffix(".npz").touch()
    error = refusal("jobs/rl_smoke.yaml", *WITH_WORKERS, f"rl.replay={recorded.path}", root=tmp_path)
    assert f"rl.replay={recorded.path}: take rl.replay=null" in error


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ((), ""),
        (("resources.gpus_per_node=1", "workers.idle_minutes=3"), ""),
        (("rollout.num_prompts=8", "train.micro_batch_size=4"), ""),  # the trainer's own
        (("train.lr=1e-5",), "train.lr=1e-05 is not this worker's to set: it takes its trainer's, 0.001."),
        (("model.tokenizer=bytes",), "model.tokenizer=bytes is not this worker's to set"),
        (("rollout.engine=vllm",), "it takes its trainer's, sampler. Remove it"),
        (("workers.patience_s=4",), "workers.patience_s=4.0 has no use in stage rollout"),
        (("workers.trainer=null",), "a rollout worker needs workers.trainer=DIR"),
        (("resources.nodes=2",), "one rank, and this job has 2: take resources.nodes=1"),
        (("resources.ranks_per_node=3",), "one rank, and this job has 3: take resources.nodes=1"),
        (("resources.gpus_per_node=4",), "one rank, and this job has 4: take resources.nodes=1"),
    ],
)
def test_a_worker_that_could_not_sample_is_refused(
    words: tuple[str, ...], refused: str, trainer: RunDir
) -> None:
    error = worker_error(trainer, *words)
    assert refused in error
    assert bool(error) == bool(refused)


def remove(trainer: RunDir) -> None:
    shutil.rmtree(trainer.path)


def without_settings(trainer: RunDir) -> None:
    trainer.config.unlink()


def folder_for_settings(trainer: RunDir) -> None:
    trainer.config.unlink()
    trainer.config.mkdir()


def of_another_stage(trainer: RunDir) -> None:
    trainer.config.write_text("stage: sft\n")


def without_workers(trainer: RunDir) -> None:
    trainer.config.write_text("stage: rl\n")


def damaged(trainer: RunDir) -> None:
    trainer.config.write_text("stage: [")


def of_a_later_version(trainer: RunDir) -> None:
    trainer.config.write_text("stage: rl\nnew_section: {key: 1}\n")


def finished(trainer: RunDir) -> None:
    trainer.finished.touch()


def open_to_all(trainer: RunDir) -> None:
    trainer.path.chmod(0o777)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (remove, "is no run that you can read and write: give the folder of your own run"),
        (without_settings, "is no run that you can read"),
        (folder_for_settings, "config.yaml"),
        (of_another_stage, "takes no groups of workers (stage=sft, workers.patience_s=None). Begin one with"),
        (without_workers, "takes no groups of workers (stage=rl, workers.patience_s=None). Begin one with"),
        (damaged, "config.yaml is not valid YAML"),
        (of_a_later_version, "is damaged, or from another version of r1hpc: unknown key 'new_section'"),
        (finished, "has finished: there is nothing to sample for it"),
        (open_to_all, "every user may replace files in"),
    ],
)
def test_a_folder_that_is_no_trainer_is_refused_by_name(
    change: Callable[[RunDir], None], refused: str, trainer: RunDir
) -> None:
    change(trainer)
    error = worker_error(trainer)
    assert error.startswith(f"workers.trainer={trainer.path}")
    assert refused in error


def test_a_name_that_the_trainer_has_seen_is_refused(trainer: RunDir) -> None:
    (trainer.workers / "w1").mkdir(parents=True)
    assert "had a worker called w1: --resume" in worker_error(trainer, "--run-name", "w1")
    assert worker_error(trainer, "--run-name", "w2") == ""


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_code_of_the_trainer_that_is_not_here_as_it_was_is_refused(change: str, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def short(completion):\n    return 1.0\n")
    trainer = trainer_at(tmp_path / "trainer", f"reward.terms={{accuracy: 1.0, '{own}:short': 0.1}}")
    assert worker_error(trainer) == ""
    if change == "gone":
        own.unlink()
    else:
        own.write_text("def short(completion):\n    return 2.0\n")
    error = worker_error(trainer)
    assert f"workers.trainer={trainer.path}: " in error
    assert f"there is no file {own}" in error or "put the old files back" in error


def test_questions_that_have_changed_since_the_trainer_began_are_refused(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [f'{{"question": "{number}", "answer": "{number}"}}\n' for number in range(99)]
    questions.write_text("".join(lines))
    trainer = trainer_at(tmp_path / "trainer", "task.name=jsonl", f"task.options={{path: {questions}}}")
    assert worker_error(trainer) == ""
    questions.write_text("".join(lines[1:]))
    assert "has changed since this run began with it" in worker_error(trainer)


@pytest.fixture
def of_root() -> Iterator[RunDir]:
    """A trainer that belongs to root, where every user may come; pytest's own folders are private."""
    place = Path(tempfile.mkdtemp(prefix="r1hpc-workers-"))
    place.chmod(0o755)
    run = trainer_at(place / "trainer")
    run.path.chmod(0o755)
    yield run
    shutil.rmtree(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_trainer_of_another_account_is_refused(mode: int, of_root: RunDir) -> None:
    of_root.config.chmod(0o644)
    of_root.path.chmod(mode)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.write(writer, worker_error(of_root).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        assert "is no run that you can read and write" in file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_worker_whose_prompts_are_other_tokens_is_refused(trainer: RunDir) -> None:
    refuse_other_prompts(trainer, "ours")  # the trainer has not begun
    write_json(trainer.metrics / "evaluated.json", {"task": "t", "form": "theirs"})
    refuse_other_prompts(trainer, "theirs")
    with pytest.raises(UsageError, match=r"\(id ours\) are not those of .*trainer \(id theirs\): put"):
        refuse_other_prompts(trainer, "ours")


def test_status_of_a_worker_shows_its_groups_and_versions(
    trainer: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = RunDir(trainer.path.parent / "w1")
    worker.create()
    load.save(load.load("jobs/rollout.yaml", [f"workers.trainer={trainer.path}"]), worker.config)

    def shown() -> str:
        assert show_status([str(worker.path)]) == 0
        return " ".join(capsys.readouterr().out.split())

    place = trainer.workers / "w1"
    assert f"groups delivered: none on file in {place}" in shown()
    Box.opened(place, 1, "a1")
    assert "groups delivered: 0 version: none yet" in shown()
    box = Box.opened(place, 2, "a2")
    box.committed, box.version = 1234, 5
    box.beat()
    assert shown().endswith("groups delivered: 1,234 version: 5")
    trainer.exchange.mkdir()
    write_json(trainer.exchange / "latest.json", {"version": 7, "digest": "d", "token": "t"})
    text = shown()
    assert text.endswith("groups delivered: 1,234 version: 5, 2 behind")
    assert "no step on record" in text
    trainer.exchange.joinpath("latest.json").write_text("{")
    assert shown().endswith("version: 5")
