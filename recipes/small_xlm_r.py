"""Write a small XLM-R with random weights, for trials of methods where the real one cannot be had.

    python recipes/silver_names.py
    python recipes/small_xlm_r.py            # writes data/models/small-xlm-r

It is of transformers' class XLMRobertaForMaskedLM, with 4 layers of 128, and its tokenizer is trained on the
training sentences of the corpus. Nothing is pretrained: scores of models that start from it compare methods,
and say nothing of what XLM-R reaches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # in the order of their ids
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 258,
    "type_vocab_size": 1,
}


def sentences(corpus: Path) -> Iterator[str]:
    """Yield the training sentences of a corpus in WikiANN's layout."""
    for file in sorted(corpus.glob("*/train")):
        for block in file.read_text(encoding="utf-8").split("\n\n"):
            words = [line.split("\t")[0].partition(":")[2] for line in block.splitlines()]
            if words:
                yield " ".join(words)


def write(corpus: Path, out: Path, vocabulary: int, seed: int) -> int:
    """Write the folder, and return the number of parameters."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        sentences(corpus),
        trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    named = {"bos": 0, "cls": 0, "pad": 1, "eos": 2, "sep": 2, "unk": 3, "mask": 4}
    settings = {f"{name}_token": SPECIAL[number] for name, number in named.items()}
    (out / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}, indent=1) + "\n"
    )
    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        **SIZES, vocab_size=tokenizer.get_vocab_size(), pad_token_id=1, bos_token_id=0, eos_token_id=2
    )
    model = XLMRobertaForMaskedLM(config)
    model.save_pretrained(out)
    return int(model.num_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("data/corpora/silver-names"))
    parser.add_argument("--out", type=Path, default=Path("data/models/small-xlm-r"))
    parser.add_argument("--vocabulary", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if not any(given.corpus.glob("*/train")):
        parser.error(f"{given.corpus} holds no LANGUAGE/train: write it with recipes/silver_names.py")
    count = write(given.corpus, given.out, given.vocabulary, given.seed)
    print(f"wrote {given.out}: {count:,} parameters, with random weights")


if __name__ == "__main__":
    main()
