"""A folder with a user's own code, for the tests that need one."""

import textwrap
from pathlib import Path

TASK = """
    import random

    class Doubling:
        def __init__(self, largest=99):
            self.largest = largest

        def question(self, index):
            number = random.Random(index).randrange(self.largest + 1)
            return f"2*{number}=", str(2 * number), {"number": number}

        def verdict(self, text, answer, metadata):
            return text.strip() == answer

        def thinking(self, prompt, answer, metadata):
            return f"{metadata['number']}+{metadata['number']}"
"""
REWARD = """
    def brevity(prompt, completion, answer, metadata):
        return max(0.0, 1 - len(completion) / 40)
"""


def write(folder: Path, name: str, text: str) -> Path:
    """A file of Python in `folder`."""
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path
