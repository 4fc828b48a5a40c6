"""r1hpc.loadtest of a server that r1hpc.serve started, with a small one in the place of vLLM.

Its measurements are tested in tests/serving/test_load.py.
"""

import json
from pathlib import Path

import pytest

from r1hpc import cancel, loadtest
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from tests.commands.commands import as_json
from tests.commands.test_serve import served
from tests.recorded import RecordedRun
from tests.runs import wait_over
from tests.serving.clients import SMALL_SERVER, key_of, make_model

SHORT = ["--seconds", "1", "--levels", "2,4", "--max-tokens", "4"]


def test_a_run_keeps_its_load_tests_and_counts_them_as_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, root = make_model(tmp_path / "little"), str(tmp_path / "r")
    words = ["--executor", "local", "--gpus", "0", "--python", SMALL_SERVER, "--run-root", root]
    # Of several words, which a setting on the command line has to quote.
    run, url = served(str(model), *words, "cluster.environment.STREAM='slots=4 first_s=0.02'")
    try:
        found = as_json(loadtest, [run.run_id, "--run-root", root, *SHORT], capsys)
        (server,) = found["servers"]
        assert (server["name"], server["url"], server["model"]) == (run.run_id, url, "little")
        assert loadtest.main([str(run.path), *SHORT]) == 0
        shown = capsys.readouterr().out
        assert "requests/s" in shown
        assert key_of(run) not in shown
        assert json.loads(sorted(run.loadtests.glob("*.json"))[0].read_text())["servers"] == [server]
        asked = sum(level["finished"] for level in server["levels"])
    finally:
        cancel.main([str(run.path)])
        wait_over(run)
    counted = json.loads(run.train_metrics.read_text().splitlines()[-1])["requests"]
    assert counted >= asked + 1, "the first one is a request too"
    with pytest.raises(R1hpcError, match="cancelled"):
        loadtest.main([str(run.path)])
    other = served_nowhere(run)
    with pytest.raises(R1hpcError, match="does not answer"):
        loadtest.main([str(other.path)])


def served_nowhere(run: RunDir) -> RunDir:
    """A run whose address was left behind by a kill."""
    run.server_address.write_text(
        json.dumps({"place": {"host": "127.0.0.1", "port": 9, "node": "n"}, "model": "m", "attempt": 1})
    )
    return run


def test_a_run_that_is_no_server_is_refused(root: Path) -> None:
    made = RecordedRun(root / "young")
    with pytest.raises(UsageError, match="is no server"):
        loadtest.main([str(made.run.path)])
