"""Whether this machine can hold the cluster, and the Debian packages it needs."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster.processes import ClusterError, call

_PACKAGE_OF = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "srun": "slurm-client",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "ip": "iproute2",
    "faketime": "faketime",
}
_LOCK_S = 600
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def unavailable() -> str | None:
    """Why the cluster cannot run here, in plain words; None when it can (packages may still be missing)."""
    if os.geteuid() != 0:
        return "the Slurm cluster needs root (network namespaces)"
    if _missing() and not shutil.which("apt-get"):
        return f"not a Debian system and these are missing: {' '.join(_missing())}"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"this container may not make network namespaces ({probe.stderr.strip()})"
    return None


def install() -> None:
    """Install what is missing, with apt-get; raise ClusterError when that is not possible."""
    with Path(tempfile.gettempdir(), "r1hpc-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two pytest workers the second finds all installed
        if missing := _missing():
            _install(missing)


def _install(missing: list[str]) -> None:
    if not shutil.which("apt-get"):
        raise ClusterError(f"these packages are missing and there is no apt-get: {' '.join(missing)}")
    # Another apt-get may hold the locks, of dpkg and of the package lists: wait for it.
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", f"DPkg::Lock::Timeout={_LOCK_S}"]
    install = [*apt, "install", "-y", "--no-install-recommends", *missing]
    try:
        call(install, timeout=900)
    except ClusterError:  # no package lists, or lists older than the mirror
        call([*apt, "update"], timeout=_LOCK_S)
        call(install, timeout=900)


def _missing() -> list[str]:
    return [package for program, package in _PACKAGE_OF.items() if not shutil.which(program, path=PATH)]
