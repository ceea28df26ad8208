"""Text of the model card of a folder of the kind ``peft``: how to use its adapters, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lsmoe_ds.directions import Direction
from lsmoe_ds.export.peft import BASE, HEADER, cells
from lsmoe_ds.languages import tag

WHAT = """A base and the matrices beside its linear layers, as LoRA adapters of `peft`, extracted from the
model `{run}` with lsmoe_ds {version}: together they compute what that model computes {of}."""
SIZES = """
`model.merge_and_unload()` makes a plain model of both. Sizes of the adapters, also in `sizes.json`:

| {{ header|join(' | ') }} |
|---|---|---:|---:|---:|
{%- for row in rows %}
| {{ row|join(' | ') }} |
{%- endfor %}

Values exclude the zeros that fill matrices up to the size of the base's layers; bytes include them."""
ELSEWHERE = """{% if base == "BASE" %}`BASE` is the folder of the base model, {{ base_name }}.

{% endif %}"""
USE = (
    ELSEWHERE
    + """```python
from peft import PeftModel
from transformers import AutoTokenizer, M2M100ForConditionalGeneration

base = M2M100ForConditionalGeneration.from_pretrained("{{ base }}")
model = PeftModel.from_pretrained(base, "FOLDER{{ adapter.name and '/' + adapter.name }}")
tokenizer = AutoTokenizer.from_pretrained("{{ base }}")
inputs = tokenizer(["Text to translate."], return_tensors="pt", padding=True)
# the tag that a source begins with: of {{ "its own language" if given else "the target" }}
head = tokenizer.convert_tokens_to_ids("{{ style.tokens[shown.source] if style else first_tag }}")
inputs["input_ids"][:, 0] = head
{%- if given %}
target = tokenizer.convert_tokens_to_ids("{{ style.tokens[shown.target] if style else last_tag }}")
print(tokenizer.batch_decode(model.generate(**inputs, forced_bos_token_id=target), skip_special_tokens=True))
{%- else %}
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))
{%- endif %}
```
"""
    + SIZES
)


def words(rows: Sequence[Mapping[str, Any]], given: bool, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for the use of adapters; the example is the first that is not empty."""
    named = provenance["base"]
    adapter = next(row for row in rows if row["ranks"])
    shown = Direction.parse(adapter["directions"][0])
    return {
        "adapter": adapter,
        "shown": shown,
        "first_tag": tag(shown.source if given else shown.target),
        "last_tag": tag(shown.target),
        "base": f"FOLDER/{named}" if named == BASE or named.startswith("../") else "BASE",
        "base_name": named,
        "header": HEADER,
        "rows": [cells(row) for row in rows],
    }
