"""Nothing that is read can do harm: damaged and hostile files get a sentence each, or change nothing.

``LSMOE_FUZZ=N`` damages each file in N times as many ways.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.commands import inside, tree
from support.mutations import Mutation, in_bytes, in_header, in_json, in_model, in_yaml
from support.small_run import PAIR_TOP1, TARGET_TOP2, make_recipe, make_run

from lsmoe_ds.checkpoint import tensors
from lsmoe_ds.checkpoint.optimizer import open_optimizer
from lsmoe_ds.checkpoint.run_folder import list_checkpoints, newest_whole, to_remove
from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.fingerprints import reason_to_prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import convert_to_dense
from lsmoe_ds.folders import describe_files
from lsmoe_ds.inference.load import load

TIMES = int(os.environ.get("LSMOE_FUZZ", "1"))
SECONDS = 10  # for one file; a reader that hangs is stopped
MEMORY = 2 << 30  # bytes that a reader may ask for beyond what the process has
LONGEST = 1100  # characters of a sentence
EN_DE = Direction("en", "de")
TEXT = "ba defi kola, nobu"
RUN, CHECKPOINT, WHOLE, DENSE, DATA = "run", "run/checkpoints/step-2", "whole", "dense", "data/prepared/small"
SHAPES: dict[str, tuple[int, ...]] = {}  # of the run's parameters


@pytest.fixture(scope="module")
def place(pool, tmp_path_factory):
    """Yield a folder with a run, what it was converted to, and its prepared data.

    The run has two tensor-parallel ranks. It was converted to a dense folder, and to a consolidated one in
    shards with optimizer state. The folder is the working directory.
    """
    folder = tmp_path_factory.mktemp("fuzz") / "place"
    folder.mkdir()
    make_run(pool, folder, TARGET_TOP2, PAIR_TOP1, 2, tensor=2)[0].rename(folder / RUN)
    with inside(folder), pytest.MonkeyPatch.context() as patch:
        convert_to_dense(RUN, EN_DE, DENSE)
        patch.setattr(tensors, "SHARD", 20_000)
        convert(RUN, "consolidated", None, WHOLE, check=0, optimizer=True)
        SHAPES.update(
            {name: tuple(value.shape) for name, value in read_weights(find_model(RUN)).tensors.items()}
        )
        yield folder


# What commands do with a file. Each returns what can be compared.


def weights(path: str) -> Any:
    return dict(read_weights(find_model(path)).tensors)


def model(path: str) -> Any:
    return load(path, "cpu").model.state_dict()


def dense(path: str) -> Any:
    out = Path("out")
    try:
        convert_to_dense(path, EN_DE, out)
        return dict(read_weights(find_model(out)).tensors)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def whole_again(path: str) -> Any:
    out = Path("out")
    try:
        convert(path, "consolidated", None, out, check=0)
        return dict(read_weights(find_model(out)).tensors)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def optimizer(path: str) -> Any:
    state = open_optimizer(Path(path), verify=True)
    found = {
        f"{name}.{key}": value
        for name, shape in SHAPES.items()
        for key, value in state.whole(name, shape).items()
    }
    return found | {"step": torch.tensor(state.step)}


def resumed(path: str) -> Any:
    found, _ = newest_whole(Path(path))
    to_remove(list_checkpoints(Path(path)), 1, 1)
    return found


def vocabulary(path: str) -> Any:
    found = Vocabulary.load(path)
    ids = found.encode(TEXT)
    return found.size, found.codes, ids, found.decode(ids)


def prepared(path: str) -> Any:
    data = PreparedData.open(path)
    found: list[Any] = [data.vocabulary.encode(TEXT), data.languages]
    for direction in (Direction("en", "de"), Direction("fr", "en")):
        found += [
            data.text(direction, "test"),
            sum(splits["train"]["pairs"] for splits in data.manifest["bitexts"].values()),
        ]
        for store in (data.tokens(direction, "train").source, data.tokens(direction, "dev").target):
            found += [store.lengths[:].tolist(), [store[index].tolist() for index in range(len(store))]]
    return found


def prepared_again(path: str) -> Any:
    return (
        reason_to_prepare(make_recipe(Path(path).absolute().parents[2], TARGET_TOP2, PAIR_TOP1, tensor=2))
        and None
    )


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return bool(first == second)


class Group(NamedTuple):
    """A file and what is done to it; ``home`` is what is read. With ``mended`` the sums are made right again,
    so that what reads the file is really reached; then another value may come of it, otherwise only the same.
    """

    file: str
    mutation: Mutation
    read: Callable[[str], Any]
    home: str
    mended: bool = False
    count: int = 20

    @property
    def name(self) -> str:
        mended = "-mended" if self.mended else ""
        return f"{self.file.replace('/', '-')}-{self.mutation.__name__}-{self.read.__name__}{mended}"


GROUPS = [
    Group(f"{CHECKPOINT}/manifest.json", in_json, weights, RUN),
    Group(f"{CHECKPOINT}/manifest.json", in_json, resumed, RUN, True),
    Group(f"{CHECKPOINT}/state.json", in_json, weights, RUN),
    Group(f"{CHECKPOINT}/state.json", in_json, model, RUN, True),
    Group(f"{CHECKPOINT}/state.json", in_json, optimizer, CHECKPOINT, True),
    Group(f"{CHECKPOINT}/state.json", in_json, resumed, RUN, True),
    Group(f"{CHECKPOINT}/pieces-rank-00000.json", in_json, optimizer, CHECKPOINT),
    Group(f"{CHECKPOINT}/pieces-rank-00001.json", in_json, optimizer, CHECKPOINT, True, 60),
    Group(f"{CHECKPOINT}/mp_rank_00_model_states.pt", in_bytes, weights, RUN, True),
    Group("OPTIMIZER", in_bytes, optimizer, CHECKPOINT, True),
    Group(f"{WHOLE}/provenance.json", in_json, weights, WHOLE),
    Group(f"{WHOLE}/provenance.json", in_json, whole_again, WHOLE),
    Group(f"{WHOLE}/model.safetensors.index.json", in_json, weights, WHOLE),
    Group(f"{WHOLE}/model.safetensors.index.json", in_json, model, WHOLE, True),
    Group(f"{WHOLE}/optimizer.safetensors.index.json", in_json, optimizer, WHOLE, True),
    Group(f"{WHOLE}/state.json", in_json, optimizer, WHOLE, True),
    Group("SHARD", in_header, weights, WHOLE, True, 60),
    Group(f"{DENSE}/model.safetensors", in_header, model, DENSE, True, 60),
    Group(f"{DENSE}/model.safetensors", in_bytes, weights, DENSE),
    Group(f"{DENSE}/provenance.json", in_json, model, DENSE),
    Group(f"{RUN}/recipe.yaml", in_yaml, load_recipe, f"{RUN}/recipe.yaml", True, 60),
    Group(f"{RUN}/recipe.yaml", in_yaml, model, RUN, True, 20),
    Group(f"{RUN}/recipe.yaml", in_yaml, dense, RUN, True, 20),
    Group(f"{DENSE}/recipe.yaml", in_yaml, model, DENSE, True, 20),
    Group(f"{RUN}/vocabulary.model", in_bytes, vocabulary, f"{RUN}/vocabulary.model", True, 60),
    Group(f"{RUN}/vocabulary.model", in_model, vocabulary, f"{RUN}/vocabulary.model", True, 60),
    Group(f"{DATA}/manifest.json", in_json, prepared, DATA, True),
    Group(f"{DATA}/manifest.json", in_json, prepared_again, DATA, True),
    Group(f"{DATA}/train/de-en/de.offsets.npy", in_bytes, prepared, DATA, True),
    Group(f"{DATA}/train/de-en/en.tokens.npy", in_bytes, prepared, DATA, True),
]


def resolve(group: Group) -> Path:
    """Return the path of the group's file.

    Some names are known only once the file is written.
    """
    if group.file == "OPTIMIZER":
        return sorted(Path(CHECKPOINT).glob("*optim_states.pt"))[0]
    if group.file == "SHARD":
        return sorted(Path(WHOLE).glob("model-*.safetensors"))[1]
    return Path(group.file)


def mend(path: Path) -> None:
    """Correct the size and checksum of a changed file wherever they are recorded."""
    for folder in path.parents:
        for name in ("manifest.json", "provenance.json"):
            if (folder / name).is_file() and path != folder / name:
                noted = json.loads((folder / name).read_text())
                noted["files"].update(describe_files(folder, [str(path.relative_to(folder))]))
                (folder / name).write_text(json.dumps(noted))


@contextmanager
def limits() -> Iterator[None]:
    """Gibibytes asked for are a MemoryError; what takes too long a TimeoutError."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer after {SECONDS} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, old)


def attempt(read: Callable[[str], Any], home: str, known: Any = None) -> str | None:
    """Call a reader and return what is wrong with its answer, or None if nothing is."""
    try:
        with limits():
            found = read(home)
        return None if known is None or same(known, found) else "another value was read"
    except UserError as error:
        said = str(error)
        return (
            None
            if said and said.isprintable() and len(said) < LONGEST
            else f"no readable sentence: {said[:1000]!r} ({len(said)})"
        )
    except BaseException:
        return traceback.format_exc(limit=-8)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_sentence_or_the_same(place, group):
    path = resolve(group)
    content, folder = path.read_bytes(), place.parent
    notes = {p: p.read_bytes() for p in [*path.parent.glob("*.json"), *Path(DATA).glob("*.json")]}
    known = group.read(group.home)
    failures = []
    count = group.count * TIMES
    for seed in range(count):
        path.write_bytes(group.mutation(content, random.Random(f"{group.name} {seed}")))
        if group.mended:
            mend(path)
        before = tree(folder)
        wrong = attempt(group.read, group.home, None if group.mended else known)
        if tree(folder) != before:
            wrong = f"{wrong or ''} something was written: {sorted(tree(folder).items() ^ before.items())}"
        if wrong is not None:
            failures.append(f"seed {seed}: {wrong}")
        path.write_bytes(content)
        for other, text in notes.items():
            other.write_bytes(text)
    assert not failures, f"{len(failures)} of {count}\n" + "\n".join(failures[:10])


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch written",)


@pytest.mark.parametrize("zipped", [True, False], ids=["as torch writes it", "a bare pickle"])
@pytest.mark.parametrize(
    ("files", "read", "home"),
    [
        ("mp_rank_00_model_states.pt", weights, RUN),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", model, RUN),
        ("*optim_states.pt", optimizer, CHECKPOINT),
    ],
)
def test_a_pickle_does_not_run(place, files, read, home, zipped):
    paths = sorted(Path(CHECKPOINT).glob(files))
    before = {path: path.read_bytes() for path in [*paths, Path(CHECKPOINT, "manifest.json")]}
    assert paths
    try:
        for path in paths:
            torch.save(
                {"module": Evil(), "optimizer_state_dict": Evil()},
                path,
                _use_new_zipfile_serialization=zipped,
            )
            mend(path)
        wrong = attempt(read, home, known={})
        assert wrong is None and not Path("written").exists(), wrong
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_a_tensor_larger_than_its_file(place):
    """Strides of 0 make a tensor of any size out of one value."""
    path = Path(CHECKPOINT, "mp_rank_00_model_states.pt")
    before = {each: each.read_bytes() for each in (path, Path(CHECKPOINT, "manifest.json"))}
    try:
        held = torch.load(path, weights_only=True)
        held["module"]["embedding.tokens.weight"] = torch.zeros(1).expand(2**18, 2**18)
        torch.save(held, path)
        mend(path)
        with pytest.raises(UserError, match="larger than the file"):
            weights(RUN)
    finally:
        for each, content in before.items():
            each.write_bytes(content)
