"""Fixtures for every package. Tests marked `slurm` run on a real four-node Slurm cluster started here.

The cluster needs root on Debian and starts once per run of pytest, in about three seconds. With
R1HPC_TEST_CLUSTER set to what `python -m tests.cluster up` printed, that cluster is used and left running;
its jobs are cancelled by the tests. Where there can be no cluster, or another one runs,
those tests are skipped and the last line says so; under CI=true they fail instead.
"""

import atexit
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster import Cluster, ClusterBusyError, ClusterError
from tests.cluster.cluster import in_use
from tests.cluster.packages import install, unavailable

_WHY_NOT = pytest.StashKey[str | None]()
_SKIPPED = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The four nodes. Its jobs are the test's to end; see `idle_cluster`."""
    named = os.environ.get("R1HPC_TEST_CLUSTER")
    if named:
        yield Cluster.attach(Path(named))
        return
    own = Cluster()
    atexit.register(own.stop)
    try:
        try:
            own.start()
        except ClusterBusyError as error:  # started by another pytest since this one looked
            _refuse(f"no Slurm cluster: {error}")
        yield own
    finally:
        own.stop()
        atexit.unregister(own.stop)


@pytest.fixture
def idle_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The four nodes without a job, before the test and after it."""
    cluster.clear()
    cluster.wait_nodes(cluster.node_names)
    yield cluster
    cluster.clear()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Once, before any test's clock runs: can there be a cluster? Install its packages."""
    session.config.stash[_SKIPPED] = 0
    wanted = any(item.get_closest_marker("slurm") for item in session.items)
    collect_only = session.config.option.collectonly
    session.config.stash[_WHY_NOT] = _why_no_cluster() if wanted and not collect_only else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a Slurm test where there is no cluster; under CI=true that is a failure."""
    why_not = item.config.stash[_WHY_NOT]
    if why_not is None or item.get_closest_marker("slurm") is None:
        return
    if os.environ.get("CI") != "true":
        item.config.stash[_SKIPPED] += 1
    _refuse(f"no Slurm cluster: {why_not}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say last what was not tested."""
    count = config.stash.get(_SKIPPED, 0)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if count and reporter is not None:
        tests = "1 Slurm test was" if count == 1 else f"{count} Slurm tests were"
        reporter.write_line(f"{tests} SKIPPED: {config.stash[_WHY_NOT]}")


def _refuse(why: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


def _why_no_cluster() -> str | None:
    if os.environ.get("R1HPC_TEST_CLUSTER"):
        return None
    why_not = unavailable() or in_use()
    if why_not is None:
        try:
            install()
        except ClusterError as error:
            why_not = f"its packages could not be installed ({str(error).splitlines()[0]})"
    return why_not
