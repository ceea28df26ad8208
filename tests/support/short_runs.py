"""Short trainings of one small recipe in any layout, each done once for all tests of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from support.small_run import TARGET_TOP2, make_recipe, write_corpus


class ShortRuns:
    """Runs below ``folder``, with eight experts in the decoder and a checkpoint every three steps.

    ``loop`` trains on a rank. ``model`` and ``training`` are what the recipes have besides. A layout is
    (tensor, expert, world, ZeRO stage).
    """

    def __init__(
        self,
        pool: Any,
        folder: Path,
        loop: Callable[..., Any],
        model: dict[str, Any] | None = None,
        **training: Any,
    ) -> None:
        self.pool, self.folder, self.loop = pool, folder, loop
        self.model, self.training = model or {}, training
        self.known: dict[Any, Path] = {}
        write_corpus(folder)
        prepare(self.recipe((1, 1, 1, 0)))

    def recipe(self, layout: tuple, bf16: bool = False, **training: Any) -> Recipe:
        """Return the recipe of a layout, with further keys of ``training``."""
        tensor, expert, _, stage = layout
        decoder = {**TARGET_TOP2, "experts": 8}
        made = make_recipe(self.folder, None, decoder, tensor=tensor, expert=expert, stage=stage, bf16=bf16)
        given = made.model_dump(mode="json", exclude_none=True)
        given["model"] |= self.model
        given["data"]["batch"] |= {"tokens": 96, "count": 4}
        given["training"] |= {"steps": 6, "checkpoint_every": 3, "log_every": 1, "learning_rate": 0.01}
        given["training"] |= {"keep": 9, "max_grad_norm": 1.0, **self.training, **training}
        return Recipe.model_validate(given)

    def train(self, recipe: Recipe, run: Path, layout: tuple, *arguments: Any) -> None:
        """Train on all ranks of a layout. ``arguments`` are further ones of the loop."""
        tensor, expert, world, _ = layout
        found = self.pool.run(world, self.loop, recipe, run, *arguments, tensor=tensor, expert=expert)
        assert found == [None] * world

    def begun(self, layout: tuple, bf16: bool = False, **training: Any) -> Path:
        """Return the folder of a run of this recipe, which is trained when it is first asked for."""
        key = layout, bf16, str(sorted(training.items()))
        if key not in self.known:
            self.known[key] = self.folder / f"begun-{len(self.known)}"
            self.train(self.recipe(layout, bf16, **training), self.known[key], layout)
        return self.known[key]
