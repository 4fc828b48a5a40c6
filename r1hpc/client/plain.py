"""Keep what a trainer has counted and buffered, and its library's checkpoints leave out.

baseline = fingerprints(trainer)          # when training begins
kept = changed(trainer, baseline)         # name -> plain value
restore(trainer, kept)
"""

import pickle
from collections import defaultdict, deque
from collections.abc import Container
from typing import Any

import numpy as np
import torch

_LEAVES = (bool, int, float, str, bytes, torch.Tensor, np.ndarray, np.generic)


def fingerprints(owner: Any, without: Container[str] = ()) -> dict[str, bytes]:
    """Return the content of each attribute of numbers, text and tensors, and containers of them."""
    return {name: pickle.dumps(value) for name, value in _attributes(owner, without)}


def changed(owner: Any, baseline: dict[str, bytes], without: Container[str] = ()) -> dict[str, Any]:
    """Return the attributes of plain data whose content is another than in the baseline."""
    found = _attributes(owner, without)
    return {name: value for name, value in found if pickle.dumps(value) != baseline.get(name)}


def restore(owner: Any, kept: dict[str, Any]) -> None:
    """Set the attributes. Dicts and deques are filled in place: they have factories and lengths."""
    for name, saved in kept.items():
        setattr(owner, name, _filled(getattr(owner, name, None), saved))


def generators(loader: Any) -> list[torch.Generator]:
    """Return the random generators of a DataLoader and its samplers."""
    found: list[torch.Generator] = []
    waiting, seen = [loader], []
    while waiting:
        each = waiting.pop()
        seen.append(each)
        for name in ("generator", "sampler", "batch_sampler", "base_dataloader"):
            part = getattr(each, name, None)
            if isinstance(part, torch.Generator) and all(part is not other for other in found):
                found.append(part)
            elif part is not None and all(part is not other for other in seen):
                waiting.append(part)
    return found


def generator_states(*loaders: Any) -> list[torch.Tensor]:
    """Return the states of the loaders' random generators."""
    return [each.get_state() for loader in loaders for each in generators(loader)]


def set_generators(states: list[torch.Tensor], *loaders: Any) -> None:
    """Set the generators to what `generator_states` returned."""
    ours = [each for loader in loaders for each in generators(loader)]
    for generator, state in zip(ours, states, strict=False):
        generator.set_state(state.cpu())


def _attributes(owner: Any, without: Container[str]) -> list[tuple[str, Any]]:
    found = []
    for name, value in vars(owner).items():
        if name in without or name.endswith("dataset"):
            continue
        try:
            found.append((name, _plain(value)))
        except TypeError:
            continue
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, _LEAVES):
        return value
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | deque | set):
        return [_plain(each) for each in value]
    if type(value) is tuple:
        return tuple(_plain(each) for each in value)
    raise TypeError(type(value).__name__)


def _filled(into: Any, saved: Any) -> Any:
    if isinstance(into, dict) and isinstance(saved, dict):
        for key in into.keys() - saved.keys():
            del into[key]
        for key, value in saved.items():
            has = key in into or (isinstance(into, defaultdict) and into.default_factory)
            into[key] = _filled(into[key] if has else None, value)
        return into
    if isinstance(into, deque):
        into.clear()
        into.extend(saved)
        return into
    return set(saved) if isinstance(into, set) else saved
