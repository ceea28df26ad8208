"""Stand in for prepared data: sentences of realistic lengths whose tokens are their numbers."""

from __future__ import annotations

import numpy as np
import torch

from lsmoe_ds.data.batches import Batch
from lsmoe_ds.directions import Direction, Languages, english_centric

FIRST = 100  # token ids of the stand-in: below are specials and tags


class Store:
    """Hold sentences whose first token is their number, so that a batch shows which they are."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths.astype(np.int32)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(self.lengths[index], FIRST + index, dtype=np.uint16)


class Pairs:
    def __init__(self, source: Store, target: Store) -> None:
        self.source, self.target = source, target

    def __len__(self) -> int:
        return len(self.source.lengths)


class Prepared:
    def __init__(self, pairs: dict[Direction, Pairs]) -> None:
        self.pairs = pairs

    def tokens(self, direction: Direction, split: str) -> Pairs:
        return self.pairs[direction]


class Vocabulary:
    def tag_id(self, code: str) -> int:
        return {"en": 4, "de": 5, "fr": 6, "zh_Hans": 7}[code]


LANGUAGES = Languages(tuple(english_centric(["de", "fr", "zh_Hans"])))
SIZES = {"de-en": 3000, "en-fr": 400, "en-zh_Hans": 90}


def realistic(n: int, seed: int) -> Pairs:
    """Draw lengths as those of real text."""
    rng = np.random.default_rng(seed)
    source = np.clip(rng.lognormal(2.9, 0.7, n), 1, 180)
    target = np.clip(source * (0.8 + 0.1 * seed) * rng.lognormal(0, 0.22, n), 1, 220)
    return Pairs(Store(source.astype(int)), Store(target.astype(int)))


def prepare(sizes: dict[str, int] = SIZES, languages: Languages = LANGUAGES) -> Prepared:
    bitexts = {name: realistic(n, seed) for seed, (name, n) in enumerate(sizes.items())}
    return Prepared({d: bitexts[d.bitext] for d in languages.directions})


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [
        batch.source,
        batch.decoder_input,
        batch.labels,
        batch.source_language,
        batch.target_language,
        batch.direction,
    ]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def sentences(batch: Batch) -> list[tuple[int, int]]:
    """Return (direction, number) of each sentence."""
    return list(zip(batch.direction.tolist(), (batch.source[:, 1] - FIRST).tolist(), strict=True))
