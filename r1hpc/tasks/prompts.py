"""The prompt around a question, for models that read language."""

from collections.abc import Sequence

from r1hpc.base.errors import UsageError

TEMPLATE = (
    "Solve the problem. Write your reasoning inside <think> </think>, then only the final answer inside "
    "<answer> </answer>.\n\nProblem: {question}\n\nSolution: "
)


def check_template(template: str) -> str:
    """A template names the place of the question once; nothing else in it is special.

    Raises:
        UsageError: it does not.
    """
    if template.count("{question}") != 1:
        raise UsageError(f"task.options.template must hold {{question}} exactly once; it is {template!r}")
    return template


def fill(template: str, question: str) -> str:
    """The prompt. Braces in the question stay what they are."""
    return template.replace("{question}", question)


def check_asks_for(answer_in: str, prompts: Sequence[str], system_prompt: str) -> None:
    """Where \\boxed counts a model must not be asked for tags alone, nor for a box where tags do: it would
    never be right.

    Args:
        answer_in: as reward.answer_in, `boxed` or `tags`.
        prompts: of one task. A question may hold a tag or box by itself; a template has all of them hold it.

    Raises:
        UsageError: it is, by the template of all prompts or by the system message.
    """
    counts, other = ("\\boxed", "<answer>") if answer_in == "boxed" else ("<answer>", "\\boxed")
    asked = [system_prompt + prompt for prompt in prompts]
    if not all(other in text for text in asked) or all(counts in text for text in asked):
        return
    what = "model.system_prompt" if other in system_prompt else "the template of the prompts"
    if answer_in == "boxed":
        raise UsageError(
            f"reward.answer_in=boxed counts what \\boxed{{}} holds, and {what} asks for <answer> tags: ask "
            "for the box, as by task.options.template='{question}\\nReason step by step, and put your final "
            "answer within \\boxed{}.'"
        )
    raise UsageError(
        f"reward.answer_in=tags counts what <answer> </answer> holds, and {what} asks for \\boxed{{}}: say "
        "reward.answer_in=boxed, or ask for the tags"
    )


def held_out_key(question: str) -> str:
    """What decides whether a question is held out: its words, whatever their case and the blanks between."""
    return " ".join(question.casefold().split())
