"""A run tells who leads the loop of its script, as it was seen at the first optimizer step."""

from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import load
from r1hpc.script.loop import note_leader, seen
from tests.client.attempts import as_attempt

STEP = "weight = torch.zeros(1, requires_grad=True)\n{0}torch.optim.SGD([weight], 0.1).step()\n"


@pytest.mark.slow  # a start of torch each
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\n" + STEP.format(""), "not led by r1hpc: a preemption sends SIGTERM"),
        (
            "import os, torch\nif pid := os.fork():\n    os.waitpid(pid, 0)\nelse:\n"
            "    weight = torch.zeros(1, requires_grad=True)\n    torch.optim.SGD([weight], 0.1).step()\n",
            "not led by r1hpc (it trains in a process of its own)",
        ),
        (
            "import torch\nfrom r1hpc.client.run import attempt\nfrom r1hpc.client.states import TorchState\n"
            "run = attempt()\nstate = TorchState(model=torch.nn.Linear(1, 1))\nrun.resume(state)\n"
            "for step in run.steps(1, state=state):\n    " + STEP.format("    "),
            "led by script",
        ),
    ],
    ids=["a loop of its own", "in a child", "r1hpc's"],
)
def test_who_leads_is_told(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, run = tmp_path / "train.py", RunDir(tmp_path / "run")
    script.write_text(text)
    done = as_attempt(run, 1, [str(script)])
    assert done.returncode == 0, done.stderr
    config = load(str(script), ["script.checkpoints=''"])
    leader = note_leader(run, config, 1, before="")
    assert note_leader(run, config, 1, before=leader) == leader
    assert seen(run, config, 1).startswith(words)
    assert capsys.readouterr().err.count(f"r1hpc: the loop is {words}") == 1
    assert run.attempts.read_text().count(words) == 1
