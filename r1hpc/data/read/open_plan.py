"""Choose in which order a run reads a dataset: all windows alike, or its sources mixed by weight.

order.py has the first, mixture.py the second; the dataset's recipe or the run's data.mix asks for it. Loaders
ask the result for the window, or the document, of each sample.

plan = open_plan(dataset, seq_len=2048, seed=0, global_batch_size=256)     # SamplePlan, or WindowMixture
plan.window_starts(np.arange(step * 256, (step + 1) * 256))
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from r1hpc.config.schema.sections import MixConfig
from r1hpc.data.format.manifest import DatasetManifest, digest
from r1hpc.data.format.mix import MixRecipe, check_schedule
from r1hpc.data.read.mixture import Change, Mixture
from r1hpc.data.read.order import Ints, SamplePlan

AS_THE_RECIPE_SAYS = MixConfig()


class _Dataset(Protocol):
    id: str
    num_tokens: int
    manifest: DatasetManifest


@dataclass(frozen=True)
class WindowMixture:
    """Windows of seq_len + 1 tokens, each inside one source, in the shares of a mixture."""

    dataset_id: str
    num_tokens: int
    seq_len: int
    first_tokens: tuple[int, ...]
    """First token of each source."""
    mixture: Mixture

    @cached_property
    def plan_hash(self) -> str:
        """Return a hash of everything the order depends on. Runs with the same hash see the same samples."""
        return digest(
            self.mixture.described
            | {"dataset_id": self.dataset_id, "seq_len": self.seq_len, "first_tokens": self.first_tokens}
        )

    def with_changes(self, changes: Sequence[Change]) -> "WindowMixture":
        """Return the same with other changes of weights."""
        return replace(self, mixture=replace(self.mixture, changes=tuple(changes)))

    def window_starts(self, sample_ids: Ints) -> Ints:
        """Return the first token of each sample's window, in the shape of `sample_ids`, which are >= 0."""
        sources, items = self.mixture.locate(sample_ids)
        return np.array(self.first_tokens, dtype=np.int64)[sources] + items * self.seq_len


WindowPlan = SamplePlan | WindowMixture


@dataclass(frozen=True)
class DocumentMixture:
    """Complete documents in a mixture's shares. Source j is the dataset's j-th run of documents."""

    dataset_id: str
    mixture: Mixture

    @cached_property
    def plan_hash(self) -> str:
        """Return a hash of the order. Runs with the same hash see the same documents."""
        return digest(self.mixture.described | {"dataset_id": self.dataset_id})

    def with_changes(self, changes: Sequence[Change]) -> "DocumentMixture":
        """Return the same with other changes of weights."""
        return replace(self, mixture=replace(self.mixture, changes=tuple(changes)))

    def documents(self, sample_ids: Ints) -> Ints:
        """Return the document of each sample, in the shape of `sample_ids`, which are >= 0."""
        sources, items = self.mixture.locate(sample_ids)
        firsts = np.array([0, *accumulate(self.mixture.sizes)], dtype=np.int64)
        return firsts[sources] + items


def open_plan(
    dataset: _Dataset,
    seq_len: int,
    seed: int,
    global_batch_size: int,
    *,
    num_samples: int = 0,
    mix: MixConfig = AS_THE_RECIPE_SAYS,
) -> WindowPlan:
    """Return the order of a dataset's windows: the mixture of its recipe or the run, or all windows alike.

    Raise UsageError for a source without a window, a schedule of other sources, or too short a mixture.

    Args:
        num_samples: of the whole run; a mixture that ends before is refused.
        mix: how the run changes the weights.
    """
    all_alike = SamplePlan(dataset.id, dataset.num_tokens, seq_len, seed)  # also checks seed and seq_len
    tokens = [source["num_tokens"] for source in dataset.manifest.content["sources"]]
    sizes = tuple(max(0, (count - 1) // seq_len) for count in tokens)
    mixture = open_mixture(dataset.manifest, mix, "tokens", sizes, global_batch_size, seed, num_samples)
    if mixture is None:
        return all_alike
    first_tokens = tuple(accumulate(tokens[:-1], initial=0))
    return WindowMixture(dataset.id, dataset.num_tokens, seq_len, first_tokens, mixture)


def open_mixture(
    manifest: DatasetManifest,
    mix: MixConfig,
    of: str,
    sizes: tuple[int, ...],
    batch: int,
    seed: int,
    num_samples: int,
) -> Mixture | None:
    """Return the mixture of a dataset's recipe, with the weights of the run's schedule; None without both.

    A sample is one of `of`, `tokens` or `documents`; `sizes` are the samples of each source. Raise UsageError
    if the schedule names other sources than there are, or the mixture ends before `num_samples`.
    """
    recipe = recipe_mix(manifest)
    if recipe is None and not mix.is_used:
        return None
    recipe, sources = recipe or MixRecipe(by=of), manifest.content["sources"]
    names = tuple(source["name"] for source in sources)
    weights, changes = shares(recipe, sources, of=of), []
    check_schedule(mix, names)
    for entry in mix.schedule:
        later = shares(recipe, sources, of=of, weights=entry["weights"])
        if entry["from_step"] == 1:
            weights = later
        else:
            changes.append(Change((entry["from_step"] - 1) * batch, later))
    mixture = Mixture(sizes, weights, batch, seed, recipe.max_epochs, tuple(changes), names)
    mixture.check_reaches(num_samples)
    return mixture


def recipe_mix(manifest: DatasetManifest) -> MixRecipe | None:
    """Return the mixture of a dataset's recipe."""
    block = manifest.content["recipe"].get("mix")
    return None if block is None else MixRecipe(**block)


def shares(
    mix: MixRecipe, sources: Sequence[dict[str, Any]], *, of: str, weights: Mapping[str, float] | None = None
) -> tuple[float, ...]:
    """Return the share of each source, summing to 1, in samples that are windows (`of` tokens) or documents.

    `weights`, by the name of every source, replace the recipe's and have the same meaning. Weights by the
    other unit are converted by the mean length of the source's documents. Without weights a source's size
    counts: temperature alone then gives multinomial sampling (Conneau & Lample 2019).
    """
    sizes = [source[f"num_{mix.by}"] for source in sources]
    weights = weights or mix.weights
    base = [weights[source["name"]] for source in sources] if weights else sizes
    powers = [float(weight) ** (1 / mix.temperature) for weight in base]
    if mix.by != of:
        powers = [
            power * source[f"num_{of}"] / max(1, source[f"num_{mix.by}"])
            for power, source in zip(powers, sources, strict=True)
        ]
    total = math.fsum(powers)
    return tuple(power / total for power in powers)
