"""A stage whose input was trained on is old, and runs again with --redo. A renamed chain goes on."""

from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.submission.chain.folder import ChainDir, supervisor_pid
from tests.runs import command_output, wait_until
from tests.submission.chains import COMMON, actions_of, submit, submitted, write_chain

_STAGES = """\
  - {name: one, checkpoint: {keep: 9}}
  - {name: two, model: {path: "${stage:one}/model"}}
"""
pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_a_stage_is_old_after_its_input_was_trained_on(tmp_path: Path) -> None:
    common = COMMON.replace("num_steps: 6", "num_steps: 4")
    file = write_chain(tmp_path, _STAGES, common)
    chain = ChainDir(tmp_path / "runs" / "small")
    done = submit(tmp_path, str(file), "--executor", "local", "--follow")
    assert done.returncode == 0, done.stderr
    wait_until("end of the supervisor", lambda: supervisor_pid(chain) is None, 60)
    before = (chain.stage("two").model / "model.safetensors").read_bytes()

    words = ["--resume", "--run-name", "one", "train.num_steps=6", "--executor", "local", "--follow"]
    command_output(["-m", "r1hpc.submit", *words, "--run-root", str(chain.path)])
    shown = command_output(["-m", "r1hpc.status", str(chain.path)])
    assert "old: its input one is now step 6, it had step 4" in " ".join(shown.split())

    named = submitted(tmp_path, "--run-name", "small")
    assert actions_of(named) == ["finished", "finished"]
    assert any("stage two is old" in note and "--redo" in note for note in named["notes"])
    redone = submit(tmp_path, "--run-name", "small", "--redo", "--follow")
    assert redone.returncode == 0, redone.stderr
    wait_until("end of the supervisor", lambda: supervisor_pid(chain) is None, 60)
    assert "old:" not in command_output(["-m", "r1hpc.status", str(chain.path)])
    kept = RunDir(chain.path / "two.old-1")
    assert (kept.model / "model.safetensors").read_bytes() == before
    assert (chain.stage("two").model / "model.safetensors").read_bytes() != before

    renamed = ChainDir(chain.path.rename(chain.path.with_name("other")))
    after = submitted(tmp_path, "--run-name", "other")
    assert actions_of(after) == ["finished", "finished"]
    assert str(chain.path) + "/" not in renamed.definition.read_text()
    assert str(chain.path) + "/" not in (renamed.path / "two" / "config.yaml").read_text()
