"""Nodes that ask the first one for the time, over loopback."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from r1hpc.preflight.network import PeerFacts, collect_peers

NAMES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return int(listener.getsockname()[1])


def test_strangers_who_knock_take_no_nodes_turn() -> None:
    port, knocked = free_port(), threading.Event()

    def ask(rank: int) -> PeerFacts:
        knocked.wait(15)
        return collect_peers(rank, NAMES, [port], None)

    def knock() -> None:
        for _ in range(len(NAMES)):
            until_connected(port).close()
        knocked.set()

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(collect_peers, 0, NAMES, [port], None)
        others = [pool.submit(ask, rank) for rank in (1, 2)]
        pool.submit(knock).result()
        for found in (other.result() for other in others):
            assert found.unreachable is None
            assert found.clock_offset_s is not None
            assert abs(found.clock_offset_s) < 5  # one clock
        first.result()


def until_connected(port: int) -> socket.socket:
    """The listener may begin later."""
    for _ in range(150):
        try:
            return socket.create_connection(("127.0.0.1", port), 2.0)
        except OSError:
            threading.Event().wait(0.1)
    raise AssertionError("nobody listens")
