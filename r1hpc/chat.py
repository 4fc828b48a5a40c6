"""Chat with a trained model.

    python -m r1hpc.chat                       # the newest run's model; /new starts over, /quit ends
    python -m r1hpc.chat RUN                   # a run's model; CHAIN/STAGE is a run
    python -m r1hpc.chat DIR                   # any Hugging Face folder
    python -m r1hpc.chat RUN --ask "17 + 25"   # one question; --json for a script
    echo "17 + 25" | python -m r1hpc.chat RUN  # lines are a conversation; /new begins another

Questions get the form used in training: the run's chat template, system prompt and question template
(--as-typed: no question template). Thinking is shown apart from the answer. Without a chat template every
line stands alone.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import add_run, choose_run, has_model, model_of
from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import UsageError

if TYPE_CHECKING:
    from r1hpc.config.schema.run import ModelConfig, RunConfig
    from r1hpc.train.rollout.chat import ChatModel, Limits

_LABELS = {"<think>": "thinking", "</think>": "says", "<answer>": "answer", "</answer>": "says"}
"""The label printed at each tag."""
_TAG = re.compile("(" + "|".join(_LABELS) + ")")
_GREY, _PLAIN = "\x1b[2m", "\x1b[0m"


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.chat", description=__doc__)
    add_run(parser, "a run, a chain (its newest model), or a Hugging Face folder")
    parser.add_argument("--ask", metavar="TEXT", help="ask this, and end")
    parser.add_argument("--system", metavar="TEXT", help="the system message; default the run's")
    parser.add_argument("--as-typed", action="store_true", help="questions without the task's template")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of an answer (1024)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    parser.add_argument("--json", action="store_true", help="with --ask: one JSON object on stdout")
    arguments = parser.parse_args(argv)
    _check(arguments)
    model, template, boxed = _model(arguments)
    from r1hpc.train.rollout.chat import ChatModel, Limits

    speaker = ChatModel(model)
    limits = Limits(arguments.max_tokens, arguments.temperature, arguments.seed)
    if arguments.json:
        from r1hpc.tasks.text.format import take_apart

        text = "".join(speaker.answer([_message(arguments.ask, template)], limits))
        parts = take_apart(text, boxed=boxed)
        print_json(
            {"question": arguments.ask, "text": text, "thinking": parts.thinking, "answer": parts.answer}
        )
    else:
        _talk(speaker, limits, [arguments.ask] if arguments.ask is not None else _typed(), template)
    return 0


def _check(arguments: Any) -> None:
    if arguments.json and arguments.ask is None:
        raise UsageError("--json prints the one answer to --ask TEXT")
    if arguments.max_tokens < 1:
        raise UsageError(f"--max-tokens {arguments.max_tokens}: give 1 or more")
    if not 0 <= arguments.temperature < float("inf"):
        raise UsageError(f"--temperature {arguments.temperature}: give 0 (greedy) or more")
    if not 0 <= arguments.seed < 2**63:
        raise UsageError(f"--seed {arguments.seed}: give 0 or more")


def _model(arguments: Any) -> "tuple[ModelConfig, str | None, bool]":
    """Return the model, the run's question template, and whether answers are in a box."""
    from dataclasses import replace

    from r1hpc.checkpoint.finished import check_folder, refuse_damaged
    from r1hpc.config.load import read
    from r1hpc.config.schema.run import ModelConfig
    from r1hpc.tasks.text.tokenizer import as_trained

    given, boxed = arguments.run_dir and Path(arguments.run_dir), False
    if given and (given / "config.json").is_file():
        check_folder(given)
        model, template = ModelConfig(path=str(given), attn_implementation=_attention(given)), None
    else:
        run = choose_run(arguments.run_dir, arguments.run_root, has_model)
        folder, config = model_of(run, "chat with"), read(run.config)
        refuse_damaged(run)
        model = as_trained(config.model, folder)
        template = None if arguments.as_typed else _template(config)
        boxed = config.reward.answer_in == "boxed"
    if arguments.system is not None:
        model = replace(model, system_prompt=arguments.system)
    return model, template, boxed


def _attention(folder: Path) -> str:
    """Return the attention the folder's weights were trained with if it is one of ours, else sdpa."""
    from r1hpc.base.files import read_json
    from r1hpc.config.schema.run import OWN_ATTENTIONS

    named = read_json(folder / "config.json", dict[str, Any]).get("attn_implementation")
    return named if named in OWN_ATTENTIONS else "sdpa"


def _template(config: "RunConfig") -> str | None:
    from r1hpc.tasks.problems.listed import TEMPLATE

    own = config.task.options.get("template")
    has_one = config.task.name in ("file", "jsonl") or config.task.name.startswith("reasoning_gym:")
    return None if config.stage == "pretrain" else str(own) if own else TEMPLATE if has_one else None


def _typed() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401 (gives input() its line editing)

    while True:
        try:
            yield input("you> ")
        except EOFError:
            print()
            return


def _talk(
    speaker: "ChatModel", limits: "Limits", questions: Iterator[str] | list[str], template: str | None
) -> None:
    turns: list[dict[str, str]] = []
    for question in questions:
        if question.strip() == "/quit":
            return
        if question.strip() == "/new":
            turns = []
        elif question.strip():
            turns = [*(turns if speaker.keeps_turns else []), _message(question, template)]
            try:
                text = _show(speaker.answer(turns, limits))
            except KeyboardInterrupt:  # ends the answer, not the conversation
                print()
                turns.pop()  # many templates refuse a second question before an answer
                continue
            # Thinking is left out of the conversation: models are not trained to read it again.
            turns.append({"role": "assistant", "content": text.rpartition("</think>")[2].strip()})


def _message(question: str, template: str | None) -> dict[str, str]:
    content = question if template is None else template.replace("{question}", question)
    return {"role": "user", "content": content}


def _show(pieces: Iterator[str]) -> str:
    """Print an answer as it comes, with a label for each tag; return the full text."""
    text = kept = ""
    label, last = "says", ""
    for piece in pieces:
        text += piece
        *whole, rest = _TAG.split(kept + piece)
        for part in whole:
            if part in _LABELS:
                label = _LABELS[part]
            else:
                last = _print(part, label, last)
        # A tag may come in several pieces: text that may begin one waits for the next.
        cut = next(
            (at for at in range(len(rest)) if any(t.startswith(rest[at:]) for t in _LABELS)), len(rest)
        )
        last, kept = _print(rest[:cut], label, last), rest[cut:]
    last = _print(kept, label, last)
    print("" if last else "says> (nothing)")
    return text


def _print(text: str, label: str, last: str) -> str:
    """Print a part of an answer, with its label if the label changed; return the label now printed."""
    text = text if label == last else text.lstrip()
    if not text:
        return last
    shown = "".join(char for char in text if char.isprintable() or char in "\n\t")
    grey = label == "thinking" and sys.stdout.isatty()
    begin = "" if label == last else f"{last and chr(10)}{label}> "
    print(f"{_GREY if grey else ''}{begin}{shown}{_PLAIN if grey else ''}", end="", flush=True)
    return label


if __name__ == "__main__":
    run_command(main)
