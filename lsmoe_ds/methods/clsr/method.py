"""Conditional language-specific routing (CLSR).

The method is from Zhang et al. 2021, "Share or not? Learning to schedule language-specific capacity for
multilingual translation"; it is a baseline of "Condensing Multilingual Knowledge" (section 5.1).

After each sublayer f, before its output is added to the residual, for a token that the sublayer read as z
[H]:

    h = f(z)        clsr(h) = g h W_lang + (1 - g) h W_shared        G(z) = relu(z W_1 + b) w_2

In training ``g = sigmoid(G(z) + alpha noise)`` with normal noise. Alpha grows linearly from 0 to 5 during
training, which drives the gates apart. At inference g is 1 where G(z) >= 0, otherwise 0. The loss
``weight |mean g - budget|`` takes the mean over all real tokens of the step and all sublayers of both sides.
The language is the source in the encoder and the target in the decoder.

In the authors' code (bzhangGo/zero) the gate reads the sublayer's input (here the normed one), the largest
alpha is 5 and the gate's hidden size is 128. There each sublayer has its own W_shared, in place of the
attention's output projection. Here W_shared follows the whole sublayer, and there is one per side: the
sublayer's last layer could absorb a W_shared of its own.

Parameters beyond the naive model: 2 (L + 1) H^2 if a side's sublayers share the language projections (CLSR),
or (N L + 2) H^2 if each of N sublayers has its own (CLSR*), plus N (H + 2) ``gate`` for the gates. The
paper's totals are 53M and 105M (48M naive, L = 9, H = 512) and 443M (242M naive, L = 95, H = 1024). They
imply that N is 24 rather than 30, that is attention and feed-forward without cross-attention (``at``), and
gates of fewer than 128 units: 8 units give 53.3M, 105.2M and 443.4M; 64 units, if the paper has no W_shared
at all, give 53.4M, 105.3M and 442.7M. 128 units after 24 sublayers give 54.8M, 106.7M and 446.4M.

With tensor parallelism every rank holds all these parameters: h, z and so the gradients are whole and equal
on all ranks.

B sentences, T positions, H hidden, L languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lsmoe_ds.config.shapes import SideName
from lsmoe_ds.directions import Languages
from lsmoe_ds.methods.base import Draw, Method, StepSize
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.products import Matrices, Multiply
from lsmoe_ds.methods.sites import SublayerSite
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe

ALPHA = 5.0
NAME = "clsr"  # the key of this method's notes
SIDES: tuple[SideName, ...] = ("encoder", "decoder")


def alpha(number: int, steps: int) -> float:
    """Return the noise's standard deviation in the ``number``-th of ``steps`` training steps, from 1."""
    return ALPHA * min((number - 1) / steps, 1.0)


class Projections(nn.Module):
    """Hold W_shared [H, H] of one side and, unless each sublayer has its own, W_lang [L H, H].

    The matrices of the languages are stacked along the rows. All matrices are transposed.
    """

    def __init__(self, hidden: int, settings: Clsr, languages: Languages, decoder: bool) -> None:
        super().__init__()
        self.settings, self.hidden, self.languages = settings, hidden, len(languages.codes)
        self.noise = 0.0  # standard deviation of the gates' noise, set before each training step
        self.matrices = Matrices([slice(i * hidden, (i + 1) * hidden) for i in range(self.languages)])
        self.kind = "target" if decoder else "source"
        self.shared = nn.Parameter(torch.empty(hidden, hidden))
        self.specific = self.all_languages() if settings.shared else None

    def all_languages(self) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.languages * self.hidden, self.hidden))


class ConditionalRouting(nn.Module):
    """The gate after one sublayer, with the sublayer's own language projections if there are any."""

    def __init__(self, side: Projections) -> None:
        super().__init__()
        units = side.settings.gate
        self.gate = nn.Sequential(nn.Linear(side.hidden, units), nn.ReLU(), nn.Linear(units, 1, bias=False))
        self.specific = None if side.settings.shared else side.all_languages()
        self._side = (side,)  # in a tuple, so that torch does not register the side's parameters twice

    def forward(self, h: Tensor, z: Tensor, real: Tensor, context: LanguageContext) -> Tensor:
        """Mix both projections of the sublayer's output ``h``, with gates that read its input ``z``.

        ``h`` and ``z`` [B, T, H] -> [B, T, H].
        """
        (side,) = self._side
        logits = self.gate(z).squeeze(2).float()
        if self.training:
            gates = torch.sigmoid(logits + side.noise * torch.randn_like(logits) if side.noise else logits)
        else:
            gates = (logits >= 0).float()
        if context.notes is not None:
            context.note(NAME, (gates * real).sum())
        rows = h.reshape(-1, side.hidden)
        own, matrices = side.specific if self.specific is None else self.specific, side.matrices
        groups = matrices.groups(context, side.kind, rows)
        specific = Multiply.apply(rows, own, matrices, groups, slice(0, side.hidden))
        return torch.lerp(F.linear(rows, side.shared), specific, gates.to(h.dtype).view(-1, 1)).view_as(h)


class ConditionalLanguageSpecificRouting(Method):
    """Add CLSR after sublayers, and its budget loss.

    A note is the sum of one sublayer's gates over its real tokens; the total is the sum of all notes.
    """

    name = NAME
    metrics = ("gates",)
    by_direction = True

    section: Clsr

    def __init__(self, section: Clsr, recipe: Recipe, topology: Topology) -> None:
        super().__init__(section, recipe, topology)
        self.model = recipe.model
        self.sides: dict[SideName, Projections] = {}

    def shared_modules(self) -> list[tuple[str, nn.Module]]:
        for side in SIDES:
            if self.section.gates(self.model, side):
                self.sides[side] = Projections(
                    self.model.hidden, self.section, self.languages, side == "decoder"
                )
        return [(f"{side}_{NAME}", projections) for side, projections in self.sides.items()]

    def make(self, site: SublayerSite) -> ConditionalRouting:
        """Return the gate for one sublayer."""
        return ConditionalRouting(self.sides[site.side])

    def initial(self, name: str) -> Draw | None:
        """Initialize projections to the identity, so that adding them does not change the model's output."""
        return _fill_with_identities if name.endswith(("_clsr.specific", "_clsr.shared")) else None

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        if not name.endswith("_clsr.specific"):
            return {}
        return {code: slice(i * width, (i + 1) * width) for i, code in enumerate(self.languages.codes)}

    def before_step(self, model: Any, number: int, steps: int) -> None:
        for projections in self.sides.values():
            projections.noise = alpha(number, steps)

    def count(self, notes: Sequence[Tensor]) -> list[Tensor]:
        return [_sum(notes).detach().view(1)]

    def losses(self, notes: Sequence[Tensor], totals: list[Tensor], size: StepSize) -> dict[str, Tensor]:
        count = self.gate_count(size)
        return {"gate_budget": budget_loss(self.section, _sum(notes), totals[0][0] / count, count)}

    def measure(self, sums: Mapping[str, float], totals: list[Tensor], size: StepSize) -> dict[str, float]:
        return {"gates": float(totals[0]) / self.gate_count(size)}

    def gate_count(self, size: StepSize) -> int:
        """Count the gate values of a step: the gates of each side times the real tokens that they read."""
        return sum(self.section.gates(self.model, side) * size.tokens(side) for side in SIDES)


def _fill_with_identities(value: Tensor, generator: Generator) -> None:
    """Fill [N H, H] with N identity matrices, stacked along the rows."""
    value.zero_().view(-1, value.shape[1], value.shape[1]).diagonal(dim1=1, dim2=2).fill_(1.0)


def _sum(notes: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(notes)).sum()


def budget_loss(settings: Clsr, gates: Tensor, mean: Tensor, count: int) -> Tensor:
    """Return a micro-batch's part of ``weight |mean - budget|``, up to a constant.

    ``gates`` is the micro-batch's sum of gates, with gradient; ``mean`` and ``count`` are the mean and the
    number of gates of the whole step. The gradients of all parts sum to the gradient of the loss.
    """
    return settings.weight * torch.sign(mean - settings.budget) * gates / count
