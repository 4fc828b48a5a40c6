"""The page of claims: what it says of what was measured, and that the committed one is the one it makes."""

import json
from pathlib import Path

import pytest

from r1hpc import claims
from r1hpc.base.errors import StateError, UsageError
from r1hpc.chain.claims import MEASURED, NOT_MEASURED, claims_page, is_measured, read_measured
from r1hpc.chain.claims_list import CLAIMS
from r1hpc.config import load
from tests.chain.test_comparison import BASELINE, arm, results

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "claims.md"


def test_the_committed_page_is_the_one_that_the_command_makes() -> None:
    again = "python -m r1hpc.claims --out docs/claims.md"
    assert _PAGE.read_text() == claims_page(read_measured(MEASURED)), f"run: {again}"


def test_without_results_only_arithmetic_is_measured() -> None:
    names = {claim.measured for claim in CLAIMS if is_measured(claim, {})}
    assert names == {"flops_term", "batch", "gpu_hours"}
    page = claims_page({})
    assert page.count(NOT_MEASURED) == len(CLAIMS) - 3
    assert page.count("Not run yet: `python -m r1hpc.ablate") == 4


def test_the_arithmetic_is_that_of_the_article() -> None:
    page = " ".join(claims_page({}).split())
    assert "gives 86 for 7 B and 100 GB, not 560" in page
    assert "is 2,337 GPU-hours" in page
    assert "train.global_batch_size is 256, but 4 ranks x train.micro_batch_size 32" in page


def test_a_result_is_told_with_its_interval_and_never_as_equal() -> None:
    found = results(
        BASELINE, arm("0.6_0.3_0.1", s0=0.91, s1=0.80, s2=0.85), arm("0.1_0.8_0.1", s0=0.1, s1=0.1)
    )
    page = " ".join(claims_page({"reward": found}).split())
    # +0.01, 0, 0: mean 0.0033, half width 4.303 * 0.00577 / sqrt 3
    assert "0.6_0.3_0.1 +0.003 [-0.011, +0.018] (n=3, not told apart)" in page
    assert "0.1_0.8_0.1 -0.750 [-1.385, -0.115] (n=2, lower)" in page
    assert "1 of 9 arms are not finished" in page


def test_arms_that_were_not_asked_for_are_not_measured() -> None:
    assert "Not measured here" in claims_page({"reward": results(BASELINE, arm("0.3_0.6_0.1", s0=0.9))})
    page = " ".join(claims_page({"reward": results(arm("rule"), arm("0.3_0.6_0.1"))}).split())
    assert "no arm is finished yet" in page


def test_the_door_writes_the_page_and_names_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert claims.main(["--out", str(tmp_path / "page.md"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["claims"]) == len(CLAIMS)
    assert (tmp_path / "page.md").read_text() == claims_page(read_measured(MEASURED))
    with pytest.raises(UsageError, match="no folder"):
        claims.main(["--results", str(tmp_path / "nowhere")])


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "reward.json").write_text('{"ablation": "reward"}')
    with pytest.raises(StateError, match="another version"):
        read_measured(tmp_path)


def test_every_preset_the_page_names_is_there() -> None:
    for name in ("r1", "dr_grpo", "dapo", "seed"):
        assert (load.assets("configs") / "rl" / f"{name}.yaml").is_file()
