"""The Python interface: load a model, translate with it, score with it, plan a recipe, read prepared data.

    import lsmoe_ds

    model = lsmoe_ds.load("runs/demo")
    model.translate(["The file cannot be opened."], source="en", target="de")

Errors that the user can correct are :class:`lsmoe_ds.errors.UserError`, whose text is one sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lsmoe_ds.config.codes import asked_direction
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lsmoe_ds.inference.engine import Engine
    from lsmoe_ds.inference.load import Loaded
    from lsmoe_ds.inference.translate import Translation
    from lsmoe_ds.planning.plan import Plan


@dataclass(frozen=True)
class Model:
    """A model ready to translate; :func:`load` makes it. Languages are codes, as on the command line."""

    engine: Engine

    def __repr__(self) -> str:
        return f"<lsmoe_ds.Model {self.engine.recipe.name}: {', '.join(self.directions)}>"

    @property
    def directions(self) -> list[str]:
        """List the directions that the model knows, such as ``en-de``."""
        return [str(each) for each in self.engine.languages.directions]

    def translate(
        self,
        texts: Iterable[str],
        source: str,
        target: str,
        beam: int = 5,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """Translate texts, each on one line; a blank one stays empty, and a long one is cut at sentences.

        Raises UserError for a direction that the model does not know.
        """
        from lsmoe_ds.inference.translate import translate

        direction = self._direction(source, target)
        return list(translate(self.engine, direction, _several(texts), beam, length_penalty))

    def translate_n_best(
        self,
        texts: Iterable[str],
        source: str,
        target: str,
        n: int,
        beam: int = 5,
        length_penalty: float = 1.0,
    ) -> list[list[Translation]]:
        """Return at most ``n`` translations of each text, best first, each with its ``text`` and ``score``.

        The first is that of :meth:`translate`; a blank text has one, which is empty. In CTranslate2 a text
        whose translation reaches the greatest length may be ranked otherwise. Raises UserError for a
        direction that the model does not know, and for an ``n`` above ``beam``.
        """
        from lsmoe_ds.inference.beam_search import Search
        from lsmoe_ds.inference.translate import translate_lines

        search, direction = Search(beam, length_penalty, n_best=n), self._direction(source, target)
        return translate_lines(self.engine, direction, _several(texts), search)

    def score(
        self, texts: Iterable[str], translations: Iterable[str], source: str, target: str
    ) -> list[float]:
        """Return the natural log-probability of each translation, with its EOS, given its text.

        For the mean divide by the number of tokens. A text longer than the model was trained on is not cut.
        Raises UserError for a model loaded into CTranslate2.
        """
        found = []
        for logits, labels in self._predictions(texts, translations, source, target):
            chosen = logits.log_softmax(1).gather(1, labels[:, None])
            found.append(float(chosen.sum()))
        return found

    def logits(
        self, texts: Iterable[str], translations: Iterable[str], source: str, target: str
    ) -> list[Tensor]:
        """Return the logits [T, V] of each translation's T tokens; the last token is EOS."""
        return [logits for logits, _ in self._predictions(texts, translations, source, target)]

    def _predictions(
        self, texts: Iterable[str], translations: Iterable[str], source: str, target: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [T, V] and the tokens [T] of each translation."""
        import torch

        engine = self._torch()
        direction = self._direction(source, target)
        texts, translations = _several(texts), _several(translations)
        if len(texts) != len(translations):
            raise UserError(f"there are {len(texts)} texts, but {len(translations)} translations")
        for text, translation in zip(texts, translations, strict=True):
            tokens = [engine.vocabulary.encode(each) for each in (text, translation)]
            batch = engine.collate([tokens[0]], [tokens[1]], direction)
            with torch.inference_mode():
                logits = engine.logits_of(batch)[0].float().cpu()
            learned = (batch.labels[0] != batch.ignored).cpu()
            yield logits[learned], batch.labels[0].cpu()[learned]

    def _torch(self) -> Loaded:
        from lsmoe_ds.inference.load import Loaded

        if not isinstance(self.engine, Loaded):
            raise UserError("a model in CTranslate2 gives no logits: load it with engine='torch', or a run")
        return self.engine

    def _direction(self, source: str, target: str) -> Direction:
        from lsmoe_ds.inference.engine import find_direction

        return find_direction(self.engine, asked_direction(source, target))


def load(
    path: str | Path, route: str = "specific", engine: str | None = None, direction: str | None = None
) -> Model:
    """Load a run, a checkpoint or a converted folder, on the GPU if there is one.

    ``route`` "shared" uses only parameters that all languages share. ``engine`` is "torch" or "ctranslate2",
    for which a run is first converted for a ``direction`` such as "en-de". Raises UserError for a path
    without a model, and for a direction that the model does not know.
    """
    from lsmoe_ds.export.engine import load_engine

    chosen = None if direction is None else Direction.parse(direction)
    loaded = load_engine(path, route, engine, chosen)
    if chosen is not None:
        from lsmoe_ds.inference.engine import find_direction

        find_direction(loaded, chosen)
    return Model(loaded)


def plan(recipe: str | Path, overrides: Sequence[str] = (), world: int | None = None) -> Plan:
    """Return what ``lsmoe plan`` shows: parameters by part, memory, bytes and operations.

    ``overrides`` are those of ``--set``: ``["training.steps=100"]``. Raises UserError for a wrong recipe.
    """
    from lsmoe_ds.convert.recipes import open_recipe
    from lsmoe_ds.planning.plan import plan as make_plan

    return make_plan(open_recipe(recipe, overrides), world)


def read_pairs(
    recipe: str | Path, direction: str, split: str = "train", overrides: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yield the sentence pairs of a direction in the prepared data of a recipe, as the model reads them.

    So they are normalized, and ⁇ stands for what the vocabulary lacks. ``split`` is train, dev or test.
    Raises UserError for data that are not prepared.
    """
    from lsmoe_ds.convert.recipes import open_recipe
    from lsmoe_ds.data.prepared import PreparedData

    loaded = open_recipe(recipe, overrides)
    data, own = PreparedData.of(loaded), loaded.languages.find(Direction.parse(direction))
    if split not in ("train", "dev", "test"):
        raise UserError(f"'{split}' is no split: choose train, dev or test")
    pairs = data.tokens(own, split)
    for number in range(len(pairs)):
        yield (
            data.vocabulary.decode(pairs.source[number].tolist()),
            data.vocabulary.decode(pairs.target[number].tolist()),
        )


def _several(texts: Iterable[str]) -> Sequence[str]:
    """Return texts as a list. Raises UserError for a single string, whose letters would be used as texts, and
    for items that are not strings.
    """
    if isinstance(texts, str):
        raise UserError("texts are a list: give [text] for a single one")
    texts = list(texts)  # an iterator can be read once
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"{wrong[0]!r} is no text: give a list of texts")
    return texts
