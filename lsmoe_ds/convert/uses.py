"""Text of model cards on how to use a folder of each kind."""

from __future__ import annotations

from lsmoe_ds.convert import adapter_card
from lsmoe_ds.data.cleaning import INVISIBLE

TRANSLATE = """With lsmoe_ds installed:

```sh
echo "Text to translate." | lsmoe translate FOLDER --from {{ first.source }} --to {{ first.target }}
```"""
USES = {
    "dense": TRANSLATE,
    "hybrid": TRANSLATE,
    "consolidated": TRANSLATE
    + """

`lsmoe convert FOLDER` takes the model of one direction out of it; with `training.start_from: FOLDER` a training begins with it.""",
    "huggingface": """```python
{%- if mended %}
import transformers
{%- endif %}
from transformers import AutoTokenizer, {{ class }}
{{ mended }}
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {{ class }}.from_pretrained("FOLDER")
{%- if given and style %}
tokenizer.src_lang = "{{ style.languages[last.source] }}"
{%- endif %}
inputs = tokenizer(["Text to translate."], return_tensors="pt", padding=True)
{%- if given %}
{%- if not style %}
inputs["input_ids"][:, 0] = tokenizer.convert_tokens_to_ids("<2{{ last.source }}>")  # the source
{%- endif %}
target = tokenizer.convert_tokens_to_ids("{{ style.tokens[last.target] if style else tags[-1] }}")
length = 2 * inputs["input_ids"].shape[1] + 22  # at most so many tokens
found = model.generate(**inputs, forced_bos_token_id=target, max_new_tokens=length)
print(tokenizer.batch_decode(found, skip_special_tokens=True))
```

A source begins with the tag of its own language and ends with `</s>`; a translation begins with the tag of the target language, which
is forced. To train it further, let the labels begin with that tag too{{ ":" if not style else ", as they do once `tgt_lang` is set:" }}

```python
{%- if style %}
tokenizer.tgt_lang = "{{ style.languages[last.target] }}"
{%- endif %}
batch = tokenizer(["Text to translate."], text_target=["Its translation."])
{%- if not style %}
batch["labels"] = [[target, *ids[1:]] for ids in batch["labels"]]
{%- endif %}
```

`generation_config.json` holds the beam search by which the model is scored. Sentences are translated one by one: cut longer text
at their ends.
{%- else %}
{%- if targets|length > 1 %}
# the target; without this line it is {{ targets[0] }}
inputs["input_ids"][:, 0] = tokenizer.convert_tokens_to_ids("{{ tags[-1] }}")
{%- endif %}
length = 2 * inputs["input_ids"].shape[1] + 21  # at most so many tokens
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=length), skip_special_tokens=True))
```

To train it further, remove the tag from the labels: a translation begins without one, but the tokenizer puts it before whatever
text it gets, `text_target` included.

```python
batch = tokenizer(["Text to translate."], text_target=["Its translation."])
batch["labels"] = [ids[1:] for ids in batch["labels"]]
```

`generation_config.json` holds the beam search by which the model is scored. A source begins with the tag of its target language
({{ tags|join(', ') }}), which the tokenizer puts there, and ends with `</s>`. Sentences are translated one by one: cut longer text
at their ends.
{%- endif %}""",
    "ctranslate2": """```python
import re
import unicodedata

import ctranslate2
import sentencepiece

{{ clean }}

vocabulary = sentencepiece.SentencePieceProcessor(model_file="FOLDER/vocabulary.model")
translator = ctranslate2.Translator("FOLDER")
pieces = vocabulary.id_to_piece(vocabulary.encode(clean("Text to translate.")))
options = {"beam_size": 5, "return_end_token": True{{ ', "min_decoding_length": 2' if given }}{{ ', "use_vmap": True' if maps }}}
options["max_decoding_length"] = 2 * len(pieces) + {{ 26 if given else 25 }}  # at most so many tokens
{%- if given %}
source = ["<2{{ first.source }}>", *pieces]  # the tag of its own language goes first
prefix = ["{{ tags[0] }}"]  # and that of the target language before the translation
found = translator.translate_batch([source], target_prefix=[prefix], **options)[0].hypotheses[0]
# without the end, which counts in the length that scores are divided by, as the tag does
print(vocabulary.decode(found[1:-1]))
{%- else %}
source = ["{{ tags[0] }}", *pieces]  # the tag of the target language goes first
found = translator.translate_batch([source], **options)[0].hypotheses[0]
print(vocabulary.decode(found[:-1]))  # without the end, which counts in the length that scores are divided by
{%- endif %}
```

Or `lsmoe translate FOLDER --from {{ first.source }} --to {{ first.target }}`.""",
    "peft": adapter_card.USE,
}
"""How a folder of each kind is used."""

CLEAN = f"""
def clean(text):
    \"\"\"Make text what the model was trained on: composed characters, no invisible ones, single spaces.\"\"\"
    text = unicodedata.normalize("NFC", text)
    invisible = (
        {ascii(INVISIBLE.pattern).replace("'", '"')}
    )
    return " ".join(re.sub(invisible, "", text).split())
"""
"""Python that does what :func:`lsmoe_ds.data.cleaning.clean_text` does, for those who have no lsmoe_ds."""

MENDED = """from transformers.models.nllb_moe import modeling_nllb_moe


def forward(self, hidden_states, padding_mask=None):
    \"\"\"Use the experts that the router has chosen: transformers 5 reads a mask as the numbers of two.\"\"\"
    tokens = hidden_states.flatten(0, 1)
    weights, chosen = self.router(tokens, padding_mask)[1].topk(2, -1)
    return self.experts(tokens, chosen, weights).view_as(hidden_states)


if transformers.__version__.startswith("5."):  # earlier versions need nothing of this
    modeling_nllb_moe.NllbMoeSparseMLP.forward = forward
"""
"""Python that mends NLLB-MoE of transformers 5."""
