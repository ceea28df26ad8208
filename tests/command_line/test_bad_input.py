"""Bad input gets one clear sentence and status 2, and leaves everything as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import inside, main, tree
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run, write_corpus

from lsmoe_ds.data.prepare import prepare


@pytest.fixture(scope="module")
def place(tmp_path_factory, pool):
    """Return a folder with a corpus, prepared data, two runs and a converted folder.

    One run is task-routed, the other token-routed. Cases work on a copy of the folder.
    """
    folder = tmp_path_factory.mktemp("place")
    write_corpus(folder)
    for name, encoder in (("run", TARGET_TOP2), ("token", TOKEN_TOP2)):
        make_run(pool, folder, encoder, TARGET_TOP2)[0].rename(folder / f"made-{name}")
    for made in folder.glob("made-*"):
        made.rename(folder / made.name.removeprefix("made-"))
    with inside(folder):
        for name in ("run", "token"):  # relative paths, so that a copy of the place stands for itself
            stored = Path(name, "recipe.yaml")
            stored.write_text(stored.read_text().replace(f"{folder}/", ""))
        recipe_here = make_recipe(Path("."), TARGET_TOP2, TARGET_TOP2)
        Path("good.yaml").write_text(recipe_here.to_yaml())
        prepare(recipe_here)
        main(
            [
                "convert",
                "run",
                "--as",
                "dense",
                "--from",
                "en",
                "--to",
                "de",
                "--out",
                "dense",
                "--check",
                "2",
            ]
        )
    return folder


Change = Callable[[], None]


def recipe(change: Callable[[dict[str, Any]], object]) -> Change:
    """Return a function that writes bad.yaml: the good recipe, changed."""

    def write() -> None:
        value = yaml.safe_load(Path("good.yaml").read_text())
        change(value)
        Path("bad.yaml").write_text(yaml.safe_dump(value, sort_keys=False))

    return write


def stored(change: Callable[[dict[str, Any]], object]) -> Change:
    """Return a function that changes the recipe of the run."""

    def write() -> None:
        value = yaml.safe_load(Path("run/recipe.yaml").read_text())
        change(value)
        Path("run/recipe.yaml").write_text(yaml.safe_dump(value, sort_keys=False))

    return write


def text(content: str | bytes, file: str = "bad.yaml") -> Change:

    def write() -> None:
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def with_corpus(content: str | bytes, **more: Any) -> Change:
    def write() -> None:
        text(content, "bad.tsv")()
        recipe(lambda r: r["data"].update(corpora=[{"path": "bad.tsv", "format": "tsv"}], **more))()

    return write


def spoil(file: str) -> Change:
    """Return a function that changes the byte in the middle of a file."""

    def change() -> None:
        content = bytearray(Path(file).read_bytes())
        content[len(content) // 2] ^= 0xFF
        Path(file).write_bytes(content)

    return change


def cut(file: str) -> Change:
    return lambda: os.truncate(file, Path(file).stat().st_size // 2)


def moses() -> None:
    Path("p.en").write_text("one two three\nfour five six\n")
    Path("p.de").write_text("eins zwei drei\n")
    recipe(
        lambda r: r["data"].update(
            corpora=[{"path": "p", "format": "moses"}], languages=["de"], directions=[]
        )
    )()


CHECKPOINT = "run/checkpoints/step-2"
PREPARE = ["data", "prepare", "bad.yaml"]
TRAIN = ["train", "bad.yaml", "--out", "new"]
NOTHING: Change = lambda: None  # noqa: E731

# fmt: off
CASES: list[tuple[str, Change, list[str], str]] = [
    # recipes
    ("no recipe", NOTHING, TRAIN, "there is no recipe bad.yaml"),
    ("no pair that fits", NOTHING, ["train", "good.yaml", "--set", "data.batch.max_length=4", "--out", "new"], "no training pair of direction"),
    ("folder as recipe", NOTHING, ["train", "run"], "recipe run is a folder: give run/recipe.yaml"),
    ("not YAML", text("name: [a"), TRAIN, "bad.yaml is not valid YAML"),
    ("not UTF-8", text(b"name: \xff\xfe"), TRAIN, "bad.yaml cannot be read"),
    ("not a mapping", text("- a\n- b\n"), TRAIN, "must be a mapping with the keys name, data, model"),
    ("empty recipe", text(""), TRAIN, "must be a mapping with the keys name, data, model"),
    ("key twice", text("name: a\nname: b\n"), TRAIN, "'name' is written twice, on lines 1 and 2"),
    ("missing key", recipe(lambda r: r.pop("training")), TRAIN, "'training' is missing"),
    ("unknown key", recipe(lambda r: r["training"].update(dropuot=0.1)), TRAIN, "unknown key 'training.dropuot' (did you mean 'dropout'?)"),
    ("unknown section", recipe(lambda r: r.update(modle={})), TRAIN, "unknown key 'modle' (did you mean 'model'?)"),
    ("unknown key of a corpus", recipe(lambda r: r["data"]["corpora"][0].update(fromat="tsv")), TRAIN, "(did you mean 'format'?)"),
    ("word for number", recipe(lambda r: r["training"].update(steps="many")), TRAIN, "'training.steps' should be a whole number, found 'many'"),
    ("out of range", recipe(lambda r: r["training"].update(dropout=1.5)), TRAIN, "'training.dropout' should be less than 1.0, found 1.5"),
    ("unknown preset", recipe(lambda r: r["model"].update(preset="huge")), TRAIN, "'model.preset' should be transformer-tiny, transformer-small, transformer-base or transformer-big, found 'huge'"),
    ("heads do not fit", recipe(lambda r: r["model"].update(heads=5)), TRAIN, "'hidden' is 16: it must be even and a multiple of 'heads'"),
    ("widths do not fit", recipe(lambda r: r["model"]["encoder"].update(feed_forward=[8])), TRAIN, "lists 1 width for 2 layers"),
    ("top-k beyond experts", recipe(lambda r: r["model"]["encoder"]["moe"].update(top_k=9)), TRAIN, "'top_k' is 9, more than the 4 experts"),
    ("unknown routing", recipe(lambda r: r["model"]["encoder"]["moe"].update(routing="magic")), TRAIN, "should be token, sentence, task or static, found 'magic'"),
    ("replicas of tokens", recipe(lambda r: r["model"]["encoder"]["moe"].update(replicas="auto", routing="token")), TRAIN, "'replicas' is auto, but with 'routing: token' no task has experts of its own"),
    ("replicas of no task", recipe(lambda r: r["model"]["decoder"]["moe"].update(replicas=["uk"], task="target")), TRAIN, "'model.decoder.moe.replicas': language 'uk' is not in this system"),
    ("replicas of a direction", recipe(lambda r: r["model"]["decoder"]["moe"].update(replicas=["en-de"], task="target")), TRAIN, "'en-de' is a direction, but the tasks of this side are languages, as de"),
    ("groups do not fit", recipe(lambda r: r["model"]["encoder"]["moe"].update(expert_groups=3)), TRAIN, "which does not divide the 4 experts"),
    ("groups of tokens", recipe(lambda r: r["model"]["encoder"]["moe"].update(expert_groups=2, routing="token")), TRAIN, "there are no tasks to assign"),
    ("top-k beyond a group", recipe(lambda r: r["model"]["encoder"]["moe"].update(expert_groups=4)), TRAIN, "more than the 1 expert of a group"),
    ("nothing to shake", recipe(lambda r: r["model"]["encoder"]["moe"].update(jitter=0.1)), TRAIN, "does not read the token states, to which jitter adds noise: leave it out"),
    ("a bias to nothing", recipe(lambda r: r["model"]["encoder"]["moe"].update(router_bias=True)), TRAIN, "has no linear router to add it to: leave it out"),
    ("no affinity", recipe(lambda r: (r["data"]["batch"].update(languages="task-affine"), r.update(parallel={"expert": 2}))), TRAIN, "a multiple of it"),
    ("two distillations", recipe(lambda r: (r["model"]["encoder"]["moe"].update(fuse_distillation=True), r["model"].update(low_rank={"rank": 2, "fuse_distillation": True}))), TRAIN, "'moe.fuse_distillation' exclude each other"),
    ("gates beside distilled experts", recipe(lambda r: (r["model"]["encoder"]["moe"].update(fuse_distillation=True), r["model"].update(clsr={}))), TRAIN, "'clsr' has nothing to distill"),
    ("shared width for tensor", recipe(lambda r: (r["model"]["encoder"].update(feed_forward=[24, 25]), r["model"]["encoder"]["moe"].update(fuse_distillation=True), r.update(parallel={"tensor": 2}))), TRAIN, "does not divide the feed-forward width 25 of the encoder"),
    ("no such drop", recipe(lambda r: r["model"]["encoder"]["moe"].update(capacity={"drop": "random"})), TRAIN, "should be probability or position, found 'random'"),
    ("plan of a wrong world", NOTHING, ["plan", "good.yaml", "--world", "3"], "data.batch.count is 4"),
    ("maps of a dense model", NOTHING, ["analyze", "routing", "dense", "--out", "new"], "dense"),
    ("no such benchmark", NOTHING, ["bench", "moo"], "there is no benchmark 'moo' (did you mean 'moe'?)"),
    ("bad code", recipe(lambda r: r["data"].update(languages=["German"], directions=[])), TRAIN, "'German' is not a language code"),
    ("only English", recipe(lambda r: r["data"].update(languages=["en"], directions=[])), TRAIN, "names no language beside English"),
    ("bad direction", recipe(lambda r: r["data"].update(directions=["en>de"])), TRAIN, "'en>de' is not a direction"),
    ("experts that no layer has", recipe(lambda r: r["model"]["encoder"]["moe"].update(every=9)), TRAIN, "none would have experts"),
    ("ZeRO that is no mapping", recipe(lambda r: r.update(deepspeed={"zero_optimization": True})), TRAIN, "it should be a mapping with a 'stage'"),
    ("a stage in quotes", recipe(lambda r: r.update(deepspeed={"zero_optimization": {"stage": "1"}})), TRAIN, "it should be a mapping with a 'stage'"),
    ("an empty path", recipe(lambda r: r["data"].update(corpora=[{"path": "", "format": "moses"}])), ["data", "prepare", "bad.yaml"], "there is no text for de-en in the corpora of the recipe (.)"),
    ("a language without direction", recipe(lambda r: r["data"].update(languages=["de", "fr"], directions=["en-de"])), TRAIN, "names fr, which none of 'directions' has"),
    ("a direction without language", recipe(lambda r: r["data"].update(languages=["de", "en"], directions=["en-de", "en-pt_BR"])), TRAIN, "'languages' lacks pt_BR, which 'directions' has: add it, or leave 'languages' out"),
    ("direction twice", recipe(lambda r: r["data"].update(directions=["en-de", "en-de"])), TRAIN, "'directions' names en-de twice"),
    ("language twice", recipe(lambda r: r["data"].update(languages=["de", "de"], directions=[])), TRAIN, "'languages' names de twice"),
    ("corpus twice", recipe(lambda r: r["data"].update(corpora=[{"path": "a", "format": "moses"}, {"path": "./a", "format": "moses"}, {"path": "a", "format": "tsv"}])), TRAIN, "the corpus a is there twice"),
    ("corpus twice, compressed", recipe(lambda r: r["data"].update(corpora=[{"path": "x.tsv", "format": "tsv"}, {"path": f"{os.getcwd()}/x.tsv.gz", "format": "tsv"}])), TRAIN, "x.tsv.gz is there twice (as x.tsv and "),
    ("named corpus twice", recipe(lambda r: r["data"].update(corpora=["django", "weblate", "django"])), TRAIN, "the corpus django is there twice: leave"),
    ("groups the wrong way round", recipe(lambda r: r["data"].update(groups={"high": 50000})), TRAIN, "'medium' is 100000, which is more than 50000, the value of 'high'"),
    ("name with a slash", recipe(lambda r: r.update(name="../up")), TRAIN, "'name'"),
    ("no such DeepSpeed file", recipe(lambda r: r.update(deepspeed="none.json")), TRAIN, "there is no file none.json"),
    ("ZeRO 3", recipe(lambda r: r.update(deepspeed={"zero_optimization": {"stage": 3}})), TRAIN, "ZeRO stage 3: 0, 1 and 2 are supported"),
    ("Adafactor beside ZeRO", recipe(lambda r: r["training"].update(optimizer="adafactor")), TRAIN, "'training.optimizer' is adafactor, which needs whole matrices, but 'deepspeed' asks for ZeRO stage 1"),
    ("settings of no optimizer", recipe(lambda r: r["training"].update(adafactor={})), TRAIN, "'training': 'adafactor' is given, but 'optimizer' is adam"),
    ("unknown optimizer", recipe(lambda r: r["training"].update(optimizer="adamw")), TRAIN, "'training.optimizer' should be adam or adafactor, found 'adamw' (did you mean 'adam'?)"),
    ("clipping twice", recipe(lambda r: r.update(deepspeed={"gradient_clipping": 1})), TRAIN, "which the recipe decides by training.max_grad_norm"),
    ("--set without value", NOTHING, ["train", "good.yaml", "--set", "training.steps"], "write --set a.b=value"),
    ("--set of nothing known", NOTHING, ["train", "good.yaml", "--set", "training.step=3"], "(did you mean 'steps'?)"),
    ("stopping by what is not measured", recipe(lambda r: r["training"].update(early_stopping={"patience": 2})), TRAIN, "counts validations, but 'training.validate_every' is 0"),
    ("stopping by what is not translated", recipe(lambda r: r["training"].update(early_stopping={"patience": 2, "metric": "chrf"}, validate_every=1)), TRAIN, "'training.early_stopping.metric' is chrf, but nothing is translated"),
    ("translations of no validation", recipe(lambda r: r["training"].update(validate_translations=5)), TRAIN, "is of validations, but 'training.validate_every' is 0"),
    ("patience of nothing", recipe(lambda r: r["training"].update(early_stopping={"patience": 0}, validate_every=1)), TRAIN, "'training.early_stopping.patience' should be at least 1, found 0"),
    ("steps the wrong way round", NOTHING, [*TRAIN[:1], "good.yaml", *TRAIN[2:], "--profile", "12-10"], "--profile is '12-10': give a step, or the first and the last of several, as in 10-12"),
    ("memory without steps", NOTHING, [*TRAIN[:1], "good.yaml", *TRAIN[2:], "--memory-snapshot"], "--memory-snapshot records the steps of --profile"),
    ("memory without a GPU", NOTHING, [*TRAIN[:1], "good.yaml", *TRAIN[2:], "--profile", "1", "--memory-snapshot"], "records the memory of a GPU, and there is none here: leave it out"),
    # corpora
    ("unknown source", NOTHING, ["data", "fetch", "djagno"], "djagno"),
    ("corpus not fetched", recipe(lambda r: r["data"].update(corpora=["django"])), PREPARE, "django"),
    ("unknown corpus", recipe(lambda r: r["data"].update(corpora=["djagno"])), PREPARE, "djagno"),
    ("no such file", recipe(lambda r: r["data"].update(corpora=[{"path": "none.tsv", "format": "tsv"}])), PREPARE, "none.tsv"),
    ("corpus not UTF-8", with_corpus(b"en\tde\tfr\na b c\t\xff\xfe\tg\n"), PREPARE, "bad.tsv"),
    ("empty corpus", with_corpus(""), PREPARE, "bad.tsv"),
    ("unequal lines", moses, PREPARE, "p.de has 1 line but p.en has "),
    ("language not in the corpora", recipe(lambda r: r["data"].update(languages=["uk"], directions=[])), PREPARE, "uk"),
    ("vocabulary too large", recipe(lambda r: r["data"]["vocabulary"].update(size=50000)), PREPARE, "50000"),
    # prepared data, processes, runs
    ("not prepared", recipe(lambda r: r.update(name="other")), TRAIN, "there is no prepared data in data/prepared/other"),
    ("prepared data cut", cut("data/prepared/small/train/de-en/de.tokens.npy"), ["train", "good.yaml", "--out", "new"], "de.tokens.npy has"),
    ("prepared otherwise", recipe(lambda r: r["data"]["vocabulary"].update(size=150)), TRAIN, "'data.vocabulary.size' is 150, but data/prepared/small was prepared with 140: set it back"),
    ("other data shown", recipe(lambda r: r["data"]["held_out"].update(seed=2)), ["data", "show", "bad.yaml"], "'data.held_out.seed' is 2, but data/prepared/small was prepared with 1"),
    ("run of other data", stored(lambda r: r["data"]["held_out"].update(test=7)), ["evaluate", "run"], "'data.held_out.test' is 7, but"),
    ("maps of other data", stored(lambda r: r["data"]["cleaning"].update(max_words=9)), ["analyze", "routing", "run", "--out", "new"], "'data.cleaning.max_words' is 9, but"),
    ("its manifest damaged", text("{", "data/prepared/small/manifest.json"), ["train", "good.yaml", "--out", "new"], "no prepared data"),
    ("processes for tensor", NOTHING, ["train", "good.yaml", "--set", "parallel.tensor=2", "--nproc", "3", "--out", "new"], "3 processes"),
    ("processes for experts", NOTHING, ["train", "good.yaml", "--set", "parallel.expert=2", "--nproc", "1", "--out", "new"], "does not divide the 1 process:"),
    ("experts for ranks", NOTHING, ["train", "good.yaml", "--set", "parallel.expert=3", "--nproc", "3", "--out", "new"], "does not divide the 4"),
    ("batches for ranks", NOTHING, ["train", "good.yaml", "--nproc", "3", "--out", "new"], "ranks cannot share evenly"),
    ("run of another recipe", NOTHING, ["train", "good.yaml", "--set", "model.hidden=32", "--out", "run"], "was started with model.hidden 16"),
    ("folder of somebody", text("mine", "data/mine.txt"), ["train", "good.yaml", "--out", "data"], "is not empty and holds no run"),
    ("only checkpoint damaged", spoil(f"{CHECKPOINT}/mp_rank_00_model_states.pt"), ["train", "good.yaml", "--out", "run"], "is whole"),
    ("its manifest cut", cut(f"{CHECKPOINT}/manifest.json"), ["train", "good.yaml", "--out", "run"], "manifest.json is missing or damaged"),
    # evaluation, translation, conversion, report
    ("no run", NOTHING, ["evaluate", "none"], "there is no folder none"),
    ("not a run", NOTHING, ["evaluate", "data"], "is neither a run folder"),
    ("no checkpoint", lambda: shutil.rmtree("run/checkpoints"), ["evaluate", "run"], "has no checkpoint yet"),
    ("unknown language", NOTHING, ["evaluate", "run", "--directions", "en-xx"], "language 'xx' is not in this system"),
    ("unknown direction", NOTHING, ["evaluate", "run", "--directions", "de-fr"], "direction de-fr is not in this system, so no held-out text of it is scored: --test FILES scores text of your own"),
    ("unknown direction to merge", NOTHING, ["evaluate", "run", "--merge", "2", "--directions", "de-fr"], "direction de-fr is not in this system, so no held-out text of it is scored: --test FILES scores text of your own"),
    ("part 0", NOTHING, ["evaluate", "run", "--part", "0/8"], "'0/8' is no part: write I/N for the I-th of N, from 1 to N"),
    ("part beyond", NOTHING, ["evaluate", "run", "--part", "9/8"], "'9/8' is no part"),
    ("part of letters", NOTHING, ["evaluate", "run", "--part", "a/b"], "'a/b' is no part"),
    ("part of nothing", NOTHING, ["evaluate", "run", "--part", "3"], "'3' is no part"),
    ("part and merge", NOTHING, ["evaluate", "run", "--part", "1/2", "--merge", "2"], "give one of them"),
    ("no parts", NOTHING, ["evaluate", "run", "--merge", "2"], "run/scores has no part of 2"),
    ("no run to merge", NOTHING, ["evaluate", "none", "--merge", "2"], "there is no recipe none/recipe.yaml"),
    ("no direction named", NOTHING, ["evaluate", "run", "--directions", " , "], "--directions names no direction"),
    ("unknown split", NOTHING, ["evaluate", "run", "--split", "training"], "training"),
    ("checkpoint cut", cut(f"{CHECKPOINT}/mp_rank_00_model_states.pt"), ["translate", "run", "--from", "en", "--to", "de"], "damaged"),
    ("expert damaged", spoil(f"{CHECKPOINT}/layer_0_expert_1_mp_rank_00_model_states.pt"), ["evaluate", "run"], "is damaged"),
    ("vocabulary gone", lambda: os.remove("run/vocabulary.model"), ["evaluate", "run"], "vocabulary.model is missing"),
    ("weights damaged", spoil("dense/model.safetensors"), ["translate", "dense", "--from", "en", "--to", "de"], "is damaged"),
    ("not its direction", NOTHING, ["translate", "dense", "--from", "de", "--to", "en"], "de-en is not in this system"),
    ("no shared route", NOTHING, ["translate", "run", "--from", "en", "--to", "de", "--route", "shared"], "has no parameters for the route 'shared'"),
    ("no shared route to score", NOTHING, ["evaluate", "run", "--route", "shared"], "has no parameters for the route 'shared'"),
    ("no shared route to convert", NOTHING, ["convert", "run", "--as", "dense", "--route", "shared", "--out", "new"], "has no parameters for the route 'shared'"),
    ("experts for all directions", NOTHING, ["convert", "run", "--as", "dense", "--out", "new"], "since each has experts of its own"),
    ("gates", stored(lambda r: r["model"].update(clsr={})), ["convert", "run", "--as", "dense", "--from", "en", "--to", "de", "--out", "new"], "the gates of model.clsr choose between two projections"),
    ("convert to what", NOTHING, ["convert", "run", "--as", "onyx", "--from", "en", "--to", "de", "--out", "new"], "'onyx'"),
    ("token-routed", NOTHING, ["convert", "token", "--as", "dense", "--from", "en", "--to", "de", "--out", "new"], "token"),
    ("into a folder", NOTHING, ["convert", "run", "--as", "dense", "--from", "en", "--to", "de", "--out", "data"], "is not empty"),
    ("quantization of dense", NOTHING, ["convert", "run", "--as", "dense", "--quantization", "int8", "--from", "en", "--to", "de", "--out", "new"], "--quantization is for --as ctranslate2"),
    ("dense without direction", NOTHING, ["convert", "run", "--as", "huggingface", "--out", "new"], "name one, as in --direction en-de"),
    ("not the dense direction", NOTHING, ["convert", "dense", "--as", "huggingface", "--from", "de", "--to", "en", "--out", "new"], "de-en is not in this system"),
    ("no report", NOTHING, ["report", "data"], "data"),
    ("scores damaged", text("{", "run/scores.json"), ["report", "run"], "scores.json"),
]
# fmt: on


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_one_sentence_and_status_2(place, tmp_path, capsys, change, arguments, sentence):
    shutil.copytree(place, tmp_path / "place")
    with inside(tmp_path / "place"):
        change()
        before = tree(Path("."))
        capsys.readouterr()
        status = main(arguments)
        said = capsys.readouterr().err.strip()
        assert status == 2, said
        after = {path: stamp for path, stamp in tree(Path(".")).items() if "/.small.work/" not in path}
        assert after == before, "something was written or removed, beside shards that are finished"
    last = said.splitlines()[-1]
    assert last.startswith("lsmoe: ") and sentence in last, said
    assert "Traceback" not in said and len(last) < 500, said


def test_bad_utf8_on_standard_input_names_the_line(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"good\n\xff\xfe\n")))
    with inside(place):
        assert main(["translate", "dense", "--from", "en", "--to", "de"]) == 2
    assert "line 2" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """Yield the folder of a newly mounted file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small tmpfs (root): full disks are not tested")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def lsmoe(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lsmoe_ds", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def assert_full(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_full_disk(place, small_disk):
    with inside(place):
        # Preparing: nothing half-written stays.
        corpus = small_disk / "filler"
        corpus.write_bytes(bytes(3_020_000))
        recipe(lambda r: r["data"].update(directory=str(small_disk / "data")))()
        assert_full(lsmoe("data", "prepare", "bad.yaml"))
        assert not list((small_disk / "data").rglob("*.npy"))
        shutil.rmtree(small_disk / "data")
        # Converting.
        corpus.write_bytes(bytes(3_060_000))
        assert_full(
            lsmoe(
                "convert",
                "run",
                "--as",
                "dense",
                "--from",
                "en",
                "--to",
                "de",
                "--out",
                small_disk / "dense",
            )
        )
        assert [p.name for p in small_disk.iterdir() if not p.name.startswith(".")] == ["filler"]
        corpus.unlink()
        # Training: the first checkpoint fits, a later one does not; the first stays whole.
        prepare(make_recipe(Path("."), TARGET_TOP2, TARGET_TOP2))
        changes = [
            "--set",
            "training.steps=40",
            "--set",
            "training.checkpoint_every=1",
            "--set",
            "training.keep=40",
        ]
        done = lsmoe("train", "good.yaml", *changes, "--out", small_disk / "run")
        assert_full(done)
        saved = sorted(
            (p.name for p in (small_disk / "run" / "checkpoints").iterdir()),
            key=lambda name: int(name.split("-")[1]),
        )
        assert saved and all(name.startswith("step-") for name in saved) and len(saved) < 40
        manifest = json.loads((small_disk / "run" / "checkpoints" / saved[-1] / "manifest.json").read_text())
        assert all(
            (small_disk / "run" / "checkpoints" / saved[-1] / name).stat().st_size == f["bytes"]
            for name, f in manifest["files"].items()
        )
