"""Add the generated pages to the documentation site: the commands, and files that lie outside docs/.

mkdocs calls it as a hook (mkdocs.yml). Links to files outside docs/ work in a clone and on the site.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from r1hpc.__main__ import COMMANDS, main  # noqa: E402

_OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "shards/README.md": "recipes.md"}
_FILES = {"constraints.txt": "constraints.txt"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, name in _OUTSIDE.items():
        files.append(File.generated(config, name, content=relinked((ROOT / source).read_text())))
    for source, name in _FILES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links to files outside docs/ at their pages on the site."""
    return relinked(markdown)


def relinked(markdown: str) -> str:
    """Return the page with links that work on the site."""
    for source, name in (_OUTSIDE | _FILES).items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}", f"]({name}", markdown)
    markdown = re.sub(r"\[([^\]]*)\]\((?:\.\./)?(?:benchmarks|research|tests)/[^)]*\)", r"\1", markdown)
    return re.sub(
        r"""(\]\((?:\.\./)?|(?:src|srcset)=")docs/""", lambda found: found[1].removesuffix("../"), markdown
    )


def commands_page() -> str:
    """Return what `--help` prints for every command."""
    parts = ["# Commands", "`r1hpc COMMAND` and `python -m r1hpc.COMMAND` are the same."]
    for name, purpose in COMMANDS.items():
        if name != "launch":
            parts += [f"## {name}", f"{purpose[0].upper()}{purpose[1:]}.", f"```text\n{help_of(name)}```"]
    return "\n\n".join(parts) + "\n"


def help_of(command: str) -> str:
    """Return what `r1hpc COMMAND --help` prints, 92 columns wide."""
    os.environ["COLUMNS"] = "92"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return out.getvalue()
