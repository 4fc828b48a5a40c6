"""Find near duplicates by MinHash (Broder 1997) with bands (Leskovec, Rajaraman & Ullman, chapter 3).

    signatures = sign(batch, recipe)                            # stage clean: bands x rows values a document
    groups = near_duplicates(bands, len(signatures), recipe)    # stage dedup; bands(3): of all signatures
    groups.original[i]                                          # the first of i's group

Shingles are runs of `ngram` words of the lower-cased text, or a shorter text as a whole. Two documents become
candidates if all rows of one band agree. A candidate counts if the share of equal values reaches the
threshold; it estimates the Jaccard similarity with a standard error of at most 0.5/sqrt(bands x rows). The
numbers are those of MinhashRecipe in corpus/recipe.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from r1hpc.corpus.clean.batch import Hashes, Ints, TextBatch
from r1hpc.corpus.recipe import MinhashRecipe
from r1hpc.data.read.order import splitmix64

Signatures = npt.NDArray[np.uint32]
Bands = Callable[[int], Signatures]
"""One band of all documents, shape (count, rows), by its number."""
_EMPTY = np.uint32(0xFFFFFFFF)
_SEED = 112


def sign(batch: TextBatch, recipe: MinhashRecipe) -> Signatures:
    """Return signatures, shape (num_documents, bands x rows). `batch` is of normal text."""
    shingles, document = _shingles(batch, recipe.ngram)
    size = recipe.bands * recipe.rows
    found = np.full((batch.num_documents, size), _EMPTY, dtype=np.uint32)
    present = np.unique(document)
    if not len(present):
        return found
    begin = np.searchsorted(document, present)
    draw = np.random.default_rng(_SEED).integers(0, 2**63, (size, 2), dtype=np.uint64)
    for row, (a, b) in enumerate(draw.tolist()):
        # Multiply-shift (Dietzfelbinger et al. 1997): the high half of an odd multiple, plus an offset.
        values = ((shingles * np.uint64(2 * a + 1 & 2**64 - 1) + np.uint64(b)) >> np.uint64(32)).astype(
            np.uint32
        )
        found[present, row] = np.minimum.reduceat(values, begin)
    return found


@dataclass(frozen=True)
class Groups:
    """The result of near_duplicates for each document."""

    original: Ints
    """The first document of its group; itself if it is alone."""
    nearest: Ints
    """The earlier document of its group that it resembles most; itself if there is none."""
    similarity: npt.NDArray[np.float64]
    """Estimated similarity to `nearest`; 0 if there is none."""


def near_duplicates(bands: Bands, count: int, recipe: MinhashRecipe) -> Groups:
    """Return groups of similar documents among `count`. Documents without words are alone.

    One band is in memory at a time, and each is read two or three times.
    """
    edges = np.empty(0, np.uint64)
    for band in range(recipe.bands):
        edges = np.unique(np.concatenate([edges, _candidates(bands(band))]))
    pairs = _unpacked(edges)
    similarity = _similarity(bands, pairs, recipe)
    sure = similarity >= recipe.threshold
    pairs, similarity = pairs[sure], similarity[sure]
    original = _components(count, pairs)
    best, nearest = np.zeros(count), np.arange(count)
    for (first, second), value in zip(pairs.tolist(), similarity.tolist(), strict=True):
        if value > best[second]:  # an edge leads from the earlier document to the later
            best[second], nearest[second] = value, first
    # Some belong to their group only through later documents: compare those with its first.
    lone = np.flatnonzero((nearest == np.arange(count)) & (original != nearest))
    nearest[lone] = original[lone]
    best[lone] = _similarity(bands, np.stack([lone, original[lone]], axis=1), recipe)
    return Groups(original, nearest, best)


def _shingles(batch: TextBatch, ngram: int) -> tuple[Hashes, Ints]:
    """Return the shingles and the document of each, in the order of the documents."""
    none = (np.empty(0, np.uint64), np.empty(0, np.int64))
    runs = [none, *((keys, document) for _, keys, document in batch.runs(1, ngram))]
    found, document = map(np.concatenate, zip(*runs, strict=True))
    order = np.argsort(document, kind="stable")
    return found[order], document[order]


def _candidates(part: Signatures) -> Hashes:
    """Return packed pairs (earlier, later) of a bucket: each document with its first and previous one."""
    keys = np.zeros(len(part), dtype=np.uint64)
    for column in part.T:
        keys = splitmix64(keys * np.uint64(31) + column)
    filled = np.flatnonzero((part != _EMPTY).any(axis=1))
    order = filled[np.argsort(keys[filled], kind="stable")]
    if len(order) < 2:
        return np.empty(0, np.uint64)
    ranked = keys[order]
    same = ranked[1:] == ranked[:-1]
    begin = np.concatenate([[0], np.flatnonzero(~same) + 1])
    lengths = np.diff(np.append(begin, len(order)))
    first = np.repeat(order[begin], lengths)
    later = np.flatnonzero(np.concatenate([[False], same]))
    return np.concatenate([_packed(first[later], order[later]), _packed(order[later - 1], order[later])])


def _packed(first: Ints, second: Ints) -> Hashes:
    """Pack two numbers below 2^32 into one, which sorts like the pair."""
    return first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64)


def _unpacked(edges: Hashes) -> npt.NDArray[np.int64]:
    return np.stack([edges >> np.uint64(32), edges & np.uint64(2**32 - 1)], axis=1).astype(np.int64)


def _similarity(
    bands: Bands, pairs: npt.NDArray[np.int64], recipe: MinhashRecipe, block: int = 65_536
) -> npt.NDArray[np.float64]:
    """Return the share of equal values of each pair."""
    equal = np.zeros(len(pairs), np.int64)
    for part in map(bands, range(recipe.bands if len(pairs) else 0)):
        for begin in range(0, len(pairs), block):
            left, right = pairs[begin : begin + block].T
            equal[begin : begin + block] += (part[left] == part[right]).sum(axis=1)
    return equal / (recipe.bands * recipe.rows)


def _components(count: int, pairs: npt.NDArray[np.int64]) -> Ints:
    """Return the smallest document of each one's connected group: union-find with path halving."""
    parent = {node: node for node in np.unique(pairs).tolist()}  # few are in any pair

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in pairs.tolist():
        a, b = find(first), find(second)
        if a != b:
            parent[max(a, b)] = min(a, b)
    found = np.arange(count)
    for node in parent:
        found[node] = find(node)
    return found
