"""The section ``model`` of a recipe: the host, ours or one of transformers, and its methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from lsmoe_ds.config.host import CLASSES, Task
from lsmoe_ds.config.method import MethodSection, sections
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.section import Positive, Section
from lsmoe_ds.config.shapes import LinearShape, SideName, shapes_of
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted, listed

PRESETS: dict[str, dict[str, Any]] = {
    "transformer-tiny": {"hidden": 256, "heads": 4, "encoder": (3, 1024), "decoder": (2, 1024)},
    "transformer-small": {"hidden": 512, "heads": 8, "encoder": (6, 1024), "decoder": (6, 1024)},
    "transformer-base": {"hidden": 512, "heads": 8, "encoder": (6, 2048), "decoder": (6, 2048)},
    "transformer-big": {"hidden": 1024, "heads": 16, "encoder": (6, 4096), "decoder": (6, 4096)},
}


class Side(Section):
    """Describe the encoder or the decoder.

    ``feed_forward`` is the width of all layers, or a list with one width for each layer (as in an extracted
    sub-network).
    """

    layers: Annotated[int, Field(ge=0, le=1000)]
    feed_forward: Positive | list[Positive]
    moe: MoE | None = None

    @model_validator(mode="after")
    def _widths(self) -> Side:
        if isinstance(self.feed_forward, list) and len(self.feed_forward) != self.layers:
            widths, layers = counted(len(self.feed_forward), "width"), counted(self.layers, "layer")
            raise ValueError(f"'feed_forward' lists {widths} for {layers}")
        if self.moe is not None and self.moe.every > self.layers:
            layers = counted(self.layers, "layer")
            raise ValueError(
                f"'moe.every' is {self.moe.every}, more than the {layers}: none would have experts"
            )
        return self

    def width(self, layer: int) -> int:
        """Return the width F of the feed-forward of a layer counted from 0."""
        return self.feed_forward[layer] if isinstance(self.feed_forward, list) else self.feed_forward

    def is_moe(self, layer: int) -> bool:
        """Return whether a layer counted from 0 holds experts: with ``every: 2`` the second, fourth, ..."""
        return self.moe is not None and (layer + 1) % self.moe.every == 0


class _Model(Section):
    """Describe the model: the Transformer, and a section for each method that it uses.

    With ``huggingface`` the Transformer is a model that transformers saved in a folder. Its configuration
    gives the other keys; a side that it lacks has 0 layers. ``task`` says what it is trained for: a decoder
    without encoder translates, an encoder without decoder tags words or finds answers.
    """

    huggingface: Path | None = None
    task: Task = "translate"
    preset: Literal["transformer-tiny", "transformer-small", "transformer-base", "transformer-big"] | None = (
        None
    )
    hidden: Positive
    heads: Positive
    encoder: Side
    decoder: Side

    @model_validator(mode="before")
    @classmethod
    def _host(cls, value: Any) -> Any:
        """Fill in what the configuration of a model of transformers says."""
        if not isinstance(value, dict) or not isinstance(value.get("huggingface"), str | Path):
            return value
        from lsmoe_ds.config.host_outline import read_outline  # needs transformers and torch

        if (task := value.get("task", "translate")) not in CLASSES:
            raise ValueError(f"'task' is {task}: it must be {' or '.join(CLASSES)}")
        if value.get("preset") is not None:
            raise ValueError("'preset' and 'huggingface' are two models: leave one out")
        try:
            host = read_outline(Path(value["huggingface"]), task)
        except UserError as error:
            raise ValueError(f"'huggingface': {error}") from None
        sides = {
            side: {"layers": host.layers.get(side, 0), "feed_forward": host.widths.get(side, 1)}
            for side in ("encoder", "decoder")
        }
        own = {"hidden": host.hidden, "heads": host.heads, **sides}
        for key, found in own.items():
            given = value.get(key, found)
            same = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given
            if same != found:
                raise ValueError(
                    f"'{key}' is {given}, but the model in 'huggingface' has {found}: leave it out"
                )
        return {**value, **own}

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("preset"), str)
            or value["preset"] not in PRESETS
        ):
            return value
        preset = PRESETS[value["preset"]]
        value = {"hidden": preset["hidden"], "heads": preset["heads"], **value}
        for side in ("encoder", "decoder"):
            layers, width = preset[side]
            given = value.get(side)
            if given is None or isinstance(given, dict):
                value[side] = {"layers": layers, "feed_forward": width, **(given or {})}
        return value

    @model_validator(mode="after")
    def _heads(self) -> _Model:
        if self.huggingface is not None:
            return self
        if self.task != "translate":
            raise ValueError(f"'task' is {self.task}, which is for models of 'huggingface': give a folder")
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            if not side.layers:
                raise ValueError(f"'{name}.layers' is 0: it must be at least 1")
        if self.hidden < 4:
            raise ValueError(
                f"'hidden' is {self.hidden}: it must be at least 4, so that positions have a sine and a "
                "cosine of two lengths"
            )
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(
                f"'hidden' is {self.hidden}: it must be even and a multiple of 'heads', which is {self.heads}"
            )
        return self

    @model_validator(mode="after")
    def _methods(self) -> _Model:
        for method in self.methods:
            if self.huggingface is not None and not method.in_hosts:
                known = [name for name, kind in sections().items() if kind.in_hosts]
                raise ValueError(
                    f"'{method.name}' has no place in a model of transformers, which can have "
                    f"{listed(known)}: leave it out"
                )
            self._check_known(method)
            method.checked(self)
        for site in shapes_of(self) if len(self.methods) > 1 else ():
            here = [method.name for method in self.methods if method.is_at(site)]
            if isinstance(site, LinearShape) and len(here) > 1:
                raise ValueError(
                    f"'{here[0]}' and '{here[1]}' both stand beside {site.at}: a linear layer takes one"
                )
        return self

    def _check_known(self, method: MethodSection) -> None:
        """Raise ValueError if a method names a sublayer of a host that has linear layers of unknown kinds."""
        if self.huggingface is None:
            return
        from lsmoe_ds.config.host_outline import read_outline

        host = read_outline(self.huggingface, self.task)
        for site in host.unknown:
            if method.is_at(site):
                others = dict.fromkeys(each.sublayer for each in host.sites)
                raise ValueError(
                    f"'{method.name}' names the {site.sublayer} of the model in 'huggingface', whose linear "
                    f"layer {site.name} is of no known kind: choose other places, such as {listed(others)}"
                )

    @property
    def methods(self) -> list[MethodSection]:
        """List the sections of the methods that the model has."""
        found = (getattr(self, name, None) for name in sections())
        return [section for section in found if section is not None]

    @property
    def alone(self) -> SideName | None:
        """Return the only side that a model of transformers has; None for our models."""
        if self.huggingface is None:
            return None
        return "encoder" if self.encoder.layers else "decoder"

    @property
    def teaches(self) -> bool:
        """Tell whether shared feed-forwards learn from experts."""
        return any(moe.has_shared for _, _, moe in self.moe_layers())

    @property
    def distills(self) -> bool:
        """Whether the model has a specific and a shared route, which both run on each training batch."""
        return self.teaches or any(method.distills for method in self.methods)

    @property
    def needs_groups(self) -> bool:
        """Tell whether a method depends on the resource groups of languages."""
        return any(method.needs_groups for method in self.methods)

    def routed(self, moe: MoE) -> int:
        """Count the training routes that use these experts: 2 if the shared route does, too, otherwise 1."""
        return 2 if self.distills and not moe.has_shared else 1

    @property
    def affine(self) -> MoE | None:
        """The settings that task-affine batches follow: the decoder's if it is routed by task, otherwise the
        encoder's if that is; else None.
        """
        settings = [
            side.moe for side in (self.decoder, self.encoder) if side.moe is not None and side.moe.by_task
        ]
        return settings[0] if settings else None

    def moe_layers(self) -> Iterator[tuple[str, int, MoE]]:
        """Yield (side, layer, settings) of each layer that holds experts."""
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            for layer in range(side.layers):
                if side.moe is not None and side.is_moe(layer):
                    yield name, layer, side.moe


if TYPE_CHECKING:
    Model = _Model
else:
    _sections = {name: (kind | None, None) for name, kind in sections().items()}
    Model = create_model("Model", __base__=_Model, __module__=__name__, **_sections)
