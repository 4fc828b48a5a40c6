"""The parts of `make demo` that need no training."""

import json
import subprocess
import sys
from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.evaluations import answers_path
from research.demo import add_to_page, free_name, learned, processes


def test_only_processes_of_the_folder_are_killed(tmp_path: Path) -> None:
    def start(*words: str) -> subprocess.Popen[bytes]:
        code = "print(flush=True); input()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    chain = tmp_path / "demo"
    supervisor = start("-m", "r1hpc.launch", "chain", str(chain))
    rank = start("-m", "r1hpc.launch", "rank", str(chain / "killed"))
    others = [start("-m", "r1hpc.launch", "rank", str(tmp_path / "demo-2")), start("edit", str(chain))]
    try:
        assert processes(chain) == sorted([supervisor.pid, rank.pid])
        assert processes(chain, "rank") == [rank.pid]
    finally:
        for process in (supervisor, rank, *others):
            process.kill()
            process.communicate()


def test_the_question_is_one_that_the_model_has_learnt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    _write_evaluations(run, {0: [True, False, False], 20: [True, False, True]})
    assert learned(run) == "question 2"
    _write_evaluations(run, {0: [True, True, True], 20: [True, True, True]})
    assert learned(run) == "question 0", "there must be one, whatever was learnt"


def _write_evaluations(run: RunDir, correct: dict[int, list[bool]]) -> None:
    run.metrics.mkdir(exist_ok=True)
    run.rl_evaluations.write_text("".join(f'{{"global_step": {step}}}\n' for step in correct))
    for step, answers in correct.items():
        lines = (
            {
                **{"index": index, "prompt": f"question {index}", "expected": "1", "greedy": "1"},
                **{"greedy_correct": right, "greedy_length": 1, "num_samples": 1, "num_correct": int(right)},
                "mean_length": 1.0,
            }
            for index, right in enumerate(answers)
        )
        answers_path(run, step).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_another_demo_gets_another_name(tmp_path: Path) -> None:
    assert free_name(tmp_path, "demo") == "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_name(tmp_path, "demo") == "demo-3"


def test_the_page_shows_the_screen(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text("<header>4 runs</header><p>hours</p>")
    add_to_page(page, ["answer> 5 < 7"], ["$ kill -9 1 2"])
    assert "</header><section" in page.read_text()
    assert page.read_text().index("answer&gt; 5 &lt; 7") < page.read_text().index("$ kill -9 1 2")
