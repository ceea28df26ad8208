"""Translate dev sentences during a training, on all ranks at once, and score them by chrF.

B sentences, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from lsmoe_ds.data.batches import Batch, PairBatch
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.inference.beam_search import Search, never_generated
from lsmoe_ds.languages import EOS, PAD
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology


@torch.no_grad()
def translate_greedily(
    model: Transformer, batch: PairBatch, given: int, banned: list[int], topology: Topology
) -> list[list[int]]:
    """Translate sentences by greedy search; return the tokens of each translation, without EOS.

    Each translation follows ``given`` tags; ``banned`` tokens are never generated. Every rank must call this
    with its own sentences. Ranks exchange tokens for experts at each position, so all continue until the last
    one is done.
    """
    state = model.start(batch.source, batch.ids)
    limits = Search(beam=1).limits((batch.source != PAD).sum(1))  # [B]
    latest = batch.decoder_input[:, : 1 + given]
    done = torch.zeros_like(limits, dtype=torch.bool)
    found = []
    for position in count():
        logits = model.step(latest, state).float()  # [B, V]
        logits[:, banned if position else [*banned, EOS]] = -torch.inf
        words = logits.argmax(1).masked_fill(done | (limits <= position), EOS)
        found.append(words)
        done = words == EOS
        if not _any_rank(not bool(done.all()), topology):
            break
        latest = words[:, None]
    rows = torch.stack(found, 1).tolist()
    return [row[: row.index(EOS)] for row in rows]


def _any_rank(going: bool, topology: Topology) -> bool:
    """Tell whether ``going`` is true on any rank that computes together with this one."""
    if topology.tensor == topology.expert == 1:
        return going
    flag = torch.tensor(float(going), device=topology.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def dev_chrf(
    engine: Any, batches: Iterable[Batch], given: int, vocabulary: Vocabulary, topology: Topology
) -> float:
    """Return the chrF of greedy translations by the specific route, averaged over directions.

    ``batches`` are those of a validation; the references are the text of their labels. Every rank must call
    this.
    """
    from sacrebleu.metrics import CHRF  # which most trainings do not need

    model: Transformer = engine.module
    model.eval()
    banned = never_generated(vocabulary)
    own: list[tuple[int, str, str]] = []
    for batch in batches:
        assert isinstance(batch, PairBatch)
        found = translate_greedily(model, batch.to(topology.device), given, banned, topology)
        for number, tokens, labels in zip(batch.direction.tolist(), found, batch.labels, strict=True):
            if bool((labels != PAD).any()):  # otherwise it is a filler for a batch that this rank lacks
                own.append((number, vocabulary.decode(tokens), vocabulary.decode(labels.tolist())))
    model.train()
    for _, layer in model.moe_layers():
        layer.deepspeed_moe.traffic.take()  # reset it, so that it does not count for the next step
    parts = [own]
    if topology.data > 1:
        parts = [[] for _ in range(topology.data)]
        dist.all_gather_object(parts, own, group=topology.data_group)
    texts: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for number, *both in (each for part in parts for each in part):
        texts[number].append((both[0], both[1]))
    scores = [
        CHRF().corpus_score([hypothesis for hypothesis, _ in each], [[reference for _, reference in each]])
        for each in texts.values()
    ]
    return sum(each.score for each in scores) / len(scores)
