"""A server gives alternatives: the next best translations of its search."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from support.playing_server import Played, ask, post

import lsmoe_ds
from lsmoe_ds.serve import worker
from lsmoe_ds.serve.settings import Settings

TEXTS = ["ba de fi", "ko la mi nobu", "fi fi ba ko", "lu ki"]


def test_alternatives_are_the_next_best(server, run):
    best = lsmoe_ds.load(run).translate_n_best(TEXTS, "en", "de", n=5)
    texts = [[first.text, *(each.text for each in rest if each.text)] for first, *rest in best]
    texts = [list(dict.fromkeys(each))[:4] for each in texts]
    assert all(len(each) > 1 for each in texts)
    first = [post(server, q=TEXTS[0], source="en", target="de", alternatives=n)[1] for n in (1, 2, 4)]
    assert len({each["alternatives"][0] for each in first}) == 1, "whatever their number"
    asked = {"source": "en", "target": "de", "alternatives": 3}
    answer = {"translatedText": [first for first, *_ in texts], "alternatives": [rest for _, *rest in texts]}
    assert post(server, q=TEXTS, **asked) == (200, answer)
    alone = {"translatedText": texts[0][0], "alternatives": texts[0][1:]}
    assert post(server, q=TEXTS[0], **asked) == (200, alone)
    assert post(server, q="", **asked) == (200, {"translatedText": "", "alternatives": []})
    assert post(server, q=[], **asked) == (200, {"translatedText": [], "alternatives": []})
    assert post(server, q="lu", source="de", target="de", alternatives=1)[1]["alternatives"] == []
    # The alternatives of a text join those of its lines; a line that has fewer repeats its last.
    _, answer = post(server, q="\n\n".join(TEXTS[:2]), **asked)
    ranks = [[each[min(rank, len(each) - 1)] for each in texts[:2]] for rank in range(4)]
    whole = list(dict.fromkeys("\n\n".join(rank) for rank in ranks))[:4]
    assert [answer["translatedText"], *answer["alternatives"]] == whole
    body = json.dumps({"q": TEXTS, **asked}).encode()
    _, got = ask(server, "POST", "/translate_stream", body, {"content-type": "application/json"})
    *events, _ = got.splitlines()
    assert [json.loads(event)["alternatives"] for event in events] == [rest for _, *rest in texts]


def test_requests_with_and_without_alternatives_at_once(run, cache, monkeypatch):
    calls, real = [], worker.translate_lines

    def counted(engine, direction, lines, search, **more):
        calls.append((search.n_best, len(lines)))
        return real(engine, direction, lines, search, **more)

    monkeypatch.setattr(worker, "translate_lines", counted)
    with Played([run], Settings(cache=cache, batch_wait=1.0, batch_size=8)) as server:
        post(server, q="ba", source="en", target="de")  # loads
        calls.clear()

        def one(number):
            return post(server, q=TEXTS[0], source="en", target="de", alternatives=number)[1]

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(one, [0, 1, 2, 0, 1, 2, 0, 4]))
    assert sorted(calls) == [(1, 3), (5, 5)], "they wait together, and each kind is a batch"
    numbers = [len(each.get("alternatives", [])) for each in found]
    assert numbers[:7] == [0, 1, 2, 0, 1, 2, 0] and numbers[7] <= 4
    (text,) = lsmoe_ds.load(run).translate(TEXTS[:1], "en", "de")
    assert {each["translatedText"] for each in found} == {text}
