"""The two conventions of tags: the target's before the source, or the source's own before it and the target's
before the translation.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from support.invented_pairs import LANGUAGES, Pairs, Prepared, Store, Vocabulary, prepare, same, tensors
from support.slow_search import BANNED, make, sentences, slow_search
from support.slow_search import same as same_hypotheses

from lsmoe_ds.config.data import Batch as BatchSettings
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.validation import validation_batches
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import Search, beam_search
from lsmoe_ds.languages import EOS, PAD

TO_DE, FROM_ZH = (LANGUAGES.direction_id(Direction.parse(each)) for each in ("en-de", "zh_Hans-en"))
BOTH = ("target", "source-target")


def ids(tags: str = "source-target") -> DirectionIds:
    return DirectionIds.of(LANGUAGES, Vocabulary(), tags)


def stream(prepared: Prepared, tags: str, languages: Languages = LANGUAGES, **batch: int) -> BatchStream:
    chosen = BatchSettings.model_validate({"tokens": 512, "count": 4, **batch})
    form = DirectionIds.of(languages, Vocabulary(), tags)
    return BatchStream(prepared, languages, Vocabulary(), chosen, 5.0, 1, form=form)


def test_layout() -> None:
    """The tag of the translation is read by the decoder and is no label."""
    batch = ids().collate([[10, 11, 12], np.array([13], dtype=np.uint16)], [[20], [21, 22]], [TO_DE, FROM_ZH])
    assert batch.source.tolist() == [[4, 10, 11, 12, EOS], [7, 13, EOS, PAD, PAD]]
    assert batch.decoder_input.tolist() == [[EOS, 5, 20, PAD], [EOS, 4, 21, 22]]
    assert batch.labels.tolist() == [[PAD, 20, EOS, PAD], [PAD, 21, 22, EOS]]
    assert batch.target_tokens == 5
    assert all(each.dtype == torch.int64 for each in tensors(batch))
    assert ids().collate([[]], [[]], [TO_DE]).labels.tolist() == [[PAD, EOS]]


def test_a_translation_begins_with_what_is_given() -> None:
    assert ids().collate([[], [9]], None, [TO_DE, FROM_ZH]).decoder_input.tolist() == [[EOS, 5], [EOS, 4]]
    assert ids("target").collate([[], [9]], None, [TO_DE, FROM_ZH]).decoder_input.tolist() == [[EOS], [EOS]]


@pytest.mark.parametrize("tags", BOTH)
def test_a_step_counts_what_its_batches_hold(tags: str) -> None:
    """Labels for the loss, positions for what the decoder's layers read; the plan keeps to the limit with the
    tags.
    """
    for step in islice(stream(prepare(), tags), 40):
        assert step.target_tokens == sum(batch.target_tokens for batch in step.batches)
        assert step.target_tokens + step.given_tokens == sum(
            int((batch.decoder_input != PAD).sum()) for batch in step.batches
        )
        assert step.source_tokens == sum(int((batch.source != PAD).sum()) for batch in step.batches)
        assert step.given_tokens == (step.sentences if tags == "source-target" else 0)
        assert all(batch.source.numel() + batch.labels.numel() <= 512 for batch in step.batches)


@pytest.mark.parametrize(
    ("tags", "target", "skipped"), [("target", 9, 0), ("source-target", 8, 0), ("source-target", 9, 5)]
)
def test_the_tag_counts_in_the_greatest_length(tags: str, target: int, skipped: int) -> None:
    """``max_length`` is 10, of which a translation has two beside its tokens."""
    one = Languages((Direction("en", "de"),))
    pairs = Pairs(Store(np.array([2] * 10)), Store(np.array([2] * 5 + [target] * 5)))
    assert stream(Prepared({one.directions[0]: pairs}), tags, one, max_length=10).skipped == {
        "en-de": skipped
    }


def test_validation_counts_the_same_labels_by_both() -> None:
    counts = []
    for tags in BOTH:
        batches = list(
            validation_batches(prepare(), LANGUAGES, Vocabulary(), BatchSettings(tokens=512), form=ids(tags))
        )
        assert all(batch.source.numel() + batch.labels.numel() <= 512 for batch in batches)
        assert (batches[0].decoder_input[:, 1] == 5).all() == (tags == "source-target")  # en-de is first
        counts.append(sum(batch.target_tokens for batch in batches))
    assert counts[0] == counts[1]


def test_a_position_is_of_one_convention() -> None:
    """One that an earlier version saved, which knew one convention only, is of that."""
    made = {tags: stream(prepare(), tags) for tags in BOTH}
    next(made["target"])
    state = made["target"].state_dict()
    with pytest.raises(UserError, match=r"saved with data.tags target, now it is source-target: set it back"):
        made["source-target"].load_state_dict(state)
    del state["plan"]["data.tags"]
    with pytest.raises(UserError, match=r"saved with data.tags target, now it is source-target"):
        made["source-target"].load_state_dict(state)
    again = stream(prepare(), "target")
    again.load_state_dict(state)
    for first, second in zip(next(made["target"]).batches, next(again).batches, strict=True):
        assert same(first, second)


def test_a_lacking_tag_is_named() -> None:
    class English:
        def tag_id(self, code: str) -> int:
            if code != "de":
                raise UserError(f"the vocabulary has no tag for '{code}'")
            return 4

    only_de = Languages((Direction("en", "de"),))
    assert DirectionIds.of(only_de, English(), "target").source_tag.tolist() == [4]
    with pytest.raises(UserError, match="no tag for 'en'"):
        DirectionIds.of(only_de, English(), "source-target")


@pytest.mark.parametrize(("beam", "penalty"), [(1, 1.0), (5, 1.0), (3, 2.0)])
@torch.no_grad()
def test_search_begins_with_the_tag(beam: int, penalty: float) -> None:
    """Its probability is no part of the score; it counts in the length, as in transformers and
    CTranslate2.
    """
    model = make()
    source, of = sentences([3, 7, 5, 4, 1, 6])
    begin = torch.tensor([[EOS, 37 + row % 3] for row in range(6)])
    search = Search(beam, penalty, per_source_token=1.0, extra=3, n_best=beam)
    found = beam_search(model, source, of, BANNED, search, begin=begin)
    wanted = []
    for row in range(len(source)):
        one, real = torch.tensor([row]), int((source[row] != PAD).sum())
        wanted.append(
            slow_search(
                model, source[row : row + 1, :real], of.select(one), BANNED, search, begin[row].tolist()
            )
        )
    same_hypotheses(found, wanted)
    assert found != beam_search(model, source, of, BANNED, search)
