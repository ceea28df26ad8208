"""Open the templates of HTML pages (report, comparison, study, expert maps), and format numbers and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2

from lsmoe_ds.languages import script
from lsmoe_ds.notices import counted

RIGHT_TO_LEFT = {"Arab", "Hebr", "Syrc", "Thaa", "Nkoo", "Adlm"}


def open_template(package: str, name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """Open a template beside a package's modules. It escapes all data, and a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "count": short_count, "bytes": size}
    environment.filters |= {"html_language": html_language, "text_direction": text_direction} | filters
    return environment.get_template(name)


def duration(seconds: float) -> str:
    """Write a duration: ``0.4 s``, ``42 s``, ``8 min 5 s``, ``3 h 20 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def short_count(value: float) -> str:
    """Write a count: ``950``, ``12.3 k``, ``41.2 M``, ``1.5 B``."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= unit:
            return f"{value / (1e3 if name == ' k' else unit):.1f}{name}"
    return f"{value:,.0f}"


def size(count: float) -> str:
    """Write a number of bytes: ``37.7 MiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return counted(round(count), "byte")


def html_language(code: str) -> str:
    """Convert our code to a ``lang`` attribute: ``zh_Hans`` -> ``zh-Hans``."""
    return code.replace("_", "-")


def text_direction(code: str) -> str:
    """Return the ``dir`` attribute for a language, so that a Hebrew line runs from the right even if it
    begins with a Latin word.
    """
    return "rtl" if script(code) in RIGHT_TO_LEFT else "auto"
