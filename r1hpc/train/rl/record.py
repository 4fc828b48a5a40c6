"""Record what stale rollouts trained on, before their first update, so that a run can be replayed.

    write_record(run, rollout, first_item)      # rank 0
    rollout = read_record(run, index, first_item)
    expected = policy_of(run, version, max_staleness)

<run>/trained/000123.npz holds the groups of rollout 123, and 000123.json their digest. A replay (rl.replay)
trains on the records of another run instead of sampling. Each record names the policy that sampled it, by an
id of its weights' bits, so a replay that comes to other weights is found.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from r1hpc.base.errors import StateError
from r1hpc.base.files import fsync_dir, fsync_file, read_json, write_json
from r1hpc.base.records import Count
from r1hpc.base.run_dir import RunDir
from r1hpc.train.rl.rollout import Rollout
from r1hpc.train.rollout.groups import read_groups, write_groups


class _Record(TypedDict):
    """A record, as far as it is read again."""

    rollout: Count
    first_item: Count
    num_items: Count
    staleness_max: Count
    policy: str
    sha256: str
    weights: NotRequired[str]


def write_record(
    run: RunDir, rollout: Rollout, first_item: int, sources: Mapping[str, Any] | None = None
) -> None:
    """Write a rollout's record durably; it replaces that of an attempt that came to the same rollout.
    `sources` are facts about who sampled the groups."""
    run.trained.mkdir(mode=0o700, exist_ok=True)
    path = run.record(rollout.index)
    groups = path.with_suffix(".npz")
    digest = write_groups(groups, rollout.groups, rollout.policy_id)
    fsync_file(groups)
    fsync_dir(run.trained)
    facts: dict[str, Any] = {"rollout": rollout.index, "policy": rollout.policy_id, "sha256": digest}
    facts |= {"first_item": first_item, "num_items": rollout.num_items, **rollout.staleness_facts()}
    write_json(path, {**facts, **(sources or {})})


def read_record(run: RunDir, index: int, first_item: int) -> Rollout:
    """Return a recorded rollout. Raise StateError if it is missing, damaged, or of other items."""
    path = run.record(index)
    try:
        facts = read_json(path, _Record)
    except OSError as error:
        raise StateError(f"{path} holds no record of rollout {index}: {error}") from None
    if (facts["rollout"], facts["first_item"]) != (index, first_item):
        raise StateError(
            f"{path} is of rollout {facts['rollout']}, which begins with item {facts['first_item']}; this "
            f"run's rollout {index} begins with item {first_item}"
        )
    policy_id, groups = read_groups(path.with_suffix(".npz"), facts["sha256"])
    return Rollout(groups, policy_id, facts["num_items"], index)


def policy_of(run: RunDir, version: int, max_staleness: int) -> str | None:
    """Return the recorded id of the weights of `version`; None if they sampled no rollout (the last ones)."""
    own = read_json(run.record(version), _Record)
    if "weights" in own:  # rollout workers sampled: of several versions, and each record names its own
        return str(own["weights"])
    path = run.record(version + max_staleness)
    if not path.is_file():
        return None
    facts = read_json(path, _Record)
    return str(facts["policy"]) if facts["rollout"] - facts["staleness_max"] == version else None
