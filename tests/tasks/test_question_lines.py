"""Lines of a question file that would be read wrongly are refused with the reason."""

from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.tasks.problems.registry import make_task


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "1+1?", "answer": "2"}\n'.encode("utf-16"), "it may be UTF-16"),
        (b'{"question": "1+1?", "answer": "2", "answer": "3"}\n', "has the key 'answer' twice"),
        (b'{"question": "1+1? \\ud800", "answer": "2"}\n', "half of a surrogate pair"),
    ],
)
def test_the_reason_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        make_task(TaskConfig("file", options={"path": str(path)})).num_questions(held_out=True)
