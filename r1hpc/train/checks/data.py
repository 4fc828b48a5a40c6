"""Check training data before the queue; keep the stages of a chain from reusing each other's questions.

The ranks read everything; here it is a few MiB, the longest lines of a GiB, and a dataset's manifest. Stage
rl of a chain begins after the items that earlier stages have shown, unless task.first_item is set. An
evaluation of test files gets the list of what those stages trained on, for its contamination report.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_bytes
from r1hpc.config.paths import FILES, is_own
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.corpus.build.from_traces import list_inputs, source_names
from r1hpc.corpus.recipe import find_recipe, load_recipe
from r1hpc.corpus.sources.lines import Line, also_said, is_compressed, iter_lines, line_number, parse_trace
from r1hpc.data.format.manifest import MANIFEST, read_manifest
from r1hpc.data.format.mix import check_schedule
from r1hpc.tasks.problems.asked_items import asked_items, first_beyond, reordered
from r1hpc.tasks.problems.registry import parts_of
from r1hpc.train.supervised.dataset import folder_of_recipe, refuse_foreign

_READ_BYTES = 8 << 20
"""Bytes of all traces, in order, whose lines are all parsed: a tenth of a second."""
_SCANNED_BYTES = 1 << 30
"""Bytes of uncompressed files in which the longest lines are looked for: some seconds."""
_ENCODED_BYTES = 512 << 10
_ENCODED_TRACES = 64
_FORM = '{"prompt": "…", "completion": "…"}'
_MOST_BYTES = 64 << 20
"""Bytes of input that build in about a minute on one core, less than a large model takes to start."""


@dataclass(frozen=True)
class _Trace:
    path: Path
    position: int
    prompt: str
    completion: str

    @property
    def place(self) -> str:
        return f"{self.path}:{line_number(self.path, self.position)}"


def check_training_data(
    config: RunConfig, to_come: Sequence[Path] = (), *, tokenizer_to_come: bool = False
) -> list[str]:
    """Refuse data of stages pretrain and sft that is missing, in another form, or too long; return notes.

    Paths below `to_come`, folders that other runs have yet to fill, are not checked. With `tokenizer_to_come`
    another run has yet to write the tokenizer, so tokens cannot be counted.
    """
    data = config.data
    if config.stage == "pretrain" and data.traces:
        raise UsageError("data.traces is of stage sft, and has no use in stage pretrain: add stage=sft")
    if data.path is not None and data.traces:
        raise UsageError(
            f"data.path={data.path} and data.traces={data.traces} name two datasets: leave one of them out"
        )
    if data.path is not None:
        if not _is_below(data.path, to_come):
            _check_dataset(Path(data.path), config)
    elif config.stage == "sft" and data.traces:
        paths = [path for path in data.traces if not _is_below(path, to_come)]
        files = [file for listed in list_inputs(paths) for file in listed]
        longest = _longest(files)
        if paths and not longest:
            raise UsageError(f"data.traces: {', '.join(map(str, files))} holds no line; give lines {_FORM}")
        never_closed = [] if tokenizer_to_come else _check_lengths(longest, config)
        return [*never_closed, *_left_out(files)]
    elif config.stage == "sft" and data.recipe and not load_recipe(find_recipe(data.recipe)).is_traces:
        raise _no_roles(f"data.recipe={data.recipe} makes")
    return []


def check_sources(config: RunConfig, to_come: Sequence[Path] = ()) -> None:
    """Refuse a weight schedule that names other sources than the dataset will have."""
    data = config.data
    if data.path is not None and _is_below(data.path, to_come):
        return
    if data.path is not None:
        names = [source["name"] for source in read_manifest(Path(data.path)).content["sources"]]
    elif data.traces and config.stage == "sft":
        names = source_names(len(data.traces))
    else:
        assert data.recipe is not None, "the configuration sees to it"
        names = [source.name for source in load_recipe(find_recipe(data.recipe)).sources]
    check_schedule(data.mix, names)


def check_mix_goes_on(frozen: RunConfig, config: RunConfig) -> None:
    """Refuse a resume that would change the order of data already seen."""
    schedules = (frozen.data.mix.schedule, config.data.mix.schedule)
    begins = [[entry for entry in schedule if entry["from_step"] == 1] for schedule in schedules]
    becomes_one = frozen.data.mix.is_used != config.data.mix.is_used and not _is_mixed(config)
    if begins[0] != begins[1] or becomes_one:
        raise UsageError(
            "data.mix: a resume cannot turn a mixture on or off, or change its first weights. It can only "
            "change the part of a schedule that has not begun, or of a recipe with mix. "
            "Leave data.mix as it was, or start a new run"
        )


def _is_mixed(config: RunConfig) -> bool:
    data = config.data
    if data.path is not None:
        return read_manifest(Path(data.path)).content["recipe"].get("mix") is not None
    if data.recipe is None or data.traces:
        return False
    return load_recipe(find_recipe(data.recipe)).mix is not None


def _is_below(path: str, folders: Sequence[Path]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _check_dataset(folder: Path, config: RunConfig) -> None:
    if folder.is_file():
        raise UsageError(
            f"data.path {folder} is a file: give the folder of a dataset, made by `python -m r1hpc.shard "
            f"build`; a file of traces is named by data.traces=[{folder}]"
        )
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"data.path {folder} has no {MANIFEST}: give the folder of a dataset, made by `python -m "
            "r1hpc.shard build`; a folder of traces (*.jsonl) is named by data.traces=[DIR]"
        )
    if config.stage == "pretrain" and not folder.is_dir():
        return  # missing_dataset explains more
    content = read_manifest(folder).content
    if config.stage == "sft" and "roles" not in content:
        raise _no_roles(f"data.path {folder} holds")
    num_tokens, seq_len = content["num_tokens"], config.data.seq_len
    if config.stage == "pretrain" and num_tokens <= seq_len:
        raise UsageError(
            f"data.path {folder} holds {num_tokens:,} tokens, but a sample needs data.seq_len + 1 = "
            f"{seq_len + 1:,}: build it from more text, or lower data.seq_len"
        )
    if config.data.validation_documents >= content["num_documents"]:
        raise UsageError(
            f"data.validation_documents={config.data.validation_documents:,} leaves none of the "
            f"{content['num_documents']:,} documents in {folder} to train on: lower it"
        )


def _no_roles(what: str) -> UsageError:
    return UsageError(
        f"stage sft learns from prompts and completions, and {what} documents without roles: give "
        f"data.traces=[FILE.jsonl] of lines {_FORM}, or a dataset whose sources have kind: traces"
    )


def _left_out(files: Iterable[Path]) -> list[str]:
    """Return a note for each file whose first line has more than its prompt and its completion."""
    sentences = []
    for path in files:
        first = next(iter_lines(path, 0, 1), None)
        names = [] if first is None else also_said(first.raw)
        if names:
            sentences.append(
                f"{path} has {', '.join(names)} beside prompt and completion, which is not learnt: put "
                "thinking into the completion, the rest into the prompt or model.system_prompt"
            )
    return sentences


def _longest(files: Iterable[Path]) -> list[_Trace]:
    """Return the longest traces: by characters in the first _READ_BYTES, whose lines are all parsed, and by
    bytes of the line behind them. The longest first. Raise UsageError with file and number of a line that is
    no trace."""
    lines, first, read = _lines(files), [], 0
    for path, line in lines:
        first.append(_parsed(path, line))
        read += line.size
        if read >= _READ_BYTES:
            break
    found = heapq.nlargest(_ENCODED_TRACES, first, key=_characters)
    behind = heapq.nlargest(_ENCODED_TRACES, lines, key=lambda placed: placed[1].size)
    return sorted([*found, *(_parsed(path, line) for path, line in behind)], key=_characters, reverse=True)


def _characters(trace: _Trace) -> int:
    return len(trace.prompt) + len(trace.completion)


def _lines(files: Iterable[Path]) -> Iterator[tuple[Path, Line]]:
    """Yield the lines in order, as far as they are checked; compressed files take longer to read."""
    read = 0
    for path in files:
        most = _READ_BYTES if is_compressed(path.name) else _SCANNED_BYTES
        for line in iter_lines(path, 0, max(0, most - read)):
            if line.fault:
                raise _no_trace(path, line, line.fault)
            read += line.size
            yield path, line


def _parsed(path: Path, line: Line) -> _Trace:
    try:
        prompt, completion = (text.decode() for text in parse_trace(line.raw))
    except ValueError as error:
        raise _no_trace(path, line, str(error)) from None
    return _Trace(path, line.position, prompt, completion)


def _no_trace(path: Path, line: Line, fault: str) -> UsageError:
    return UsageError(
        f"{path}:{line_number(path, line.position)}: {fault}. A line of data.traces is {_FORM}: correct it, "
        "or leave it out"
    )


def _check_lengths(traces: Sequence[_Trace], config: RunConfig) -> list[str]:
    """Refuse a trace that the build or the ranks would refuse: too long, not encodable, or with an end token
    inside. Return a note if a prompt opens a thinking block that its completion does not close."""
    from r1hpc.tasks.text.format import TAGS, encode
    from r1hpc.tasks.text.tokenizer import form_of, load_tokenizer, special_ids  # the tokenizers library

    tokenizer = load_tokenizer(config.model)
    form, eos_id = form_of(tokenizer, config.model), special_ids(tokenizer, config.model).eos
    left, most, longest, never_closed = _ENCODED_BYTES, 0, None, None
    for trace in traces:
        try:
            texts = form.prompt(trace.prompt), form.completion(trace.completion)
            prompt, completion = (encode(tokenizer, text) for text in texts)
        except UsageError as error:
            raise UsageError(f"{trace.place}: {error}") from None
        if eos_id in completion:
            end = tokenizer.id_to_token(eos_id)
            raise UsageError(
                f"{trace.place}: the completion holds {end}, which is added to every completion: "
                "remove it, or leave the line out"
            )
        length = len(prompt) + len(completion) + 1
        left -= sum(map(len, texts))
        if length > most:
            most, longest = length, trace
        if form.opens_thinking and TAGS[1] not in trace.completion:
            never_closed = never_closed or trace
        if left <= 0:
            break
    if longest is not None and most > config.data.seq_len:
        raise UsageError(
            f"data.seq_len is {config.data.seq_len}, but the trace of {longest.place} has {most:,} tokens "
            f"with its EOS: set data.seq_len={most} or more, or leave long ones out of the traces"
        )
    if never_closed is None:
        return []
    return [
        f"prompts end in {TAGS[0]} (the chat template, or model.open_thinking), and the completion of "
        f"{never_closed.place} has no {TAGS[1]}: the model would learn to answer inside the thinking; write "
        f"{TAGS[1]} before the answer, with or without a thinking before it"
    ]


def refuse_long_build(run: RunDir, config: RunConfig) -> None:
    """Refuse a run that would build a large dataset at its start, with its GPUs idle. data.traces of any size
    are accepted: no command builds that dataset beforehand."""
    data = config.data
    if config.stage not in ("pretrain", "sft") or data.path or data.traces or data.recipe is None:
        return
    path = find_recipe(data.recipe)
    folder = folder_of_recipe(run, path)
    refuse_foreign(folder, config)
    if folder.exists():
        return
    from r1hpc.corpus.sources.read import list_spans  # numpy, which other submissions are spared

    num_bytes = sum(span.num_bytes for span in list_spans(load_recipe(path)))
    if num_bytes > _MOST_BYTES:
        raise UsageError(
            f"the dataset of recipe {data.recipe} is not built yet, and the job's GPUs would wait while it "
            f"is made of {format_bytes(num_bytes)}. Build it first, then submit again:\n"
            f"  python -m r1hpc.shard build {data.recipe} --out {folder} --engine slurm"
        )


def connected(name: str, config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    """Return a stage's configuration with the values that follow from the stages before it. Raise UsageError
    if the task does not exist, or RL asks a list of an earlier stage in another order."""
    if config.stage == "rl" and config.task.first_item is None:
        for before, each in earlier.items():
            if asked_items(each) and (settings := reordered(config.task, each.task)):
                ours = " ".join(f"{key}={value}" for key, (value, _) in settings.items())
                theirs = " ".join(f"{name}:{key}={value}" for key, (_, value) in settings.items())
                raise UsageError(
                    f"{ours} asks the questions of the earlier stage {before} in another order, so some come "
                    f"again. Set {theirs} to begin after them, or choose {name}:task.first_item yourself"
                )
        shown = [(each.task, items.stop) for each in earlier.values() if (items := asked_items(each))]
        first = max((first_beyond(config.task, task, end) for task, end in shown), default=0)
        return replace(config, task=replace(config.task, first_item=first)) if first else config
    if config.stage == "evaluate" and (config.evaluate.path or config.evaluate.sets):
        return _with_trained_on(config, earlier)
    return config


def _with_trained_on(config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
    """Return an evaluation of test files with the training data of earlier stages added to its own list."""
    evaluate = config.evaluate
    traces = [path for each in earlier.values() if each.stage == "sft" for path in each.data.traces]
    asked = [path for each in earlier.values() if each.stage == "rl" for path in _question_files(each.task)]
    others = [f"{each} (stage {name})" for name, config in earlier.items() for each in _unread(config)]
    searched = list(dict.fromkeys([*evaluate.trained_on, *traces, *asked]))
    not_searched = list(dict.fromkeys([*evaluate.not_searched, *others]))
    return replace(config, evaluate=replace(evaluate, trained_on=searched, not_searched=not_searched))


def _question_files(task: TaskConfig) -> list[str]:
    """Return the files a task takes its questions from, also as part of a mixture."""
    files = [part.options for part in parts_of(task).values() if part.name in FILES]
    return [str(options["path"]) for options in files if options.get("path")]


def _unread(config: RunConfig) -> list[str]:
    """Return the training data that cannot be searched: datasets (tokens only) and custom code."""
    if config.stage == "rl":
        names = [part.name for part in parts_of(config.task).values()]
        return [f"questions of {name}" for name in names if is_own(name)]
    data = config.data
    if config.stage not in ("pretrain", "sft") or (config.stage == "sft" and data.traces and not data.path):
        return []
    return [f"data.path={data.path}" if data.path else f"data.recipe={data.recipe}"]
