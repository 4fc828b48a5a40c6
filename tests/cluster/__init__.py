"""The Slurm cluster the tests run on. See cluster.py for the class, __main__.py for the command line."""

from tests.cluster.cluster import Cluster
from tests.cluster.network import INTERFACE
from tests.cluster.processes import ClusterBusyError, ClusterError
from tests.cluster.state import STATE_FILE

__all__ = ["INTERFACE", "STATE_FILE", "Cluster", "ClusterBusyError", "ClusterError"]
