"""Preparing in shards: what is finished is kept, several processes share the work, and the bytes are the
same however it was done.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_corpora import fates_of, keys_of, made_bitext, pairs, recipe, write_fetched, write_lines

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data import keys as keys_module
from lsmoe_ds.data import preparation, shards, stages
from lsmoe_ds.data.bitext import _some
from lsmoe_ds.data.fates import DROPPED, TRAIN
from lsmoe_ds.data.held_out import Claims, mixed
from lsmoe_ds.data.lines import Stretch, index_lines, read_lines
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.shards import FUNCTIONS, encode_task, index_task
from lsmoe_ds.data.stages import Stale, Work, attempt, finished
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import claimed

SHARD = 25


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", SHARD)


def write_corpus(folder: Path, *, changed: int | None = None, more: int = 0) -> Recipe:
    """200 pairs in eight shards; line ``changed`` is another sentence, and ``more`` lines follow."""
    content = pairs("de", "en", 200 + more)
    if changed is not None:
        content[changed] = pairs("de", "en", 1, start=5000)[0]
    for side, code in enumerate(("de", "en")):
        write_lines(folder / f"text.{code}", [pair[side] for pair in content])
    corpora = [{"path": str(folder / "text"), "format": "moses"}]
    return recipe(folder, corpora=corpora, languages=["de"], held_out={"dev": 5, "test": 10})


class Calls(Counter[str]):
    """Count how often tasks of each stage are done; the one in which ``limit`` is passed is interrupted."""

    def __init__(self, patch: pytest.MonkeyPatch, **limit: int) -> None:
        super().__init__()
        for stage, function in FUNCTIONS.items():
            patch.setitem(FUNCTIONS, stage, self._counted(stage, function, limit.get(stage)))

    def _counted(self, stage: str, function: Any, limit: int | None) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if limit is not None and self[stage] >= limit:
                raise KeyboardInterrupt
            self[stage] += 1
            return function(*arguments, **named)

        return call


@pytest.mark.parametrize(("stage", "done"), [("clean", 0), ("clean", 5), ("encode", 3)])
def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, done: int
) -> None:
    settings = write_corpus(tmp_path)
    with monkeypatch.context() as patch:
        before = Calls(patch, **{stage: done})
        with pytest.raises(KeyboardInterrupt):
            prepare(settings)
    said = capsys.readouterr().err
    count = before["clean"] + before["encode"]
    assert (f"{count} finished shards are kept in" in said) == (count > 0)
    assert (tmp_path / "prepared/.small.work").exists() == (count > 0)
    assert not (tmp_path / "prepared/small").exists()
    with monkeypatch.context() as patch:
        after = Calls(patch)
        data = prepare(settings)
    assert before["clean"] + after["clean"] == before["encode"] + after["encode"] == 8
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["small"]
    monkeypatch.setattr(shards, "SHARD", 1 << 18)
    assert prepare(settings, force=True).manifest == data.manifest


@pytest.mark.parametrize(
    ("change", "cleaned"),
    [({"changed": 60}, 1), ({"more": 10}, 1), ({"more": 30}, 2), ({"changed": 60, "more": 10}, 2)],
)
def test_a_changed_input_makes_its_shards_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], cleaned: int
) -> None:
    settings = write_corpus(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Calls(patch, encode=8)
        patch.setattr(preparation, "encode_task", stop)
        prepare(settings)
    write_corpus(tmp_path, **change)
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        data = prepare(settings)
    assert calls["clean"] == cleaned
    assert prepare(settings, force=True).manifest["files"] == data.manifest["files"]


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_another_recipe_makes_anew_what_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_corpus(tmp_path)
    assert settings.data.vocabulary.size == 120
    with monkeypatch.context() as patch, pytest.raises(UserError, match="too small for more than"):
        Calls(patch)
        prepare(with_data(settings, vocabulary={"size": 30000}))
    done = []
    for change in ({}, {"cleaning": {"max_words": 100}}):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            done.append(Calls(patch, encode=2))
            prepare(with_data(settings, **change))
    assert [calls["clean"] for calls in done] == [0, 8]


def with_data(settings: Recipe, **changes: Any) -> Recipe:
    content = settings.model_dump(mode="json", exclude_none=True)
    return Recipe.model_validate({**content, "data": {**content["data"], **changes}})


LEADER = """
import sys, time, yaml
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data import shards
from lsmoe_ds.data.prepare import prepare
shards.SHARD = int(sys.argv[1])
stage, true, count = sys.argv[2], shards.FUNCTIONS[sys.argv[2]], 0
def wait(*arguments, **named):
    global count
    count += 1
    if count == 3:
        print("here", flush=True)
        time.sleep(600)
    return true(*arguments, **named)
shards.FUNCTIONS[stage] = wait
prepare(Recipe.model_validate(yaml.safe_load(sys.argv[3])))
"""


@pytest.mark.parametrize("stage", ["clean", "encode"])
def test_a_helper_does_the_rest_and_leads_when_the_leader_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """The leader is killed in its third shard, when nothing but that one is left to do."""
    settings, left = write_corpus(tmp_path), []
    command = [sys.executable, "-c", LEADER, str(SHARD), stage, settings.to_yaml()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as leader:
        assert leader.stdout is not None and leader.stdout.readline() == "here\n"
        with monkeypatch.context() as patch:
            calls = Calls(patch)

            def kill(_: float) -> None:
                left.append(Counter(calls))
                leader.kill()
                leader.wait()

            patch.setattr(stages.time, "sleep", kill)
            data = prepare(settings, processes=0)
    assert left[0] == {stage: 5}, "the helper has done all but the two finished ones and that of the leader"
    assert calls[stage] == 6
    assert "another process is preparing" in capsys.readouterr().err
    assert prepare(settings, force=True).manifest == data.manifest


def test_processes_that_start_together_make_the_data_once(tmp_path: Path) -> None:
    settings = write_corpus(tmp_path)
    code = "import sys, yaml; from lsmoe_ds.config.recipe import Recipe; from lsmoe_ds.data import shards\n"
    code += f"shards.SHARD = {SHARD}\nfrom lsmoe_ds.data.prepare import prepare\n"
    code += "prepare(Recipe.model_validate(yaml.safe_load(sys.argv[1])), force=True, processes=0)"
    command = [sys.executable, "-c", code, settings.to_yaml()]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert sum("preparing" in text and "it was asked for" in text for text in said) >= 1
    files = prepare(settings).manifest["files"]
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["small"]
    assert prepare(settings, force=True).manifest["files"] == files


# --- tasks


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = Work(tmp_path / "x", FUNCTIONS).folder
    for stage in FUNCTIONS:
        (folder / stage).mkdir(parents=True)
    return folder


def test_a_task_that_another_process_does_is_left_to_it(tmp_path: Path, work: Path) -> None:
    write_lines(tmp_path / "a", ["1", "2"])
    task = index_task(tmp_path / "a")
    with claimed(work / task.name) as mine:
        assert mine and attempt(work, FUNCTIONS, task) is None
    record = attempt(work, FUNCTIONS, task)
    assert record is not None and record["lines"] == 2
    assert [path.name for path in (work / "index").iterdir()] == [task.name.split("/")[1]]


def test_a_damaged_result_is_made_anew(tmp_path: Path, work: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"1\n2\n"))
    task = index_task(tmp_path / "a.gz")
    record = attempt(work, FUNCTIONS, task)
    (work / task.name / "text").write_bytes(b"1")
    assert finished(work / task.name) is None
    assert attempt(work, FUNCTIONS, task) == record == finished(work / task.name)


def test_a_helper_of_a_leader_that_is_gone_does_nothing(tmp_path: Path, work: Path) -> None:
    write_lines(tmp_path / "a", ["1"])
    assert attempt(work, FUNCTIONS, index_task(tmp_path / "a"), run="of another leader") is None
    assert list((work / "index").iterdir()) == []


def test_no_shard_is_encoded_by_fates_that_are_no_longer_true(tmp_path: Path, work: Path) -> None:
    (tmp_path / "fate").write_bytes(b"\0\0\1")
    (tmp_path / "model").write_bytes(b"")
    task = encode_task("clean/x", tmp_path / "fate", 1, 2, tmp_path / "model", "a checksum")
    (tmp_path / "fate").write_bytes(b"\0\0\0")
    with pytest.raises(Stale):
        shards.encode(tmp_path, work, **task.arguments)
    assert attempt(work, FUNCTIONS, task) is None


# --- lines


@pytest.mark.parametrize(
    "content", ["", "a", "a\n", "a\nb\nc", "a\nb\nc\n", "ä\r\n\n\nb\n\n", "a\nb\nc\nd\n"]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [1, 3, 1 << 22])
def test_shards_of_a_file_are_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, packed: bool, block: int
) -> None:
    monkeypatch.setattr("lsmoe_ds.data.lines.BLOCK", block)
    path, plain = tmp_path / "a", tmp_path / "b"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    count, starts, sums = index_lines(path, 3, plain if packed else None)
    whole = list(read_lines(path))
    assert count == len(whole) and len(starts) == len(sums) == -(-count // 3)
    found = []
    for number, (start, sha) in enumerate(zip(starts, sums, strict=True)):
        size = min(3, count - 3 * number)
        stretch = Stretch(plain if packed else path, path, 3 * number + 1, size, start, sha)
        found.append(list(stretch.lines()))
    assert [line for lines in found for line in lines] == whole
    assert len({*sums}) == len({tuple(lines) for lines in found})


def test_an_error_in_a_shard_names_file_and_line(tmp_path: Path) -> None:
    settings = write_corpus(tmp_path)
    lines = (tmp_path / "text.de").read_bytes().split(b"\n")
    lines[70] = b"ein \xff Haus"
    (tmp_path / "text.de").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"text\.de, line 71: not UTF-8 \(byte 0xff at position 5\)"):
        prepare(settings)
    (tmp_path / "text.de").write_bytes(b"\n".join(lines[:40]))
    with pytest.raises(UserError, match=r"text\.de has 40 lines but .*text\.en has 200: aligned files need"):
        prepare(settings)


def test_compressed_text_is_cut_as_plain_text_is(tmp_path: Path) -> None:
    settings = write_corpus(tmp_path)
    files = prepare(settings).manifest["files"]
    for code in ("de", "en"):
        (tmp_path / f"text.{code}.gz").write_bytes(gzip.compress((tmp_path / f"text.{code}").read_bytes()))
        (tmp_path / f"text.{code}").unlink()
    assert prepare(settings, force=True).manifest["files"] == files


def test_the_same_text_twice_is_cleaned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("django", "wagtail"):
        write_fetched(tmp_path, name, {"de-en": pairs("de", "en", 100)})
    calls = Calls(monkeypatch)
    data = prepare(recipe(tmp_path, corpora=["django", "wagtail"], languages=["de"]))
    assert calls["clean"] == 4 and data.manifest["cleaning"]["de-en"]["duplicate"] == 100


# --- what depends on all pairs


@pytest.mark.parametrize("most", [0, 1, 7, 40, 99, 200])
def test_a_cap_keeps_the_first_in_a_random_order(tmp_path: Path, most: int) -> None:
    chance = np.random.default_rng(3)
    bitext = made_bitext(tmp_path, "de-en", [(n, int(chance.integers(40))) for n in range(100)], shard=7)
    fates, english = np.array(fates_of(bitext)), np.array(keys_of(bitext, 1), dtype=np.uint64)
    bitext.set_fate(bitext.pieces[2], np.full(7, DROPPED, dtype=np.uint8))
    fates[14:21] = DROPPED
    train = np.flatnonzero(fates == TRAIN)
    order = np.argsort(mixed(english[train], 5), kind="stable")
    fates[train[order[most:]]] = DROPPED
    bitext.cap(most, seed=5)
    assert fates_of(bitext) == fates.tolist()
    assert bitext.counts["beyond max_pairs"] == max(0, 93 - most)


def test_numbers_for_a_sample_of_many() -> None:
    for count in (1000, (1 << 22) + 1):
        found = _some(count, 900, np.random.default_rng(1))
        assert len(np.unique(found)) == 900 and (np.diff(found) > 0).all()
        assert found[0] >= 0 and found[-1] < count


def test_memory_does_not_grow_with_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times as many pairs, in shards of the same size, with all that compares pairs with each other."""
    monkeypatch.setattr(keys_module, "KEYS_AT_ONCE", 2000)
    peaks = []
    for count in (4_000, 24_000):
        chance = np.random.default_rng(1)
        keys = chance.integers(0, 1 << 62, (count, 2)).tolist()
        claims = Claims()
        claims.add("test", np.array(keys[0], dtype=np.uint64))
        bitext = made_bitext(tmp_path / str(count), "de-en", keys, shard=1000)
        tracemalloc.start()
        bitext.drop_copies()
        bitext.candidates(claims)
        bitext.leave_out(claims)
        bitext.cap(count // 2, seed=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert bitext.size("train") == count // 2
    assert peaks[1] < 1.3 * peaks[0]
