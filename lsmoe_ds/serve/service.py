"""Answer requests: find the direction of each text, and get its translated lines from the pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lsmoe_ds.detection import MISSING, Detected, Detector, can_detect
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import language_name
from lsmoe_ds.notices import listed
from lsmoe_ds.serve.limits import Buckets, is_key
from lsmoe_ds.serve.metrics import SEVERAL, Metrics
from lsmoe_ds.serve.models import Catalog, Served
from lsmoe_ds.serve.pool import Closed, Pool, Unavailable, say
from lsmoe_ds.serve.requests import Asked, Refused
from lsmoe_ds.serve.settings import Settings
from lsmoe_ds.serve.text import Line, split_lines
from lsmoe_ds.serve.worker import Job

STOPPING = "the server is stopping"
AUTO = "auto"


@dataclass(frozen=True)
class Text:
    """A text to translate.

    ``job`` translates its ``lines`` (None if nothing is translated); ``numbers`` has each line's number in
    the job.
    """

    lines: Sequence[Line]
    job: Job | None
    numbers: Sequence[int | None]
    detected: Detected | None

    async def parts(self, until: float) -> AsyncIterator[list[str]]:
        """Yield the translations of each line, best first, including all white space.

        Raises TimeoutError at the event loop's time ``until``.
        """
        for line, number in zip(self.lines, self.numbers, strict=True):
            found = [line.words]
            if self.job is not None and number is not None:
                async with asyncio.timeout_at(until):
                    found = await self.job.line(number)
            best, *others = found
            texts = [best, *filter(None, others)]  # an empty text is no alternative
            yield list(dict.fromkeys(f"{line.before}{words}{line.after}" for words in texts))


@dataclass(frozen=True)
class Translation:
    """A request that is being translated."""

    texts: Sequence[Text]
    jobs: Sequence[Job]
    direction: str  # the direction of all texts, for the metrics
    until: float  # the deadline, in the event loop's time

    def cancel(self) -> None:
        """Let the workers skip the lines that they have not begun."""
        for job in self.jobs:
            job.cancelled = True


class Service:
    """Everything that the server's paths need."""

    def __init__(self, models: Sequence[Served], settings: Settings) -> None:
        self.settings, self.catalog = settings, Catalog(models)
        self.only = {each.name: Catalog([each]) for each in models}  # for requests that name a model
        self.metrics = Metrics(self.catalog.directions)
        self.pool = Pool(settings, self.metrics)
        self.buckets = Buckets(settings.rate)
        self.detector = Detector() if can_detect() else None
        self.stopping = False
        self.in_progress = 0

    def check_asker(self, address: str) -> None:
        """Raise Refused (429) if an address sends too many requests."""
        if wait := self.buckets.take(address):
            limit = f"at most {self.settings.rate:,} requests a minute are allowed"
            raise Refused(429, f"{limit}: wait {wait:.0f} s" if wait >= 1 else limit, wait)

    def check_key(self, key: str) -> None:
        """Raise Refused (403) if keys are required and this is not one of them."""
        if self.settings.keys is None:
            return
        if not key:
            raise Refused(403, "this server needs an API key: give it as api_key")
        if not is_key(key, self.settings.keys):
            raise Refused(403, "the API key is wrong")

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it is being answered.

        Raises Refused (503) if there are too many requests or the server is stopping.
        """
        if self.stopping:
            raise Refused(503, STOPPING, 5)
        if self.in_progress >= self.settings.queue:
            raise Refused(503, f"{self.in_progress:,} requests are waiting already: try again", 1)
        self.in_progress += 1
        self.metrics.queue(self.in_progress)
        try:
            yield
        finally:
            self.in_progress -= 1
            self.metrics.queue(self.in_progress)

    async def begin(self, asked: Asked, catalog: Catalog) -> Translation:
        """Queue the lines of a request. Raises Refused for languages or directions that no model has."""
        target = self._code(asked.target, "target", catalog)
        found: list[Detected | None] = [None] * len(asked.texts)
        if asked.source == AUTO:
            if not (sources := catalog.sources(target)):
                raise Refused(400, f"there is no direction into {target}")
            found = [each[0] for each in await self._detect(asked.texts, [*sources, target])]
            directions = [Direction(each.language, target) for each in found if each is not None]
        else:
            source = self._code(asked.source, "source", catalog)
            directions = [Direction(source, target)] * len(asked.texts)
        lines: dict[Direction, list[str]] = {}
        cut: list[list[Line]] = []
        numbers: list[list[int | None]] = []
        for text, direction in zip(asked.texts, directions, strict=True):
            own = split_lines(text)
            words = lines.setdefault(direction, [])
            numbers.append([])
            for line in own:
                is_blank = (
                    not line.words or direction.alone
                )  # a text that is already in the target language is not changed
                numbers[-1].append(None if is_blank else len(words))
                if not is_blank:
                    words.append(line.words)
            cut.append(own)
        models = {each: self._model(each, catalog) for each in lines if not each.alone}
        jobs = {}
        try:
            for direction, model in models.items():
                if lines[direction]:
                    # All that the search has: some are repetitions, so that N + 1 may not give N others.
                    several = self.settings.beam if asked.alternatives else 1
                    jobs[direction] = self.pool.submit(model, direction, lines[direction], several)
        except Closed:
            raise Refused(503, STOPPING, 5) from None
        texts = [
            Text(own, jobs.get(direction), places, detected)
            for own, direction, places, detected in zip(cut, directions, numbers, found, strict=True)
        ]
        labels = {str(each) for each in lines}
        until = asyncio.get_running_loop().time() + self.settings.patience
        return Translation(texts, list(jobs.values()), labels.pop() if len(labels) == 1 else SEVERAL, until)

    async def answer(self, asked: Asked, translation: Translation) -> dict[str, Any]:
        """Return the whole answer to a request that has begun. Raises Refused (503) if it takes too long."""
        try:
            with _failures():
                texts = [
                    _joined([part async for part in each.parts(translation.until)])
                    for each in translation.texts
                ]
        except TimeoutError:
            raise self._late() from None
        finally:
            translation.cancel()
        return _shape(asked, texts) | _detected(asked, translation)

    async def stream(self, asked: Asked, translation: Translation) -> AsyncIterator[dict[str, Any]]:
        """Yield each line's translation, in order, as soon as it is ready; then a final event or an error."""
        began = time.monotonic()
        try:
            for index, text in enumerate(translation.texts):
                place, number = {"index": index} if asked.is_list else {}, 0
                with _failures():
                    async for part in text.parts(translation.until):
                        best, *others = part
                        more = {"alternatives": others[: asked.alternatives]} if asked.alternatives else {}
                        yield {**place, "line": number, "translatedText": best, **more}
                        number += 1
            seconds = round(time.monotonic() - began, 3)
            yield {"done": True, "seconds": seconds, **_detected(asked, translation)}
        except TimeoutError:
            yield {"error": str(self._late())}
        except Refused as refused:
            yield {"error": str(refused)}
        finally:
            translation.cancel()

    async def detect(
        self, asked: Asked, catalog: Catalog
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Return the languages that a text may be in, most probable first; for a list, those of each text."""
        found = [
            [each.to_dict() for each in one if each.confidence or each is one[0]]
            for one in await self._detect(asked.texts, catalog.codes)
        ]
        return found if asked.is_list else found[0]

    def languages(self, catalog: Catalog) -> list[dict[str, Any]]:
        """Return all languages, sorted by name, each with the targets of its directions."""
        found = [
            {"code": code, "name": language_name(code), "targets": catalog.targets.get(code, [])}
            for code in catalog.codes
        ]
        return sorted(found, key=lambda each: str(each["name"]))

    def frontend(self, catalog: Catalog) -> dict[str, Any]:
        """Return the settings that LibreTranslate gives to web pages."""
        first = catalog.directions[0]
        return {
            "apiKeys": self.settings.keys is not None,
            "charLimit": self.settings.chars or -1,
            "frontendTimeout": 500,
            "keyRequired": self.settings.keys is not None,
            "language": {
                "source": {"code": first.source, "name": language_name(first.source)},
                "target": {"code": first.target, "name": language_name(first.target)},
            },
            "detection": self.detector is not None,
            "suggestions": False,
            "supportedFilesFormat": [],
        }

    def details(self, source: str, target: str, catalog: Catalog) -> dict[str, Any]:
        """Return the model that serves a direction and, once it is loaded, its size and experts."""
        codes = self._code(source, "source", catalog), self._code(target, "target", catalog)
        direction = Direction(*codes)
        model = self._model(direction, catalog)
        found = {"direction": str(direction), "model": model.name, "engine": model.engine, "loaded": False}
        if (ready := self.pool.ready(model, direction)) is not None:
            found |= {"loaded": True, "parameters": ready.parameters, "bytes": ready.bytes}
            found |= {"step": ready.step, "experts": ready.experts}
        return found

    def _code(self, text: str, field: str, catalog: Catalog) -> str:
        if (found := catalog.own(text)) is None:
            raise Refused(
                400, f"{field} '{text[:50]}' is no language here: there are {listed(catalog.codes)}"
            )
        return found

    def _model(self, direction: Direction, catalog: Catalog) -> Served:
        if (found := catalog.find(direction)) is None:
            targets = catalog.targets.get(direction.source, [])
            into = f"into {listed(targets)}" if targets else "into no language"
            raise Refused(400, f"{direction} is not translated here: {direction.source} is translated {into}")
        return found

    async def _detect(self, texts: Sequence[str], codes: Sequence[str]) -> list[list[Detected]]:
        detector = self.detector
        if detector is None:
            raise Refused(400, MISSING)
        known = tuple(dict.fromkeys(codes))
        return await asyncio.to_thread(lambda: [detector.detect(text, known) for text in texts])

    def _late(self) -> Refused:
        return Refused(503, f"the translation took longer than {self.settings.patience:g} s", 1)


def _joined(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the translations of a text: the best of each line joined, then the second of each, and so on.

    A line that has fewer repeats its last.
    """
    ranks = range(max(map(len, lines), default=1))
    texts = ("".join(line[min(rank, len(line) - 1)] for line in lines) for rank in ranks)
    return list(dict.fromkeys(texts))


def _shape(asked: Asked, texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return translations in LibreTranslate's form: lists if the request had a list."""
    answer: dict[str, Any] = {"translatedText": [best for best, *_ in texts]}
    if asked.alternatives:
        answer["alternatives"] = [others[: asked.alternatives] for _, *others in texts]
    return answer if asked.is_list else {name: value[0] for name, value in answer.items()}


def _detected(asked: Asked, translation: Translation) -> dict[str, Any]:
    """Return the detected languages in LibreTranslate's form, if the request asks for them."""
    if asked.source != AUTO:
        return {}
    found = [each.detected.to_dict() for each in translation.texts if each.detected is not None]
    return {"detectedLanguage": found if asked.is_list else found[0]}


@contextmanager
def _failures() -> Iterator[None]:
    """Turn the error of a line into Refused. Each line fails by itself."""
    try:
        yield
    except Unavailable as error:
        raise Refused(503, str(error), 10) from None
    except UserError as error:
        raise Refused(500, str(error)) from None
    except Exception as error:
        if isinstance(error, (Refused, TimeoutError)):
            raise
        say(f"a line was not translated: {type(error).__name__}: {UserError(str(error))}")
        raise Refused(500, "the translation failed") from None
