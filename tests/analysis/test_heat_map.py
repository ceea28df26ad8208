"""The pictures of expert shares: order of tasks, frames, one scale of color."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
from support.pages import routing_layer

from lsmoe_ds.analysis.heat_map import heat_map, largest_share
from lsmoe_ds.analysis.routing import read_routing


def test_maps_put_relatives_side_by_side(tmp_path) -> None:
    path = tmp_path / "routing.json"
    path.write_text(
        json.dumps({"layers": [routing_layer("decoder"), routing_layer("encoder")]}), encoding="utf-8"
    )
    encoder, decoder = read_routing(path)
    assert (encoder.side, decoder.side) == ("encoder", "decoder")
    assert encoder.tasks == ("he", "nl", "en", "de", "ru")  # Semitic; Dutch, English, German; Slavic
    assert encoder.shares[0] == (0.1, 0.4, 0.4, 0.1) and encoder.shares[3] == (
        0.5,
        0.3,
        0.1,
        0.1,
    )  # rows moved with their tasks
    assert encoder.chosen(0) == {1, 2} and encoder.chosen(3) == {0, 1} and encoder.chosen(4) == {0, 1}
    assert encoder.alike() == [("nl", "de", "ru")]
    assert encoder.overlap() == (pytest.approx(2 / 3), pytest.approx((1 + 1 + 1 + 1 + 2 + 2 + 0) / 7))


def test_pairs_are_ordered_by_section_and_the_language_that_is_not_english(tmp_path) -> None:
    tasks = ["en-ru", "de-en", "en-nl", "ru-en", "nl-en", "en-uk", "en-de", "de-ru"]
    layer = routing_layer(task="pair", tasks=tasks, shares=[[0.25] * 4] * 8)
    (tmp_path / "routing.json").write_text(json.dumps({"layers": [layer]}), encoding="utf-8")
    expected = ("en-nl", "en-de", "en-ru", "en-uk", "nl-en", "de-en", "ru-en", "de-ru")
    assert read_routing(tmp_path / "routing.json")[0].tasks == expected


def test_heat_map_is_valid_svg_with_the_chosen_framed(tmp_path) -> None:
    wide = routing_layer("decoder", experts=128, shares=[[1 / 128] * 128] * 5, routing="token")
    (tmp_path / "routing.json").write_text(json.dumps({"layers": [routing_layer(), wide]}))
    task, token = read_routing(tmp_path / "routing.json")
    svg = ElementTree.fromstring(heat_map(task, 0.5))
    assert len([e for e in svg.iter("rect") if e.get("class") == "frame"]) == 5 * 2
    cells = [e for e in svg.iter("rect") if e.get("class") is None]
    assert len(cells) == 5 * 4
    titles = [title.text for title in svg.iter("title")]
    assert "German, expert 1: 50.0%, chosen" in titles and "German, expert 3: 10.0%" in titles
    darkest = max(cells, key=lambda cell: float(cell.get("fill-opacity", 0)))
    assert darkest.findtext("title") in ("German, expert 1: 50.0%, chosen", "Dutch, expert 2: 50.0%, chosen")
    svg = ElementTree.fromstring(heat_map(token, 1 / 128))
    assert len(list(svg.iter("title"))) == 5 * 128 and not [
        e for e in svg.iter("rect") if e.get("class") == "frame"
    ]
    assert float(svg.get("width", 0)) < 1400


def test_two_layers_have_one_scale_of_color(tmp_path) -> None:
    """A share has the same color in both, though each layer's largest share differs."""
    pale = routing_layer("decoder", shares=[[0.25, 0.25, 0.25, 0.25]] * 5)
    (tmp_path / "routing.json").write_text(json.dumps({"layers": [routing_layer(), pale]}))
    layers = read_routing(tmp_path / "routing.json")
    assert largest_share(layers) == 0.5

    def color(drawing: str, expert: int) -> float:
        cells = [
            e
            for e in ElementTree.fromstring(drawing).iter("rect")
            if (e.findtext("title") or "").startswith(f"Russian, expert {expert}:")
        ]
        return float(cells[0].get("fill-opacity", 0))

    first, second = (heat_map(layer, largest_share(layers)) for layer in layers)
    assert color(first, 1) == color(second, 1) == pytest.approx(0.04 + 0.96 * 0.25 / 0.5, abs=0.01)
