"""Versions of the weights in files: what was published is read to the bit, anything else is refused."""

import multiprocessing
import random
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1hpc.base.errors import StateError
from r1hpc.train.exchange.versions import Latest, load_version, prune, publish, read_latest, version_dir

fork = multiprocessing.get_context("fork")


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    embedding = torch.randn(5, 3, dtype=torch.bfloat16)
    return {"embed": embedding, "norm": torch.randn(3), "head": embedding, "scale": torch.tensor(2.0)}


def test_a_version_is_read_to_the_bit(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    latest = publish(tmp_path, 7, weights(0).items(), "t1")
    assert read_latest(tmp_path) == latest
    back = load_version(tmp_path, latest)
    assert back.keys() == weights(0).keys()
    assert all(torch.equal(back[name], value) for name, value in weights(0).items())


def test_the_digest_sees_names_and_bits_and_nothing_else(tmp_path: Path) -> None:
    base = publish(tmp_path, 1, weights(0).items(), "t1")["digest"]
    assert publish(tmp_path, 2, weights(0).items(), "t2")["digest"] == base
    swapped = weights(0) | {"norm": weights(0)["norm"].flip(0)}
    assert publish(tmp_path, 3, swapped.items(), "t1")["digest"] != base
    assert publish(tmp_path, 4, reversed(weights(0).items()), "t1")["digest"] == base
    renamed = {name.replace("norm", "Norm"): value for name, value in weights(0).items()}
    assert publish(tmp_path, 5, renamed.items(), "t1")["digest"] != base


def test_a_version_published_again_after_a_resume_is_another_folder(tmp_path: Path) -> None:
    old = publish(tmp_path, 7, weights(0).items(), "t1")
    new = publish(tmp_path, 7, weights(1).items(), "t2")
    assert read_latest(tmp_path) == new
    assert torch.equal(load_version(tmp_path, old)["norm"], weights(0)["norm"])
    assert torch.equal(load_version(tmp_path, new)["norm"], weights(1)["norm"])
    with pytest.raises(StateError, match="was announced"):
        load_version(tmp_path, {**new, "digest": old["digest"]})


def publish_for_ever(exchange: Path, seed: int) -> None:
    """Publish versions 0 to 2 again and again, as attempts that are resumed do."""
    for start in count():
        for version in range(3):
            latest = publish(exchange, version, weights(version).items(), f"{seed}-{start}")
            prune(exchange, latest, 1)


def test_a_kill_at_any_moment_leaves_a_version_that_is_there(tmp_path: Path) -> None:
    """latest.json never names a missing one, also where the killed attempt published its number again."""
    rng = random.Random(0)
    latest: Latest | None = publish(tmp_path, 0, weights(0).items(), "first")
    for seed in range(40):
        child = fork.Process(target=publish_for_ever, args=(tmp_path, seed))
        child.start()
        time.sleep(rng.uniform(0.005, 0.05))
        child.kill()
        child.join(30)
        latest = read_latest(tmp_path)
        assert latest is not None
        assert torch.equal(load_version(tmp_path, latest)["norm"], weights(latest["version"])["norm"])
    assert latest is not None
    assert len(list(tmp_path.glob("*"))) > 3
    prune(tmp_path, latest, 0)
    assert not list(tmp_path.glob(".v-*"))


def test_a_damaged_or_missing_version_is_refused(tmp_path: Path) -> None:
    latest = publish(tmp_path, 7, weights(0).items(), "t1")
    path = version_dir(tmp_path, 7, "t1") / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "norm": tensors["norm"] + 1}, path)
    with pytest.raises(StateError, match="was announced"):
        load_version(tmp_path, latest)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StateError, match="cannot be read"):
        load_version(tmp_path, latest)
    path.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        load_version(tmp_path, latest)


def test_old_versions_go(tmp_path: Path) -> None:
    for version in range(6):
        latest = publish(tmp_path, version, weights(version).items(), "t1")
    prune(tmp_path, latest, kept_behind=2)
    left = sorted(path.name for path in tmp_path.glob("v-*"))
    assert left == ["v-000003-t1", "v-000004-t1", "v-000005-t1"]
