"""Ranks that look for rank 0 and find somebody else's store."""

from pathlib import Path

import pytest

from r1hpc.attempt.control.watchdog import Watchdog
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm import rank_env
from r1hpc.slurm.rank_env import RankContext, choose_port
from r1hpc.train.parallel.distributed import make_store
from r1hpc.train.rank import _rendezvous


def test_a_store_of_another_attempt_is_refused(tmp_path: Path) -> None:
    """A stranger serves the port that rank 0 of this attempt had: real stores on both ends."""
    run = RunDir(tmp_path / "run")
    run.create()
    run.attempt_dir(2).mkdir(parents=True)
    listener = choose_port()
    port = listener.getsockname()[1]
    stranger = make_store("localhost", port, 2, listener=listener)
    stranger.set("r1hpc/token", "of attempt 1")
    place = run.attempt_dir(2) / "rendezvous.json"
    write_json(place, {"host": "localhost", "port": port, "token": "of attempt 2"})
    context = RankContext(1, 1, 2, 2, 0, 1, "here", ("here",), attempt=2)
    with pytest.raises(R1hpcError, match=f"localhost:{port} answers, but not for this attempt"):
        _rendezvous(run, RunConfig(), context, "of attempt 2", Watchdog(300, print))


def test_a_rank_that_finds_no_rank_0_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rendezvous.json is of an earlier attempt, whose rank 0 is gone."""
    monkeypatch.setattr(rank_env, "_RENDEZVOUS_TIMEOUT_S", 0.3)
    place, beats = tmp_path / "rendezvous.json", list[str]()
    write_json(place, {"host": "localhost", "port": 1, "token": "of attempt 1"})
    with pytest.raises(R1hpcError, match=r"rank 0 did not write .*rendezvous\.json within 0 s"):
        rank_env.await_meeting(place, "of attempt 2", beats.append)
    assert set(beats) == {"waiting for rank 0"}
