"""Near duplicates by MinHash (Broder 1997) with bands (Leskovec, Rajaraman & Ullman, chapter 3).

    signatures = sign(batch, recipe)                            # one a document, of bands x rows values
    groups = near_duplicates(signatures, recipe)                # groups.original[i] is the first of i's group

Shingles are runs of `ngram` words of the lower-cased text; the whole text where it has fewer. Two documents
become candidates when all rows of one band agree; a candidate counts when the share of equal values, an
estimate of the Jaccard similarity with a standard error of at most 0.5/sqrt(bands x rows), reaches the
threshold.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from r1hpc.data.cleaning.batch import Hashes, Ints, TextBatch, mix, ngrams
from r1hpc.data.recipe_stages import MinhashRecipe

Signatures = npt.NDArray[np.uint32]
_EMPTY = np.uint32(0xFFFFFFFF)
_SEED = 112


def sign(batch: TextBatch, recipe: MinhashRecipe) -> Signatures:
    """Shape (num_documents, bands x rows). `batch` is of normal text."""
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
    """What near_duplicates found of each document."""

    original: Ints
    """The first of its group; itself where it is alone."""
    nearest: Ints
    """The earlier document of its group it resembles most; itself where there is none."""
    similarity: npt.NDArray[np.float64]
    """Estimated, with `nearest`; 0 where there is none."""


def near_duplicates(signatures: Signatures, recipe: MinhashRecipe) -> Groups:
    """Groups of similar documents. Those without words, whose signature is empty, are alone."""
    count = len(signatures)
    pairs = [_candidates(signatures, band, recipe.rows) for band in range(recipe.bands)]
    edges = np.unique(np.concatenate(pairs), axis=0) if pairs else np.empty((0, 2), np.int64)
    similarity = _similarity(signatures, edges)
    sure = similarity >= recipe.threshold
    edges, similarity = edges[sure], similarity[sure]
    original = _components(count, edges)
    best, nearest = np.zeros(count), np.arange(count)
    for (first, second), value in zip(edges.tolist(), similarity.tolist(), strict=True):
        if value > best[second]:  # an edge leads from the earlier document to the later
            best[second], nearest[second] = value, first
    # Some are tied to their group by later documents only: those are compared with its first.
    for lone in np.flatnonzero((nearest == np.arange(count)) & (original != nearest)).tolist():
        nearest[lone] = original[lone]
        best[lone] = (signatures[lone] == signatures[original[lone]]).mean()
    return Groups(original, nearest, best)


def _shingles(batch: TextBatch, ngram: int) -> tuple[Hashes, Ints]:
    words = batch.words
    hashes = batch.hashes(words)
    found, first = ngrams(hashes, words.document, ngram)
    document = words.document[first]
    short = np.flatnonzero((words.count() < ngram) & (words.count() > 0))
    if not len(short):
        return found, document
    begin = np.searchsorted(words.document, short)
    sizes = words.count()[short]
    whole = np.array([_fold(hashes[a : a + n]) for a, n in zip(begin, sizes, strict=True)], np.uint64)
    found, document = np.concatenate([found, whole]), np.concatenate([document, short])
    order = np.argsort(document, kind="stable")
    return found[order], document[order]


def _fold(hashes: Hashes) -> int:
    return int(ngrams(hashes, np.zeros(len(hashes), np.int64), len(hashes))[0][0])


def _candidates(signatures: Signatures, band: int, rows: int) -> npt.NDArray[np.int64]:
    """Pairs (earlier, later) that agree in one band: each with the first of its bucket, and with the one
    before."""
    part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
    keys = np.zeros(len(part), dtype=np.uint64)
    for column in part.T:
        keys = mix(keys * np.uint64(31) + column)
    filled = np.flatnonzero((part != _EMPTY).any(axis=1))
    order = filled[np.argsort(keys[filled], kind="stable")]
    if len(order) < 2:
        return np.empty((0, 2), np.int64)
    ranked = keys[order]
    same = ranked[1:] == ranked[:-1]
    begin = np.concatenate([[0], np.flatnonzero(~same) + 1])
    lengths = np.diff(np.append(begin, len(order)))
    first = np.repeat(order[begin], lengths)
    later = np.flatnonzero(np.concatenate([[False], same]))
    with_first = np.stack([first[later], order[later]], axis=1)
    with_before = np.stack([order[later - 1], order[later]], axis=1)
    return np.concatenate([with_first, with_before])


def _similarity(
    signatures: Signatures, edges: npt.NDArray[np.int64], block: int = 65_536
) -> npt.NDArray[np.float64]:
    found = np.empty(len(edges))
    for begin in range(0, len(edges), block):
        left, right = edges[begin : begin + block].T
        found[begin : begin + block] = (signatures[left] == signatures[right]).mean(axis=1)
    return found


def _components(count: int, edges: npt.NDArray[np.int64]) -> Ints:
    """The smallest document of each one's connected group: union-find with path halving."""
    parent = list(range(count))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in edges.tolist():
        a, b = find(first), find(second)
        if a != b:
            parent[max(a, b)] = min(a, b)
    return np.array([find(node) for node in range(count)], dtype=np.int64)
