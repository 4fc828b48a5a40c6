"""Fixtures for every package. Tests marked `slurm` run on a real four-node Slurm cluster started here.

The cluster needs root on Debian and starts once per worker of pytest, in about three seconds. With
R1HPC_TEST_CLUSTER set to what `python -m tests.cluster up` printed, that cluster is used and left running;
its jobs are cancelled by the tests. Where there can be no cluster, or another one runs,
those tests are skipped and the last line says so; under CI=true they fail instead.

`make test-all` runs three workers, each in a box (`python -m tests.cluster worker`) with its own cluster.
Under a plain `pytest -n 2 --dist loadgroup` one worker runs all Slurm tests, first.
"""

import atexit
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import HealthCheck, settings

from tests.cluster import Cluster, ClusterBusyError, ClusterError
from tests.cluster.daemons import in_use
from tests.cluster.packages import install, unavailable

_WHY_NOT = pytest.StashKey[str | None]()
_NO_CLUSTER = "no Slurm cluster: "
_SLOW = Path(__file__).with_name("slow.txt")
"""Written by `python -m tests.slow JUNIT.xml`."""


# A machine that others use too is slow now and then.
settings.register_profile("r1hpc", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("r1hpc")
os.environ.pop("COLUMNS", None)  # texts are as wide as in a log, wherever the tests are started from


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
        _start(own)
        yield own
    finally:
        own.stop()
        atexit.unregister(own.stop)


def _start(cluster: Cluster) -> None:
    """Start it, in a second try if a stalled disk or a busy host spoils the first."""
    try:
        cluster.start()
    except ClusterBusyError as error:  # started by another pytest since this one looked
        _refuse(str(error))
    except ClusterError as error:
        warnings.warn(f"the cluster did not start at first: {error}", stacklevel=1)
        cluster.start()


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """Some commands set their process's; here many run in one."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def idle_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The four nodes without a job, before the test and after it."""
    cluster.clear()
    cluster.wait_nodes(cluster.node_names)
    yield cluster
    cluster.clear()


@pytest.fixture
def on_cluster(idle_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands that this process runs itself."""
    for name, value in idle_cluster.env().items():
        monkeypatch.setenv(name, value)  # read_situation() and sbatch() ask this cluster
    return idle_cluster


@pytest.fixture
def prompt_cluster(idle_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster where no signal comes so late that it meets the next attempt."""
    before = idle_cluster.kill_wait, idle_cluster.message_timeout
    idle_cluster.set_waits(kill_wait=8, message_timeout=15)
    yield idle_cluster
    idle_cluster.clear()
    idle_cluster.set_waits(*before)


@pytest.hookimpl(tryfirst=True)  # ahead of xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests: those in slow.txt, with dear fixtures or a time-out.

    The longest come first: those with Slurm, then those with a time-out or a group, then the other slow ones.
    Outside of boxes one worker has the cluster.
    """
    slow = frozenset(_SLOW.read_text().splitlines())
    for item in items:
        needs_time = any(item.get_closest_marker(name) for name in ("xdist_group", "timeout"))
        if needs_time or item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slurm") is not None and "R1HPC_TEST_BOX" not in os.environ:
            item.add_marker(pytest.mark.xdist_group("slurm"))
    first = ("slurm", "timeout", "xdist_group", "slow")
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in first])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Once, before any test's clock runs: can there be a cluster? Install its packages."""
    wanted = any(item.get_closest_marker("slurm") for item in session.items)
    collect_only = session.config.option.collectonly
    session.config.stash[_WHY_NOT] = _why_no_cluster() if wanted and not collect_only else None


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Try a Slurm test that failed once more; its first failure is a warning of the second try.

    Real daemons act in real time, and a machine may stand still for a minute. (pytest-rerunfailures needs a
    socket between its workers, which have a network each.)
    """
    if item.get_closest_marker("slurm") is None or item.get_closest_marker("soak") is not None:
        return None  # as usual
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failures = [report.longreprtext for report in reports if report.failed]
    if failures:
        assert isinstance(item, pytest.Function)
        item._initrequest()  # fixtures of one test are made anew
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        warnings.warn(f"{item.nodeid} failed at first:\n{failures[0]}", stacklevel=1)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a Slurm test where there is no cluster; under CI=true that is a failure.

    vLLM wants an environment of its own: its tests are skipped in any other.
    """
    if item.get_closest_marker("vllm") is not None and find_spec("vllm") is None:
        pytest.skip("vLLM is not in this environment: make test-vllm")
    why_not = item.config.stash[_WHY_NOT]
    if why_not is None or item.get_closest_marker("slurm") is None:
        return
    _refuse(why_not)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say last what was not tested."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of xdist
        return
    reasons = [str(report.longrepr[2]) for report in reporter.stats.get("skipped", ())]
    missed = [reason.partition(_NO_CLUSTER)[2] for reason in reasons if _NO_CLUSTER in reason]
    if missed:
        tests = "1 Slurm test was" if len(missed) == 1 else f"{len(missed)} Slurm tests were"
        reporter.write_line(f"{tests} SKIPPED: {missed[0]}")


def _refuse(why: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(_NO_CLUSTER + why, pytrace=False)
    pytest.skip(_NO_CLUSTER + why)


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
