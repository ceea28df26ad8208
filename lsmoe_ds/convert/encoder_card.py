"""Text of the model card of an encoder: how to find names or answers with it."""

from __future__ import annotations

from typing import Any

from lsmoe_ds.config.host import Task, read_config
from lsmoe_ds.config.recipe import Recipe

TAG = """```python
from transformers import AutoModelForTokenClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForTokenClassification.from_pretrained("FOLDER")
words = "Words and punctuation marks between spaces .".split()
inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
numbers = model(**inputs).logits[0].argmax(-1)
for place, word in enumerate(words):
    print(word, model.config.id2label[int(numbers[inputs.word_ids().index(place)])])
```

The tag of a word is that of its first sub-word. Sentences are read one by one; one of more than {{ longest }}
tokens was cut between words.

"""
ANSWER = """```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForQuestionAnswering.from_pretrained("FOLDER")
question, context = "A question?", "A text that holds its answer."
options = {"return_offsets_mapping": True{{ ', "return_token_type_ids": True' if types }}}
inputs = tokenizer(question, context, return_tensors="pt", **options)
spans = inputs.pop("offset_mapping")[0]
inside = [i for i, side in enumerate(inputs.sequence_ids()) if side == 1]
found = model(**inputs)
ends = [(i, j) for i in inside for j in inside if i <= j < i + 30]
i, j = max(ends, key=lambda ends: found.start_logits[0, ends[0]] + found.end_logits[0, ends[1]])
print(context[spans[i][0] : spans[j][1]])
```

A question and a context of more than {{ longest }} tokens were read in windows that overlap by
{{ stride }} tokens.

"""
LINES: dict[Task, str] = {
    "tag": "echo 'Words and punctuation marks between spaces .'",
    "answer": "printf 'A question?\\tA text that holds its answer.\\n'",
}
LABEL = """With lsmoe_ds installed, {what} in each line:

```sh
{line} | lsmoe label FOLDER --language {{{{ first.source }}}}
```"""
WHAT: dict[Task, str] = {"tag": "a sentence", "answer": "a question and its context"}
WHOLE = """

`lsmoe convert FOLDER` takes the model of one language out of it; with `training.start_from: FOLDER` a
training begins with it."""


def uses(task: Task) -> dict[str, str]:
    """Return the text on how to use a folder, by kind."""
    label = LABEL.format(what=WHAT[task], line=LINES[task])
    code = TAG if task == "tag" else ANSWER
    return {"huggingface": code + label, "consolidated": label + WHOLE}


def words(recipe: Recipe) -> dict[str, Any]:
    """Return the template's variables for the use of a model."""
    host = recipe.model.huggingface
    types = host is not None and getattr(read_config(host), "type_vocab_size", 1) > 1
    return {"types": types, "longest": recipe.data.batch.max_length, "stride": recipe.data.stride}
