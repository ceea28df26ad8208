"""Routing analysis: its numbers against those worked out by hand, its files, and a whole analysis of a small
run.
"""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.small_run import make_run

from lsmoe_ds.analysis.command import analyze_routing, write_analysis
from lsmoe_ds.analysis.heat_map import as_file, heat_map, largest_share
from lsmoe_ds.analysis.measures import measure_layer, similarity
from lsmoe_ds.analysis.measuring import Counts, choose_pairs
from lsmoe_ds.analysis.routing import LayerRouting, Routing, read_routing
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import load
from lsmoe_ds.languages import table

SVG = "{http://www.w3.org/2000/svg}"
# German and Dutch are relatives; Russian is of another branch.
SHARES = {"de": (0.5, 0.5, 0.0, 0.0), "nl": (0.25, 0.75, 0.0, 0.0), "ru": (0.0, 0.5, 0.5, 0.0)}


def make_layer(
    shares: dict[str, tuple[float, ...]] = SHARES, routing: str = "token", task: str = "target", **more
) -> LayerRouting:
    experts = len(next(iter(shares.values())))
    return LayerRouting(
        "encoder", 1, experts, 2, routing, task, tuple(shares), tuple(shares.values()), **more
    )


def test_numbers_of_a_layer() -> None:
    measures = measure_layer(make_layer(tokens=(200, 100, 100)))
    # (2 de + nl + ru) / 4
    assert measures.load == pytest.approx((0.3125, 0.5625, 0.125, 0.0))
    assert measures.balance == pytest.approx(4 * 0.5625)
    # mean 0.25; deviations 0.0625, 0.3125, -0.125, -0.25: variance 0.1796875 / 4
    assert measures.variation == pytest.approx(4 * (0.1796875 / 4) ** 0.5)
    assert measures.entropy == pytest.approx(0.3125 * 1.678072 + 0.5625 * 0.830075 + 0.125 * 3, abs=1e-6)
    assert measures.relative_entropy == pytest.approx(measures.entropy / 2)
    assert measures.task_entropy == pytest.approx((1 + 0.811278 + 1) / 3, abs=1e-6)
    assert measures.relative_task_entropy == pytest.approx((1 + 0.811278 + 1) / 6, abs=1e-6)
    assert measures.unused == (3,)
    assert measures.same_family == pytest.approx(0.75) and measures.different_families == pytest.approx(0.5)


def test_tasks_count_alike_where_no_tokens_were_measured_and_a_measured_load_goes_first() -> None:
    equal = pytest.approx((0.25, 1.75 / 3, 0.5 / 3, 0))
    assert (
        measure_layer(make_layer()).load == equal
        and measure_layer(make_layer(tokens=(0, 0, 0))).load == equal
    )
    assert measure_layer(make_layer(tokens=(1, 1, 1), load=(0.0, 0.0, 0.5, 0.5))).balance == 2


def test_even_and_single_experts() -> None:
    even = measure_layer(make_layer({"de": (0.25,) * 4, "ru": (0.25,) * 4}))
    assert (even.balance, even.variation, even.entropy, even.relative_entropy, even.unused) == (
        1,
        0,
        2,
        1,
        (),
    )
    assert (even.same_family, even.different_families) == (None, 1)
    one = measure_layer(replace(make_layer({"de": (1.0,)}), top_k=1))
    assert (one.balance, one.entropy, one.relative_entropy, one.relative_task_entropy) == (1, 0, 1, 1)


def test_under_task_routing_the_load_is_what_the_chosen_receive() -> None:
    layer = make_layer({"de": (0.4, 0.3, 0.2, 0.1), "ru": (0.1, 0.5, 0.4, 0.0)}, "task", tokens=(3, 1))
    measures = measure_layer(layer)
    assert measures.load == pytest.approx((3 / 8, 4 / 8, 1 / 8, 0)) and measures.unused == (3,)
    assert measures.different_families == pytest.approx(0.1 + 0.3 + 0.2)  # of the probabilities


def test_similarity_is_the_overlap_of_shares() -> None:
    expected = [[1, 0.75, 0.5], [0.75, 1, 0.5], [0.5, 0.5, 1]]
    assert similarity(make_layer()).tolist() == [pytest.approx(row) for row in expected]


def test_families_are_compared_within_one_section_and_unknown_ones_left_out() -> None:
    shares = {
        "en-de": (1.0, 0.0),
        "en-nl": (0.5, 0.5),
        "de-en": (0.0, 1.0),
        "ru-en": (0.25, 0.75),
        "en-xx": (0.0, 1.0),
    }
    measures = measure_layer(make_layer(shares, task="pair"))
    assert measures.same_family == 0.5  # en-de and en-nl, not en-de and de-en
    assert measures.different_families == 0.75  # de-en and ru-en


def test_choices_are_counted_and_dropped_ones_are_not() -> None:
    counts = Counts.none(3, 4)
    experts = torch.tensor([[0, 1], [0, -1], [3, 2], [-1, -1]])
    for tasks, chosen in (([0, 0, 2, 2], experts), ([0], torch.tensor([[1, 3]]))):
        counts.add(SimpleNamespace(tasks=torch.tensor(tasks), routes=SimpleNamespace(experts=chosen)))
    assert counts.received.tolist() == [[2, 2, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert counts.tokens.tolist() == [3, 0, 2] and counts.choices == 10


class Data:
    """Held-out text of two bitexts."""

    def __init__(self, german: list[str], french: list[str]) -> None:
        self.english = {"de-en": german, "en-fr": french}

    def text(self, direction: Direction, split: str) -> tuple[list[str], list[str]]:
        english = self.english[direction.bitext]
        foreign = [f"{sentence}!" for sentence in english]
        return (english, foreign) if direction.source == "en" else (foreign, english)

    def tokens(self, direction: Direction, split: str) -> list[str]:
        return self.english.get(direction.bitext, ["x"] * 7)


ALL_WAYS = Languages(tuple(Direction.parse(d) for d in ("en-de", "de-en", "fr-en")))


def test_common_english_sentences_are_measured_on_and_no_others() -> None:
    common = [f"sentence {n}" for n in range(25)]
    data = Data(["only German", *common, common[3]], [*reversed(common), "only French"])
    pairs, multiway = choose_pairs(data, ALL_WAYS, "test")
    assert multiway == 25
    assert pairs[Direction("en", "de")] == pairs[Direction("de", "en")] == list(range(1, 26))
    assert pairs[Direction("fr", "en")] == list(range(24, -1, -1))


def test_too_few_common_sentences_or_text_without_english_are_measured_apart() -> None:
    few = [f"sentence {n}" for n in range(19)]
    pairs, multiway = choose_pairs(Data([*few, "a"], ["b", *few, "c"]), ALL_WAYS, "test")
    assert multiway is None and [len(places) for places in pairs.values()] == [20, 20, 21]
    many = [f"sentence {n}" for n in range(250)]
    pairs, multiway = choose_pairs(Data(many, many), ALL_WAYS, "test")
    assert multiway == 200 and pairs[Direction("fr", "en")] == list(range(200))
    languages = Languages((*ALL_WAYS.directions, Direction("de", "fr")))
    pairs, multiway = choose_pairs(Data(many, many), languages, "test")
    assert (
        multiway is None
        and len(pairs[Direction("en", "de")]) == 200
        and len(pairs[Direction("de", "fr")]) == 7
    )


@pytest.mark.parametrize("routing", ["token", "task"])
def test_heat_map_of_204_tasks_and_128_experts(routing: str) -> None:
    codes = [code for code in sorted(table()) if code != "en"][:102]
    tasks = [f"en-{code}" for code in codes] + [f"{code}-en" for code in codes]
    row = (0.5, *[0.5 / 127] * 127)
    shares = {task: row[-index % 128 :] + row[: -index % 128] for index, task in enumerate(tasks)}
    layer = make_layer(shares, routing, "pair").ordered()
    drawn = heat_map(layer, largest_share([layer]))
    assert len(drawn) < 300_000
    file = ElementTree.fromstring(as_file(drawn))
    assert (
        file.tag == f"{SVG}svg" and float(file.get("width", 0)) < 1300 and float(file.get("height", 0)) < 4500
    )
    rows = [group.findtext(f"{SVG}title", "") for group in file.iter(f"{SVG}g")]
    assert len(rows) == 204 and all("50.0%" in title for title in rows)
    dark = [path for path in file.iter(f"{SVG}path") if path.get("fill-opacity") == "1"]
    assert len(dark) == 204 and all(path.get("d", "").count("M") == 1 for path in dark)
    frames = [path for path in file.iter(f"{SVG}path") if path.get("class") == "frame"]
    assert len(frames) == (204 if routing == "task" else 0) and all(
        path.get("d", "").count("M") == 2 for path in frames
    )
    headings = [text.text for text in file.iter(f"{SVG}text") if text.get("class") == "section"]
    assert headings == ["Out of English", "Into English"]
    assert layer.tasks[0].startswith("en-") and layer.tasks[102].endswith("-en")


def routing_of(*layers: LayerRouting) -> Routing:
    return Routing("test", None, 12, layers)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_files_of_an_analysis(tmp_path: Path) -> None:
    decoder = replace(make_layer(routing="static", tokens=(5, 5, 2), dropped=0.25), side="decoder", layer=3)
    out = tmp_path / "out"
    summary = write_analysis(out, "<b>demo</b>", 7, routing_of(decoder, make_layer()))
    assert summary["files"] == sorted(path.name for path in out.iterdir() if path.name != "summary.json")
    assert set(summary["files"]) == {
        "routing.json",
        "routing.csv",
        "similarity.csv",
        "encoder-2.svg",
        "decoder-4.svg",
        "index.html",
    }
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert [layer["side"] for layer in summary["layers"]] == ["encoder", "decoder"] and summary[
        "multiway"
    ] is None
    assert summary["layers"][1]["unused"] == (3,) and summary["layers"][1]["alike"] == [("nl", "de")]
    encoder, read = read_routing(out / "routing.json")
    assert read == decoder.ordered() and encoder.tokens is None
    shares = rows_of(out / "routing.csv")
    assert len(shares) == 2 * 3 * 4
    assert {"side": "decoder", "layer": "3", "task": "nl", "expert": "1", "share": "0.75"} in shares
    similar = rows_of(out / "similarity.csv")
    assert len(similar) == 2 * 3
    assert {"side": "encoder", "layer": "1", "task": "nl", "other": "de", "similarity": "0.75"} in similar
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 2 and "&lt;b&gt;demo" in page and "<b>demo" not in page and "25.0%" in page
    assert "http" not in page and "<script" not in page
    ElementTree.fromstring((out / "decoder-4.svg").read_text())


def test_an_earlier_analysis_is_replaced_and_anything_else_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_analysis(out, "demo", 1, routing_of(make_layer()))
    write_analysis(out, "demo", 2, routing_of(replace(make_layer(), layer=0)))
    assert (out / "encoder-1.svg").exists() and not (out / "encoder-2.svg").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which lsmoe did not write"):
        write_analysis(out, "demo", 3, routing_of(make_layer()))
    assert (
        json.loads((out / "summary.json").read_text())["step"] == 2
        and (out / "notes.txt").read_text() == "mine"
    )
    # A run folder has a routing.json too.
    run = tmp_path / "run"
    run.mkdir()
    (run / "routing.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds routing\.json"):
        analyze_routing(tmp_path / "nothing", run)
    with pytest.raises(UserError, match="is a file"):
        analyze_routing(tmp_path / "nothing", run / "routing.json")
    with pytest.raises(UserError, match="'train' is no held-out text: choose dev or test"):
        analyze_routing(tmp_path / "nothing", out, "train")


def test_a_failure_while_writing_leaves_the_earlier_analysis(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    write_analysis(out, "demo", 1, routing_of(make_layer()))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lsmoe_ds.analysis.command.write_csv", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_analysis(out, "demo", 2, routing_of(make_layer()))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


SENTENCE = {
    "routing": "sentence",
    "task": "source",
    "experts": 4,
    "every": 1,
    "top_k": 1,
    "capacity": {"evaluation": 0.5},
}
STATIC = {"routing": "static", "task": "pair", "experts": 4, "every": 1, "top_k": 2, "expert_groups": 2}
GROUPED = {"routing": "task", "task": "source", "experts": 4, "every": 2, "top_k": 1, "expert_groups": 2}


def test_a_run_with_sentence_and_static_routing(pool, tmp_path: Path) -> None:
    run, _ = make_run(pool, tmp_path, SENTENCE, STATIC)
    summary = analyze_routing(run, tmp_path / "maps")
    # Every English sentence of the made-up text is translated into both languages.
    assert (summary["multiway"], summary["pairs"], summary["split"]) == (20, 4 * 20, "test")
    layers = read_routing(tmp_path / "maps" / "routing.json")
    assert [(layer.side, layer.layer, layer.routing) for layer in layers] == [
        *[("encoder", n, "sentence") for n in range(2)],
        *[("decoder", n, "static") for n in range(3)],
    ]
    loaded = load(run, "cpu")
    data = open_data(loaded)
    for layer in layers[:2]:
        assert set(layer.tasks) == {"de", "en", "fr"} and sum(layer.load or ()) == pytest.approx(1)
        # Four experts of half a fair share each hold an eighth of the tokens, rounded up.
        assert layer.dropped is not None and 0.4 < layer.dropped < 0.9
        pairs = data.tokens(Direction("de", "en"), "test")
        assert (layer.tokens or ())[layer.tasks.index("de")] == pairs.source.lengths[:].sum() + 2 * len(pairs)
    for layer in layers[2:]:
        # Two pairs in each group of two experts, so every pair uses both experts of its group.
        groups = dict(
            zip(loaded.languages.tasks("pair"), loaded.languages.task_groups("pair", 2), strict=True)
        )
        assert dict(zip(layer.tasks, layer.shares, strict=True)) == {
            task: (0.5, 0.5, 0.0, 0.0) if group == 0 else (0.0, 0.0, 0.5, 0.5)
            for task, group in groups.items()
        }
        assert layer.dropped == 0


def test_under_task_routing_experts_outside_the_group_have_no_share(pool, tmp_path: Path) -> None:
    run, _ = make_run(pool, tmp_path, GROUPED, None)
    analyze_routing(run, tmp_path / "maps", "dev")
    (layer,) = read_routing(tmp_path / "maps" / "routing.json")
    loaded = load(run, "cpu")
    groups = dict(
        zip(loaded.languages.tasks("source"), loaded.languages.task_groups("source", 2), strict=True)
    )
    assert set(groups.values()) == {0, 1}
    weight = loaded.model.get_submodule("encoder.1.feed_forward.router").weight
    for task, row in zip(layer.tasks, layer.shares, strict=True):
        inside = slice(2 * groups[task], 2 * groups[task] + 2)
        assert row[inside] == pytest.approx(weight[loaded.languages.id(task), inside].softmax(-1).tolist())
        assert sum(row) == pytest.approx(1) and row.count(0.0) == 2
