"""Whether imported M2M-100, NLLB and NLLB-MoE models compute and translate as they did in transformers,
before any training.

    python benchmarks/imports.py [--corpus build/imports/data/corpora/django] [--work build/imports]

Makes a random model of each class of transformers, with the vocabulary that sentencepiece learns on a fetched
corpus in English, German and French, so set that it translates into text, with an end. Each is imported, and
exported again. In each of 6 directions 200 lines are translated with beam 5: by the original model and
tokenizer, in the way that its page shows, and by ours in torch, by transformers with the exported folder and
its own tokenizer, and by CTranslate2. Counted are equal translations, token by token; the largest difference
of any logit is that of ours in torch along the original translations. An NLLB-MoE has no dense equal, so it
is not exported; transformers 5 is mended to use the experts that its router chose.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from common import argument_parser, run_main, write

from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.folders import read_json
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate_tokens
from lsmoe_ds.languages import EOS, PAD
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.shipped import ROOT as PROJECT

sys.path.insert(0, str(PROJECT / "tests"))
from support.small_huggingface import make_fluent, use_chosen_experts

DIRECTIONS = [Direction(*pair.split("-")) for pair in ("en-de", "de-en", "en-fr", "fr-en", "de-fr", "fr-de")]
LINES, WORDS, BATCH = (
    200,
    (3, 25),
    20,
)  # of each direction; words of a line; lines that transformers translates at once
PIECES = 8000
SIZES = {"d_model": 64, "encoder_layers": 3, "encoder_ffn_dim": 128, "encoder_attention_heads": 4}
SIZES |= {"decoder_layers": 3, "decoder_ffn_dim": 128, "decoder_attention_heads": 4}
NLLB = ["deu_Latn", "eng_Latn", "fra_Latn", "nld_Latn", "spa_Latn", "zho_Hans"]


def write_m2m_100(folder: Path, model: bytes) -> list[int]:
    """Write the tokenizer of an M2M-100, with ids in another order than the pieces, and return the ids of
    text.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    random.Random(1).shuffle(pieces)
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    (folder / "vocab.json").write_text(
        json.dumps({piece: index for index, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])})
    )
    transformers.M2M100Tokenizer(folder / "vocab.json", folder / "sentencepiece.bpe.model").save_pretrained(
        folder
    )
    return list(range(4, 4 + len(pieces)))


def write_nllb(folder: Path, model: bytes) -> list[int]:
    """Write the tokenizer of an NLLB, and return the ids of text."""
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": NLLB}))
    transformers.NllbTokenizer.from_pretrained(folder, additional_special_tokens=NLLB).save_pretrained(folder)
    return list(range(4, sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() + 1))


@dataclass(frozen=True)
class Kind:
    """A class of models: what makes its tokenizer, what it calls languages, rows beside text and the special
    four.
    """

    title: str
    tokenizer: Callable[[Path, bytes], list[int]]
    languages: dict[str, str]
    tags: dict[str, str]
    rows: int
    model: type[Any] = transformers.M2M100ForConditionalGeneration
    config: type[Any] = transformers.M2M100Config
    sparse: dict[str, float] = field(default_factory=dict)  # experts; a model that has some is not exported


CODES = ("en", "de", "fr")
NAMES = dict(zip(CODES, ("eng_Latn", "deu_Latn", "fra_Latn"), strict=True))
KINDS = {
    "m2m_100": Kind(
        "M2M-100", write_m2m_100, {code: code for code in CODES}, {code: f"__{code}__" for code in CODES}, 108
    ),
    "nllb": Kind("NLLB", write_nllb, NAMES, NAMES, len(NLLB) + 4),
    "nllb_moe": Kind(
        "NLLB-MoE",
        write_nllb,
        NAMES,
        NAMES,
        len(NLLB) + 4,
        transformers.NllbMoeForConditionalGeneration,
        transformers.NllbMoeConfig,
        {
            "num_experts": 8,
            "encoder_sparse_step": 3,
            "decoder_sparse_step": 3,
            "moe_eval_capacity_token_fraction": 1.0,
        },
    ),
}


def text_of(corpus: Path) -> dict[str, list[str]]:
    """Return lines of each language, each once."""
    lines: dict[str, dict[str, None]] = {code: {} for code in CODES}
    for bitext in ("de-en", "en-fr"):
        for row in (corpus / f"{bitext}.tsv").read_text(encoding="utf-8").splitlines():
            for code, line in zip(bitext.split("-"), row.split("\t"), strict=True):
                if WORDS[0] <= len(line.split()) <= WORDS[1]:
                    lines[code][clean_text(line)] = None
    return {code: list(found) for code, found in lines.items()}


def corpus_of(given: Path | None, work: Path) -> Path:
    """Return the folder of a corpus: the given one, or django, fetched into ``work``."""
    if given is not None:
        return given
    corpus = work / "data" / "corpora" / "django"
    if not corpus.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "lsmoe_ds", "data", "fetch", "django"], check=True, cwd=work)
    return corpus


def make(kind: Kind, folder: Path, text: dict[str, list[str]]) -> None:
    """Write a random model with a vocabulary of the text."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for lines in text.values() for line in lines),
        model_writer=pieces,
        model_type="bpe",
        vocab_size=PIECES,
        minloglevel=2,
    )
    ids = kind.tokenizer(folder, pieces.getvalue())
    torch.manual_seed(4)
    model = kind.model(kind.config(vocab_size=4 + len(ids) + kind.rows, dropout=0.0, **SIZES, **kind.sparse))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    make_fluent(model, ids, ending=200.0)
    model.save_pretrained(folder)


def in_transformers(
    folder: Path, kind: Kind, direction: Direction, lines: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the pieces of the lines and of their translations, without tags and ends."""
    model = kind.model.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.src_lang = kind.languages[direction.source]
    target = tokenizer.convert_tokens_to_ids(kind.tags[direction.target])
    sources, found = [], []
    for start in range(0, len(lines), BATCH):
        batch = tokenizer(list(lines[start : start + BATCH]), return_tensors="pt", padding=True)
        rows = model.generate(
            **batch, forced_bos_token_id=target, num_beams=5, early_stopping=True, max_new_tokens=200
        )
        sources += [row[1 : row.index(EOS)] for row in batch["input_ids"].tolist()]
        found += [row[2 : row.index(EOS, 1) if EOS in row[1:] else None] for row in rows.tolist()]
    return sources, found


@torch.inference_mode()
def largest_difference(
    folder: Path, base: Path, kind: Kind, direction: Direction, sources: Any, targets: Any
) -> float:
    """Compare the logits of the original with ours, along the original's translations."""
    theirs, ours = kind.model.from_pretrained(folder).eval(), load(base, "cpu")
    assert isinstance(ours.model, Transformer)
    number = ours.languages.direction_id(direction)
    ids = DirectionIds.of(ours.languages, ours.vocabulary, ours.recipe.data.tags)
    largest = 0.0
    for start in range(0, len(sources), BATCH):
        part = slice(start, start + BATCH)
        batch = ids.collate(sources[part], targets[part], [number] * len(sources[part]))
        found = ours.model.logits(batch.source, batch.decoder_input, batch.ids)
        options = {
            "input_ids": batch.source,
            "attention_mask": batch.source != PAD,
            "decoder_input_ids": batch.decoder_input,
        }
        wanted = theirs(**options).logits
        real = batch.decoder_input != PAD
        largest = max(largest, (found[:, :, : wanted.shape[2]] - wanted)[real].abs().max().item())
    return largest


def measure(kind: Kind, work: Path, text: dict[str, list[str]]) -> dict[str, Any]:
    folder, base = work / "model", work / "imported"
    make(kind, folder, text)
    overrides = ["data.corpora=[none]", f"data.directions=[{','.join(map(str, DIRECTIONS))}]"]
    convert(folder, "consolidated", None, base, overrides=overrides)
    exported = () if kind.sparse else ("huggingface", "ctranslate2")
    for to in exported:
        convert(base, to, None, work / to, check=0)
    same: Counter[str] = Counter()
    difference, lengths, distinct = 0.0, [], 0
    for direction in DIRECTIONS:
        lines = text[direction.source][:LINES]
        sources, wanted = in_transformers(folder, kind, direction, lines)
        lengths += [len(each) for each in wanted]
        distinct += len({tuple(each) for each in wanted})
        difference = max(difference, largest_difference(folder, base, kind, direction, sources, wanted))
        found, engines = {}, {"torch": load_engine(base)}
        if exported:
            found["transformers"] = in_transformers(work / "huggingface", kind, direction, lines)[1]
            engines["ctranslate2"] = load_engine(work / "ctranslate2")
        for name, engine in engines.items():
            own = [engine.vocabulary.encode(line) for line in lines]
            same[f"pieces, {name}"] += sum(
                first == second for first, second in zip(own, sources, strict=True)
            )
            found[name] = [best.tokens for (best,) in translate_tokens(engine, direction, own, Search())]
        for name, each in found.items():
            same[name] += sum(first == second for first, second in zip(each, wanted, strict=True))
        print(kind.title, direction, dict(same), difference, flush=True)
    return {
        "model": kind.title,
        "lines": len(DIRECTIONS) * LINES,
        "largest logit difference": difference,
        "same pieces": same["pieces, torch"],
        "same translations": {name: same.get(name) for name in ("torch", "transformers", "ctranslate2")},
        "distinct translations": distinct,
        "tokens of a translation": {
            "least": min(lengths),
            "mean": round(sum(lengths) / len(lengths), 1),
            "most": max(lengths),
        },
    }


def main() -> None:
    parser = argument_parser(__doc__)
    about = (
        "a folder that `lsmoe data fetch` made, with de-en.tsv and en-fr.tsv (default: django, fetched into "
        "--work)"
    )
    parser.add_argument("--corpus", type=Path, metavar="DIR", help=about)
    about = "where models are kept (default: build/imports)"
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "imports", metavar="DIR", help=about)
    arguments = parser.parse_args()
    use_chosen_experts()
    work = arguments.work.resolve()
    corpus = corpus_of(arguments.corpus, work)
    made = read_json(corpus / "PROVENANCE.json") or {}
    text = text_of(corpus)
    rows = {name: measure(kind, work / name, text) for name, kind in KINDS.items()}
    versions = {
        name: importlib.metadata.version(name) for name in ("transformers", "ctranslate2", "sentencepiece")
    }
    source = {key: made.get(key) for key in ("name", "package", "version")}
    write({"versions": versions, "corpus": source, "beam": Search().beam, "rows": rows}, arguments.out)


if __name__ == "__main__":
    run_main(main)
