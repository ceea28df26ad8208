"""Text of the model card of a model of transformers: how to write its prompts and get answers."""

from __future__ import annotations

from typing import Any

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.adapter_card import ELSEWHERE, SIZES
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.prompts import SOURCE, prompt_text
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction

IMPORTS = """```python
import re
import unicodedata

import torch
"""
ANSWER = """
{{ clean }}


def encode(text, plain=False):
    \"\"\"Tokenize a part of a prompt, in which special tokens are themselves unless it is plain text.\"\"\"
    return tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]


before, after = {{ prompt }}.split("{{ source }}")
text = encode(clean("Text to translate."), plain=True)
ids = [{{ start }}*encode(before), *text, *encode(after)]
inputs, end = torch.tensor([ids]), encode({{ end }})[0]
options = {"num_beams": 5, "early_stopping": True, "do_sample": False, "max_new_tokens": 4 * len(text) + 20}
options |= {"attention_mask": torch.ones_like(inputs), "eos_token_id": end, "pad_token_id": end}
found = model.generate(inputs, **options)
print(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True))
```

The parts of a prompt are tokenized apart, as in training.
"""
USES = {
    "huggingface": IMPORTS
    + """from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
"""
    + ANSWER
    + """Sentences are translated one by one: cut longer text at their ends.""",
    "peft": ELSEWHERE
    + IMPORTS
    + """from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained("{{ base }}")
model = AutoModelForCausalLM.from_pretrained("{{ base }}")
# Without the base's own settings, such as a penalty for repetitions.
model.generation_config = GenerationConfig()
model = PeftModel.from_pretrained(model, "FOLDER{{ adapter.name and '/' + adapter.name }}")
"""
    + ANSWER
    + SIZES,
}


def words(recipe: Recipe, vocabulary: Vocabulary | HostTokenizer, direction: Direction) -> dict[str, Any]:
    """Return the template's variables for the use of a model; the example is for one direction."""
    prompt = recipe.data.prompt
    assert prompt is not None and isinstance(vocabulary, HostTokenizer)
    text = prompt_text(prompt, direction)
    tokens = vocabulary.before(text.split(SOURCE)[0])
    return {
        "prompt": repr(text),
        "source": SOURCE,
        "end": repr(prompt.end),
        "start": "".join(f"*encode({token!r}), " for token in tokens),
    }
