"""Score the other tasks: labels of words by seqeval, and answers as the script of SQuAD v1.1 does."""

from __future__ import annotations

import importlib
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lsmoe_ds.config.host import Task
from lsmoe_ds.data.labels import read_question
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import DirectionScore, spread_samples
from lsmoe_ds.evaluation.groups import Metrics

BETWEEN_ANSWERS = "\t"  # in a line of references
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_language(
    task: Task,
    direction: Direction,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    seconds: float = 0.0,
    samples: int = 5,
) -> DirectionScore:
    """Score N lines of another task than translation in the language of ``direction``.

    For ``tag``, hypotheses and references are the labels of a sentence's words, separated by spaces. For
    ``answer``, a hypothesis is an answer, and a reference is the right answers, joined by
    :func:`join_answers`. ``sources`` are only shown. Raises UserError if there is no line, ValueError if
    numbers of lines or of a sentence's labels differ.
    """
    shown = spread_samples(direction, sources, hypotheses, references, samples)
    if task == "tag":
        metrics = score_tags([line.split() for line in references], [line.split() for line in hypotheses])
    elif task == "answer":
        metrics = score_answers(hypotheses, [line.split(BETWEEN_ANSWERS) for line in references])
    else:
        raise ValueError(f"{task}: this scores only what is not translated")
    return DirectionScore(
        task=task,
        direction=direction,
        metrics=metrics,
        copy=None,
        sentences=len(references),
        exact=0.0,
        weak=0.0,
        seconds=seconds,
        signatures={},
        samples=tuple(
            replace(each, reference=each.reference.replace(BETWEEN_ANSWERS, " | ")) for each in shown
        ),
    )


def readable(task: Task, sources: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Convert lines of :mod:`lsmoe_ds.data.labels` to the text kept with scores: for questions, the question
    with its context, and the right answers.
    """
    if task == "tag":
        return list(sources), list(references)
    asked = [" ".join(f"{question} | {context}".split()) for question, context in map(read_question, sources)]
    return asked, [join_answers([each["text"] for each in json.loads(line)]) for line in references]


def join_answers(answers: Sequence[str]) -> str:
    """Write the right answers to a question in one line, with tabs between them."""
    return BETWEEN_ANSWERS.join(" ".join(answer.split()) for answer in answers)


def score_tags(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Metrics:
    """Compute precision, recall and F1 of the entities that the labels of N sentences mark.

    These are seqeval's, in its default mode (as conlleval: an ``I-`` after another type begins an entity),
    over the entities of all types together (micro average). Labels are of IOB schemes, ``B-PER``, ``I-PER``
    and ``O``. Each is 0 where it is undefined. Raises ValueError if numbers of labels differ.
    """
    if list(map(len, gold)) != list(map(len, predicted)):
        raise ValueError("the numbers of labels differ from those of the gold labels")
    precision, recall, f1, _ = _import_seqeval().precision_recall_fscore_support(
        list(map(list, gold)), list(map(list, predicted)), average="micro", zero_division=0
    )
    shares = {"f1": f1, "precision": precision, "recall": recall}
    return Metrics({name: 100 * float(share) for name, share in shares.items()})


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Metrics:
    """Compute F1 over words and exact match of N predictions, as the official script of SQuAD v1.1 does.

    Each prediction is compared with each of its ``answers`` (at least one) after :func:`normalize_answer`,
    and the best counts. This is done in every language, as in TyDiQA-GoldP and XTREME. As in the script, two
    texts that are empty after normalization match exactly, but have an F1 of 0.
    """
    pairs = [
        (normalize_answer(prediction), [normalize_answer(answer) for answer in right])
        for prediction, right in zip(predictions, answers, strict=True)
    ]
    exact = sum(prediction in right for prediction, right in pairs)
    f1 = sum(max(_word_f1(prediction, answer) for answer in right) for prediction, right in pairs)
    return Metrics({"f1": 100 * f1 / len(pairs), "exact": 100 * exact / len(pairs)})


def normalize_answer(text: str) -> str:
    """Return text in lower case, without ASCII punctuation, English articles and superfluous whitespace.

    The words a, an and the are removed in every language, even where they are not articles; articles of other
    languages stay.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def _word_f1(prediction: str, answer: str) -> float:
    found, wanted = prediction.split(), answer.split()
    common = (Counter(found) & Counter(wanted)).total()
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _import_seqeval() -> Any:
    try:
        return importlib.import_module("seqeval.metrics.sequence_labeling")
    except ImportError:
        raise UserError(
            "labels of words are scored by seqeval, which is not installed: pip install 'lsmoe_ds[hosts]'"
        ) from None
