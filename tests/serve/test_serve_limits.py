"""What a server refuses, and with which status; hostile bodies are a client's error, never the server's."""

from __future__ import annotations

import http.client
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode, urlsplit

import pytest
from support.playing_server import Played, ask, post

from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import normalize_code
from lsmoe_ds.serve import worker
from lsmoe_ds.serve.limits import Buckets, is_key, neighborhood, read_keys
from lsmoe_ds.serve.models import Catalog
from lsmoe_ds.serve.settings import Settings, read_size, read_time
from lsmoe_ds.serve.text import split_lines

JSON, FORM = {"content-type": "application/json"}, {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def server(run, cache):
    with Played([run], Settings(cache=cache, body=20_000, chars=500, texts=20)) as played:
        yield played


def refusal(server, path="/translate", body=b"", headers=None) -> tuple[int, str]:
    status, got, had = ask(server, "POST", path, body, headers or JSON, True)
    assert had["content-type"] == "application/json" and had["x-content-type-options"] == "nosniff"
    value = json.loads(got)
    assert list(value) == ["error"] and "\n" not in value["error"]
    return status, value["error"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"source": "en", "target": "de"}, 400, "the field q, the text, is missing"),
        ({"q": 3, "source": "en", "target": "de"}, 400, "q should be a text, or a list of texts"),
        ({"q": ["a", None], "source": "en", "target": "de"}, 400, "q should be a text, or a list of texts"),
        ({"q": "a", "source": "en"}, 400, "the field target is missing"),
        ({"q": "a", "target": "de"}, 400, "the field source is missing"),
        ({"q": "a", "source": "en", "target": ["de"]}, 400, "target should be a text"),
        (
            {"q": "a", "source": "nl", "target": "de"},
            400,
            "source 'nl' is no language here: there are de, en",
        ),
        ({"q": "a", "source": "en", "target": "auto"}, 400, "target 'auto' is no language here"),
        ({"q": "a", "source": "de", "target": "fr"}, 400, "de-fr is not translated here: de is translated"),
        ({"q": "a", "source": "en", "target": "de", "format": "html"}, 400, "format is text alone"),
        ({"q": "a", "source": "en", "target": "de", "stream": 3}, 400, "stream should be true or false"),
        ({"q": "a", "source": "en", "target": "de", "alternatives": 5}, 400, "a whole number from 0 to 4"),
        ({"q": "a", "source": "en", "target": "de", "alternatives": -1}, 400, "a whole number from 0 to 4"),
        ({"q": "a", "source": "en", "target": "de", "alternatives": 1.5}, 400, "a whole number from 0 to 4"),
        ({"q": "a", "source": "en", "target": "de", "alternatives": True}, 400, "a whole number from 0 to 4"),
        (
            {"q": "a", "source": "en", "target": "de", "alternatives": "1.5"},
            400,
            "a whole number from 0 to 4",
        ),
        ({"q": "\ud800", "source": "en", "target": "de"}, 400, "half of a pair of surrogates at character 1"),
        ({"q": "a", "source": "\ud800\n\0", "target": "de"}, 400, "is no language here"),
        ({"q": "a", "source": "e" * 5000, "target": "de"}, 400, "is no language here"),
        ({"q": "a" * 501, "source": "en", "target": "de"}, 413, "q has 501 characters: at most 500"),
        ({"q": ["a"] * 10_000, "source": "en", "target": "de"}, 413, "more than the 20,000 bytes"),
        ({"q": ["a"] * 21, "source": "en", "target": "de"}, 413, "q has 21 texts: at most 20 are allowed"),
    ],
)
def test_fields_that_are_refused(server, fields, status, message):
    for path in ("/translate", "/translate_stream"):
        found, said = refusal(server, path, json.dumps(fields).encode())
        assert found == status and message in said


def test_bodies_that_are_refused(server):
    good = {"q": "ba", "source": "en", "target": "de"}
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    for body, headers, status, message in (
        (b"{", JSON, 400, "the body is no JSON: see line 1, column 2"),
        (b"[]", JSON, 400, "the body should be an object"),
        (b"", JSON, 400, "the field q, the text, is missing"),
        (b"[" * 15_000, JSON, 400, "the body is nested too deeply"),
        (b'{"a":' * 3000, JSON, 400, "the body is nested too deeply"),
        (b'{"q": ' + b"1" * 10_000 + b"}", JSON, 400, "the body is no JSON"),
        (b"\xff\xfe{", JSON, 400, "the body is not UTF-8"),
        (b"a" * 20_001, JSON, 413, "the request has more than the 20,000 bytes that are allowed"),
        (b"q=%ff&source=en&target=de", FORM, 400, "the form is not percent-encoded UTF-8"),
        (b"q=\xe4", FORM, 400, "the form is not percent-encoded UTF-8"),
        (b"&".join([b"q=a"] * 1001), FORM, 413, "the form has more than 1,000 fields"),
        (b"--x\r\n\r\nba\r\n--x--", multipart, 400, "the form is damaged"),
        (b"--x", {"content-type": "multipart/form-data"}, 400, "the form does not say its boundary"),
        (json.dumps(good).encode("utf-16"), JSON, 400, "the body is not UTF-8"),
    ):
        found, said = refusal(server, body=body, headers=headers)
        assert found == status and message in said, (body[:30], said)
    # Without a length the body is cut off while it is read.
    status, _ = ask(server, "POST", "/translate", iter([b"a" * 9000] * 3), JSON)
    assert status == 413


def test_alternatives_are_read_as_numbers_and_forms_write_them(server):
    asked = {"q": "ba", "source": "en", "target": "de"}
    wanted = post(server, **asked, alternatives=2)
    assert len(wanted[1]["alternatives"]) == 2
    for given in (2.0, "2", " 2 ", "+2"):
        assert post(server, **asked, alternatives=given) == wanted
    for given in (None, "", 0, "0"):
        assert post(server, **asked, alternatives=given) == post(server, **asked)


def test_forms_are_read(server):
    wanted = post(server, q=["ba de", "lu & ki"], source="en", target="de")[1]["translatedText"]
    fields = {"q": "lu & ki", "source": "en", "target": "de", "format": "text", "api_key": ""}
    status, got = ask(server, "POST", "/translate", urlencode(fields), FORM)
    assert (status, json.loads(got)) == (200, {"translatedText": wanted[1]})
    several = urlencode([("q", "ba de"), ("q", "lu & ki"), ("source", "en"), ("target", "de")])
    assert json.loads(ask(server, "POST", "/translate", several, FORM)[1]) == {"translatedText": wanted}
    parts = "".join(
        f'--=x y\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    headers = {"content-type": 'multipart/form-data; boundary="=x y"'}
    status, got = ask(server, "POST", "/translate", f"{parts}--=x y--\r\n", headers)
    assert (status, json.loads(got)) == (200, {"translatedText": wanted[1]})


def test_strange_text_is_translated(server):
    for text in ("\0", "ba\0de", "\u202e\ufeff", "<2fr> ba", "😀" * 60, "\x1b[31m", "a" * 500, "\r" * 400):
        status, answer = post(server, q=text, source="en", target="de")
        assert status == 200 and isinstance(answer["translatedText"], str)
        assert post(server, q=text, source="auto", target="de")[0] == 200
        assert post(server, "/detect", q=text)[0] == 200


def test_random_bodies_never_fail_the_server(server):
    generator = random.Random(3)
    good = json.dumps({"q": ["ba de", "fi"], "source": "auto", "target": "de", "stream": False}).encode()
    for _ in range(150):
        body = bytearray(good)
        for _ in range(generator.randint(1, 6)):
            at = generator.randrange(len(body))
            body[at : at + generator.randint(0, 3)] = generator.randbytes(generator.randint(0, 3))
        path = generator.choice(["/translate", "/translate_stream", "/detect"])
        headers = generator.choice([JSON, FORM, {}, {"content-type": "multipart/form-data; boundary=q"}])
        assert ask(server, "POST", path, bytes(body), headers)[0] in (200, 400, 413)


def test_paths_that_there_are_not(server):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/page/page.html", 404),
        ("POST", "/models/%2e%2e/translate", 404),
        ("GET", "/translate", 405),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
    ):
        found, got = ask(server, method, path)
        assert found == status and list(json.loads(got)) == ["error"]


def test_labels_and_memory_do_not_grow_with_what_strangers_send(server):
    size = normalize_code.cache_info().currsize
    for number in range(50):
        code = f"qx-{number:04}"
        assert post(server, q="a", source=code, target="de")[0] == 400
    assert normalize_code.cache_info().currsize <= size + 2
    text = ask(server, "GET", "/metrics")[1].decode()
    assert "qx" not in text and 'lsmoe_requests_total{direction="none",status="400"}' in text


def test_too_many_requests(run, cache):
    with Played([run], Settings(cache=cache, rate=2)) as server:
        assert [post(server, "/detect", q="ba")[0] for _ in range(2)] == [200, 200]
        status, got, headers = ask(server, "POST", "/translate", b"{}", JSON, True)
        assert status == 429 and 1 <= int(headers["retry-after"]) <= 30
        assert json.loads(got)["error"].startswith("at most 2 requests a minute are allowed")
        assert ask(server, "GET", "/languages")[0] == 200


def test_keys(run, cache, tmp_path, capfd):
    (tmp_path / "keys").write_text("# ours\nfirst-secret\n\n second-secret \n")
    with Played([run], Settings(cache=cache, keys=read_keys(tmp_path / "keys"))) as server:
        fields = {"q": "ba", "source": "en", "target": "de"}
        for key in ("", "first-secre", "\ud800", "# ours"):
            body = json.dumps(fields | {"api_key": key}).encode()
            assert refusal(server, body=body)[0] == 403
        assert refusal(server, body=json.dumps(fields | {"api_key": 3}).encode())[0] == 403
        for key in ("first-secret", "second-secret"):
            assert post(server, **fields, api_key=key)[0] == 200
            assert post(server, "/detect", q="ba", api_key=key)[0] == 200
        assert json.loads(ask(server, "GET", "/frontend/settings")[1])["keyRequired"] is True
    said = capfd.readouterr()
    assert "secret" not in said.out + said.err
    assert is_key("first-secret", read_keys(tmp_path / "keys")) and not is_key("", ())


def test_keys_that_are_none(tmp_path):
    for content, message in ((b"\n# x\n", "holds no API key"), (b"\xff", "is not UTF-8"), (b"abc", "line 1")):
        (tmp_path / "keys").write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            read_keys(tmp_path / "keys")
        assert "abc" not in str(raised.value)


def test_a_full_queue_and_a_late_answer(run, cache):
    with Played([run], Settings(cache=cache, queue=1, batch_wait=1.0)) as server:
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(post, server, q="ba", source="en", target="de")
            while not server.service.in_progress:
                assert not first.done()
            status, _, headers = ask(server, "POST", "/detect", b"", JSON, True)
            assert status == 503 and headers["retry-after"] == "1"
            assert first.result()[0] == 200
        server.service.stopping = True
        assert refusal(server) == (503, "the server is stopping")
        assert ask(server, "GET", "/health")[0] == 503
    with Played([run], Settings(cache=cache, patience=0.2, batch_wait=1.0)) as server:
        status, answer = post(server, q="ba", source="en", target="de")
        assert status == 503 and "took longer than 0.2 s" in answer["error"]
        body = json.dumps({"q": "ba", "source": "en", "target": "de", "stream": True}).encode()
        (event,) = map(json.loads, ask(server, "POST", "/translate", body, JSON)[1].splitlines())
        assert "took longer than 0.2 s" in event["error"]
        # Who sends no body gives the place in the queue up.
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        connection.putrequest("POST", "/translate")
        connection.putheader("content-length", "5")
        connection.endheaders()
        assert connection.getresponse().status == 408
        connection.close()
        assert server.service.in_progress == 0


def test_a_stream_that_is_cut_off_says_so(run, cache, monkeypatch, capfd):
    """A line of it takes longer than the grace of a server that stops."""
    go, real = threading.Event(), worker.translate_lines

    def slow(engine, direction, texts, *rest, **more):
        if "fi" in texts:
            go.wait(30)
        return real(engine, direction, texts, *rest, **more)

    monkeypatch.setattr(worker, "translate_lines", slow)
    with ThreadPoolExecutor(1) as threads:
        with Played([run], Settings(cache=cache, batch_size=1), grace=1) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
            asked = {"q": ["ba", "fi"], "source": "en", "target": "de"}
            connection.request("POST", "/translate_stream", json.dumps(asked), JSON)
            answer = connection.getresponse()
            assert answer.status == 200 and json.loads(answer.readline())["index"] == 0
            rest = threads.submit(answer.read)
            threading.Timer(2.5, go.set).start()  # the pool waits for its workers
        *_, last = map(json.loads, rest.result().splitlines())
    assert last == {"error": "the server is stopping"}
    assert server.service.in_progress == 0
    assert "Traceback" not in capfd.readouterr().err


def test_who_hangs_up_is_not_translated_for(run, cache, monkeypatch):
    begun, go, lines = threading.Event(), threading.Event(), []
    real = worker.translate_lines

    def slow(engine, direction, texts, *rest, **more):
        lines.extend(texts)
        begun.set()
        go.wait(30)
        return real(engine, direction, texts, *rest, **more)

    monkeypatch.setattr(worker, "translate_lines", slow)
    with Played([run], Settings(cache=cache, batch_size=1)) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        asked = {"q": ["ba", "de", "fi"], "source": "en", "target": "de"}
        connection.request("POST", "/translate", json.dumps(asked), JSON)
        assert begun.wait(30)
        assert ask(server, "GET", "/health")[0] == 200, "the event loop is free while a worker translates"
        connection.close()
        while server.service.in_progress:
            assert begun.is_set()
        connection.connect()
        connection.request("POST", "/translate_stream", json.dumps(asked | {"q": "ka"}), JSON)
        assert connection.getresponse().status == 200 and server.service.in_progress == 1
        connection.close()
        connection.sock = None
        while server.service.in_progress:
            assert begun.is_set()
        go.set()
        assert post(server, q="lu", source="en", target="de")[0] == 200
    assert lines == ["ba", "lu"]


def test_a_stream_says_what_went_wrong(run, cache, monkeypatch):
    def fails(*rest, **more):
        raise RuntimeError("out of memory at /secret/path")

    monkeypatch.setattr(worker, "translate_lines", fails)
    with Played([run], Settings(cache=cache)) as server:
        body = json.dumps({"q": "ba", "source": "en", "target": "de"}).encode()
        events = ask(server, "POST", "/translate_stream", body, JSON)[1].splitlines()
        assert [json.loads(event) for event in events] == [{"error": "the translation failed"}]
        assert refusal(server, body=body) == (500, "the translation failed")


def test_a_model_that_cannot_be_loaded(run, cache, capfd):
    with Played([run], Settings(cache=cache)) as server:
        model = server.service.catalog.models["small"]
        server.service.catalog._of[Direction("en", "de")] = type(model)(
            "gone",
            run / "gone",
            type(model.stored)("sparse", run, run / "gone", model.stored.recipe),
            "cut",
            "torch",
        )
        body = json.dumps({"q": "ba", "source": "en", "target": "de"}).encode()
        for _ in range(2):  # it is tried again
            status, said = refusal(server, body=body)
            assert status == 503 and "cannot be loaded: the server's log says why" in said
            assert str(run) not in said
        assert post(server, q="ba", source="de", target="en")[0] == 200
    assert capfd.readouterr().err.count("en-de of gone cannot be loaded: there is no folder") == 2


def test_buckets_fill_up_and_are_bounded():
    now = [0.0]
    buckets = Buckets(60, most=3, clock=lambda: now[0])
    assert [buckets.take("1.2.3.4") for _ in range(60)] == [0.0] * 60
    assert buckets.take("1.2.3.4") == pytest.approx(1.0)
    assert buckets.take("::ffff:1.2.3.4") == pytest.approx(1.0) and buckets.take("1.2.3.5") == 0.0
    now[0] = 1.5
    assert [buckets.take("1.2.3.4") for _ in range(2)] == [0.0, pytest.approx(0.5)]
    for number in range(100):
        buckets.take(f"10.0.0.{number}")
    assert len(buckets) == 3
    assert neighborhood("2001:db8::1") == neighborhood("2001:db8::ffff") != neighborhood("2001:db8:0:1::1")
    assert Buckets(0).take("1.2.3.4") == 0.0


def test_sizes_times_and_lines():
    assert [read_size(text, "") for text in ("4GB", "2 GiB", "500k", "7", "1.5MB")] == [
        4_000_000_000,
        2**31,
        500_000,
        7,
        1_500_000,
    ]
    assert [read_time(text, "") for text in ("5ms", "2min", "1.5 s", "3")] == [0.005, 120.0, 1.5, 3.0]
    for text in ("", "GB", "-4GB", "4XB", "1e9", "٤GB", "9" * 400):
        with pytest.raises(UserError, match="is no size"):
            read_size(text, "--memory")
    for text in ("a\nb", "\r\n\n a\u2029b\t", "", "\v", "a"):
        lines = split_lines(text)
        assert "".join(map("".join, lines)) == text
        assert all(line.words == line.words.strip() for line in lines)
    assert [line.words for line in split_lines("a\r\n\x1cb\x85c")] == ["a", "b", "c"]


def test_codes_are_read_as_on_the_command_line(server):
    catalog: Catalog = server.service.catalog
    assert [catalog.own(code) for code in ("de", "deu_Latn", "DE-at", "ger", "français", "x" * 99)] == [
        "de",
        "de",
        None,
        "de",
        None,
        None,
    ]
