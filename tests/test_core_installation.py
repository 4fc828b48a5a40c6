"""`pip install r1hpc` alone: every command for a login node works, or names the extra that it needs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.package import OPTIONAL
from tests.core_environment import CHECKOUT, make_core_environment

_DRY_RUN = "submit rl_smoke --dry-run --json --executor slurm"
_WITH_PYTHON = f"{_DRY_RUN} cluster.python={sys.executable}"
_WORKS = (
    *("submit smoke --dry-run", _DRY_RUN, "settings smoke", "estimate train", "status edc0a14"),
    *(
        "watch edc0a14 --once",
        "logs edc0a14",
        "samples edc0a14",
        "report edc0a14",
        "report --json",
        "diagnose edc0a14",
    ),
    *("budget", "calibrate", "compare edc0a14@0 edc0a14@6", "export-metrics edc0a14 --to prometheus"),
    *("completion bash", "export --help", "shard --help"),
)
_NEEDS = {
    "report edc0a14 --format html --out page.html": "report",
    "shard verify x": "data",
    "chat edc0a14": "train",
    "export edc0a14 --out y --quantize int8": "train",
    "submit smoke --executor local": "train",
    "submit smollm2 --dry-run": "gym",
}
_DRIVER = """
import contextlib, io, json, sys, traceback
from r1hpc.__main__ import main

for words in sys.argv[1:]:
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words.split())
        except SystemExit as ended:
            status = ended.code or 0
        except Exception:
            traceback.print_exc()
    print(json.dumps([words, status, out.getvalue(), err.getvalue()]))
"""
"""Runs one command after the other."""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment without any extra."""
    return make_core_environment(tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with finished runs."""
    folder = tmp_path_factory.mktemp("root") / "runs"
    shutil.copytree(CHECKOUT / "tests" / "old_runs", folder)
    return folder


@pytest.fixture(scope="module")
def answers(core: str, root: Path) -> dict[str, tuple[int, str, str]]:
    """Exit status, stdout and stderr of each command, away from the checkout and from any Slurm."""
    done = call(core, root, "-c", _DRIVER, *_WORKS, *_NEEDS, _WITH_PYTHON)
    return {words: answer for words, *answer in map(json.loads, done.stdout.splitlines())}


def call(python: str, root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": str(root.parent), "HOME": str(root.parent), "R1HPC_RUN_ROOT": str(root)}
    command, place = [python, *words], root.parent
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)


def test_the_environment_has_no_optional_module(core: str, root: Path) -> None:
    code = "import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if u.find_spec(m)])"
    assert call(core, root, "-c", code, *OPTIONAL).stdout == "\n"


@pytest.mark.parametrize("words", _WORKS)
def test_a_command_of_the_login_node_needs_no_extra(answers: Any, words: str) -> None:
    status, out, err = answers[words]
    assert (status, err) == (0, "")
    assert out


@pytest.mark.parametrize("words", _NEEDS)
def test_what_needs_an_extra_names_it_in_one_line(answers: Any, root: Path, words: str) -> None:
    status, out, err = answers[words]
    assert (status in (1, 2), out) == (True, "")
    assert re.fullmatch(rf"error: .*pip install 'r1hpc\[{_NEEDS[words]}\]'.*\n", err), err
    assert not list(root.glob("smoke*")), "refused before anything is written"


def test_a_dry_run_shows_the_plan_and_what_a_submission_would_lack(answers: Any) -> None:
    lacks = "submit refuses this run here: stage=rl needs the packages torch, "
    notes = json.loads(answers[_DRY_RUN][1])["notes"]
    assert [note for note in notes if note.startswith(lacks)]
    notes = json.loads(answers[_WITH_PYTHON][1])["notes"]
    assert not [note for note in notes if "pip install" in note], "the nodes' interpreter has them"


def examine(python: str, root: Path, profile: str) -> "subprocess.CompletedProcess[str]":
    (root.parent / "site.yaml").write_text(profile)
    return call(python, root, "-m", "r1hpc.doctor", "--json", "--cluster", "./site.yaml")


def judged(python: str, root: Path, profile: str) -> dict[str, Any]:
    done = examine(python, root, profile)
    found = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert done.returncode == int(found["packages"]["state"] == "fail"), done.stdout
    return {**found["packages"], "checks": set(found)}


def test_doctor_judges_the_interpreter_of_the_nodes(core: str, root: Path) -> None:
    """A login node without torch is well where the nodes' interpreter has it."""
    nodes = judged(core, root, f"name: mine\npython: {sys.executable}\n")
    assert nodes["state"] == "ok"
    assert nodes["detail"].startswith(f"{sys.executable}: python 3.")
    assert "torch and driver" in nodes["checks"]
    own = judged(core, root, "name: mine\n")
    assert own["state"] == "fail"
    assert f"{core} lacks torch, deepspeed" in own["detail"]
    assert "pip install 'r1hpc[train]'" in own["fix"]
    assert "torch and driver" not in own["checks"], "there is no torch to judge"


def test_doctor_takes_nothing_of_its_own_environment_for_the_nodes(core: str, root: Path) -> None:
    found = judged(sys.executable, root, f"name: mine\npython: {core}\n")
    assert f"{core} lacks torch, deepspeed, transformers, zarr" in found["detail"]


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ("python: python3\nsetup: [module load python]\n", "cluster.setup decide"),
        ("python: /nowhere/bin/python\n", "No such file"),
        ("python: /bin/false\n", "printed no versions"),
    ],
)
def test_an_interpreter_that_cannot_be_asked_is_no_fault(
    core: str, root: Path, profile: str, why: str
) -> None:
    found = judged(core, root, f"name: mine\n{profile}")
    assert (found["state"], why in found["detail"]) == ("unknown", True)
    assert "--nodes" in found["fix"]


def test_an_interpreter_that_cannot_stand_in_a_job_script_is_refused(core: str, root: Path) -> None:
    for wrong in (" ", "python; touch x"):
        done = examine(core, root, f'name: mine\npython: "{wrong}"\n')
        assert (done.returncode, done.stdout) == (2, "")
        assert "error: cluster.python" in done.stderr
