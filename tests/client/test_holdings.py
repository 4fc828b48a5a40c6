"""Generators, states and plain values of objects are found, saved when they changed, and put back."""

import copy
import functools
import itertools
import os
import random
import sys
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1hpc.client.held import holdings as module
from r1hpc.client.held.holdings import Holdings, keeps_itself, script_globals


class Inner:
    def __init__(self) -> None:
        self.count = 0
        self.dice = random.Random(1)


class Owner:
    drawn = 0

    def __init__(self) -> None:
        self.numpy, self.old = np.random.default_rng(1), np.random.RandomState(1)
        self.torch = torch.Generator().manual_seed(1)
        self.lazy: Any = None
        self.ema = torch.nn.Linear(2, 1)
        self.inner = Inner()
        self.many: list[Any] = [Inner(), {"one": Inner()}]
        self.recent: deque[float] = deque(maxlen=3)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.array, self.shared = np.zeros(3), torch.zeros(3)
        self.view = {"shared": self.shared}
        self.me, self.pid, self.name = self, os.getpid(), "constant"

    def use(self) -> list[Any]:
        """Draw from everything, change everything, and return what was seen."""
        Owner.drawn += 1
        self.lazy = self.lazy or np.random.default_rng(7)
        self.inner.count += 1
        self.recent.append(self.inner.dice.random())
        self.counts["calls"] += 1
        self.array[0] += 1
        self.shared += 1
        with torch.no_grad():
            self.ema.weight.data.mul_(0.5)
        inner = [self.many[0].dice.random(), self.many[1]["one"].dice.random()]
        draws = [self.numpy.random(), self.old.rand(), torch.rand(1, generator=self.torch).item()]
        values = [Owner.drawn, self.inner.count, *self.recent, self.counts["calls"], self.array[0]]
        return [
            *inner,
            *draws,
            *values,
            self.lazy.random(),
            self.view["shared"][0].item(),
            self.ema.weight.sum(),
        ]


def test_an_object_goes_on_where_it_was(tmp_path: Path) -> None:
    Owner.drawn = 0
    owner = Owner()
    weight = copy.deepcopy(owner.ema)
    holdings = Holdings({"owner": owner, "class": Owner})
    assert all(kind not in ("plain", "state") for kind, _ in holdings.changed().values())
    for _ in range(5):
        owner.use()
    torch.save(holdings.changed(), tmp_path / "held.pt")
    expected = [owner.use() for _ in range(3)]

    Owner.drawn = 0
    fresh = Owner()
    fresh.ema.load_state_dict(weight.state_dict())
    again = Holdings({"owner": fresh, "class": Owner})
    again.restore(torch.load(tmp_path / "held.pt", weights_only=False))
    assert [fresh.use() for _ in range(3)] == expected
    assert fresh.recent.maxlen == 3
    assert ("owner", "name") not in holdings.changed()
    assert again.not_kept == set()


def test_a_process_number_is_the_new_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Inner()
    owner.worker_pid = None  # type: ignore[attr-defined]
    holdings = Holdings({"owner": owner})
    owner.worker_pid = os.getpid()  # type: ignore[attr-defined]
    saved = holdings.changed()
    monkeypatch.setattr(os, "getpid", lambda: 7)
    holdings.restore(saved)
    assert owner.worker_pid == 7  # type: ignore[attr-defined]


def test_a_collator_of_functions_is_looked_into() -> None:
    def make() -> tuple[Any, Any]:
        dice, count = random.Random(1), 0

        def collate() -> tuple[float, int]:
            nonlocal count
            count += 1
            return dice.random(), count

        bound = functools.partial(lambda rng: rng.random(), rng=np.random.default_rng(1))
        return collate, bound

    collate, bound = make()
    holdings = Holdings({"collator": collate, "partial": bound})
    collate(), bound()
    saved = holdings.changed(copies=True)
    expected = collate(), bound()
    collate, bound = make()
    Holdings({"collator": collate, "partial": bound}).restore(saved)
    assert (collate(), bound()) == expected


def test_globals_of_the_script_are_kept_and_those_of_libraries_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_part.py").write_text("count = 0\nnames = ['a']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_part  # type: ignore[import-not-found]

    roots = script_globals()
    assert roots["global of own_part"] is own_part
    assert "global of torch" not in roots
    holdings = Holdings({"own_part": own_part})
    own_part.count = 3
    assert holdings.changed() == {("own_part", "count"): ("plain", 3)}
    del sys.modules["own_part"]


def test_what_cannot_be_kept_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_LEAVES", 50)
    owner = Inner()
    owner.numbers = itertools.count()  # type: ignore[attr-defined]
    owner.rows, owner.grows = [0] * 60, [0]  # type: ignore[attr-defined]
    holdings = Holdings({"callback": owner})
    assert holdings.not_kept == {"callback: numbers (a count)"}  # the rows may never change
    owner.rows.append(1)  # type: ignore[attr-defined]
    holdings.changed()
    assert "callback: rows (too large)" in holdings.not_kept
    holdings.restore({("callback", "gone", "value"): ("plain", 1)})
    assert any(text.startswith("callback: gone.value (cannot be restored") for text in holdings.not_kept)


def test_what_the_library_saves_is_not_saved_again() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    holdings = Holdings({"model": model}, model.modules())
    next(model.parameters()).data += 1
    assert holdings.changed() == {}
    assert keeps_itself(model)
    assert not keeps_itself(Inner())
