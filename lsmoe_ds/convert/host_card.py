"""What the model card says of a model of transformers: how its prompts are written and answered."""

from __future__ import annotations

from typing import Any

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.adapter_card import ELSEWHERE, SIZES
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.prompts import SOURCE, prompt_text
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction

ANSWER = """
prompt = {{ prompt }}
text = prompt.replace("{{ source }}", "Text to translate.")
inputs = tokenizer(text, return_tensors="pt", add_special_tokens={{ begins }})
end = tokenizer({{ end }}, add_special_tokens=False)["input_ids"][0]
options = {"num_beams": 5, "early_stopping": True, "do_sample": False, "max_new_tokens": 200}
found = model.generate(**inputs, **options, eos_token_id=end, pad_token_id=end)
print(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
USES = {
    "huggingface": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")"""
    + ANSWER
    + """
Sentences are translated one by one: cut longer text at their ends.""",
    "peft": ELSEWHERE
    + """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ base }}")
model = AutoModelForCausalLM.from_pretrained("{{ base }}")
model = PeftModel.from_pretrained(model, "FOLDER{{ adapter.name and '/' + adapter.name }}")"""
    + ANSWER
    + SIZES,
}


def words(recipe: Recipe, vocabulary: Vocabulary | HostTokenizer, direction: Direction) -> dict[str, Any]:
    """Return what the use of a model is written with; the example is of one direction."""
    prompt = recipe.data.prompt
    assert prompt is not None and isinstance(vocabulary, HostTokenizer)
    text = prompt_text(prompt, direction)
    begun = text.split(SOURCE)[0]
    return {
        "prompt": repr(text),
        "source": SOURCE,
        "end": repr(prompt.end),
        "begins": vocabulary.begin(begun) != vocabulary.encode_markup(begun),
    }
