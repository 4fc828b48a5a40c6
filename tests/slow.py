"""Write tests/slow.txt, the tests that take over two seconds: `make test` leaves them out.

    pytest --junitxml all.xml -m 'not soak'; python -m tests.slow all.xml [MORE.xml ...]

A parametrized test is slow as a whole, by the sum of its cases.
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

_SLOW_S = 2.0
_LIST = Path(__file__).with_name("slow.txt")


def slow_tests(reports: list[Path]) -> list[str]:
    """Return the node ids, without parameters, of the tests that took too long in these JUnit reports."""
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            seconds[_node(case.attrib["classname"], case.attrib["name"])] += float(case.attrib["time"])
    return sorted(node for node, spent in seconds.items() if spent > _SLOW_S)


def _node(classname: str, name: str) -> str:
    """Return the node id of a JUnit case: tests.a.test_b and test_x[1] are tests/a/test_b.py::test_x."""
    parts = classname.split(".")
    file = next(number for number, part in enumerate(parts) if part.startswith("test_"))
    inside = "".join(f"::{part}" for part in parts[file + 1 :])
    return f"{'/'.join(parts[: file + 1])}.py{inside}::{name.partition('[')[0]}"


if __name__ == "__main__":
    _LIST.write_text("".join(f"{node}\n" for node in slow_tests([Path(name) for name in sys.argv[1:]])))
