"""gpu-<node>.folded: what is read with it is what the readings say, whatever happens to them in between."""

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.gpu import history
from r1hpc.telemetry.gpu.history import folded_beside, read_gpu_history, read_gpus
from tests.telemetry.counting import calls_of
from tests.telemetry.scenes import summarise

NODES = ("n1", "n2.cluster")
MIG = "MIG-41b36b0e-2b9f-5b4e-9d4e-0d6a2d1f7c11"


@pytest.fixture(autouse=True)
def _keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is little."""
    monkeypatch.setattr(history, "_WORTH_BYTES", 1)


@pytest.fixture
def lines_folded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many lines were folded since it was called last."""
    return calls_of(monkeypatch, history.GpuHistory, "add")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def path(run: RunDir) -> Path:
    """One node's, 20 ticks of one attempt."""
    append(run.gpu_metrics("n1"), *first_lines(20))
    return run.gpu_metrics("n1")


def first_lines(ticks: int, begin: int = 0, power: float = 300.0) -> Iterator[dict[str, Any]]:
    """A start, then a tick a second, 100 J each."""
    stamp = {"node": "n1", "attempt": 1, "source": "nvml"}
    if not begin:
        static = {"uuid": "GPU-1", "index": 0, "name": "A100", "power_limit_w": 400.0}
        yield {"event": "devices", "time": 0, **stamp, "period_s": 1.0, "driver": "550", "gpus": [static]}
    for at in range(begin, begin + ticks):
        yield {"time": at, **stamp, "gpus": [{"uuid": "GPU-1", "power_w": power, "energy_j": 100.0 * at}]}


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def said(run: RunDir) -> str:
    """All that reports and pictures are given, to the digit; two NaN are the same."""
    nodes = read_gpus(run)
    return repr([(node.result(), list(node.series.values())) for node in nodes])


def afresh(run: RunDir) -> str:
    """The same without what is kept, which stays as it was."""
    kept = {path: path.read_bytes() for path in run.metrics.glob("*.folded")}
    for path in kept:
        path.unlink()
    found = said(run)
    for path in run.metrics.glob("*.folded"):
        path.unlink()
    for path, raw in kept.items():
        path.write_bytes(raw)
    return found


def random_lines(dice: random.Random, node: str) -> Iterator[bytes]:
    """What samplers leave in weeks: starts, gaps, a clock that is set back, counters that begin again, torn
    lines, GPUs that do not read everything, are lost, or are slices of one."""
    now, attempt, energy, uuids = 1.79e9, 0, 0.0, ["GPU-a", "GPU-b", MIG]
    while True:
        stamp = {"node": node, "attempt": attempt, "source": "nvml"}
        if dice.random() < 0.03:
            attempt += dice.choice([0, 1, 1])
            now += dice.choice([3, 4000.7])
            uuids = ["GPU-a", MIG, dice.choice(["GPU-b", f"GPU-{attempt}"])]
            statics = [
                {"uuid": uuid, "index": i, "name": "A100", "power_limit_w": dice.choice([400.0, None])}
                for i, uuid in enumerate(uuids)
            ]
            about = {"period_s": dice.choice([1.0, 5]), "source": dice.choice(["nvml", "stub"])}
            yield _line({"event": "devices", "time": now, **stamp, **about, "gpus": statics})
        elif dice.random() < 0.02:
            yield _line({"event": "no_driver", "time": now, **stamp, "message": f"no driver {now}"})
        elif dice.random() < 0.03:
            yield dice.choice([b'{"time": 17, "gp\n', b"\n", b"\0\xff\n", b'{"time": "noon", "gpus": []}\n'])
        else:
            now += dice.choice([1, 1.1, 0.9, 5, 40, -7.3])
            energy = dice.choice([0.1, energy]) if dice.random() < 0.02 else energy + 400 * dice.random()
            yield _line({"time": now, **stamp, "gpus": [_reading(dice, uuid, energy) for uuid in uuids]})


def _reading(dice: random.Random, uuid: str, energy: float) -> dict[str, Any]:
    if dice.random() < 0.02:
        return {"uuid": uuid, "error": dice.choice(["gpu is lost", "ünbekannt"])}
    values = {
        "gpu_utilization_percent": dice.choice([100, 99, 3]),
        "memory_utilization_percent": dice.randint(0, 100),
        "power_w": dice.choice([66, 400 * dice.random()]),
        "memory_used_bytes": dice.randint(0, 85 * 10**9),
        "temperature_c": dice.randint(30, 90),
        "energy_j": energy,
        "throttle_reasons": dice.choice([[], ["sw_power_cap"], ["gpu_idle", "0x800"]]),
        "ecc_corrected_volatile": dice.randint(0, 9),
        "ecc_uncorrected_volatile": dice.randint(0, 2),
    }
    keeps = 0.2 if uuid == MIG else 0.9
    return {"uuid": uuid, **{key: value if dice.random() < keeps else None for key, value in values.items()}}


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


@pytest.mark.parametrize("seed", range(8))
def test_folds_that_were_cut_anywhere_say_what_the_readings_say(
    run: RunDir, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept folds go on from wherever the last report was, at the middle of a line too."""
    dice = random.Random(seed)
    monkeypatch.setattr("r1hpc.telemetry.gpu.history._MOST_POINTS", 60)
    written = {run.gpu_metrics(node): b"".join(islice(random_lines(dice, node), 250)) for node in NODES}
    while any(written.values()):
        for path, rest in written.items():
            size = dice.choice([0, 1, dice.randint(0, 9000), *[dice.randint(0, 90_000)] * 3])
            with path.open("ab") as file:
                file.write(rest[:size])
            written[path] = rest[size:]
        found = said(run)
        assert found == afresh(run)
        assert found == said(run), "and once more, now from what is kept"
    nodes = read_gpus(run)
    assert [node.result() for node in nodes] == [summarise(path) for path in run.all_gpu_metrics]
    strides = [series.stride for node in nodes for series in node.series.values()]
    assert max(strides) > 1, "and the series were thinned"


def test_readings_are_folded_once(run: RunDir, path: Path, lines_folded: Callable[[], int]) -> None:
    first = said(run)
    assert lines_folded() == 21
    assert said(run) == first
    assert lines_folded() == 0
    append(path, *first_lines(3, begin=20))
    assert said(run) == afresh(run) != first
    assert lines_folded() == 3 + 24


def test_a_line_that_is_being_written_is_read_when_it_is_whole(run: RunDir, path: Path) -> None:
    (line,) = map(_line, first_lines(1, begin=20))
    for part, ticks in ((line[:30], 20), (line[30:-1], 21), (line[-1:], 21)):
        with path.open("ab") as file:
            file.write(part)
        assert [read_gpu_history(path).ticks for _ in range(2)] == [ticks, ticks]


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replace(path: Path) -> None:
    path.unlink()
    append(path, *first_lines(40, power=200.0))


def _rewrite(path: Path) -> None:
    path.write_text(path.read_text().replace("300.0", "200.0"))


def _other_digit(path: Path) -> None:
    folded = folded_beside(path)
    folded.write_bytes(folded.read_bytes().replace(b'"ticks": 20', b'"ticks": 30'))


def _other_fields(path: Path) -> None:
    """As if a field had come without another VERSION."""
    _, _, body = folded_beside(path).read_bytes().partition(b"\n")
    body = body.replace(b'"resets"', b'"falls"')
    folded_beside(path).write_bytes(history._head(body) + b"\n" + body)


def _other_version(path: Path) -> None:
    raw = folded_beside(path).read_bytes().replace(b'"ticks": 20', b'"ticks": 30')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "VERSION", history.VERSION + 1)
        body = raw.partition(b"\n")[2]
        folded_beside(path).write_bytes(history._head(body) + b"\n" + body)


@pytest.mark.parametrize(
    "change",
    [
        _shrink,
        _replace,
        _rewrite,
        _other_digit,
        _other_fields,
        _other_version,
        lambda path: path.write_bytes(b""),
        lambda path: folded_beside(path).write_bytes(b"\xff\x00" * 50),
        lambda path: folded_beside(path).write_bytes(b""),
        lambda path: os.truncate(folded_beside(path), 400),
        lambda path: folded_beside(path).unlink(),
    ],
)
def test_folds_of_other_readings_or_damaged_ones_are_made_again(
    run: RunDir, path: Path, change: Callable[[Path], object], lines_folded: Callable[[], int]
) -> None:
    said(run)
    change(path)
    found = said(run)
    assert found == afresh(run)
    if path.stat().st_size:
        lines_folded()
        assert said(run) == found
        assert lines_folded() == 0


def test_readings_that_are_gone(run: RunDir, path: Path) -> None:
    said(run)
    path.unlink()
    assert read_gpu_history(path).result()["gpus"] == {}


def test_where_the_folder_cannot_be_written_they_are_folded_each_time(
    run: RunDir, path: Path, lines_folded: Callable[[], int]
) -> None:
    folded_beside(path).mkdir()  # stands for a colleague's folder: also root cannot replace it by a file
    first = said(run)
    lines_folded()
    assert said(run) == first
    assert lines_folded() == 21
    assert list(run.metrics.glob(".*")) == []


def test_little_is_read_again_rather_than_written(
    run: RunDir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_WORTH_BYTES", path.stat().st_size + 1)
    said(run)
    assert not folded_beside(path).exists()
    append(path, *first_lines(1, begin=20))
    said(run)
    assert folded_beside(path).exists()


def test_reports_of_a_live_run_at_once(run: RunDir, path: Path) -> None:
    def report(_: int) -> bool:
        (gpu,) = read_gpu_history(path).gpus.values()
        return bool(gpu.result()["energy_j"] == 100.0 * (gpu.ticks - 1))

    def live() -> None:
        for at in range(20, 320):
            append(path, *first_lines(1, begin=at))

    with ThreadPoolExecutor(4) as pool:
        sampler = pool.submit(live)
        assert all(pool.map(report, range(120)))
        sampler.result()
    assert said(run) == afresh(run)
    assert read_gpu_history(path).ticks == 320
