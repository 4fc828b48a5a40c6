"""The colours of everything people look at: of each chart, and of the page around it, by day and by night.

    colour("lost")           # as matplotlib takes it: the light one
    as_css()                 # :root{--lost:#c8452c; ...}, and the dark ones under their media query

A picture for a slide has the light colours. In the page an inlined chart names the variable instead of the
colour, so that it follows the reader's scheme: that is why no two names share a light colour.
"""

import re

_COLOURS = {
    # name: (light, dark)
    "useful": ("#2468a8", "#5fa5e4"),
    "lost": ("#c8452c", "#f0735a"),
    "start-up": ("#dd9a2f", "#e8b45c"),
    "save": ("#7c62a9", "#a98fd6"),
    "idle": ("#aab3bd", "#66717d"),
    "other": ("#d6dbe0", "#38424d"),
    "good": ("#2c8a5b", "#5cc08d"),
    "planned": ("#cfd7df", "#3a4653"),
    "median": ("#66727f", "#a7b2be"),
    "band": ("#f3f5f7", "#20272f"),
    "band2": ("#e9edf1", "#28313a"),
    "grid": ("#e4e8eb", "#29313a"),
    "ink": ("#1b2430", "#e4e8ed"),
    "muted": ("#647080", "#98a3af"),
    "card": ("#ffffff", "#1a2027"),
    "page": ("#f6f7f8", "#12161b"),
    "edge": ("#e2e6ea", "#2a323b"),
}
LINES = ("useful", "start-up", "good", "save", "lost", "median", "idle", "ink")
"""For many lines beside each other, none of which means more than the others."""
_NAMES = {light: name for name, (light, _) in _COLOURS.items()}


def colour(name: str) -> str:
    """The light colour of this name, #rrggbb."""
    return _COLOURS[name][0]


def with_variables(style: str) -> str:
    """CSS with each colour of the palette replaced by its variable; others stay."""
    return re.sub("#[0-9a-f]{6}", lambda found: _variable(found[0]), style)


def as_css() -> str:
    """The variables. Paper is light whatever the screen is."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in _COLOURS.items()) for i in (0, 1))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _variable(value: str) -> str:
    return f"var(--{_NAMES[value]})" if value in _NAMES else value
