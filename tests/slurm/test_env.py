"""Who a rank is, from SLURM_* and from the local supervisor; ports and interfaces of this machine."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.slurm.rank_env import (
    choose_port,
    current,
    expand_counts,
    expand_nodelist,
    from_local,
    from_slurm,
    job_id,
    network_interface_to,
)

# As printed by a step of `srun -N2 --ntasks-per-node=4` on Slurm 24.11.5, rank 5.
STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "r1n[1-2]",
    "SLURM_JOB_NODELIST": "r1n[1-4]",
    "SLURMD_NODENAME": "r1n2",
    "R1HPC_ATTEMPT": "3",
}


def test_a_rank_of_a_step() -> None:
    context = from_slurm(STEP)
    assert (context.rank, context.local_rank, context.world_size, context.local_world_size) == (5, 1, 8, 4)
    assert (context.node_rank, context.num_nodes, context.node_name) == (1, 2, "r1n2")
    assert context.node_names == ("r1n1", "r1n2")
    assert (context.attempt, context.job_id) == (3, "17")
    assert context.master_host == context.peer_host == "r1n1"


def test_the_first_node_looks_at_the_second_for_its_interface() -> None:
    first = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert from_slurm(first).peer_host == "r1n2"


def test_what_was_inherited_from_another_world_is_not_read() -> None:
    foreign = {
        "MASTER_ADDR": "10.9.9.9",
        "MASTER_PORT": "1",
        "RANK": "7",
        "LOCAL_RANK": "7",
        "WORLD_SIZE": "99",
    }
    assert current({**STEP, **foreign}) == from_slurm(STEP)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SLURM_PROCID": "8"}, "rank 8"),
        ({"SLURM_LOCALID": "4"}, "local_rank 4"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ({"SLURM_PROCID": "one"}, "SLURM_PROCID"),
        ({"R1HPC_ATTEMPT": ""}, "R1HPC_ATTEMPT"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(y2)"}, "task counts"),
    ],
)
def test_variables_that_make_no_sense_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(StateError, match=named.replace("(", r"\(")):
        from_slurm({**STEP, **change})


def test_outside_of_srun_it_says_how_to_start() -> None:
    with pytest.raises(StateError, match=r"python -m r1hpc\.submit"):
        current({"HOME": "/root"})


def test_local_ranks_play_several_nodes() -> None:
    environ = {"R1HPC_LOCAL_RANK": "3", "R1HPC_LOCAL_WORLD_SIZE": "4", "R1HPC_LOCAL_NODE_COUNT": "2"}
    context = current({**STEP, **environ, "R1HPC_ATTEMPT": "1"})
    host = socket.gethostname()
    assert (context.node_rank, context.local_rank, context.local_world_size) == (1, 1, 2)
    assert context.node_names == (f"{host}-0", f"{host}-1")
    assert context.peer_host == "127.0.0.1"


def test_local_ranks_must_fill_their_nodes() -> None:
    environ = {"R1HPC_LOCAL_RANK": "0", "R1HPC_LOCAL_WORLD_SIZE": "3", "R1HPC_LOCAL_NODE_COUNT": "2"}
    with pytest.raises(StateError, match="does not divide 3"):
        from_local({**environ, "R1HPC_ATTEMPT": "1"})


def test_the_id_of_an_array_task_is_not_the_arrays() -> None:
    assert job_id({"SLURM_JOB_ID": "44"}) == "44"
    array = {"SLURM_JOB_ID": "46", "SLURM_ARRAY_JOB_ID": "44", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_id(array) == "44_2"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07],m2", ["n1", "n2", "n3", "n07", "m2"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("r[1-2]c[3,5]-ib", ["r1c3-ib", "r1c5-ib", "r2c3-ib", "r2c5-ib"]),
        ("a-1,b-2", ["a-1", "b-2"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert list(expand_nodelist(text)) == names


@pytest.mark.parametrize("text", ["n[1-3", "n1-3]", "n[[1]]", "n[1-x]", "n[]", "n[1,,2]"])
def test_node_lists_that_cannot_be_read(text: str) -> None:
    with pytest.raises(StateError, match="cannot read"):
        expand_nodelist(text)


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.sets(st.integers(0, 120), min_size=1)),
        min_size=1,
        max_size=4,
        unique_by=lambda pair: pair[0],
    ),
    st.integers(1, 4),
)
def test_expanding_undoes_compressing(groups: list[tuple[str, set[int]]], width: int) -> None:
    names = [f"{prefix}{str(n).zfill(width)}" for prefix, numbers in groups for n in sorted(numbers)]
    text = ",".join(f"{prefix}[{_ranges(sorted(numbers), width)}]" for prefix, numbers in groups)
    assert list(expand_nodelist(text)) == names


def _ranges(numbers: list[int], width: int) -> str:
    """Runs of consecutive numbers as Slurm prints them; a change of digits ends a run."""
    runs: list[list[int]] = []
    for number in numbers:
        follows = runs and runs[-1][-1] == number - 1
        same_digits = runs and len(str(runs[-1][0]).zfill(width)) == len(str(number).zfill(width))
        if follows and same_digits:
            runs[-1].append(number)
        else:
            runs.append([number])
    padded = [[str(run[0]).zfill(width), str(run[-1]).zfill(width)] for run in runs]
    return ",".join(first if first == last else f"{first}-{last}" for first, last in padded)


def test_counts() -> None:
    assert expand_counts("4(x2),3") == (4, 4, 3)


def test_a_port_is_held_and_outside_the_ephemeral_range() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    with choose_port() as one, choose_port() as other:
        ports = {one.getsockname()[1], other.getsockname()[1]}
        assert len(ports) == 2
        assert all(port >= 10000 and not first <= port <= last for port in ports)
        socket.create_connection(("127.0.0.1", min(ports)), timeout=2).close()


def test_a_squatter_is_stepped_round(monkeypatch: pytest.MonkeyPatch) -> None:
    with choose_port() as squatter:
        taken = squatter.getsockname()[1]
        monkeypatch.setattr("r1hpc.slurm.rank_env._outside_ephemeral", lambda: [taken])
        with pytest.raises(R1hpcError, match="no free port"):
            choose_port()


def test_the_interface_to_oneself_is_the_loopback() -> None:
    assert network_interface_to("127.0.0.1") == "lo"


def test_the_interface_of_the_default_route() -> None:
    lines = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    routes = [fields[0] for fields in lines if fields[1] == "00000000"]
    if not routes:
        pytest.skip("this machine has no default route")
    assert network_interface_to("192.0.2.1") in routes  # TEST-NET-1: nobody's; no packet is sent


def test_a_host_that_does_not_resolve_is_named() -> None:
    with pytest.raises(R1hpcError, match=r"cannot reach no-such-host\.invalid"):
        network_interface_to("no-such-host.invalid")


def test_the_environment_of_the_tests_is_no_rank() -> None:
    assert "SLURM_PROCID" not in os.environ
