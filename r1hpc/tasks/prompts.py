"""The prompt around a question, for models that read language."""

from collections.abc import Iterable

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


def check_asks_for_box(texts: Iterable[str]) -> None:
    """What a model is told must not ask for tags where \\boxed alone counts: who obeys would be right never.

    Raises:
        UsageError: it does.
    """
    if any("<answer>" in text for text in texts):
        raise UsageError(
            "reward.answer_in=boxed counts what \\boxed{} holds, and the model is asked for <answer> tags: "
            "give a template that asks for the box, as in task.options.template="
            "'{question}\\nReason step by step, and put your final answer within \\boxed{}.'"
        )


def held_out_key(question: str) -> str:
    """What decides whether a question is held out: its words, whatever their case and the blanks between."""
    return " ".join(question.casefold().split())
