"""A model by its name on the Hugging Face Hub: the snapshot in the local cache, or how to get one.

local_folder("Qwen/Qwen2.5-7B")     # ~/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/<commit>

Nothing is fetched: the nodes of most clusters have no network, and a queue is no place to find that out.
"""

import os
import re
from pathlib import Path

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def cache() -> Path:
    """Where huggingface_hub keeps what it fetched (its HF_HUB_CACHE, as its documentation says)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be a name on the Hub: owner/name, and no such folder here."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def local_folder(name: str) -> str:
    """The cached snapshot of a Hub name: of `main`, else the only one. Anything else stays what it is."""
    if not is_hub_name(name):
        return name
    folder = cache() / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    wanted = main.read_text().strip() if main.is_file() else "*"
    found = list((folder / "snapshots").glob(wanted))
    return str(found[0]) if len(found) == 1 else name


def how_to_fetch(name: str) -> str:
    """The sentence for a Hub name that is not in the cache."""
    target = f"models/{name.split('/')[1]}"
    return (
        f"no such folder here, and as a name on the Hub not in the local cache ({cache()}); on the login "
        f"node: `hf download {name}`, or with `--local-dir {target}` for model.path={target}"
    )
