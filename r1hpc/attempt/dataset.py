"""The dataset of a run that names its traces (data.traces): built once, the same for the run's whole life.

<run_root>/datasets/traces-<hash of inputs and tokenizer>/  the dataset, shared by all runs on these traces
<run>/dataset/                                              the recipe, with links to the inputs
<run>/dataset.json                                          which dataset the run began with
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import read_json, write_json
from r1hpc.base.rundir import RunDir
from r1hpc.config.schema import ModelConfig, RunConfig

_MAX_WORKERS = 8
_HASH_DIGITS = 16


def ensure_traces(run: RunDir, config: RunConfig) -> Path:
    """The folder of the dataset of config.data.traces, built on first use.

    Raises:
        UsageError: a file or the tokenizer is not there.
        R1hpcError: it cannot be built, or the traces have changed since the run began.
    """
    # Deferred: only a run on traces pays for numpy and tokenizers on the batch host.
    from r1hpc.data.trace_recipe import inputs_hash, list_inputs, write_trace_recipe
    from r1hpc.tasks.tokenizer import load_tokenizer, special_ids

    record = run.path / "dataset.json"
    known = Path(read_json(record)["path"]) if record.exists() else None
    try:
        inputs = list_inputs(config.data.traces)
    except UsageError:
        if known is None or not known.is_dir():
            raise
        return known  # the files may go once the dataset is there
    eos_id = special_ids(load_tokenizer(config.model), config.model).eos
    with _tokenizer(config.model) as tokenizer:
        name = inputs_hash(inputs, tokenizer, eos_id)[:_HASH_DIGITS]
        target = run.path.parent / "datasets" / f"traces-{name}"
        if known not in (None, target):
            raise R1hpcError(
                f"the traces or the tokenizer of {run.run_id} have changed since it began with {known}: "
                f"begin a new run, or give data.path={known} to go on with the old ones"
            )
        recipe = write_trace_recipe(inputs, tokenizer, eos_id, run.path / "dataset")
    build(recipe, target)
    write_json(record, {"path": str(target)})
    return target


def build(recipe: Path, target: Path) -> None:
    """Run `shard build` in a process of its own, so that zarr's threads do not outlive it.

    Raises:
        R1hpcError: with what it said.
    """
    workers = str(min(_MAX_WORKERS, len(os.sched_getaffinity(0))))
    command = [sys.executable, "-m", "r1hpc.shard", "build", str(recipe), "--out", str(target)]
    command += ["--workers", workers, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise R1hpcError(f"the dataset could not be built from {recipe}: {done.stderr.strip()}")


@contextlib.contextmanager
def _tokenizer(model: ModelConfig) -> Iterator[Path]:
    """The model's tokenizer.json; of the built-in one a copy, gone afterwards."""
    from r1hpc.tasks.tokenizer import CHARACTERS, character_tokenizer, tokenizer_file

    if model.tokenizer != CHARACTERS:
        yield tokenizer_file(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        character_tokenizer().save(str(path))
        yield path
