"""A promise is made only for what the look at a script can follow."""

from pathlib import Path

import pytest

from r1hpc.config.load import load
from r1hpc.script.look import look_at
from r1hpc.script.loop import look_of, promise


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        place = (
            folder
            / f"{name.replace('____init__', '/INIT').replace('__', '/').replace('INIT', '__init__')}.py"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder / "train.py"


@pytest.mark.parametrize(
    ("text", "library"),
    [
        ("from transformers import Trainer\nTrainer().train()\n", "transformers"),
        ("import transformers as hf\nhf.Trainer().train()\n", "transformers"),
        ("from trl import SFTTrainer as T\nT().train()\n", "transformers"),
        ("from transformers import AutoModel\n", ""),
        ("from lightning import seed_everything\nseed_everything(1)\n", ""),
        ("import lightning as L\nL.Trainer().fit(1)\n", "lightning"),
        ("import lightning as L\nL.Fabric()\nmodel.fit()\n", ""),
        ("from accelerate import Accelerator\nAccelerator().backward(1)\n", ""),
        ("from accelerate import Accelerator\nAccelerator().save_state('a')\n", "accelerate"),
        ("from r1hpc import attempt\nattempt()\n", "r1hpc"),
    ],
)
def test_the_library_is_that_of_the_loop_not_of_an_import(tmp_path: Path, text: str, library: str) -> None:
    found = look_at(written(tmp_path, train=text))
    assert (found.library, found.doubts) == (library, [])


def test_a_trainer_in_a_local_package_is_followed(tmp_path: Path) -> None:
    script = written(
        tmp_path,
        train="from mine.loops import Fast\nFast().train()\n",
        mine____init__="",
        mine__loops="from .base import Base\nclass Fast(Base):\n    pass\n",
        mine__base="import transformers\nclass Base(transformers.Trainer):\n    pass\n",
    )
    assert look_at(script).library == "transformers"


@pytest.mark.parametrize(
    ("text", "doubt"),
    [
        (
            "import torch.multiprocessing as mp\nfrom transformers import Trainer\n"
            "def main(rank):\n    Trainer().train()\nmp.spawn(main)\n",
            "train.py, line 5: spawn trains in processes of its own",
        ),
        (
            "from accelerate import notebook_launcher\nfrom transformers import Trainer\n"
            "notebook_launcher(lambda: Trainer().train())\n",
            "train.py, line 3: notebook_launcher trains in processes of its own",
        ),
        (
            "from transformers import Trainer\nclass Mine(Trainer):\n    def train(self):\n        pass\n",
            "train.py, line 3: Mine has a train() of its own",
        ),
        ("from trl import NoSuchTrainer\nNoSuchTrainer().train()\n", "trl.NoSuchTrainer cannot be read here"),
    ],
)
def test_what_cannot_be_followed_is_not_promised(tmp_path: Path, text: str, doubt: str) -> None:
    script = load(str(written(tmp_path, train=text))).script
    sentence = promise(script, look_of(script))
    assert doubt in sentence
    assert "to the bit" not in sentence
    assert "If it does not, it has no checkpoints: it begins anew after each preemption" in sentence


def test_a_wrapper_of_the_interpreter_is_not_promised(tmp_path: Path) -> None:
    file = written(tmp_path, train="from transformers import Trainer\nTrainer().train()\n")
    script = load(str(file), ["script.python=python -m cProfile"]).script
    assert "script.python runs cProfile" in promise(script, look_of(script))


def test_a_subclass_in_an_installed_package_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    written(
        site,
        sentences____init__="from sentences.deep import TextTrainer, OddTrainer\n",
        sentences__deep="from transformers import Trainer\nclass TextTrainer(Trainer):\n    pass\n"
        "class OddTrainer(Trainer):\n    def train(self):\n        pass\n",
    )
    monkeypatch.syspath_prepend(str(site))
    fine = look_at(written(tmp_path, train="from sentences import TextTrainer\nTextTrainer().train()\n"))
    assert (fine.library, fine.doubts) == ("transformers", [])
    odd = look_at(written(tmp_path, train="from sentences import OddTrainer\nOddTrainer().train()\n"))
    assert odd.doubts == ["train.py, line 2: OddTrainer has a train() of its own"]


def test_what_no_checkpoint_holds_is_named_with_its_line(tmp_path: Path) -> None:
    notes = look_at(
        written(
            tmp_path,
            train="import itertools, random\nfrom transformers import Trainer, TrainerCallback\n"
            "COUNTS = {}\nTOTAL = 0\n"
            "class Ema(TrainerCallback):\n"
            "    def __init__(self):\n        self.order = itertools.cycle([1, 2])\n"
            "    def on_step_end(self, *args, **kwargs):\n"
            "        global TOTAL\n        COUNTS['a'] = 1\n        COUNTS.update(b=2)\n"
            "DICE = random.Random()\nFIXED = random.Random(3)\nTrainer(callbacks=[Ema()]).train()\n",
        )
    ).notes
    lines = [note.partition(":")[0].rpartition(" ")[2] for note in notes]
    assert sorted(map(int, lines)) == [7, 9, 10, 11, 12]
