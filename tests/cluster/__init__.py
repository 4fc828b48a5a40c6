"""The Slurm cluster the tests run on. daemons.py starts and stops it, cluster.py breaks and mends it,
__main__.py is its command line."""

from tests.cluster.cluster import Cluster
from tests.cluster.network import INTERFACE
from tests.cluster.processes import ClusterBusyError, ClusterError
from tests.cluster.state import STATE_FILE

__all__ = ["INTERFACE", "STATE_FILE", "Cluster", "ClusterBusyError", "ClusterError"]
