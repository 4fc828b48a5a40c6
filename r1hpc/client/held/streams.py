"""Seed, save and restore the random streams of a rank: torch, CUDA, numpy, Python, those of its loaders.

Used in scripts (states.py and the attached libraries) and by our own stages (train/).
"""

import json
import random
from typing import Any

import numpy as np
import torch


def seed_streams(seed: int, step: int, rank: int) -> None:
    """Seed fresh random streams, different for every (seed, step, rank)."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    torch.manual_seed(int(mixed[0]) << 16 ^ int(mixed[1]))
    np.random.seed(int(mixed[1]))
    random.seed(int(mixed[0]))


def streams() -> dict[str, Any]:
    """Return every random stream of this rank, for torch.save."""
    return packed(glance())


def glance() -> tuple[Any, ...]:
    """Return every random stream of this rank, within 50 microseconds; `packed` makes it fit for a file.

    CUDA's only where this process uses a GPU: a CPU run must not take memory of one that is there.
    """
    cuda = torch.cuda.get_rng_state() if _uses_gpu() else None
    return torch.get_rng_state(), cuda, np.random.get_state(legacy=True), random.getstate()


def packed(seen: tuple[Any, ...]) -> dict[str, Any]:
    """Return what `glance` saw, for torch.save and `set_streams`."""
    of_torch, cuda, (name, keys, position, has_gauss, gauss), (version, internal, gauss_next) = seen
    return {
        "torch": of_torch,
        "cuda": cuda,
        "numpy": json.dumps([str(name), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)]),
        "python": json.dumps([version, list(internal), gauss_next]),
    }


def set_streams(saved: dict[str, Any]) -> None:
    """Set the streams to what `streams` returned."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and _uses_gpu():
        torch.cuda.set_rng_state(saved["cuda"])
    name, keys, position, has_gauss, gauss = json.loads(saved["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = json.loads(saved["python"])
    random.setstate((version, tuple(internal), gauss_next))


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


def _uses_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
