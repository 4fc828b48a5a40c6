"""No command prints a line that is wider than a terminal of 80 columns."""

import importlib
import io
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from r1hpc.__main__ import COMMANDS
from r1hpc.api import ChainSubmission
from r1hpc.config import load
from r1hpc.reporting.page import publish
from r1hpc.submission.chain.file import Definition, Stage, open_definition, save_definition
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.submit_chain import SubmittedChain

_OLD = Path(__file__).parents[1] / "old_runs"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChainDir:
    """Two runs of reinforcement learning, the second from the model of the first; on 80 columns."""
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    made = ChainDir(tmp_path / "runs" / "r1")
    stages: list[Stage] = []
    for name, version in (("grpo", "0.1.0"), ("again", "edc0a14")):
        shutil.copytree(_OLD / version, made.path / name)
        config = load.load("rl_smoke", [f"model.path={made.path}/grpo/model"] if stages else [])
        load.save(config, made.stage(name).config)
        stages.append(Stage(name, ("grpo",) if stages else (), config))
    save_definition(Definition("r1.yaml", "", tuple(stages)), made)
    return made


@pytest.mark.parametrize(
    "words",
    [
        "status r1",
        "status r1/grpo",
        "status --all",
        "watch r1/grpo --once",
        "report r1",
        "report r1/again",
        "diagnose r1/grpo",
        "compare r1/grpo@0 r1/grpo@6",
        "budget",
        "calibrate",
        "settings jobs/smoke.yaml",
        "estimate jobs/r1.yaml",
        "estimate --params 7e9 --tokens 1e9 --gpu a100-80gb --num-gpus 8",
        "submit jobs/smoke.yaml --dry-run --executor local",
        "submit jobs/r1.yaml --dry-run --executor local --run-name new",
        *(f"{name} --help" for name in COMMANDS),
    ],
)
def test_no_line_is_wider_than_the_terminal(words: str, chain: ChainDir, capsys: Capture) -> None:
    command, *rest = words.split()
    with suppress(SystemExit):  # of --help
        assert importlib.import_module(f"r1hpc.{command.replace('-', '_')}").main(rest) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if str(chain.path.parent) not in line]
    assert lines
    assert [line for line in lines if len(line) > 80] == []


def test_results_of_a_chain_stand_in_one_table(chain: ChainDir, tmp_path: Path, capsys: Capture) -> None:
    from r1hpc import report, status

    assert status.main(["r1"]) == 0
    shown = capsys.readouterr().out.rpartition("\n\n")[2]
    table = [line.split() for line in shown.splitlines()]
    assert [row[0] for row in table] == ["stage", "grpo@0", "grpo", "again@0", "again"]
    headings = shown.splitlines()[0].split()
    assert headings == [
        "stage",
        "model",
        "greedy",
        "pass@1",
        *["95", "%", "interval"],
        "difference",
        "node-h",
    ]
    assert [row[1] for row in table[3:]] == ["grpo", "grpo"]
    base, trained = float(table[1][3]), float(table[2][3])
    assert float(table[2][6]) == pytest.approx(trained - base, abs=0.0011)
    assert report.main(["r1"]) == 0
    assert capsys.readouterr().out.endswith(shown)
    runs = [chain.stage(stage.name) for stage in open_definition(chain).stages]
    page = publish(runs, chain.path.parent, tmp_path / "page.html", 1.8e9).read_text()
    assert page.index("<h3>Results</h3>") < page.index("again@0") < page.index("Where the hours went")


def test_followed_to_its_end_a_chain_shows_its_results(chain: ChainDir) -> None:
    out = io.StringIO()
    assert ChainSubmission(SubmittedChain(chain, "local", (), {}, ())).follow(out) == 0
    assert "r1: finished (2 of 2 stages finished)" in out.getvalue()
    assert "again@0" in out.getvalue()
