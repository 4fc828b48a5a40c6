"""Nonsense for every key and command, from a grammar: one clear error or a sound value, never a traceback.

python -m pytest tests/test_fuzz.py -m soak
"""

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from r1hpc.__main__ import COMMANDS
from r1hpc.base.errors import R1hpcError
from r1hpc.config.load import as_layer, known_keys, load, read, save
from r1hpc.config.secrets import refuse_secrets
from r1hpc.slurm.fields import check_cluster, check_resources

pytestmark = pytest.mark.soak

SECRET = "hf" + "_AbCdEfGhIjKlMnOpQrStUvWx"
ATOMS = (
    *(
        "",
        "0",
        "-1",
        "1",
        "1.5",
        "1e999",
        ".nan",
        ".inf",
        "-.inf",
        "\u0667",
        "9" * 30,
        "9" * 5000,
        "null",
        "true",
        "~",
    ),
    *(
        "x",
        "x" * 5000,
        "'a b'",
        '"\\0"',
        '"\\ud800"',
        "../../etc",
        "/nosuch",
        "--wrap",
        "$(touch x)",
        "`id`",
        "a;b",
    ),
    *(
        "${oc.env:HOME}",
        "${train.seed}",
        "${nope}",
        "${",
        "???",
        "!!python/name:os.system",
        "&a [*a]",
        "{",
        "[",
        "]",
    ),
    *(
        SECRET,
        f"https://me:{SECRET}@h/x",
        "machine h login a password b",
        "12:00:00",
        "-1:00",
        "a100:4",
        "\x1b[31m",
    ),
)
NAMES = (
    "accuracy",
    "format",
    "model_type",
    "a.b",
    "",
    "token",
    "password",
    "1",
    "gres",
    "!replace",
    "é",
    "A=B",
)
# Those that stay, or act on something that is not there to be acted on.
LEFT_OUT = {"launch", "monitor", "doctor", "drill", "chat"}


def value(dice: random.Random, depth: int = 0) -> str:
    """An atom, or a YAML list or mapping of values."""
    kind = dice.randrange(8 if depth < 2 else 5)
    if kind == 5:
        return f"[{', '.join(value(dice, depth + 1) for _ in range(dice.randrange(3)))}]"
    if kind >= 6:
        items = (f"{dice.choice(NAMES)}: {value(dice, depth + 1)}" for _ in range(dice.randrange(3)))
        return f"{'!replace ' if kind == 7 else ''}{{{', '.join(items)}}}"
    return dice.choice(ATOMS)


def override(dice: random.Random, keys: list[str]) -> str:
    key = dice.choice(keys)
    if dice.random() < 0.3:
        key = f"{key}.{dice.choice(NAMES)}"
    return f"{key}={value(dice)}"


def numbers(plain: Any) -> list[float]:
    if isinstance(plain, dict | list):
        return [
            number
            for item in (plain.values() if isinstance(plain, dict) else plain)
            for number in numbers(item)
        ]
    return [plain] if isinstance(plain, int | float) else []


@pytest.mark.parametrize("seed", range(8))
def test_every_key(seed: int, tmp_path: Path) -> None:
    dice, accepted = random.Random(seed), 0
    keys = known_keys()
    for number in range(600):
        given = [override(dice, keys) for _ in range(dice.choice((1, 1, 1, 2)))]
        try:
            config = load(dice.choice((None, "smoke", "rl_smoke")), given)
            check_cluster(config.cluster)
            check_resources(config.resources)
            refuse_secrets(config, given)
        except R1hpcError:
            continue
        except Exception as error:
            raise AssertionError(f"{given}: {type(error).__name__}") from error
        accepted += 1
        assert all(math.isfinite(each) for each in numbers(as_layer(config))), given
        path = tmp_path / f"{number}.yaml"
        save(config, path)
        assert read(path) == config, given
        assert SECRET not in path.read_text(), given
    assert accepted > 20


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - LEFT_OUT))
def test_every_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    module = __import__(f"r1hpc.{command.replace('-', '_')}", fromlist=["main"])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    flags = sorted(set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help", "--follow"})
    dice = random.Random(command)
    for _ in range(60):
        words = ["--dry-run"] if command == "submit" else []
        for _ in range(dice.randrange(1, 5)):
            words += [dice.choice([*flags, "--nosuch"])] if dice.random() < 0.6 else []
            words += [dice.choice([*ATOMS, "smoke", "train.lr=1"])] if dice.random() < 0.7 else []
        try:
            module.main(words)
        except (R1hpcError, SystemExit, OSError):
            pass
        except Exception as error:
            raise AssertionError(f"{command} {words}: {type(error).__name__}: {error}") from error
