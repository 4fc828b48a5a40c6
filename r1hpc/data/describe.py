"""What a dataset holds, for a person to look at: its numbers, a document, the source of a training sample.

described = describe(Path("data/stdlib"), document=12)
found, documents = trace_sample(Path("data/stdlib"), sample=4711, seq_len=256, seed=0)
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from r1hpc.base.errors import UsageError
from r1hpc.data.order import DocumentPlan, SamplePlan
from r1hpc.data.reader import open_dataset
from r1hpc.data.segments import has_roles
from r1hpc.data.traces import open_traces

_CONTENT = (
    *("name", "num_tokens", "num_documents", "vocab_size", "eos_id", "dtype", "sources", "parts"),
    "recipe_hash",
)


def describe(path: Path, document: int | None = None) -> dict[str, Any]:
    """The numbers of a dataset, and of one document with its text where `document` says which.

    Raises:
        UsageError: no such document.
    """
    dataset = open_dataset(path)
    content = dataset.manifest.content
    described: dict[str, Any] = {"id": dataset.id, "path": str(dataset.path)}
    described |= {key: content[key] for key in _CONTENT}
    described["tokenizer"] = content["recipe"]["tokenizer"]["kind"]
    described["profile"] = content["recipe"]["profile"]
    if has_roles(dataset.manifest):
        described["roles"] = _roles(path)
    if document is not None:
        described["document"] = _document(dataset, document)
    return described


def trace_sample(path: Path, sample: int, seq_len: int | None, seed: int) -> tuple[dict[str, Any], list[Any]]:
    """Where the tokens of a training sample lie, and the documents that they come from.

    Args:
        sample: counted over all epochs.
        seq_len: data.seq_len of the run; not needed where a sample is a document.

    Raises:
        UsageError: `seq_len` is needed, or there can be no such sample.
    """
    if not 0 <= sample < 2**63:
        raise UsageError(f"--sample must lie between 0 and 2^63 - 1, not {sample}")
    dataset = open_dataset(path)
    if has_roles(dataset.manifest):
        found, documents = _find_document(dataset, sample, seed)
    else:
        found, documents = _find_window(dataset, sample, seq_len, seed)
    return {"id": dataset.id, "sample": sample} | found, documents


def _find_window(
    dataset: Any, sample: int, seq_len: int | None, seed: int
) -> tuple[dict[str, Any], list[Any]]:
    """Place and documents of one sample of pretraining."""
    if seq_len is None:
        raise UsageError("--seq-len is needed: a sample of this dataset is a window of data.seq_len tokens")
    plan = SamplePlan(dataset.id, dataset.num_tokens, seq_len, seed)
    start = int(plan.window_starts(np.array([sample]))[0])
    found = {"plan_hash": plan.plan_hash, "epoch": sample // plan.num_windows}
    window = {"token_start": start, "token_stop": start + plan.seq_len + 1}
    return found | window, dataset.docs_of(start, plan.seq_len + 1)


def _find_document(dataset: Any, sample: int, seed: int) -> tuple[dict[str, Any], list[Any]]:
    """Place and document of one sample of traces."""
    plan = DocumentPlan(dataset.id, dataset.num_documents, seed)
    info = dataset.documents[int(plan.documents(np.array([sample]))[0])]
    found = {"plan_hash": plan.plan_hash, "epoch": sample // plan.num_documents}
    return found | {"token_start": info.token_start, "token_stop": info.token_stop}, [info]


def _roles(path: Path) -> dict[str, Any]:
    """Tokens by role, and the longest document: what data.seq_len must hold."""
    traces = open_traces(path)
    num_prompt_tokens = int(traces.prompt_lengths.sum())
    return {
        "prompt": num_prompt_tokens,
        "completion": traces.num_tokens - num_prompt_tokens,
        "longest_document": int(traces.document_lengths.max()),
    }


def _document(dataset: Any, number: int) -> dict[str, Any]:
    if not 0 <= number < dataset.num_documents:
        raise UsageError(f"--doc {number} is outside 0 to {dataset.num_documents - 1}")
    info = dataset.documents[number]
    ids = dataset.read(info.token_start, info.token_stop - info.token_start)[:-1]
    described = asdict(info) | {"text": _decode(dataset, ids)}
    if has_roles(dataset.manifest):
        end = open_traces(dataset.path).read_document(number)[1]
        described |= {"prompt": _decode(dataset, ids[:end]), "completion": _decode(dataset, ids[end:])}
    return described


def _decode(dataset: Any, ids: Any) -> str:
    if dataset.tokenizer_path is None:
        return " ".join(str(token) for token in ids.tolist())
    from r1hpc.data.vocabulary import TOKENIZER_FILE, Encoder  # the tokenizers library, for this alone

    return Encoder(dataset.tokenizer_path / TOKENIZER_FILE, dataset.eos_id).decode(ids)
