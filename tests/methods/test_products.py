"""Products with the matrices of many languages against one language after another, and how many operations
they are.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.products import INPUTS, LENGTH, OUTPUTS, context_of, one_after_another, places_of
from torch.utils._python_dispatch import TorchDispatchMode

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import Languages, SentenceIds, english_centric
from lsmoe_ds.languages import EOS
from lsmoe_ds.methods.products import Add, Matrices, Multiply
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.grouped import Groups
from lsmoe_ds.parallel.topology import Topology

RANKS = {
    "alike": [8, 8, 8, 8, 8],
    "odd": [3, 3, 3, 3, 3],
    "small": [2, 2, 1, 2, 2],
    "unlike": [4, 0, 12, 1, 8],
    "large": [2, 0, 70, 20, 16],
    "one": [0, 0, 0, 4, 0],
}
LANGUAGES = {
    "sorted": [0, 0, 1, 2, 2, 2, 3, 4],
    "unsorted": [4, 0, 2, 0, 0, 3, 1, 4],
    "few": [2, 2, 4],
    "single": [3, 3],
    "without": [1, 1],
}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("columns", [slice(0, INPUTS), slice(4, 12), slice(3, 3)], ids=str)
@pytest.mark.parametrize("languages", LANGUAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_all_languages_at_once_are_one_after_another(ranks, languages, columns):
    torch.manual_seed(1)
    places, chosen = places_of(RANKS[ranks]), LANGUAGES[languages]
    matrices, total = Matrices(places, pads=True), places[-1].stop
    x, y = torch.randn(len(chosen) * LENGTH, INPUTS), torch.randn(len(chosen) * LENGTH, OUTPUTS)
    down, up = torch.randn(total, INPUTS), torch.randn(total, OUTPUTS)
    given = [each.requires_grad_() for each in (x, y, down, up)]
    groups = matrices.groups(context_of(chosen), "target", x)
    z = Multiply.apply(x, down, matrices, groups, columns)
    found = Add.apply(y.clone(), z, up, matrices, groups, columns)
    wanted = one_after_another(*given, places, chosen, columns)
    weights = torch.randn(wanted.shape)
    results = [
        [out, *torch.autograd.grad((out * weights).sum(), given, materialize_grads=True)]
        for out in (found, wanted)
    ]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6 * float(second.detach().abs().max()))


def test_rows_of_no_group_stay_where_they_are():
    groups = Groups([(1, 4, 6), (0, 0, 1), (1, 1, 2)], 3, 7, torch.device("cpu"))
    rows = torch.arange(1.0, 8.0)[:, None]
    assert groups.take(rows)[:, 0].tolist() == [1, 2, 5, 6]
    assert groups.put(groups.take(rows))[:, 0].tolist() == [1, 2, 0, 0, 5, 6, 0]
    assert groups.sizes == [1, 3, 0] and not groups.is_all


def test_groups_are_split_into_parts():
    spans = [(group, 2 * group, 2 * group + 2) for group in (4, 1, 2, 0)]
    groups = Groups(spans, 6, 10, torch.device("cpu"))
    parts = groups.parts(3)
    assert [(index, rows, part.sizes) for index, rows, part in parts] == [
        (slice(0, 3), slice(0, 6), [2, 2, 2]),
        (slice(4, 5), slice(6, 8), [2]),
    ]
    ((index, _, _),) = groups.parts(4)
    assert index.tolist() == [0, 1, 2, 4], "which are no range"


PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "_grouped_mm", "matmul", "linear"}


class Operations(TorchDispatchMode):
    """Count the operations that a device would be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.found[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))

    @property
    def products(self) -> int:
        return sum(count for name, count in self.found.items() if name in PRODUCTS)


MANY = "ar be bg bn ca cs da de el es et fa fi fr he hi hr hu".split()  # noqa: SIM905
METHODS = {
    "pair": {"low_rank": {"rank": 4, "at": "both"}},
    "language": {"low_rank": {"rank": 4, "index": "language", "at": "both"}},
    "learned": {"low_rank": {"rank": 4, "index": "learned"}},
    "modular": {"low_rank": {"rank": 4, "index": "modular"}},
    "unlike": {"low_rank": {"rank": {"en": 20, **dict.fromkeys(MANY, 3)}, "index": "language"}},
    "CLSR": {"clsr": {"gate": 4}},
    "CLSR*": {"clsr": {"gate": 4, "shared": False}},
    "adapters": {"adapters": {"width": 8}},
    "LaSS": {"lass": {"tuned": "none"}},
}


def operations_of(method: str, codes: list[str]) -> Operations:
    """Count those of a forward and a backward pass over one sentence of each direction."""
    languages = Languages(tuple(english_centric(codes)))
    section = METHODS[method]
    if method == "unlike":
        ranks = {code: rank for code, rank in section["low_rank"]["rank"].items() if code in languages.codes}
        section = {"low_rank": {**section["low_rank"], "rank": ranks}}
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "data": {"corpora": ["none"], "languages": codes, "vocabulary": {"size": 96}},
            "model": {
                "hidden": 16,
                "heads": 2,
                "encoder": {"layers": 1, "feed_forward": 24},
                "decoder": {"layers": 1, "feed_forward": 24},
                **section,
            },
            "training": {"steps": 3, "dropout": 0.0, "start_from": "none" if method == "LaSS" else None},
        }
    )
    model = Transformer(recipe, 96)
    initialize(model, 1, Topology.single())
    ids = [
        (languages.id(each.source), languages.id(each.target), number)
        for number, each in sorted(enumerate(languages.directions), key=lambda pair: str(pair[1]))
    ]
    tokens = torch.randint(4, 96, (len(ids), LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = EOS
    with Operations() as operations:
        model(tokens, tokens, tokens, SentenceIds(*torch.tensor(ids).unbind(1))).loss.backward()
    return operations


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("method", METHODS)
def test_the_products_are_as_many_for_many_languages_as_for_few(method):
    few, many = (operations_of(method, codes) for codes in (MANY[::7], MANY))
    assert 0 < many.products == few.products
    # A few more or fewer, where it costs less to sort the tokens than to copy matrices.
    assert many.found.total() <= 1.1 * few.found.total(), "nor does anything else grow"
