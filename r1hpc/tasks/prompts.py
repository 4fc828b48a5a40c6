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


def check_asks_for_box(prompts: Sequence[str], system_prompt: str) -> None:
    """Where \\boxed alone counts, a model must not be asked for tags without it: it would never be right.

    Args:
        prompts: of one task. A question may hold a tag or box by itself; a template has all of them hold it.

    Raises:
        UsageError: it is, by the template of all prompts or by the system message.
    """
    asked = [system_prompt + prompt for prompt in prompts]
    asks_for_tags = all("<answer>" in text for text in asked)
    if not asks_for_tags or all("\\boxed" in text for text in asked):
        return
    what = "model.system_prompt" if "<answer>" in system_prompt else "the template of the prompts"
    raise UsageError(
        f"reward.answer_in=boxed counts what \\boxed{{}} holds, and {what} asks for <answer> tags: ask for "
        "the box, as by task.options.template='{question}\\nReason step by step, and put your final answer "
        "within \\boxed{}.'"
    )


def held_out_key(question: str) -> str:
    """What decides whether a question is held out: its words, whatever their case and the blanks between."""
    return " ".join(question.casefold().split())
