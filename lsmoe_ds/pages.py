"""Templates of the HTML pages: report, comparison, study, expert maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2


def open_template(package: str, name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """Open a template that lies beside the modules of a package. Everything it shows of data is escaped, and a value that was
    not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
