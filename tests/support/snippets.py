"""Find the code of a page, and execute it."""

from __future__ import annotations

import re
from typing import Any


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def run(code: str, found: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "snippet", "exec"), found)
    return found
