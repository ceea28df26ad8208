"""The checked options of ``lsmoe serve``; sizes such as ``4GB`` and times such as ``5ms``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from lsmoe_ds.errors import UserError
from lsmoe_ds.export.ctranslate2 import QUANTIZATIONS
from lsmoe_ds.export.engine import ENGINES
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.languages import nearest

NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)")
SIZES = {"": 1, "b": 1}
SIZES |= {f"{letter}{end}": 1000**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
SIZES |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
TIMES = {"ms": 0.001, "": 1.0, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def read_size(text: str, option: str) -> int:
    """Return a number of bytes written as ``500MB``, ``4GB`` or ``2GiB``. Raises UserError for other text."""
    found = NUMBER.fullmatch(text.strip())
    if found is None or found[2].lower() not in SIZES or not (count := float(found[1])):
        raise UserError(f"{option} {text} is no size: write one such as 500MB, 4GB or 2GiB")
    return max(1, round(count * SIZES[found[2].lower()]))


def read_time(text: str, option: str) -> float:
    """Return a number of seconds written as ``5ms``, ``30s`` or ``2min``. Raises UserError for other text."""
    found = NUMBER.fullmatch(text.strip())
    if found is None or found[2].lower() not in TIMES:
        raise UserError(f"{option} {text} is no time: write one such as 5ms, 30s or 2min")
    return float(found[1]) * TIMES[found[2].lower()]


@dataclass(frozen=True)
class Settings:
    """The options of the server. Sizes are in bytes, times in seconds; a limit of 0 means no limit.

    ``memory`` limits the bytes of the loaded models, of which there is always one. ``chars`` and ``texts``
    limit one request, ``body`` its bytes; ``rate`` is in requests per minute and address; ``queue`` limits
    the requests in progress. ``patience`` is the longest time for an answer, ``grace`` for stopping.
    ``proxies`` are addresses whose X-Forwarded-For is trusted.
    """

    memory: int = 2**32
    cache: Path | None = None
    engine: str | None = None
    route: str = "specific"
    quantization: str | None = None
    threads: int | None = None
    beam: int = 5
    length_penalty: float = 1.0
    batch_wait: float = 0.005
    batch_size: int = 32
    chars: int = 20_000
    texts: int = 100
    body: int = 4_000_000
    rate: int = 0
    queue: int = 256
    patience: float = 120.0
    grace: float = 30.0
    keys: tuple[bytes, ...] | None = None
    proxies: str | None = None

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--beam", self.beam, 1),
            ("--threads", 1 if self.threads is None else self.threads, 1),
            ("--batch-size", self.batch_size, 1),
            ("--queue-limit", self.queue, 1),
            ("--char-limit", self.chars, 0),
            ("--batch-limit", self.texts, 0),
            ("--req-limit", self.rate, 0),
        ):
            if value < least:
                zero = "" if least else "; 0 is no limit"
                raise UserError(f"{option} is {value}: it must be at least {least}{zero}")
        Search(self.beam, self.length_penalty)  # raises UserError
        if self.batch_wait > 1:
            raise UserError(f"--batch-wait is {self.batch_wait:g} s: it must be at most 1 s")
        if self.patience <= 0:
            raise UserError("--request-timeout is 0: it must be more, such as 30s")
        for address in () if self.proxies is None else self.proxies.split(","):
            try:
                ip_network(address.strip(), strict=False)
            except ValueError:
                raise UserError(
                    f"--trusted-proxy {self.proxies} is no address: write one such as 127.0.0.1 or 10.0.0.0/8"
                ) from None
        if self.engine is not None and self.engine not in ENGINES:
            known = f"choose {' or '.join(ENGINES)}"
            raise UserError(f"'{self.engine}' is no engine{nearest(self.engine, ENGINES)}: {known}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            guess = nearest(self.quantization, QUANTIZATIONS)
            raise UserError(
                f"'{self.quantization}' is no quantization{guess}: choose {', '.join(QUANTIZATIONS)}"
            )
        if self.quantization is not None and self.engine == "torch":
            raise UserError("--quantization is for CTranslate2: leave it out, or --engine torch")
