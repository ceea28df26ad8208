"""The vocabulary: a sentencepiece model with the first ids of M2M-100 and tags that no text can spell."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from lsmoe_ds.config import data as data_settings
from lsmoe_ds.config.data import SMALLEST
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import BOS, EOS, PAD, UNK, nearest, tag
from lsmoe_ds.notices import counted

SPECIALS = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", UNK: "<unk>"}
UNUSED, MULTIPLE = "<unused", 8
FEW = 12  # languages that an error names; more are counted
# Sums in unigram training depend on the number of threads: with a fixed number the model is the same on any
# machine.
THREADS = 4


class Vocabulary:
    """Convert text to ids and back. Ids 0 to 3 are BOS, PAD, EOS, UNK; then come tags and pieces of text.

    ``unused`` are ids that are no tag and that no text is encoded to.
    """

    PAD, BOS, EOS, UNK = PAD, BOS, EOS, UNK

    def __init__(self, model: bytes) -> None:
        """Load a serialized sentencepiece model. Raises UserError for any other, or one of another system."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = [self._processor.id_to_piece(index) for index in range(max(len(SPECIALS), self.size))]
        except (RuntimeError, IndexError, UnicodeDecodeError):
            raise UserError("the vocabulary is damaged: it is not a sentencepiece model") from None
        if pieces[: len(SPECIALS)] != list(SPECIALS.values()):
            raise UserError(
                f"the vocabulary begins with {', '.join(pieces[: len(SPECIALS)])} where "
                f"{', '.join(SPECIALS.values())} are needed"
            )
        self._model = model
        controls = {index: piece for index, piece in enumerate(pieces) if self._processor.is_control(index)}
        self._tags = {piece[2:-1]: index for index, piece in controls.items() if piece.startswith("<2")}
        self.unused = tuple(sorted(controls.keys() - SPECIALS.keys() - {*self._tags.values()}))
        self._silent = frozenset({BOS, PAD, EOS, *self._tags.values(), *self.unused})

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary file. For a tokenizer of transformers return a :class:`HostTokenizer`, which
        serves as a vocabulary without tags.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"vocabulary {path} cannot be read: {error.strerror}") from None
        if model.startswith(b"{"):
            return HostTokenizer(model)  # type: ignore[return-value]
        try:
            return cls(model)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def __reduce__(self) -> tuple[type[Vocabulary], tuple[bytes]]:
        return Vocabulary, (self._model,)

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    def type(self) -> str:
        """``unigram``, ``bpe`` or another model type of sentencepiece."""
        spec = parse_model(self._model).trainer_spec
        return str(type(spec).ModelType.Name(spec.model_type)).lower()

    @property
    def codes(self) -> tuple[str, ...]:
        """Languages that have a tag."""
        return tuple(self._tags)

    @property
    def their_tags(self) -> dict[str, str]:
        """The tags' names in the model from which the vocabulary was imported, by language; empty if it was
        not imported.
        """
        return dict(zip(self._tags, parse_model(self._model).trainer_spec.accept_language, strict=False))

    def tag_id(self, code: str) -> int:
        """Return the id of a language's tag. Raises UserError if the vocabulary has none."""
        if code not in self._tags:
            raise UserError(
                f"the vocabulary has no tag for '{code}'{nearest(code, self._tags)}: it has "
                f"{_few(list(self._tags))}"
            )
        return self._tags[code]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without tag and EOS. A tag in the text becomes ordinary pieces."""
        return list(self._processor.encode(clean_text(text)))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of many texts that :func:`clean_text` has already cleaned."""
        return list(self._processor.encode(list(texts), num_threads=1))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; BOS, PAD, EOS and tags are skipped."""
        return str(self._processor.decode([int(index) for index in ids if int(index) not in self._silent]))

    def save(self, path: Path) -> None:
        path.write_bytes(self._model)


def parse_model(model: bytes) -> Any:
    """Parse a sentencepiece model into its ``ModelProto``. Raises UserError if it is none, or if protobuf is
    older than sentencepiece needs.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2

        found = sentencepiece_model_pb2.ModelProto()
    except Exception as error:  # protobuf's version check does not raise an ImportError
        raise UserError(
            f"sentencepiece needs another protobuf than is installed: {' '.join(str(error).split())}"
        ) from None
    try:
        found.ParseFromString(model)
    except (
        Exception
    ):  # google.protobuf.message.DecodeError, which cannot be imported where protobuf is missing
        raise UserError("the vocabulary is damaged: it is not a sentencepiece model") from None
    return found


def fill_up(proto: Any) -> None:
    """Add unused pieces, which no text holds, so that the usual numbers of tensor-parallel ranks can share
    the embedding.
    """
    while len(proto.pieces) % MULTIPLE:
        proto.pieces.add(
            piece=f"{UNUSED}{len(proto.pieces)}>", score=0.0, type=type(proto).SentencePiece.CONTROL
        )
    proto.trainer_spec.vocab_size = len(proto.pieces)


def add_tags(model: bytes, codes: Sequence[str]) -> bytes:
    """Return a sentencepiece model with tags for further languages after all its pieces, filled up
    (:func:`fill_up`).
    """
    if not codes:
        return model
    proto = parse_model(model)
    for code in codes:
        proto.pieces.add(piece=tag(code), score=0.0, type=type(proto).SentencePiece.CONTROL)
    proto.trainer_spec.control_symbols.extend(tag(code) for code in codes)
    fill_up(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def train_vocabulary(
    texts: Iterator[str], settings: data_settings.Vocabulary, codes: Sequence[str]
) -> Vocabulary:
    """Train a vocabulary of exactly ``settings.size`` pieces, with a tag for each of ``codes``, on texts of
    :func:`clean_text`.

    The same texts in the same order give the same bytes. sentencepiece holds the texts in memory.
    Raises UserError, which names the nearest possible size, if the text allows no vocabulary of this size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type=settings.type,
            vocab_size=settings.size,
            character_coverage=settings.character_coverage,
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            control_symbols=[tag(code) for code in codes],
            # clean_text has normalized the text; NFKC would replace the full-width punctuation of Chinese,
            # which lowers every score.
            normalization_rule_name="identity",
            shuffle_input_sentence=False,
            # Pruning starts from ten times the pieces instead of a million: as good on real text (335k tokens
            # against 336k), in a third less time.
            seed_sentencepiece_size=10 * max(settings.size, 1000),
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), settings)) from None
    return Vocabulary(model.getvalue())


def read_vocabulary(settings: data_settings.Vocabulary, codes: Sequence[str]) -> Vocabulary:
    """Read the vocabulary in ``settings.file``. Raises UserError unless it has the settings' size and type
    and a tag for each of ``codes``.
    """
    assert settings.file is not None
    vocabulary = Vocabulary.load(settings.file)
    if vocabulary.size != settings.size:
        raise UserError(
            f"'data.vocabulary.size' is {settings.size}, but {settings.file} has {vocabulary.size} pieces: "
            f"set it to {vocabulary.size}"
        )
    if vocabulary.type != settings.type:
        raise UserError(
            f"'data.vocabulary.type' is {settings.type}, but {settings.file} is of the type "
            f"{vocabulary.type}: set it to that"
        )
    if isinstance(vocabulary, HostTokenizer):
        return vocabulary
    if lacking := [code for code in codes if code not in vocabulary.codes]:
        raise UserError(
            f"{settings.file} has no tag for '{lacking[0]}'{nearest(lacking[0], vocabulary.codes)}: it has "
            f"{_few(vocabulary.codes)}; `lsmoe convert --as grown` adds a language to a model"
        )
    return vocabulary


def _few(codes: Sequence[str]) -> str:
    """Name the codes if a reader would read them, otherwise count them."""
    return counted(len(codes), "language") if len(codes) > FEW else ", ".join(codes) or "none"


def _explain(message: str, settings: data_settings.Vocabulary) -> str:
    prefix = f"'data.vocabulary.size' is {settings.size}, but"
    if found := re.search(r"set it to a value <= (\d+)", message):
        most = int(found.group(1))
        advice = (
            f"set it to at most {most}"
            if most >= SMALLEST
            else f"give more text, as a vocabulary has at least {SMALLEST}"
        )
        return f"{prefix} the text is too small for more than {most} pieces: {advice}"
    if found := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return (
            f"{prefix} the characters and tags alone need {found.group(1)} pieces: set it higher, or "
            "'character_coverage' lower"
        )
    return f"the vocabulary could not be trained: {' '.join(message.split())}"
