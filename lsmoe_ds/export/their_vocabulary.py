"""Import the vocabulary of a Hugging Face folder as a sentencepiece model in which every piece keeps its id.

So rows of the embedding stay in place, and a model that is exported again works with its original tokenizer.
Rows without a piece of text, such as ``<mask>`` or made-up words, become control pieces, which never occur in
encoded text and are never generated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lsmoe_ds.checkpoint.stored import VOCABULARY
from lsmoe_ds.data.vocabulary import SPECIALS, UNUSED, Vocabulary, fill_up, parse_model
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.tokenizer import TAG, read_tokenizer, set_specials
from lsmoe_ds.folders import read_json
from lsmoe_ds.languages import CODE, UNK, normalize_code, tag
from lsmoe_ds.notices import counted, notice

SENTENCEPIECE, PIECE_IDS = "sentencepiece.bpe.model", "vocab.json"
# The languages of the published M2M-100 in the order of their ids; transformers has this list in its code, so
# a folder need not contain it.
M2M_100_LANGUAGES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr "
    "ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or "
    "pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
)
LANGUAGE = re.compile(rf"__(?P<m2m>\w+)__|(?P<nllb>[a-z]{{3}}_[A-Z][a-z]{{3}})|{TAG.pattern}")


def read_vocabulary(folder: Path, size: int) -> tuple[bytes, list[int]]:
    """Return our sentencepiece model, and for each of its V pieces the row of the embedding, which has
    ``size``.

    Ids stay the same. A piece without an id, which M2M-100 reads as unknown, gets an id after all others, and
    the row of the unknown piece; without it text would be segmented differently. Prints how many rows have no
    name in any file. Raises UserError for damaged files.
    """
    if (folder / VOCABULARY).is_file():
        own = Vocabulary.load(folder / VOCABULARY)
        if own.size != size:
            found = counted(own.size, "piece")
            raise UserError(
                f"{folder}: the vocabulary has {found}, but 'vocab_size' in config.json is {size}"
            )
        return (folder / VOCABULARY).read_bytes(), list(range(size))
    proto, ids, languages = _read_tokenizer(folder)
    for index, name in SPECIALS.items():
        if ids.get(name) != index:
            raise UserError(f"{folder} gives {name} the id {ids.get(name)}: M2M-100 and NLLB give it {index}")
    kinds = type(proto).SentencePiece
    text = [
        kinds.FromString(p.SerializeToString())
        for p in proto.pieces
        if p.type not in (kinds.UNKNOWN, kinds.CONTROL)
    ]
    rows = [*(ids[piece.piece] for piece in text if piece.piece in ids), *languages.values()]
    if wrong := [row for row in rows if not 0 <= row < size]:
        raise UserError(f"{folder}: a piece has the id {wrong[0]}, but 'vocab_size' in config.json is {size}")

    placed = {
        index: _silent(kinds, name, kinds.UNKNOWN if index == UNK else kinds.CONTROL)
        for index, name in SPECIALS.items()
    }
    tags: dict[int, str] = {}
    known: dict[str, int] = {}
    for token, row in languages.items():
        code = code_of(token)
        if code and code not in known and row not in placed:  # the first of two for the same language
            known[code], tags[row] = row, token
            placed[row] = _silent(kinds, tag(code))
    if not known:
        raise UserError(
            f"{folder} names no languages: special_tokens_map.json or tokenizer.json of the published model "
            f"does, or for an M2M-100 {PIECE_IDS}"
        )
    more = []
    for piece in text:
        row = ids.get(piece.piece, UNK)
        if row in placed:
            more.append((piece, row))
        else:
            placed[row] = piece
    rows = [*range(size), *(row for _, row in more)]
    names = _free_names(ids, placed, {piece.piece for piece in text}, size)
    if unnamed := size - len(placed) - len(names):
        are = "row of the embedding has" if unnamed == 1 else "rows of the embedding have"
        notice(
            f"{folder}: {unnamed:,} {are} no piece in the vocabulary: they stay, as padding that is never "
            "generated"
        )

    del proto.pieces[:]
    proto.pieces.extend(
        placed.get(row) or _silent(kinds, names.get(row, f"{UNUSED}{row}>")) for row in range(size)
    )
    proto.pieces.extend(piece for piece, _ in more)
    ours = all(TAG.fullmatch(token) for token in tags.values())
    if not ours:
        fill_up(proto)
    rows += [UNK] * (len(proto.pieces) - len(rows))
    order = sorted(tags)
    set_specials(proto, [placed[row].piece for row in order])
    proto.trainer_spec.accept_language[:] = [] if ours else [tags[row] for row in order]
    return proto.SerializeToString(deterministic=True), rows


def code_of(token: str) -> str:
    """Return our code of a language by its token (``__de__``, ``deu_Latn``, ``<2de>``); empty for
    other tokens.
    """
    match = LANGUAGE.fullmatch(token)
    if match is None:
        return ""
    code = token[2:-1] if TAG.fullmatch(token) else normalize_code(match["m2m"] or match["nllb"])
    return code if CODE.match(code) else ""


def _silent(kinds: Any, name: str, kind: int | None = None) -> Any:
    """Return a piece that never occurs in encoded text."""
    return kinds(piece=name, score=0.0, type=kinds.CONTROL if kind is None else kind)


def _free_names(
    ids: Mapping[str, int], placed: Mapping[int, Any], text: set[str], size: int
) -> dict[int, str]:
    """Return a name for each row without a piece, where the files have one; names are unique and none of
    ours.
    """
    taken = text | {piece.piece for piece in placed.values()}
    found = {}
    for name, row in ids.items():
        if (
            name
            and 0 <= row < size
            and row not in placed
            and row not in found
            and name not in taken
            and not name.startswith("<2")
        ):
            found[row] = name
    return found


def _read_tokenizer(folder: Path) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Return the sentencepiece model, the row of each piece and token that has one, and the row of each token
    that may be a language's, in order.

    M2M-100's rows are in vocab.json. NLLB's are those of fairseq: the four special pieces in our order, too,
    then the others of the sentencepiece model. Languages follow, unless a file gives their rows. A folder
    with only a tokenizer.json has everything in it.
    """
    path = folder / SENTENCEPIECE
    written, listed, by_heart = _written(folder)
    if not path.is_file():
        if (made := read_json(folder / "tokenizer.json")) is None:
            raise UserError(f"{folder} has neither {SENTENCEPIECE} nor a tokenizer.json")
        try:
            proto, ids = read_tokenizer(made)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        return (
            proto,
            written | ids,
            {token: row for token, row in written.items() if LANGUAGE.fullmatch(token)},
        )
    try:
        proto = parse_model(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if (folder / PIECE_IDS).exists():
        ids = read_json(folder / PIECE_IDS) or {}
        if not all(isinstance(row, int) for row in ids.values()) or not ids.keys() >= set(SPECIALS.values()):
            raise UserError(
                f"{folder / PIECE_IDS} is damaged: it should give ids to pieces, "
                f"{', '.join(SPECIALS.values())} among them"
            )
        first, known = len(ids), [f"__{code}__" for code in M2M_100_LANGUAGES.split()] if by_heart else []
    else:
        settings = read_json(folder / "tokenizer_config.json") or {}
        if str(settings.get("tokenizer_class")).startswith("M2M100") or any(
            (found := LANGUAGE.fullmatch(token)) and found["m2m"] for token in (*written, *listed)
        ):
            raise UserError(
                f"{folder} is an M2M-100 without {PIECE_IDS}, which says which row each piece has: copy it "
                "from the published model"
            )
        begin = [piece.piece for piece in proto.pieces[:3]]
        if begin != ["<unk>", "<s>", "</s>"]:
            raise UserError(
                f"{path} begins with {', '.join(begin)}, NLLB's with <unk>, <s>, </s>, and M2M-100 has a "
                f"{PIECE_IDS} beside it"
            )
        ids = {name: index for index, name in SPECIALS.items()}
        ids |= {piece.piece: index + 1 for index, piece in enumerate(proto.pieces) if index >= 3}
        first, known = len(proto.pieces) + 1, []
    languages = {token: row for token, row in written.items() if LANGUAGE.fullmatch(token)}
    order = [token for token in listed if LANGUAGE.fullmatch(token)] or known
    return proto, written | ids, languages or {token: first + index for index, token in enumerate(order)}


def _written(folder: Path) -> tuple[dict[str, int], Sequence[str], bool]:
    """Return the added tokens with their ids, the tokens that are listed without ids, and whether the
    languages are those in transformers' own list.
    """
    tokenizer, settings, added, special = (
        read_json(folder / f"{name}.json") or {}
        for name in ("tokenizer", "tokenizer_config", "added_tokens", "special_tokens_map")
    )
    written: dict[str, int] = {}
    try:
        written |= {str(token["content"]): int(token["id"]) for token in tokenizer.get("added_tokens", [])}
        written |= {
            str(token["content"]): int(row) for row, token in settings.get("added_tokens_decoder", {}).items()
        }
        written |= {str(token): int(row) for token, row in added.items()}
        listed = list(dict.fromkeys([*_listed(special), *_listed(settings)]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is damaged: its tokenizer's files are not understood ({error})") from None
    return written, listed, settings.get("language_codes", "m2m100") == "m2m100"


def _listed(settings: Mapping[str, Any]) -> Iterable[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for token in settings.get(key) or []:
            yield str(token["content"] if isinstance(token, dict) else token)
