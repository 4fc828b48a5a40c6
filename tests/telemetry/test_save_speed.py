"""How fast checkpoints were written, from the saves on record in a run root."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import GIB
from r1hpc.telemetry.diagnosis.timeline import Part, spans_of
from r1hpc.telemetry.records.attempts import Attempt
from r1hpc.telemetry.records.ranks import measured_save_speed


def test_the_median_of_saves_that_say_something(tmp_path: Path) -> None:
    # Written behind training: 1 s of copying, 7 of writing, of which training waited for half a second.
    behind = {"seconds": 1.5, "waited_s": 0.5, "write_s": 7.0, "bytes": 16 * GIB, "num_nodes": 4}
    made(tmp_path / "a", [behind, {"seconds": 0.1, "bytes": 5 << 20}])
    made(tmp_path / "b", [{"seconds": 2.0, "bytes": 2 * GIB}, {"seconds": 4.0, "bytes": 4 * GIB}])
    speed = measured_save_speed(tmp_path, num_nodes=4)
    assert speed is not None
    assert speed.gib_s == 1.0
    assert "3 saves" in speed.source
    assert measured_save_speed(tmp_path / "nothing", 4) is None


@pytest.mark.parametrize(("num_nodes", "gib_s"), [(1, 0.5), (4, 2.0), (8, 2.0)])
def test_fewer_nodes_are_not_believed_to_be_as_fast(tmp_path: Path, num_nodes: int, gib_s: float) -> None:
    save = {"seconds": 0.0, "waited_s": 0.0, "write_s": 8.0, "bytes": 16 * GIB, "num_nodes": 4}
    made(tmp_path / "a", [save])
    speed = measured_save_speed(tmp_path, num_nodes)
    assert speed is not None
    assert speed.gib_s == gib_s


def test_a_save_is_on_the_timeline_where_training_waited_for_it() -> None:
    attempt = Attempt(1, None, 0.0, 50.0, 1, 0, None, None, None)
    behind = {"event": "save", "time": 20.0, "seconds": 1.5, "waited_s": 0.5, "copied_at": 12.0}
    formerly = {"event": "save", "time": 40.0, "seconds": 3.0}
    spans = [s for s in spans_of(attempt, 50.0, (), (), (behind, formerly)) if s.part is Part.save]
    assert [(s.begin, s.end) for s in spans] == [(19500, 20000), (11000, 12000), (37000, 40000)]


def made(path: Path, saves: list[dict[str, Any]]) -> None:
    run = RunDir(path)
    run.create()
    run.config.touch()
    lines = [json.dumps({"event": "save", "time": 1.0, "attempt": 1, **save}) for save in saves]
    run.events.parent.mkdir(exist_ok=True)
    run.events.write_text("\n".join(lines) + "\n")
