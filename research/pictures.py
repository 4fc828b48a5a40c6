"""Make the pictures of README and docs from a real run of the demo.

    python -m research.pictures                     # run the demo first: five minutes or more
    python -m research.pictures runs/demo           # from a demo that has run, with its screen.txt

Needs chromium on the PATH for the pictures of pages.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
_WIDTH = 88
# Without the web font: a picture on GitHub may fetch nothing.
_SVG = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace("Fira Code, ", "")
_STYLES = {
    r"^\$ kill .*": "bold #ff7b72",
    r"^\$ .*": "bold #7ee787",
    r"^ *\d+:\d\d": "#8b949e",
    r".*same to the bit.*": "bold",
    r"^(Shown|Cost|Page|Next)\b": "bold #79c0ff",
}


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m research.pictures", description=__doc__)
    parser.add_argument("chain", nargs="?", type=Path, metavar="CHAIN", help="a demo that has run")
    chain = parser.parse_args(argv).chain
    if chain is None:
        chain = play()
    else:
        picture_of_watch(chain)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise R1hpcError("pictures of pages need a browser. Install chromium.")
    screen = (chain / "screen.txt").read_text()
    as_svg(shortened(screen), "make demo", IMAGES / "demo.svg")
    take_page(browser, chain, "page-chain", height=1080)
    take_page(browser, chain / "killed", "page-run", height=960)
    r1hpc("report", str(chain / "killed"), "--plots")
    save_small(chain / "killed" / "report" / "loss.png", IMAGES / "plots.png")
    return 0


def play() -> Path:
    """Run the demo; keep its screen, and a picture of `watch` in the middle of it."""
    argv = [sys.executable, "-u", "-m", "research.demo"]
    lines, name = [], ""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as demo:
        for line in demo.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
            if found := re.search(r"--run-name (\S+)", line):
                name = found[1]
            if re.search(r"twin +step 30", line):
                picture_of_watch(ROOT / "runs" / name)
    if demo.returncode:
        raise R1hpcError(f"the demo failed with exit status {demo.returncode}")
    chain = ROOT / "runs" / name
    (chain / "screen.txt").write_text("".join(lines))
    return chain


def picture_of_watch(chain: Path) -> None:
    as_svg(r1hpc("watch", str(chain / "twin"), "--once"), "r1hpc watch", IMAGES / "watch.svg")


def shortened(screen: str) -> str:
    """Return the demo's screen without the undisturbed run's evaluations, status and chat."""
    screen = re.sub(r"^ *\d+:\d\d +twin +step .*\n", "", screen, flags=re.MULTILINE)
    screen = re.sub(r"\n\$ r1hpc status .*?(?=\n\$ r1hpc report --compare)", "", screen, flags=re.DOTALL)
    return re.sub(r"\nA test question, before GRPO.*?(?=\nShown )", "", screen, flags=re.DOTALL)


def r1hpc(*words: str) -> str:
    """Run a command of r1hpc and return what it prints."""
    argv = [sys.executable, "-m", "r1hpc", *words]
    environ = {"COLUMNS": str(_WIDTH), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise R1hpcError(f"r1hpc {' '.join(words)} failed: {done.stderr}")
    return done.stdout


def as_svg(text: str, title: str, path: Path) -> None:
    """Write a terminal's text as an SVG, without the path of this clone."""
    with open("/dev/null", "w") as nowhere:
        console = Console(record=True, width=_WIDTH, file=nowhere, highlight=False)
        for line in text.replace(f"{ROOT}/", "").strip("\n").split("\n"):
            styled = Text(line)
            for pattern, style in _STYLES.items():
                if found := re.match(pattern, line):
                    styled.stylize(style, *found.span())
                    break
            console.print(styled)
        console.print()  # rich cuts off the lower edge of the last line
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(console.export_svg(title=title, code_format=_SVG, unique_id=path.stem))


def take_page(browser: str, run: Path, name: str, height: int) -> None:
    """Write the top of the page of a run or chain as two pictures, light and dark, 1280 pixels wide."""
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "page.html", Path(folder) / "page.png"
        r1hpc("report", str(run), "--format", "html", "--out", str(page))
        for scheme, number in (("dark", 0), ("light", 1)):
            argv = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", str(page)]
            argv += [f"--window-size=1280,{height}", f"--screenshot={picture}"]
            argv += [f"--blink-settings=preferredColorScheme={number}"]
            subprocess.run(argv, check=True, capture_output=True)
            save_small(picture, IMAGES / f"{name}-{scheme}.png")


def save_small(source: Path, target: Path) -> None:
    """Copy a PNG without its alpha channel."""
    Image.open(source).convert("RGB").save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    run_command(main)
