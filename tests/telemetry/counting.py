"""How often a function is called: counted = calls_of(monkeypatch, module, "name"), then counted()."""

from collections.abc import Callable
from typing import Any

import pytest


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Callable[[], int]:
    """The calls of `owner.name` since this was asked last."""
    count, whole = 0, getattr(owner, name)

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return whole(*arguments)

    monkeypatch.setattr(owner, name, counted)

    def since() -> int:
        nonlocal count
        before, count = count, 0
        return before

    return since
