"""What is wrong with a recipe is said in the words of the file: the key, its line or option, what was found,
what is allowed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from support.recipe_text import CORPUS, GOOD, STEPS

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.study.settings import load_study

BELOW = "model:\n  "
OF_DEEPSPEED = ": the keys are those of DeepSpeed 0.19.8"

# What is replaced in the recipe, by what; the whole sentence that follows the file's name.
WRITTEN = [
    (
        CORPUS,
        "{path: a}",
        (
            "line 2: 'format' in item 1 of 'data.corpora' is missing: it should be opus100, flores, ntrex, "
            "iwslt, moses, tmx, tsv, translated, wikiann, conll or squad"
        ),
    ),
    (
        CORPUS,
        "{path: a, format: mosses}",
        (
            "line 2: 'format' in item 1 of 'data.corpora' should be opus100, flores, ntrex, iwslt, moses, "
            "tmx, tsv, translated, wikiann, conll or squad, found 'mosses' (did you mean 'moses'?)"
        ),
    ),
    (
        CORPUS,
        "{path: a, format: tsv, source: en, target: no}",
        (
            "line 2: 'target' in item 1 of 'data.corpora' should be text, found no, which YAML reads as "
            "false: write 'no' in quotes"
        ),
    ),
    (
        "[de]",
        "[no]",
        (
            "line 2: item 1 of 'data.languages' should be text, found no, which YAML reads as false: write "
            "'no' in quotes"
        ),
    ),
    (
        "[de]",
        "[de, on]",
        (
            "line 2: item 2 of 'data.languages' should be text, found on, which YAML reads as true: write "
            "'on' in quotes"
        ),
    ),
    ("[de]", "de", "line 2: 'data.languages' should be a list of texts, found 'de': write [de]"),
    ("[de]", "", "line 2: 'data.languages' should be a list of texts, found nothing"),
    (
        "name: x",
        "name: 2024-01-01",
        (
            "line 1: 'name' should be text, found 2024-01-01, which YAML reads as a date: write '2024-01-01' "
            "in quotes"
        ),
    ),
    (
        "name: x",
        "name: 12",
        "line 1: 'name' should be text, found 12, which YAML reads as a number: write '12' in quotes",
    ),
    (
        "name: x",
        "name: 010",
        "line 1: 'name' is 010, which YAML reads in base 8: write 8 or 10, or for text '010' in quotes",
    ),
    (
        "name: x",
        "name: a b",
        (
            "line 1: 'name' should consist of letters, digits, '.', '_' and '-' and begin with a letter or "
            "digit, found 'a b'"
        ),
    ),
    ("name: x", "name: x\nno: 3", "line 2: the key no is not text to YAML: write 'no' in quotes"),
    ("name: x", "name: x\n? [1]\n: 3", "line 2: a key is not text"),
    ("name: x", "name: x\nname: y", "line 2: 'name' is written twice, on lines 1 and 2"),
    (
        STEPS,
        "{steps: 010}",
        (
            "line 8: 'training.steps' is 010, which YAML reads in base 8: write 8 or 10, or for text '010' in"
            " quotes"
        ),
    ),
    (
        STEPS,
        "{steps: 1:30}",
        "line 8: 'training.steps' is 1:30, which YAML reads in base 60: write 90, or '1:30' in quotes",
    ),
    (STEPS, '{steps: "10"}', "line 8: 'training.steps' should be a whole number, found '10': write 10"),
    (STEPS, "{steps: 1e4}", "line 8: 'training.steps' should be a whole number, found '1e4': write 10000"),
    (STEPS, "{steps: 4.5}", "line 8: 'training.steps' should be a whole number, found 4.5"),
    (STEPS, "{steps: yes}", "line 8: 'training.steps' should be a whole number, found yes"),
    (STEPS, "{steps: 0}", "line 8: 'training.steps' should be at least 1, found 0"),
    (STEPS, "{steps: }", "line 8: 'training.steps' should be a whole number, found nothing"),
    (STEPS, "{steps: 4, dropout: 1.5}", "line 8: 'training.dropout' should be less than 1.0, found 1.5"),
    (STEPS, "{steps: 4, clip: 1}", "line 8: 'training.clip' is now called 'training.max_grad_norm'"),
    (STEPS, "{steps: 4, patience: 9}", "line 8: 'training.patience' is now called 'training.hang_timeout'"),
    (
        "encoder: {layers: 2,",
        "encoder: {moe: {experts: 2, balance: 0.1}, layers: 2,",
        "line 6: 'model.encoder.moe.balance' is now called 'model.encoder.moe.balance_loss_weight'",
    ),
    (
        STEPS,
        "{steps: 4, max_grad_norm: .inf}",
        "line 8: 'training.max_grad_norm' should be a finite number, found .inf",
    ),
    (STEPS, "{steps: 4, max_grad_norm: on}", "line 8: 'training.max_grad_norm' should be a number, found on"),
    (
        STEPS,
        "{steps: 4, start_from: None}",
        (
            "line 8: 'training.start_from' is the text 'None': YAML's word for nothing is null, or leave the "
            "key out"
        ),
    ),
    (
        STEPS,
        "{steps: 4}\nparallel:",
        "line 9: 'parallel' is empty: write its keys below it (tensor, expert, node), or leave it out",
    ),
    (
        BELOW,
        f"{BELOW}low_rank: {{rank: no}}\n  ",
        (
            "line 4: 'model.low_rank.rank' should be a whole number or a mapping from names to whole numbers,"
            " found no"
        ),
    ),
    (
        BELOW,
        f"{BELOW}low_rank: {{rank: {{de: many, en: 3}}, index: language}}\n  ",
        "line 4: 'model.low_rank.rank.de' should be a whole number, found 'many'",
    ),
    (
        BELOW,
        f"{BELOW}low_rank: {{rank: -1}}\n  ",
        "line 4: 'model.low_rank.rank' should be at least 0, found -1",
    ),
    (
        BELOW,
        f"{BELOW}low_rank: {{rank: {{no: 3}}}}\n  ",
        "line 4: the key no is not text to YAML: write 'no' in quotes",
    ),
    (
        BELOW,
        f"{BELOW}clsr: {{at: [fed_forward]}}\n  ",
        (
            "line 4: item 1 of 'model.clsr.at' should be attention, cross_attention or feed_forward, "
            "found 'fed_forward' (did you mean 'feed_forward'?)"
        ),
    ),
    (
        "deepspeed: {}",
        "deepspeed: {zero_optimisation: {stage: 1}}",
        "line 9: 'deepspeed': unknown key 'zero_optimisation' (did you mean 'zero_optimization'?)"
        + OF_DEEPSPEED,
    ),
    (
        "deepspeed: {}",
        "deepspeed: {fp16: {scale: 5}}",
        "line 9: 'deepspeed': unknown key 'fp16.scale' (did you mean 'loss_scale'?)" + OF_DEEPSPEED,
    ),
    (
        "deepspeed: {}",
        "deepspeed: {bf16: true}",
        "line 9: 'deepspeed': 'bf16' is True: it should be a mapping with an 'enabled' of true or false",
    ),
    (
        "deepspeed: {}",
        "deepspeed: {bf16: {enabled: true}, fp16: {enabled: true}}",
        "line 9: 'deepspeed': 'bf16' and 'fp16' are both enabled: enable one of them",
    ),
    (
        BELOW,
        f"{BELOW}low_rank: {{rank: {{en: 3, de: true}}, index: language}}\n  ",
        "line 4: 'model.low_rank.rank.de' should be a whole number, found true",
    ),
    (
        "feed_forward: 64",
        "feed_forward: [64, on]",
        "line 6: item 2 of 'model.encoder.feed_forward' should be a whole number, found on",
    ),
    (
        BELOW,
        f"{BELOW}clsr: {{shared: 'no'}}\n  ",
        "line 4: 'model.clsr.shared' should be true or false, found 'no'",
    ),
    (
        BELOW,
        f"{BELOW}clsr: {{shared: 0}}\n  ",
        "line 4: 'model.clsr.shared' should be true or false, found 0",
    ),
    (
        STEPS,
        "\n  steps: 1,000",
        "line 9: 'training.steps' should be a whole number, found '1,000': write 1000",
    ),
    (
        BELOW,
        f"{BELOW}clsr: {{shared: maybe}}\n  ",
        "line 4: 'model.clsr.shared' should be true or false, found 'maybe'",
    ),
]


def complaint(text: str, tmp_path: Path, *overrides: str) -> str:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "r.yaml", overrides)
    return str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(("before", "after", "says"), WRITTEN, ids=[after.strip() for _, after, _ in WRITTEN])
def test_a_wrong_value_in_the_file(tmp_path, before, after, says):
    assert before in GOOD
    assert complaint(GOOD.replace(before, after), tmp_path) == f"r.yaml, {says}"


def test_an_unknown_key_in_a_deepspeed_file_names_the_file(tmp_path):
    (tmp_path / "mine.json").write_text('{"fp61": {"enabled": true}}')
    said = complaint(GOOD.replace("deepspeed: {}", f"deepspeed: {tmp_path}/mine.json"), tmp_path)
    assert said.startswith("r.yaml, line 9: 'deepspeed': mine.json: unknown key 'fp61' (did you mean ")


def test_tabs_are_named(tmp_path):
    said = complaint(GOOD.replace(f"training: {STEPS}", "training:\n\tsteps: 4"), tmp_path)
    assert said == "recipe r.yaml is not valid YAML: line 9 is indented with a tab: use spaces"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.seed=yes", "'training.seed' should be a whole number, found yes"),
        ("training.steps=many", "'training.steps' should be a whole number, found 'many'"),
        (
            "training.steps=010",
            "'training.steps' is 010, which YAML reads in base 8: write 8 or 10, or for text '010' in quotes",
        ),
        (
            "training.stepps=3",
            "unknown key 'training.stepps' (did you mean 'steps'?); allowed here: steps, start_from, ",
        ),
        (
            "data.languages=[no]",
            (
                "item 1 of 'data.languages' should be text, found no, which YAML reads as false: write 'no' "
                "in quotes"
            ),
        ),
        ("model.encoder={layers: two}", "'model.encoder.layers' should be a whole number, found 'two'"),
        (
            "data.corpora=[{path: a}]",
            "'format' in item 1 of 'data.corpora' is missing: it should be opus100, ",
        ),
        (
            "deepspeed=none.json",
            (
                "'deepspeed': there is no file none.json: give a file, or one that comes with lsmoe_ds: "
                "bf16_zero0, bf16_zero1, "
            ),
        ),
        ("deepspeed={foo: 1}", "'deepspeed': unknown key 'foo'" + OF_DEEPSPEED),
        (
            "training={steps: 1,000}",
            "'training.steps' is 1,000, but a comma ends a number in braces: write digits only",
        ),
        ("a=[", "'[' is not a YAML value"),
        ("steps=3", "unknown key 'steps' (did you mean 'training.steps'?); allowed here: name, data, "),
        ("data.experts=4", "unknown key 'data.experts' (did you mean 'model.encoder.moe.experts' or "),
        ("training.at=3", "unknown key 'training.at'; allowed here: steps, "),  # of too many sections
        ("Training.steps=3", "unknown key 'Training'"),
        ("training..steps=3", "unknown key 'training.'; allowed here: steps, "),
    ],
)
def test_an_option_is_cited_instead_of_a_line(tmp_path, override, says):
    assert complaint(GOOD, tmp_path, override).startswith(f"'--set {override}': {says}")


def test_an_option_that_contradicts_the_file_is_cited_beside_it(tmp_path):
    said = complaint(GOOD, tmp_path, "model.heads=5")
    assert said.startswith("r.yaml, line 3 with '--set model.heads=5': 'model': 'hidden' is 32")


def test_options_that_an_error_names_are_cited_alone(tmp_path):
    said = complaint(GOOD, tmp_path, "training.seed=3", "training.keep_best=2")
    assert said.startswith("r.yaml with '--set training.keep_best=2': 'training.keep_best' is 2, but without")


def test_a_member_of_a_study_is_blamed_for_what_it_changes(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    study = {
        "name": "s",
        "recipe": "base.yaml",
        "baseline": "a",
        "members": {"a": {"set": {"model": {"heads": "two"}}}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(
        UserError, match=r"base\.yaml, changed by 'set': 'model\.heads' should be a whole number, found 'two'"
    ):
        load_study(tmp_path / "s.yaml")


def test_numbers_as_people_write_them_are_read(tmp_path):
    (tmp_path / "r.yaml").write_text(
        GOOD.replace(STEPS, "{steps: 1_000, learning_rate: 1e-4, warmup: 1.0e+3, max_grad_norm: 1, seed: 0}")
    )
    training = load_recipe(tmp_path / "r.yaml", ["training.label_smoothing=2e-1"]).training
    assert (
        training.steps,
        training.learning_rate,
        training.warmup,
        training.max_grad_norm,
        training.label_smoothing,
    ) == (
        1000,
        1e-4,
        1000,
        1.0,
        0.2,
    )


def test_methods_cannot_train_where_there_are_none(tmp_path):
    said = complaint(GOOD.replace(STEPS, "{steps: 4, trainable: methods}"), tmp_path)
    assert said == (
        "r.yaml: 'training.trainable' is methods, but 'model' has none that trains: add adapters, clsr, "
        "low_rank or the experts of 'moe', or give all or patterns of global names"
    )
    value = yaml.safe_load(GOOD.replace(STEPS, "{steps: 4, trainable: methods}"))
    value["model"]["neurons"] = {"random": 0.5}
    assert complaint(yaml.safe_dump(value), tmp_path).endswith(said.partition(": ")[2]), "masks do not train"


ANY = ["low_rank={rank: 2}", "clsr={}", "adapters={}", "decoder.moe={experts: 2}"]


@pytest.mark.parametrize("method", ANY)
def test_what_trains_may_be_any_method(tmp_path, method):
    (tmp_path / "r.yaml").write_text(GOOD)
    load_recipe(tmp_path / "r.yaml", ["training.trainable=methods", f"model.{method}"])


def test_an_option_changes_one_of_two_sections_that_share_an_alias(tmp_path):
    moe = (
        "  encoder: {layers: 2, feed_forward: 64, moe: &moe {experts: 4}}\n  decoder: {layers: 2, "
        "feed_forward: 64, moe: *moe}\n"
    )
    (tmp_path / "r.yaml").write_text(re.sub(r"  encoder.*\n  decoder.*\n", moe, GOOD))
    model = load_recipe(tmp_path / "r.yaml", ["model.decoder.moe.experts=8"]).model
    assert (model.encoder.moe.experts, model.decoder.moe.experts) == (4, 8)
