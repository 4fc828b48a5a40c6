"""Draw one chart with matplotlib: inlined in a page as SVG at two widths, or written as PNG for a slide.

An SVG that only scales has unreadable text on a telephone. A chart that is wide on a desk is therefore drawn
twice, and the style sheet shows one of them. Lengths are CSS pixels. matplotlib is imported only to draw.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from r1hpc.base.files import write_atomic
from r1hpc.base.names import printable
from r1hpc.reporting.style import colour, keys, text, with_variables

Axes = Any
"""matplotlib.axes.Axes, which is not imported here."""
NARROW, HALF, FULL = 360, 514, 1080
"""Widths: of a telephone or a third of the page, of half the page, and of the full page."""
BAND = "P10 to P90"
"""Name of an estimate's range in charts."""
_FONT = 13
_WIDE = 600
"""From this width on names are beside their bars, and there are more ticks."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "r1hpc",
    "font.size": _FONT,
    "axes.titlesize": _FONT,
    "axes.titlecolor": colour("muted"),
    "axes.titlelocation": "left",
    **{f"axes.spines.{side}": False for side in ("top", "right", "left", "bottom")},
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": colour("muted"),
    "axes.xmargin": 0,
    "grid.color": colour("grid"),
    "grid.linewidth": 1,
    "text.color": colour("ink"),
    "text.parse_math": False,
    "xtick.color": colour("grid"),
    "xtick.labelcolor": colour("muted"),
    "xtick.major.pad": 6,
    "ytick.color": colour("grid"),
    "ytick.labelcolor": colour("muted"),
    **{f"{axis}tick.{kind}.size": 0 for axis in ("x", "y") for kind in ("major", "minor")},
    "legend.frameon": False,
    "legend.fontsize": _FONT,
    "lines.linewidth": 1.8,
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
DAY = 86400.0
_DROPPED = ("metadata", "clipPath", "style")
_KEPT = ("d", "x", "y", "transform", "href", "style")
_USUAL = re.compile(
    rf"font-size: {_FONT}px;? ?|font-family: [^;]*;? ?|stroke-linejoin: \w+;? ?|stroke-linecap: [^r]\w+;? ?"
    rf"|text-anchor: start;? ?|fill: {colour('ink')};? ?"
)
"""Properties that the style sheet sets, or defaults."""


@dataclass(frozen=True)
class Chart:
    name: str
    """Name of its file, without the suffix."""
    title: str
    label: str
    """Text for readers who cannot see it: what it shows, and its numbers if they are few."""
    draw: Callable[[Axes, int], None]
    """Draws on empty axes that belong to a figure of this width."""
    height: int = 210
    num_rows: int = 0
    """Rows of a chart of named bars; they determine its height."""
    keys: Sequence[tuple[str, str]] = ()
    """(colour of the palette, what it means)."""

    def height_at(self, width: int) -> int:
        return 46 + self.num_rows * (28 if width >= _WIDE else 43) if self.num_rows else self.height


def inline(chart: Chart | None, width: int = NARROW) -> str:
    """Return the chart as HTML, from `width` down to a telephone's; empty if there is none."""
    if chart is None:
        return ""
    sizes = {NARROW: "narrow", width: "wide"} if width > NARROW else {NARROW: "any"}
    drawn = ""
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    for each, css in sizes.items():
        height, written = chart.height_at(each), io.StringIO()
        with _drawing():
            _figure([chart], each, height).savefig(written, format="svg", metadata=nothing)
        shapes = "".join(_plain(child) for child in ElementTree.fromstring(written.getvalue()))
        drawn += f'<svg class="{css}" viewBox="0 0 {each} {height}" role="img" '
        drawn += f'aria-label="{text(chart.label)}">{shapes}</svg>'
    return f'{keys(chart.keys)}<div class="chart">{drawn}</div>'


def save_png(charts: Sequence[Chart], title: str, path: Path) -> None:
    """Write the charts under each other, atomically."""
    from matplotlib.patches import Patch

    with _drawing():
        figure = _figure(charts, FULL, sum(chart.height_at(FULL) for chart in charts) + 40)
        figure.suptitle(
            printable(title), x=0.01, ha="left", fontsize=16, fontweight="bold", color=colour("ink")
        )
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
        # In a page the keys are HTML.
        meanings = [key for chart in charts for key in chart.keys]
        patches = [Patch(color=colour(name), label=printable(words)) for name, words in meanings]
        if patches:
            figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), handlelength=1)
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=110, facecolor=colour("card"), metadata={"Software": None})
    write_atomic(path, written.getvalue())


def tip(artist: Any, words: str) -> Any:
    """Attach words that a page shows while the pointer is on the artist."""
    artist.set_gid(f"tip {printable(words)}")
    return artist


def mark(axes: Axes, x: float, y: float, height: float, words: str) -> None:
    """Draw an upright stroke on a bar."""
    tip(axes.vlines(x, y - height / 2, y + height / 2, color=colour("median"), lw=2.5), words)


def dot(axes: Axes, x: float, y: float, name: str, words: str, size: float = 8) -> None:
    how: dict[str, Any] = {"color": colour(name), "marker": "o", "ms": size, "mew": 0, "lw": 0}
    tip(axes.plot([x], [y], zorder=5, clip_on=False, **how)[0], words)


def note(axes: Axes, x: float, y: float, words: str, name: str = "ink", **how: Any) -> None:
    """Write text at a point, on a patch of the background so that lines do not cross it."""
    back = {"facecolor": colour("card"), "alpha": 0.75, "linewidth": 0, "pad": 1.0}
    style: dict[str, Any] = {"color": colour(name), "ha": "center", "va": "bottom", "zorder": 6, "bbox": back}
    axes.annotate(printable(words), (x, y), textcoords="offset points", **{"xytext": (0, 4), **style, **how})


def time_axis(axes: Axes, begin: float, end: float, width: int) -> None:
    """Set the x axis in Unix seconds / DAY, labelled in local time."""
    from dateutil.tz import tzlocal
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    zone = tzlocal()
    fewest, most = (4, 10) if width > HALF else (2, 6)
    locator = AutoDateLocator(tz=zone, minticks=fewest, maxticks=most)
    day = "%-d %b"
    formats = ["%Y", "%b", day, "%H:%M", "%H:%M", "%H:%M:%S" if width > HALF else ":%S"]
    zeros = ["", "%b %Y", day, day, "%H:%M", "%H:%M"]
    axes.set_xlim(begin / DAY, end / DAY)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(
        ConciseDateFormatter(locator, tz=zone, formats=formats, zero_formats=zeros, show_offset=False)
    )
    axes.grid(axis="x", visible=False)


def number_axis(axis: Any, low: float, high: float, count: int = 5) -> None:
    """Set an axis of plain numbers from `low` to `high`: 0  0.25  40  12,000."""
    from matplotlib.ticker import MaxNLocator

    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: short(value))


def log_axis(axis: Any, low: float, high: float) -> None:
    """Set a logarithmic axis with few labels: the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: short(value))


def short(value: float) -> str:
    """Return a tick label: 0  0.25  40  12,000."""
    value = 0.0 if abs(value) < 1e-12 else value
    if abs(value) >= 10 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) >= 0.001 else f"{value:.0e}"


def row_chart(
    name: str,
    title: str,
    about: str,
    rows: Sequence[tuple[str, str, bool]],
    draw: Callable[[Axes, Sequence[float], float], None],
    keys: Sequence[tuple[str, str]] = (),
) -> Chart:
    """Return a chart of rows, each labelled with (name, value, bold).

    Args:
        about: what the rows show, for readers who cannot see them.
        draw: draws on the axes at the y of each row, with bars of this thickness.
    """
    label = f"{about}: {'; '.join(f'{row}: {value}' for row, value, _ in rows)}"

    def labelled(axes: Axes, width: int) -> None:
        draw(axes, *_label_rows(axes, rows, width))

    return Chart(name, title, label, labelled, num_rows=len(rows), keys=keys)


def _label_rows(axes: Axes, rows: Sequence[tuple[str, str, bool]], width: int) -> tuple[list[float], float]:
    """Write names and values; return y of each bar, and the thickness.

    Names are beside their bars if there is room, and above them on a telephone.
    """
    wide, ys = width >= _WIDE, [-float(i) for i in range(len(rows))]
    axes.set_ylim(ys[-1] - 0.5, 0.5 if wide else 0.8)
    axes.set_yticks(ys, [""] * len(ys))
    axes.grid(axis="y", visible=False)
    most = 36 if width == FULL else 22
    for y, (name, value, strong) in zip(ys, rows, strict=True):
        bold = {"fontweight": "bold", "color": colour("ink")} if strong else {}
        named = {"transform": axes.get_yaxis_transform(), "clip_on": False, **bold}
        if wide:
            axes.text(-10 / width, y, _cut(name, most), ha="right", va="center", **named)
            axes.text(1 + 10 / width, y, value, ha="left", va="center", **{"color": colour("muted"), **named})
        else:
            axes.text(0, y + 0.27, _cut(name, 49 - len(value)), ha="left", va="bottom", **named)
            axes.text(1, y + 0.27, value, ha="right", va="bottom", **{"color": colour("muted"), **named})
    return ys, 0.62 if wide else 0.4


def _cut(name: str, most: int) -> str:
    """Shorten a name in the middle, because names of runs often differ at their ends."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib

    # Nobody who reads a report can fix a letter missing from a font, or a crowded layout.
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _figure(charts: Sequence[Chart], width: int, height: int) -> Any:
    """Return a figure of stacked charts; 1 point is 1 pixel, as in SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    heights = [chart.height_at(width) for chart in charts]
    panels = figure.subplots(len(charts), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for chart, axes in zip(charts, panels, strict=True):
        chart.draw(axes, width)
    return figure


def _plain(node: ElementTree.Element) -> str:
    """Return an element without namespaces, metadata, clipping and groups without a meaning."""
    tag, name = _local(node.tag), node.get("id", "")
    inner = "".join(_plain(child) for child in node)
    if tag in _DROPPED or (tag in ("g", "defs") and not inner):
        return ""
    if tag == "g":
        words = name.removeprefix("tip ")
        return f"<g><title>{text(words)}</title>{inner}</g>" if words != name else inner
    given = {_local(key): value for key, value in node.attrib.items()}
    kept = {key: _tidy(key, given[key]) for key in _KEPT if key in given}
    if kept.get("style") == "fill:none":
        return ""
    if name.startswith("m") and tag == "path":  # a <use> refers to it
        kept["id"] = name
    attributes = "".join(f' {key}="{text(value)}"' for key, value in kept.items() if value)
    inner = f"{text(node.text or '')}{inner}" if tag == "text" else inner
    return f"<{tag}{attributes}>{inner}</{tag}>" if inner else f"<{tag}{attributes}/>"


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def _tidy(key: str, value: str) -> str:
    if key == "style":
        return with_variables(_USUAL.sub("", value)).replace(": ", ":").replace("; ", ";").rstrip("; ")
    if key == "transform" and re.match(r"rotate\(-?0 ", value):
        return ""
    value = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", value) if key == "d" else value
