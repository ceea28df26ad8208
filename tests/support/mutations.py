"""What damage and malice make of a file: JSON, YAML, safetensors headers and plain bytes, each change drawn
from a seed.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import yaml

from lsmoe_ds.data.vocabulary import parse_model

Mutation = Callable[[bytes, random.Random], bytes]
RAW = "@@{}@@"  # stands in a value for text that no writer of JSON or YAML would write
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        2**31,
        2**63,
        2**64,
        10**30,
        -(2**63),
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        float("-inf"),
    ),
    *(
        "",
        "x",
        "3",
        "../../x",
        "/etc/passwd",
        "/dev/zero",
        "a/../../x",
        ".",
        "..",
        "a\0b",
        "a\nb",
        "a\x1b[31mb",
        "\ud800",
        "\u202eb",
    ),
    *("x" * 300, "x" * 100_000, "C:\\x", "~/x", "$(touch x)", "\ufeff", "step-9", "0" * 64),
    *(
        [],
        {},
        [[]],
        [None],
        {"": 0},
        {"../x": {"bytes": 0, "sha256": ""}},
        [0] * 1000,
        {"a": {"b": {"c": [1, {"d": 2}]}}},
    ),
]
RAW_JSON = [
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "9" * 5000,
    "1e400",
    "-",
    '"\\ud800"',
]
NINES = [(new, ",".join([f"*{old}"] * 9)) for old, new in pairwise("abcdefghijkl")]
BOMB = "&a [x,x,x,x,x,x,x,x,x], " + ", ".join(f"&{new} [{old}]" for new, old in NINES)
RAW_YAML = [
    *(
        "!!python/object/apply:os.system ['touch written']",
        "!!python/name:os.system",
        "!!python/object/new:os.system [x]",
    ),
    *(
        "!!int ''",
        "!!float ''",
        "!!bool maybe",
        "!!timestamp x",
        "2001-99-99",
        "!!binary '*'",
        "!!set [1]",
        "!!omap [1]",
        "!x y",
    ),
    *(
        f"[{BOMB}]",
        "&r [*r]",
        "&r {a: *r}",
        "{<<: &m {x: 1}}",
        "*none",
        "{? [1] : 2}",
        "{? &k [*k] : 2}",
        "{1: 2}",
        "{null: 2}",
    ),
    *(
        "{? [" + BOMB + "] : 1}",
        "[&a {x: 1}, " + ", ".join(f"&{new} {{<<: [{old}]}}" for new, old in NINES) + "]",
    ),
    *(
        "[" * 20_000,
        "[" * 300 + "]" * 300,
        "{a: " * 300 + "}" * 300,
        "9" * 5000,
        "0x" + "f" * 5000,
        "1:" * 50 + "1",
        ".inf",
        ".nan",
        "1e999",
    ),
    *(
        "'\\x00'",
        '"\\0"',
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        "|\n  x",
        "%YAML 9",
        "---\n",
        "...\n",
        "\t",
        "\x00",
        "@",
        "`",
        "x" * 100_000,
    ),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything in a nested value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def change(value: Any, chance: random.Random, raw: int) -> Any:
    """One change somewhere in a nested value. Of ``raw`` texts, which :data:`RAW` numbers, one may take the
    place of a value.
    """
    value = deepcopy(value)
    container, key = chance.choice(places(value))
    what = chance.random()
    if what < 0.15:
        del container[key]
    elif what < 0.65:
        container[key] = deepcopy(chance.choice(VALUES))
    elif what < 0.75:
        other, there = chance.choice(places(value))
        container[key] = deepcopy(other[there])
    elif what < 0.85:
        name = chance.choice([each for each in VALUES if isinstance(each, str)])
        if isinstance(container, dict):
            container[name] = container.pop(key)
        else:
            container.append(name)
    elif what < 0.95:
        container[key] = RAW.format(chance.randrange(raw))
    else:
        container[key] = [container[key]]
    return value


def in_json(content: bytes, chance: random.Random) -> bytes:
    value = change(json.loads(content), chance, len(RAW_JSON))
    if chance.random() < 0.1:
        value = change(value, chance, len(RAW_JSON))
    text = json.dumps(value)
    for number, raw in enumerate(RAW_JSON):
        text = text.replace(f'"{RAW.format(number)}"', raw)
    if chance.random() < 0.05:
        text = chance.choice(
            ["", "null", "[]", "3", "{}", '"x"', *RAW_JSON, text + text, text[:-5], "\ufeff" + text]
        )
    if chance.random() < 0.1:
        return in_bytes(text.encode(), chance)
    return text.encode()


def in_yaml(content: bytes, chance: random.Random) -> bytes:
    value = change(yaml.safe_load(content), chance, len(RAW_YAML))
    text = yaml.safe_dump(value, sort_keys=False)
    for number, raw in enumerate(RAW_YAML):
        text = text.replace(f"'{RAW.format(number)}'", raw)
    if chance.random() < 0.1:
        text += chance.choice(RAW_YAML)
    if chance.random() < 0.1:
        return in_bytes(text.encode(), chance)
    return text.encode()


def in_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flips, cuts, inserts, zeroes or repeats; places near the beginning are the likelier ones."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(max(1, min(len(changed), chance.choice([16, 256, 1 << 30]))))
        what = chance.randrange(6)
        some = chance.randrange(1, 65)
        if what == 0:
            changed[at : at + 1] = bytes([(changed[at : at + 1] or b"\0")[0] ^ (1 << chance.randrange(8))])
        elif what == 1:
            changed = changed[:at]
        elif what == 2:
            changed[at:at] = chance.randbytes(some)
        elif what == 3:
            changed[at : at + some] = bytes(len(changed[at : at + some]))
        elif what == 4:
            changed[at : at + some] = b"\xff" * len(changed[at : at + some])
        else:
            changed[at:at] = changed[at : at + some]
    return bytes(changed)


def in_header(content: bytes, chance: random.Random) -> bytes:
    """Of a safetensors file: its length field, and its JSON in ways that a reader could believe."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    what = chance.randrange(8)
    if what == 0:
        length = chance.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8, len(content)])
        return struct.pack("<Q", length) + content[8:]
    if what == 1:
        return content[:8] + in_bytes(content[8:], chance)
    name = chance.choice([each for each in header if each != "__metadata__"])
    entry, other = header[name], header[chance.choice([each for each in header if each != "__metadata__"])]
    if what == 2:
        entry["dtype"] = chance.choice(
            ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "F128", "", 3, None]
        )
    elif what == 3:
        huge = chance.choice([0, -1, 2**31, 2**40, 2**63, 2**64, 1.5, "3"])
        entry["shape"] = chance.choice(
            [[huge], [huge, huge], [huge, *entry["shape"]], entry["shape"][::-1], [], [1] * 2000, None]
        )
    elif what == 4:
        begin, end = entry["data_offsets"]
        wrong = [
            [begin, begin],
            [end, begin],
            [begin, 2**62],
            [-1, end],
            [begin + 4, end + 4],
            [begin, end - 1],
            [2**64, 2**64 + 4],
            [begin],
        ]
        entry["data_offsets"] = chance.choice([*wrong, other["data_offsets"]])
    elif what == 5:  # a shape that fits its offsets, of data that is not there
        entry["shape"], entry["data_offsets"] = [2**34], [0, 2**36]
    elif what == 6:
        header["../../x" if chance.random() < 0.5 else "\0\n"] = header.pop(name)
    else:
        header = change(header, chance, 1)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def in_model(content: bytes, chance: random.Random) -> bytes:
    """Of a sentencepiece model, in ways that still are one."""
    model = parse_model(content)
    for _ in range(chance.choice([1, 1, 3, 30])):
        piece, what = chance.choice(model.pieces), chance.randrange(8)
        if what == 0:
            piece.score = chance.choice([float("nan"), float("inf"), float("-inf"), 0.0, 1e38, -1e38])
        elif what == 1:
            piece.type = chance.choice([1, 2, 3, 4, 5, 6])
        elif what == 2:
            piece.piece = chance.choice(
                [
                    "",
                    "x" * 100_000,
                    "\0",
                    "<s>",
                    "<2xx>",
                    "<0x41>",
                    "\u2581",
                    chance.choice(model.pieces).piece,
                ]
            )
        elif what == 3:
            model.pieces.remove(piece)
        elif what == 4:
            model.pieces.add().CopyFrom(piece)
        elif what == 5:
            spec = model.trainer_spec
            field = chance.choice(
                [
                    "model_type",
                    "vocab_size",
                    "bos_id",
                    "pad_id",
                    "unk_id",
                    "eos_id",
                    "max_sentencepiece_length",
                ]
            )
            setattr(
                spec,
                field,
                chance.choice([1, 2, 3, 4])
                if field == "model_type"
                else chance.choice([-1, 0, 1, 2**31 - 1, -(2**31)]),
            )
        elif what == 6:
            blob = struct.pack("<I", chance.choice([0, 4, 1024, 2**31])) + chance.randbytes(
                chance.choice([0, 4, 1024, 2048])
            )
            chance.choice([model.normalizer_spec, model.denormalizer_spec]).precompiled_charsmap = blob
        else:
            model.trainer_spec.byte_fallback = model.trainer_spec.treat_whitespace_as_suffix = (
                chance.random() < 0.5
            )
            model.normalizer_spec.add_dummy_prefix = chance.random() < 0.5
    return bytes(model.SerializeToString())
