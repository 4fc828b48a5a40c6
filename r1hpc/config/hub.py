"""Find a model by its Hugging Face Hub name in the local cache, or name the command that fetches it.

Nothing is downloaded: the nodes of most clusters have no network.
"""

import os
import re
from pathlib import Path

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def cache() -> Path:
    """Return huggingface_hub's cache folder (HF_HUB_CACHE in its documentation)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def is_hub_name(name: str) -> bool:
    """True if `name` can only be a name on the Hub: owner/name, and no such folder here."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def local_folder(name: str) -> str:
    """Return the cached snapshot of a Hub name: `main`, else the only one. Any other name is unchanged."""
    if not is_hub_name(name):
        return name
    folder = cache() / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    wanted = main.read_text().strip() if main.is_file() else "*"
    found = list((folder / "snapshots").glob(wanted))
    return str(found[0]) if len(found) == 1 else name


def how_to_fetch(name: str) -> str:
    """Explain how to fetch a Hub name that is not in the cache."""
    target = f"models/{name.split('/')[1]}"
    return (
        f"no such folder here, and as a name on the Hub not in the local cache ({cache()}); on the login "
        f"node: `hf download {name}`, or with `--local-dir {target}` for model.path={target}"
    )
