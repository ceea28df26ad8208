"""Split bitexts into training text, dev and test sets, so that no sentence of a set is in any training text.

A sentence is held out in every language and bitext, with its near-duplicates: a training pair is dropped
if any bitext holds out one of its sides. No sentence is in both a dev and a test set, unless corpora provide
it in both.
"""

from __future__ import annotations

from collections.abc import Sequence

from lsmoe_ds.config.data import HeldOut
from lsmoe_ds.data.bitext import Bitext
from lsmoe_ds.data.held_out import Claims, choose, quota
from lsmoe_ds.languages import is_english


def hold_out(bitexts: Sequence[Bitext], settings: HeldOut) -> Claims:
    """Choose the dev and test sets of cleaned bitexts, and remove their sentences from training text.

    Sets that corpora provide are used unchanged. Bitexts with English come first, then those of each other
    pivot language. Each bitext prefers sentences that are already held out, so that the sets of a multi-way
    corpus are the same sentences.
    """
    claims = Claims()
    for bitext in bitexts:
        bitext.claim_published(claims)
    quotas = {
        bitext.name: quota(settings, bitext.trained(None)) | dict.fromkeys(bitext.own, 0)
        for bitext in bitexts
    }
    for pivot in sorted(
        {bitext.codes[bitext.pivot] for bitext in bitexts}, key=lambda code: (not is_english(code), code)
    ):
        group = [bitext for bitext in bitexts if bitext.codes[bitext.pivot] == pivot]
        left = {bitext.name: bitext.adopt(quotas[bitext.name], claims, settings.seed) for bitext in group}
        chosen = choose({bitext.name: bitext.candidates(claims) for bitext in group}, left, settings.seed)
        for bitext in group:
            bitext.decide(chosen[bitext.name], claims)
    for bitext in bitexts:
        bitext.leave_out(claims)
    return claims
