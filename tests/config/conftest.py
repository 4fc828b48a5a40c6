"""No test of this folder takes the cluster profile of the environment it is started from."""

import pytest


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1HPC_CLUSTER", raising=False)
