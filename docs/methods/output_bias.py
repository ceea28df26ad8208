"""An example of a method in one file: a bias of each target language at the decoder's feed-forwards.

    y = W x + b + s m b_target        loss: weight x the mean of (m b_target)^2 over the sentences of a step

s rises from 0 to 1 over the first half of the training; the stored mask m leaves out every fourth output.
"""

import torch
from torch import nn

from lsmoe_ds.config.method import Chart, MethodSection
from lsmoe_ds.config.shapes import Count, LinearShape
from lsmoe_ds.methods.base import Method


class OutputBias(MethodSection):
    name = "output_bias"
    weight: float = 0.01  # of the loss

    def is_at(self, site):
        return isinstance(site, LinearShape) and (site.side, site.name) == ("decoder", "contract")

    def count(self, site, languages, held="all"):  # parameters
        return Count(whole=len(languages.codes) * site.outputs)

    def describe(self):
        return "an output bias of each target language"

    def charts(self):
        return [Chart("Mean square of the output biases", "bias_square")]

    def build(self, recipe, topology):
        return OutputBiases(self, recipe, topology)


class Bias(nn.Module):  # beside one linear layer
    def __init__(self, site, languages):
        super().__init__()
        self.scale = 0.0  # set before each training step
        self.rows = nn.Parameter(torch.empty(languages, site.outputs))
        self.register_buffer("mask", torch.ones(site.outputs, dtype=torch.bool))

    def forward(self, base, x, context):  # x [B, T, inputs] of B sentences
        bias = (self.rows * self.mask)[context.ids.target]  # [B, outputs]
        context.note("output_bias", torch.stack([bias.square().mean(1).sum(), bias.new_tensor(len(bias))]))
        return base(x) + (self.scale if self.training else 1.0) * bias[:, None]


class OutputBiases(Method):
    name, metrics, by_direction = "output_bias", ("bias_square",), True

    def make(self, site):
        return Bias(site, len(self.languages.codes))

    def initial(self, name):
        if name.endswith("_output_bias.mask"):  # given here, so that growing can add it to a trained model
            return lambda value, generator: value.copy_(torch.arange(len(value)) % 4 > 0)
        return (lambda value, generator: value.zero_()) if name.endswith("_output_bias.rows") else None

    def before_step(self, model, number, steps):
        for layer in filter(lambda module: isinstance(module, Bias), model.modules()):
            layer.scale = min(2 * (number - 1) / steps, 1.0)

    def count(self, notes):  # summed over the whole step before its losses are computed: here the sentences
        return [torch.stack(notes)[:, 1].sum().detach().view(1)]

    def losses(self, notes, totals, size):
        return {"output_bias": self.section.weight * torch.stack(notes)[:, 0].sum() / totals[0][0]}

    def measure(self, sums, totals, size):
        return {"bias_square": sums["output_bias"] / self.section.weight}

    def language_rows(self, name, width):  # where growing puts the row of a new language
        codes = self.languages.codes if name.endswith(".rows") else ()
        return {code: slice(i, i + 1) for i, code in enumerate(codes)}

    def merge_at(self, weights, at, direction, route):  # into the bias of the layer ``at``, for one direction
        rows, mask = (weights.entries[f"{at}_output_bias.{name}"] for name in ("rows", "mask"))
        base, language = weights.entries[f"{at}.bias"], self.languages.id(direction.target)
        return {f"{at}.bias": base._replace(make=lambda: base.make() + rows.make()[language] * mask.make())}
