"""Random search: drawn values are lasting, inside their range, and told alike by name and YAML."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from r1hpc import sweep as sweep_command
from r1hpc.base.errors import UsageError
from r1hpc.submission.order import Order, Purpose
from r1hpc.sweeps.definition import Definition, SweepDir, read_words
from r1hpc.sweeps.plan import config_of
from r1hpc.sweeps.samples import Samples, draw
from r1hpc.sweeps.submit import Chosen, _defined, submit_sweep
from r1hpc.telemetry.records.rungs import Halving

_LR = "train.lr=log:1e-5..1e-3"


def drawn(word: str, count: int, seed: int = 0) -> list[str]:
    """Return the values of the one key of this word."""
    grids, _ = draw(read_words([word])[0], Samples(count, seed))
    return [values[0] for grid in grids for values in grid.values()]


def order(root: Path) -> Order:
    return Order(Purpose.dry_run, executor="local", job="smoke", run_root=root, run_name="s")


def begin(root: Path, count: int, *words: str, halving: Chosen | None = None, seed: int = 0) -> Definition:
    """Write sweep.json as a call does, without jobs, and read it."""
    sweep, definition = _defined(order(root), read_words(words)[0], halving, Samples(count, seed))
    sweep.path.mkdir(exist_ok=True)
    sweep.save(definition)
    return SweepDir(root / "s").read()


def test_the_first_values_are_those_of_every_version() -> None:
    assert drawn("lr=log:1e-5..1e-3", 3) == ["0.0002512", "0.0001717", "0.0001165"]
    assert drawn("lr=log:1e-5..1e-3", 3, seed=1) != drawn("lr=log:1e-5..1e-3", 3)
    assert drawn("x=log:1e-5..1e-3", 3) != drawn("lr=log:1e-5..1e-3", 3)


@pytest.mark.parametrize("word", ["x=log:1e-5..1e-3", "x=int:1..50", "x=choice:0..49"])
def test_a_longer_list_begins_with_the_shorter_one(word: str) -> None:
    assert drawn(word, 40)[:7] == drawn(word, 7)


@pytest.mark.parametrize(
    ("text", "quantile"),
    [
        ("log:1e-5..1e-3", lambda share: 1e-5 * 100**share),
        ("uniform:-1..3", lambda share: -1 + 4 * share),
        ("uniform:0.9999..0.99999", lambda share: 0.9999 + 9e-5 * share),
        ("int:-500..499", lambda share: -500 + 1000 * share),
        ("log-int:1000..100000", lambda share: 1000 * 100**share),
    ],
)
def test_draws_fill_their_range_evenly(text: str, quantile: Any) -> None:
    values = sorted(map(float, drawn(f"x={text}", 500)))
    low, high = quantile(0), quantile(1)
    assert low - 1e-12 <= values[0]
    assert values[-1] <= high + 1e-12
    ends = [quantile(tenth / 10) for tenth in range(11)]
    counts = [sum(a <= value < b for value in values) for a, b in pairwise(ends)]
    assert all(25 <= count <= 75 for count in counts), counts


def test_values_are_short_and_whole_where_they_must_be() -> None:
    assert all(
        len(f"{float(value):e}".split("e")[0].rstrip("0")) <= 5 for value in drawn("x=log:1e-9..1e9", 99)
    )
    assert sorted(map(int, drawn("x=int:1..8", 8))) == list(range(1, 9)), "both ends, each once"
    assert sorted(map(int, drawn("x=log-int:1..16", 16))) == list(range(1, 17))
    assert set(drawn("x=choice:adam,sgd,[a,b]", 3)) == {"adam", "sgd", "[a,b]"}
    assert sorted(drawn("x=choice:1e-3,2e-3,0.001", 2)) in (["0.001", "2e-3"], ["1e-3", "2e-3"])


def test_name_and_configuration_have_the_same_value(tmp_path: Path) -> None:
    definition = begin(tmp_path, 20, _LR, "train.weight_decay=uniform:0..0.3")
    for point in definition.points():
        train = config_of(definition, point).train
        assert point.name == f"lr_{point.settings['train.lr']}-weight_decay_{train.weight_decay}"
        assert train.lr == float(point.settings["train.lr"])
        assert len(point.name) <= 40


def test_each_sample_has_all_seeds_and_more_samples_extend_the_list(tmp_path: Path) -> None:
    few = begin(tmp_path, 3, "train.seed=0..1", _LR).points()
    assert [point.settings["train.seed"] for point in few] == ["0", "1"] * 3
    more = begin(tmp_path, 5, _LR, "train.seed=0..2").points()
    assert more[:6] == few
    assert len(more) == 15
    assert len({point.settings["train.lr"] for point in more}) == 5
    assert begin(tmp_path, 3, _LR, "train.seed=0..1").points() == more, "fewer take none away"
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["drawn_from"] == [_LR, "--sample-seed 0"]


def test_another_range_or_seed_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, 3, _LR)
    with pytest.raises(
        UsageError, match=r"ranges \(train\.lr=log:1e-5\.\.1e-3 --sample-seed 0\) must be the"
    ):
        begin(tmp_path, 3, "train.lr=log:1e-5..1e-2")
    with pytest.raises(UsageError, match="another --run-name"):
        begin(tmp_path, 3, _LR, seed=1)
    with pytest.raises(UsageError, match="another --run-name"):
        submit_sweep(order(tmp_path), {"train.lr": ["1e-4", "1e-3"]})


def test_rungs_compare_samples_by_their_seeds(tmp_path: Path) -> None:
    rungs = begin(tmp_path, 4, _LR, "train.seed=0..2", halving=Chosen(2, 1 / 3, "loss", True)).rungs
    assert rungs is not None
    assert list(map(len, rungs["groups"])) == [3, 3, 3, 3]
    assert Halving(**rungs)["steps"] == [20]


def test_a_dry_run_lists_the_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [_LR, "train.seed=0..1", "--samples", "3", "--dry-run", "--executor", "local"]
    assert sweep_command.main(["smoke", *words, "--run-root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for value in drawn(_LR, 3):
        assert f"lr_{value}-seed_1  train.lr={value} train.seed=1  to submit" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([_LR], "is drawn: add the number of samples, --samples 20"),
        (
            ["train.lr=1e-4,1e-3", "--samples", "3"],
            "no setting has a range of log, uniform, int, log-int, choice. Give",
        ),
        (
            ["train.lr=1e-4", "--samples", "3"],
            "no setting has a range of log, uniform, int, log-int, choice. Give",
        ),
        ([_LR, "--samples", "0"], "--samples 0: give 1 or more"),
        ([_LR, "--samples", "100001"], "100,000 points"),
        ([_LR, "train.seed=0..9", "--samples", "10001"], "100,000 points"),
        (["train.seed=int:1..8", "--samples", "9"], "gave 8 different samples. Give --samples 8 or fewer"),
        (["train.seed=0..1", "--sample-seed", "3"], "--sample-seed goes with --samples"),
        (["train.lr=log:1e-5-1e-3", "--samples", "3"], "give two numbers, as log:1e-5..1e-3"),
        (["train.seed=int:1..8.5", "--samples", "3"], "give two whole numbers"),
        (["train.lr=log:1e-3..1e-5", "--samples", "3"], "a range goes up"),
        (["train.lr=uniform:1..1e400", "--samples", "3"], "a range goes up, with numbers of up to 1e300"),
        (["train.lr=uniform:1e308..1.797e308", "--samples", "3"], "numbers of up to 1e300"),
        (["train.lr=uniform:0...5", "--samples", "3"], "give two numbers, as uniform:0.0..0.3"),
        (["train.lr=log:0..1", "--samples", "3"], "a logarithmic range begins above 0"),
        (["train.lr=1e-2,log:1e-5..1e-3", "--samples", "3"], "stands alone, without other values"),
        (["train.lr=log:1e-5..1e-3,1e-2", "--samples", "3"], "give two numbers, as log:"),
        (["train.lr=choice:1,,2", "--samples", "3"], "with its values in one list"),
        (["train.num_steps=uniform:5..9", "--samples", "3"], "it must be a whole number"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, words: list[str], error: str) -> None:
    with pytest.raises(UsageError) as refused:
        sweep_command.main(["smoke", *words, "--run-root", str(tmp_path), "--dry-run"])
    assert error in str(refused.value)


def test_samples_do_not_go_with_the_folder_of_a_sweep(tmp_path: Path) -> None:
    begin(tmp_path, 2, _LR)
    for flag in ("--samples", "--sample-seed"):
        with pytest.raises(UsageError, match="go with the command that submits points"):
            sweep_command.main([str(tmp_path / "s"), flag, "3"])
