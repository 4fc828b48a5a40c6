"""Describe a dataset for people: its numbers, a document, the documents of a run's sample, what was left out.

For `shard inspect`, `trace` and `audit`.

described = describe(Path("data/stdlib"), document=12)
found, documents = trace_sample(Path("data/stdlib"), 4711, SampleOrder(seq_len=256, seed=0))
order = SampleOrder(..., **fill_in(arguments))      # the arguments of `shard trace --run`, filled in
"""

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.load import read
from r1hpc.config.schema.sections import MixConfig
from r1hpc.corpus.clean import decisions
from r1hpc.corpus.clean.losses import describe_counts, read_counts
from r1hpc.data.format.documents import DocumentInfo, has_roles
from r1hpc.data.format.manifest import MANIFEST, read_manifest
from r1hpc.data.read.open_plan import AS_THE_RECIPE_SAYS, DocumentMixture, open_plan, recipe_mix, shares
from r1hpc.data.read.order import DocumentPlan, RankShare, SamplePlan
from r1hpc.data.read.reader import TokenDataset, open_dataset
from r1hpc.data.read.sft_documents import Parting, hold_out, open_traces
from r1hpc.data.read.sft_loader import document_order_id, open_document_plan
from r1hpc.plan.run import PlanBatch
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.metrics import read_steps

_CONTENT = (
    *("name", "num_tokens", "num_documents", "vocab_size", "eos_id", "dtype", "sources", "parts"),
    "recipe_hash",
)


def describe(path: Path, document: int | None = None) -> dict[str, Any]:
    """Return the numbers of a dataset, and one document with its text; UsageError if it does not exist."""
    dataset = open_dataset(path)
    content = dataset.manifest.content
    described: dict[str, Any] = {"id": dataset.id, "path": str(dataset.path)}
    described |= {key: content[key] for key in _CONTENT}
    described["tokenizer"] = content["recipe"]["tokenizer"]["kind"]
    described["profile"] = content["recipe"]["profile"]
    if has_roles(dataset.manifest):
        traces = open_traces(path)
        num_prompt_tokens = int(traces.prompt_lengths.sum())
        described["roles"] = {
            "prompt": num_prompt_tokens,
            "completion": traces.num_tokens - num_prompt_tokens,
            "longest_document": int(traces.document_lengths.max()),  # data.seq_len must hold it
        }
    if document is not None:
        if not 0 <= document < dataset.num_documents:
            raise UsageError(f"--doc {document} is outside 0 to {dataset.num_documents - 1}")
        info = dataset.documents[document]
        ids = dataset.read(info.token_start, info.token_stop - info.token_start)[:-1]
        found = asdict(info) | {"text": _decode(dataset, ids)}
        if has_roles(dataset.manifest):
            end = open_traces(dataset.path).read_document(document)[1]
            found |= {"prompt": _decode(dataset, ids[:end]), "completion": _decode(dataset, ids[end:])}
        described["document"] = found | _with_decisions(dataset, info)
    return described


@dataclass(frozen=True)
class SampleOrder:
    """A run's order of samples."""

    seq_len: int | None = None
    """data.seq_len; not needed if a sample is a document."""
    seed: int = 0
    global_batch_size: int | None = None
    """Needed for a mixture, whose shares are exact in every batch."""
    mix: MixConfig = AS_THE_RECIPE_SAYS
    """How the run changes the weights of the sources."""
    validation_documents: int = 0
    """Documents held out, for a run on traces."""
    plan_hash: str | None = None
    """The order named in the run's checkpoints; None without one."""


def trace_sample(path: Path, sample: int, order: SampleOrder) -> tuple[dict[str, Any], list[Any]]:
    """Return where the tokens of a training sample lie, and the documents they come from.

    Each document has the decisions about it, if the recipe took any. `sample` is counted over all epochs.
    Raise UsageError if a part of the order is missing, or there can be no such sample.
    """
    if not 0 <= sample < 2**63:
        raise UsageError(f"--sample must lie between 0 and 2^63 - 1, not {sample}")
    dataset = open_dataset(path)
    is_mixed = recipe_mix(dataset.manifest) is not None or order.mix.is_used
    if is_mixed and order.global_batch_size is None:
        raise UsageError("--global-batch-size is needed: the shares of a mixture are those of a batch")
    find = _find_document if has_roles(dataset.manifest) else _find_window
    found, infos = find(dataset, sample, order)
    documents = [_with_decisions(dataset, info) for info in infos]
    return {"id": dataset.id, "sample": sample} | found, documents


def sample_of(step: int, row: int, share: RankShare) -> int:
    """Return the sample in a row of a rank's batch in a step, counted from 1; UsageError if there is none.

    Rows are counted over the rank's micro batches in their order.
    """
    ids = share.sample_ids(step - 1).ravel()
    if step < 1 or not 0 <= row < len(ids):
        raise UsageError(f"step {step}, row {row}: steps begin at 1, rows of a rank are 0 to {len(ids) - 1}")
    return int(ids[row])


def _find_window(
    dataset: TokenDataset, sample: int, order: SampleOrder
) -> tuple[dict[str, Any], list[DocumentInfo]]:
    if order.seq_len is None:
        raise UsageError("--seq-len is needed: a sample of this dataset is a window of data.seq_len tokens")
    plan = open_plan(dataset, order.seq_len, order.seed, order.global_batch_size or 1, mix=order.mix)
    start = int(plan.window_starts(np.array([sample]))[0])
    found: dict[str, Any] = {"plan_hash": plan.plan_hash}
    if isinstance(plan, SamplePlan):
        found["epoch"] = sample // plan.num_windows
    window = {"token_start": start, "token_stop": start + plan.seq_len + 1}
    return found | window, dataset.docs_of(start, plan.seq_len + 1)


def _find_document(
    dataset: TokenDataset, sample: int, order: SampleOrder
) -> tuple[dict[str, Any], list[DocumentInfo]]:
    traces, held = open_traces(dataset.path), order.validation_documents

    def plan_of(parting: Parting | None) -> DocumentPlan | DocumentMixture:
        size = order.global_batch_size or 1
        return open_document_plan(traces, order.seed, size, parting=parting, mix=order.mix)

    def is_of_run(parting: Parting) -> bool:
        plan = plan_of(parting)
        if isinstance(plan, DocumentMixture):  # a checkpoint names the order without changes
            plan = plan.with_changes(())
        return document_order_id(plan, parting) == order.plan_hash

    parting = hold_out(traces, held, order.seed, is_of_run) if held else None
    plan = plan_of(parting)
    items = plan.documents(np.array([sample]))
    info = dataset.documents[int((items if parting is None else parting.training(items))[0])]
    found: dict[str, Any] = {"plan_hash": document_order_id(plan, parting)}
    if isinstance(plan, DocumentPlan):
        found["epoch"] = sample // plan.num_documents
    return found | {"token_start": info.token_start, "token_stop": info.token_stop}, [info]


def _with_decisions(dataset: TokenDataset, info: DocumentInfo) -> dict[str, Any]:
    part, row = dataset.documents.place(info.number)
    decided = decisions.of_document(dataset.manifest, part, row)
    return asdict(info) | {"decisions": decided}


def audit(path: Path) -> dict[str, Any]:
    """Return the counts of all input records, over all and by source, and the tokens of each source."""
    manifest = read_manifest(path)
    content = manifest.content
    tokens = {source["name"]: source["num_tokens"] for source in content["sources"]}
    prepared = describe_counts(read_counts(manifest))
    mix = recipe_mix(manifest)
    found = {"id": manifest.id, "documents": prepared["documents"], "tokens": tokens}
    found |= {"sources": prepared["sources"], "edits": prepared["edits"]}
    if mix is not None:
        of = "documents" if has_roles(manifest) else "tokens"
        names = [source["name"] for source in content["sources"]]
        found["mix"] = dict(zip(names, shares(mix, content["sources"], of=of), strict=True))
    return found


def _decode(dataset: Any, ids: Any) -> str:
    if dataset.tokenizer_path is None:
        return " ".join(str(token) for token in ids.tolist())
    # The tokenizers library, for this alone.
    from r1hpc.corpus.build.vocabulary import TOKENIZER_FILE, Encoder

    return Encoder(dataset.tokenizer_path / TOKENIZER_FILE, dataset.eos_id).decode(ids)


def fill_in(arguments: Namespace) -> dict[str, Any]:
    """Fill in from the run's plan the arguments without a flag; return the other fields of a SampleOrder.

    Raise UsageError if the run reads another dataset, has no such step, or took it on other ranks.
    """
    run = open_run(arguments.run)
    config, plan = read(run.config), read_json(run.plan, PlanBatch)
    data = config.data
    if config.stage not in ("pretrain", "sft"):
        raise UsageError(f"{run.run_id} is of stage {config.stage}, which reads no dataset: name another run")
    step, num_steps = arguments.step, config.train.num_steps
    if step is not None and not 1 <= step <= num_steps:
        raise UsageError(f"--step {step}: {run.run_id} has the steps 1 to {num_steps}")
    plan_hash = _order_in_checkpoints(run, data.path, arguments.dir)
    if config.stage == "sft" and data.packing and step is not None:
        raise UsageError("data.packing puts documents of any rank into a row: take --sample")
    topology, batch, shared = plan["topology"], plan["batch"], config.train.sequence_parallel
    if step is not None:
        _refuse_other_ranks(run, arguments, topology["num_nodes"] * topology["ranks_per_node"])
    if arguments.world_size is None:
        arguments.rank //= shared  # ranks that share their sequences read as one
    known = {
        "seq_len": data.seq_len,
        "seed": data.seed,
        "global_batch_size": batch["global_batch_size"],
        "micro_batch_size": batch["micro_batch_size"],
        "world_size": topology["num_nodes"] * topology["ranks_per_node"] // shared,
    }
    for name, value in known.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return {"mix": data.mix, "validation_documents": data.validation_documents, "plan_hash": plan_hash}


def _refuse_other_ranks(run: RunDir, arguments: Namespace, num_ranks: int) -> None:
    """Refuse a step taken on other ranks: a --resume may have changed ranks and micro batch since."""
    if arguments.world_size is not None and arguments.micro_batch_size is not None:
        return
    taken = read_steps(run).effective.get(arguments.step)
    ranks = {each.attempt: each.ranks for each in read_history(run).attempts}
    then = ranks.get(taken.attempt) if taken is not None else None
    if then and then != num_ranks:
        raise UsageError(
            f"step {arguments.step} was taken on {then} ranks, and the plan of {run.run_id} is for "
            f"{num_ranks} now: give --world-size and --micro-batch-size as they were (ranks that share their "
            "sequences count as one)"
        )


def _order_in_checkpoints(run: RunDir, path: str | None, folder: Path) -> str | None:
    """Return the plan_hash in the run's newest checkpoint; UsageError if it read another dataset."""
    newest = next(iter(CheckpointStore(run.checkpoints).list()), None)
    if newest is not None:
        known = newest.manifest.meta.get("dataset_id")
    else:
        known = read_manifest(Path(path)).id if path and Path(path, MANIFEST).is_file() else None
    found = read_manifest(folder).id
    if known not in (None, found):
        raise UsageError(
            f"{folder} holds dataset {found[:12]}, and {run.run_id} was trained on {str(known)[:12]}: give "
            "its folder (`inspect DIR` shows the id)"
        )
    return None if newest is None else newest.manifest.meta.get("plan_hash")
