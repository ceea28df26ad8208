"""The OpenAPI document: it names what the server has, and answers to thousands of made-up requests are as it
says.
"""

from __future__ import annotations

import json

import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import booleans
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from support.playing_server import Played, ask, post

from lsmoe_ds.serve.app import PAGE, build_app
from lsmoe_ds.serve.openapi import describe
from lsmoe_ds.serve.settings import Settings

REQUESTS = 40  # of each operation, allowed and not
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(run, cache):
    with Played([run], Settings(cache=cache, chars=400, texts=5)) as played:
        yield played


def test_it_names_each_path_and_method(server):
    routes = {
        (route.path, method.lower())
        for route in build_app(server.service).routes
        if isinstance(route, APIRoute) and route.path.strip("/") not in PAGE
        for method in route.methods
    }
    paths = json.loads(ask(server, "GET", "/openapi.json")[1])["paths"]
    assert routes == {(path, method) for path, operations in paths.items() for method in operations}


def operations() -> list[tuple[str, str]]:
    found = describe(Settings())["paths"]
    return [(method.upper(), path) for path, each in found.items() for method in each]


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), operations())
def test_answers_are_as_it_says(server, method, path, mode):
    """Statuses, types and bodies; of requests that the document allows, and of such that it does not."""
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]

    requests = REQUESTS if "{" not in path else REQUESTS // 4  # the same, by one model

    @settings(max_examples=requests, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), speaks=booleans())
    def check(case: schemathesis.Case, speaks: bool) -> None:
        if speaks and isinstance(case.body, dict) and "source" in case.body:  # or nothing is ever translated
            case.body = {**case.body, "source": "en", "target": "de"}
        if speaks and "{" in path:
            case.path_parameters = {"model": next(iter(server.service.catalog.models))}
        case.call_and_validate(checks=CHECKS, timeout=60)

    try:
        check()
    except Unsatisfiable:  # such as a request without fields that has one wrong
        assert mode is GenerationMode.NEGATIVE


def test_the_server_translates_afterwards(server):
    status, answer = post(server, q="ba de fi", source="en", target="de")
    assert status == 200 and answer["translatedText"]
    assert json.loads(ask(server, "GET", "/health")[1])["status"] == "ok"
    assert server.service.in_progress == 0
