"""What a submission wants to know of its data before any of it is read: no zarr, no numpy.

preview_vocab_size("data/stdlib", None)     # from the manifest; a missing dataset is an error here
preview_vocab_size(None, "smoke")           # from the recipe that will be built on first use
"""

from pathlib import Path

from r1hpc.data.manifest import read_manifest
from r1hpc.data.recipe import find_recipe, load_recipe


def preview_vocab_size(path: str | None, recipe: str | None) -> int | None:
    """The vocabulary a run will see; None where it stands only in a tokenizer's own folder.

    A byte-level BPE can end up smaller than its recipe asks for, when the text has too few pairs.

    Raises:
        DatasetMissingError: there is no dataset at `path`.
        UsageError: no such recipe, or one that cannot be used.
    """
    if path is not None:
        vocab_size: int = read_manifest(Path(path)).content["vocab_size"]
        return vocab_size
    return None if recipe is None else load_recipe(find_recipe(recipe)).tokenizer.vocab_size
