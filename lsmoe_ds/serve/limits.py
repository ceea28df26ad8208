"""API keys, and the limit of requests per minute for each address."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted

MOST_ADDRESSES = 10_000  # most addresses that are remembered; a bucket needs about 200 bytes
SHORTEST_KEY = 8


def digest(key: str) -> bytes:
    """Return a key's digest. Digests have one length, so comparing them reveals nothing about the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Return the digests of the keys in a file, one per line. Skips blank lines and those that start with #.

    Raises UserError, which shows no key, if the file cannot be read, has no key, or has too short ones.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: write one API key a line") from None
    except OSError as error:
        raise UserError(f"--api-keys: {path} cannot be read: {error.strerror}") from None
    keys = {
        number: line.strip()
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    }
    if not keys:
        raise UserError(f"{path} holds no API key: write one a line")
    for number, key in keys.items():
        if len(key) < SHORTEST_KEY:
            size = counted(len(key), "character")
            raise UserError(f"line {number} of {path} has {size}: a key has at least {SHORTEST_KEY}")
    return tuple(digest(key) for key in keys.values())


def is_key(given: str, keys: tuple[bytes, ...]) -> bool:
    """Tell whether the digest of a key is among ``keys``, in a time that does not depend on which one."""
    own, found = digest(given), False
    for each in keys:
        found |= hmac.compare_digest(own, each)
    return found


def neighborhood(address: str) -> str:
    """Return the unit whose requests are counted: an IPv4 address, or the /64 network of an IPv6 address.

    One host can have all addresses of such a network.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False))


class Buckets:
    """A token bucket for each address: it holds a minute's requests and fills up steadily.

    If there are more than ``most`` addresses, the one with the oldest last request is forgotten.
    """

    def __init__(
        self, per_minute: int, most: int = MOST_ADDRESSES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_minute, self._most, self._clock = per_minute, most, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = (
            OrderedDict()
        )  # the requests left, and when that was

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str) -> float:
        """Use up one request of an address; return 0, or the seconds to wait if there is none."""
        if not self.per_minute:
            return 0.0
        now, each = self._clock(), 60.0 / self.per_minute
        left, since = self._buckets.pop(address := neighborhood(address), (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - since) / each)
        wait = 0.0 if left >= 1 else (1 - left) * each
        self._buckets[address] = (left - 1 if not wait else left, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return wait
