"""Conditional language-specific routing, CLSR (Zhang et al. 2021, "Share or not? Learning to schedule language-specific capacity
for multilingual translation"), a baseline of "Condensing Multilingual Knowledge" (section 5.1).

After each sublayer f, before its output is added to the residual, for a token that the sublayer read as z [H]:

    h = f(z)        clsr(h) = g h W_lang + (1 - g) h W_shared        G(z) = relu(z W_1 + b) w_2

In training ``g = sigmoid(G(z) + alpha noise)`` with normal noise, and alpha grows linearly from 0 to 5 over the training, which
drives the gates apart; at inference g is 1 where G(z) >= 0, otherwise 0. The loss ``weight |mean g - budget|`` takes the mean
over all real tokens of the step and all sublayers of both sides. The language is the source in the encoder and the target in
the decoder. The authors' code (bzhangGo/zero) says that the gate reads the sublayer's input (here the normed one), that the
largest alpha is 5 and that 128 is the gate's hidden size. There W_shared is each sublayer's own, and stands in place of the
attention's output projection; here it follows a whole sublayer and, as any sublayer's last layer could take in a matrix of
its own, there is one a side.

Parameters: naive + 2 (L + 1) H^2 with the languages' projections shared by a side's sublayers (CLSR), and naive + (N L + 2) H^2
where each of N sublayers has its own (CLSR*), and the gates' N (H + 2) ``gate``. The paper's 53M and 105M (48M naive, L = 9,
H = 512) and 443M (242M naive, L = 95, H = 1024) say that N is 24 rather than 30, so attention and feed-forward without the
cross-attention (``at``), and leave gates less than 128 units: with 8 this gives 53.3M, 105.2M and 443.4M, and with 64, had the
paper no W_shared at all, 53.4M, 105.3M and 442.7M. With 128 units after 24 sublayers it is 54.8M, 106.7M and 446.4M.

With tensor parallelism every rank has all of it: h, z, and so the gradients, are whole and equal on all of them.

B sentences, T positions, H hidden, L languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lsmoe_ds.config.shapes import SideName
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import Languages
from lsmoe_ds.methods.base import Draw, Method, StepSize
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.methods.context import LanguageContext, Route
from lsmoe_ds.methods.low_rank.bank import MultiplySegments, slices_of
from lsmoe_ds.methods.sites import SublayerSite
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe

ALPHA = 5.0
NAME = "clsr"  # of the notes
SIDES: tuple[SideName, ...] = ("encoder", "decoder")


def alpha(number: int, steps: int) -> float:
    """Deviation of the noise in the ``number``-th of ``steps`` training steps, counted from 1."""
    return ALPHA * min((number - 1) / steps, 1.0)


class Projections(nn.Module):
    """Hold W_shared [H, H] of one side, and W_lang of all languages, one below the other [L H, H], unless each
    sublayer has its own. All are transposed.
    """

    def __init__(self, hidden: int, settings: Clsr, languages: Languages, decoder: bool) -> None:
        super().__init__()
        self.settings, self.hidden, self.languages = settings, hidden, len(languages.codes)
        self.noise = 0.0  # deviation of the gates' noise, set before each training step
        self.places = [slice(i * hidden, (i + 1) * hidden) for i in range(self.languages)]
        self.kind = "target" if decoder else "source"
        self.shared = nn.Parameter(torch.empty(hidden, hidden))
        self.specific = self.all_languages() if settings.shared else None

    def all_languages(self) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.languages * self.hidden, self.hidden))


class ConditionalRouting(nn.Module):
    """What follows one sublayer."""

    def __init__(self, side: Projections) -> None:
        super().__init__()
        units = side.settings.gate
        self.gate = nn.Sequential(nn.Linear(side.hidden, units), nn.ReLU(), nn.Linear(units, 1, bias=False))
        self.specific = None if side.settings.shared else side.all_languages()
        self._side = (side,)  # in a tuple, so that its parameters are the side's alone and have one name

    def forward(self, h: Tensor, z: Tensor, real: Tensor, context: LanguageContext) -> Tensor:
        """h, what the sublayer gave, and z, what it read [B, T, H] -> [B, T, H]."""
        (side,) = self._side
        logits = self.gate(z).squeeze(2).float()
        if self.training:
            gates = torch.sigmoid(logits + side.noise * torch.randn_like(logits) if side.noise else logits)
        else:
            gates = (logits >= 0).float()
        if context.notes is not None:
            context.note(NAME, (gates * real).sum())
        rows = h.reshape(-1, side.hidden)
        matrices = side.specific if self.specific is None else self.specific
        specific = MultiplySegments.apply(rows, matrices, slices_of(side.places, context, side.kind, rows), side.hidden)
        return torch.lerp(F.linear(rows, side.shared), specific, gates.to(h.dtype).view(-1, 1)).view_as(h)


class ConditionalLanguageSpecificRouting(Method):
    """A note is a sublayer's sum of gates over its real tokens; the total is the sum over all of them."""

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
                self.sides[side] = Projections(self.model.hidden, self.section, self.languages, side == "decoder")
        return [(f"{side}_{NAME}", projections) for side, projections in self.sides.items()]

    def make(self, site: SublayerSite) -> ConditionalRouting:
        """Return what follows one sublayer."""
        return ConditionalRouting(self.sides[site.side])

    def initial(self, name: str) -> Draw | None:
        """Make projections the identity, so that a model begins as it would without them."""
        return _fill_with_identities if name.endswith(("_clsr.specific", "_clsr.shared")) else None

    def check_merge(self, route: Route) -> None:
        raise UserError(
            "the gates of model.clsr choose between two projections for each token at run time, so no dense model computes the same: "
            "serve the trained model itself"
        )

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
        """Count the gates of a step: those of each side times the real tokens that they read."""
        return sum(self.section.gates(self.model, side) * size.tokens(side) for side in SIDES)


def _fill_with_identities(value: Tensor, generator: Generator) -> None:
    """Fill [N H, H] with N identities, one below the other."""
    value.zero_().view(-1, value.shape[1], value.shape[1]).diagonal(dim1=1, dim2=2).fill_(1.0)


def _sum(notes: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(notes)).sum()


def budget_loss(settings: Clsr, gates: Tensor, mean: Tensor, count: int) -> Tensor:
    """A micro-batch's part of ``weight |mean - budget|`` but for a constant: ``gates``, its sum of gates, has the gradient. ``mean``
    is that of the whole step, which has ``count`` gates; the parts of all micro-batches have the gradient of the loss."""
    return settings.weight * torch.sign(mean - settings.budget) * gates / count
