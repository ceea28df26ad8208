"""Hold the text of a small recipe, and parts of it to replace."""

from __future__ import annotations

GOOD = """\
name: x
data: {corpora: [{path: a, format: moses}], languages: [de], vocabulary: {size: 128}}
model:
  hidden: 32
  heads: 2
  encoder: {layers: 2, feed_forward: 64}
  decoder: {layers: 2, feed_forward: 64}
training: {steps: 4}
deepspeed: {}
"""
CORPUS, MODEL, STEPS = "{path: a, format: moses}", "model:\n", "{steps: 4}"
