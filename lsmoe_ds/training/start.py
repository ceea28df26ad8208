"""From a recipe to running processes: check everything that can be checked before starting any."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from lsmoe_ds import interrupt
from lsmoe_ds.checkpoint.run_folder import check_run, list_checkpoints, newest_whole, open_run
from lsmoe_ds.checkpoint.stored import RECIPE, find_model
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.host import check_weights
from lsmoe_ds.config.layout import Parallel, check_layout
from lsmoe_ds.config.method import MethodSection
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.groups import with_listed_groups
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.prompts import joined
from lsmoe_ds.data.shares import shares_of, with_named_replicas
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.folders import locked
from lsmoe_ds.launch import joining, watchdog
from lsmoe_ds.launch import processes as launch
from lsmoe_ds.launch.determinism import make_deterministic
from lsmoe_ds.launch.membership import Membership, find
from lsmoe_ds.launch.memory import keep_large_blocks
from lsmoe_ds.model.build import outline
from lsmoe_ds.model.freezing import freeze
from lsmoe_ds.moe.load import loads
from lsmoe_ds.notices import counted, listed
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import on_main
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.curves import check_installed
from lsmoe_ds.training.engine import check_precision
from lsmoe_ds.training.profiling import Traced
from lsmoe_ds.training.start_from import added_methods, check_start_from
from lsmoe_ds.training.teacher import check_teacher


def check(recipe: Recipe, run: Path) -> None:
    """Check a recipe, then open its run folder. Raises UserError for what would stop training later."""
    check_installed(recipe.training.log_to)
    prepared = PreparedData.of(recipe)
    _check_dev(recipe, prepared)
    if recipe.training.trainable != "all":
        freeze(outline(recipe, prepared.vocabulary.size), recipe, Topology.single())
    vocabulary = prepared.folder / "vocabulary.model"
    check_run(recipe, run, vocabulary)
    found, _ = newest_whole(run)
    if found is None:
        _check_batches(recipe, prepared)
    if found is None and recipe.model.huggingface is not None:
        check_weights(recipe.model.huggingface)
    if found is None:
        added = {method.name for method in recipe.model.methods}
        if recipe.training.start_from is not None:
            check_start_from(recipe, recipe.training.start_from, vocabulary)
            added = set(added_methods(recipe, find_model(recipe.training.start_from)))
        for method in recipe.model.methods:
            if method.name in added:
                _check_dev_of(method, recipe, prepared)
                if recipe.training.start_from is not None:
                    method.check_begin(recipe)
    check_teacher(recipe, vocabulary, run)
    open_run(recipe, run, vocabulary)


def _check_batches(recipe: Recipe, prepared: PreparedData) -> None:
    """Raise UserError if no batch can be made.

    This must come before the run folder is made, because its recipe cannot be changed afterwards.
    """
    data, vocabulary = recipe.data, prepared.vocabulary
    mixed = data.batch.model_copy(update={"languages": "mixed"})
    form = form_of(data, recipe.languages, vocabulary)
    BatchStream(
        *(prepared, recipe.languages, vocabulary, mixed, data.temperature, recipe.training.seed),
        form=form,
        directions=recipe.trained,
    )


def _has_dev(prepared: PreparedData, directions: Iterable[Direction]) -> bool:
    return any(prepared.manifest["bitexts"][each.bitext]["dev"]["pairs"] for each in directions)


def _check_dev_of(method: MethodSection, recipe: Recipe, prepared: PreparedData) -> None:
    """Raise UserError if a method that is added now reads the dev set, and there is none."""
    if method.reads_dev and not _has_dev(prepared, recipe.languages.directions):
        raise UserError(
            f"'model.{method.name}' reads the dev set, but {prepared.folder} has no dev pairs: raise "
            "'data.held_out.dev' and prepare again"
        )


def _check_dev(recipe: Recipe, prepared: PreparedData) -> None:
    """Raise UserError if the recipe validates but there are no dev pairs.

    The validation loss would be 0, which would count as the best.
    """
    every = recipe.training.validate_every
    if every and not _has_dev(prepared, recipe.trained):
        of_these = " of 'training.directions'" if recipe.training.directions else ""
        raise UserError(
            f"'training.validate_every' is {every}, but {prepared.folder} has no dev pairs{of_these}: "
            "set it to 0, or raise 'data.held_out.dev' and prepare again"
        )


def _check_processes(recipe: Recipe, world: int) -> None:
    """Raise SharedError unless ``world`` processes can share the recipe's steps, experts and tensors."""
    try:
        check_layout(recipe, world)
        check_precision(recipe)
    except UserError as error:
        raise SharedError(str(error)) from None


def train(recipe: Recipe, run: Path, processes: int | None, traced: Traced | None = None) -> int:
    """Train, and profile the ``traced`` steps.

    If a launcher has started this process, it is one of the launcher's ranks. Otherwise start ``processes``
    ranks on this machine, by default as few as the layout needs.

    Returns the exit status: 0 after the last step, :func:`interrupt.status_of` the signal when asked to stop,
    :data:`watchdog.STATUS` when another rank is lost.
    """
    membership = find(os.environ)
    if recipe.training.deterministic:
        make_deterministic()
    recipe = _with_what_data_decide(recipe)
    if membership.is_alone:
        return _start(recipe, run, processes, traced)
    os.environ.update(membership.environment())
    if processes not in (None, membership.world):
        started = counted(membership.world, "process")
        raise SharedError(
            f"--nproc is {processes}, but {membership.launcher} has started {started}: leave --nproc out"
        )
    _check_processes(recipe, membership.world)
    return _join_and_train(recipe, run, membership, traced)


def _with_what_data_decide(recipe: Recipe) -> Recipe:
    """Fill in resource groups and replicas, so that the run does not need its data for them.

    Raises SharedError.
    """
    try:
        return with_named_replicas(with_listed_groups(recipe) if recipe.model.needs_groups else recipe)
    except UserError as error:
        raise SharedError(str(error)) from None


def _notice(recipe: Recipe) -> None:
    """Print notices on standard error about settings that are allowed but rarely intended."""
    training = recipe.training
    if training.warmup > training.steps:
        reached = training.learning_rate * training.steps / training.warmup
        interrupt.say(
            f"training.warmup is {training.warmup}, more than the {training.steps} training.steps: the "
            f"learning rate rises to {reached:.2e} and never reaches training.learning_rate, "
            f"{training.learning_rate:.2e}"
        )
    base = training.start_from
    if training.trainable != "all" and base is None and recipe.model.huggingface is None:
        interrupt.say(
            "training.trainable freezes weights, but there is no training.start_from: "
            "they stay as random as they begin"
        )
    own = [method.name for method in recipe.model.methods if method.trains]
    if training.weight_decay and training.directions and own:
        interrupt.say(
            f"training.weight_decay is {training.weight_decay:g}: each step shrinks also what {listed(own)} "
            "has of directions that do not train here; 0 leaves that as it is"
        )
    if recipe.data.prompt is not None:
        wrong, seen = joined(PreparedData.of(recipe), recipe.data.prompt)
        if wrong:
            interrupt.say(
                f"in {wrong:,} of {counted(seen, 'dev sentence')} the tokenizer joins the prompt with the "
                "text, so that the whole prompt as one text has other tokens than are trained on: let "
                "{source} stand on a line of its own in data.prompt.text"
            )
    for method in recipe.model.methods:
        for text in method.notices(recipe):
            interrupt.say(text)
    if any(moe.replicas for _, _, moe in recipe.model.moe_layers()):
        for load in loads(recipe, shares_of(recipe, PreparedData.of(recipe))):
            if load.tasks:
                interrupt.say(load.describe())
    with suppress(UserError):  # a resumed run no longer needs the folder
        if base is not None and (learned := load_recipe(base / RECIPE).data.tags) != recipe.data.tags:
            interrupt.say(
                f"data.tags is {recipe.data.tags}, but the model in {base} was trained with {learned}: "
                "it has to learn another use of its tags"
            )


def _start(recipe: Recipe, run: Path, processes: int | None, traced: Traced | None) -> int:
    world = processes or launch.smallest_world(recipe)
    with locked(run) as lock:
        _check_processes(recipe, world)
        check(recipe, run)
        _notice(recipe)
        if world == 1:
            return _join_and_train(recipe, run, Membership(), traced)
        options = traced.arguments() if traced is not None else []
        return launch.start(["train", str(run / "recipe.yaml"), "--out", str(run), *options], world, lock)


def _open(recipe: Recipe, run: Path, held: ExitStack) -> None:
    if launch.LOCKED not in os.environ:
        held.enter_context(locked(run))
        _notice(recipe)
    check(recipe, run)


def _sizes(layout: Parallel, membership: Membership) -> str:
    """Describe the layout, and warn if machines do not have as many ranks as it says."""
    told, node, here = f"tensor {layout.tensor}, expert {layout.expert}", layout.forwards_among, membership
    if node > 1:
        told += f" on machines of {node}"
    if here.local_world % node:
        told += (
            f"\nwarning: parallel.node is {node}, but this machine has {counted(here.local_world, 'rank')}: "
            "rows cross the network more than once"
        )
    return told


def _join_and_train(recipe: Recipe, run: Path, membership: Membership, traced: Traced | None) -> int:
    import torch.distributed as dist

    from lsmoe_ds.training.loop import train as train_on_this_rank

    keep_large_blocks()
    layout, hang_timeout = recipe.parallel, recipe.training.hang_timeout
    party = joining.join(
        membership, {"the recipe": hashlib.sha256(recipe.to_yaml().encode()).hexdigest()}, 2 * hang_timeout
    )
    told = not membership.is_alone and membership.rank == 0
    if told:
        print(f"{party.describe()}; {_sizes(layout, membership)}", file=sys.stderr, flush=True)
    interrupt.save_and_leave(alone=membership.is_alone)
    here = Topology.build(layout.tensor, layout.expert, joining.device(), layout.node)
    with ExitStack() as held, watchdog.watch(party, hang_timeout):
        try:
            if not membership.is_alone:
                on_main(lambda: _open(recipe, run, held))
            asked = train_on_this_rank(recipe, run, here, traced)
        except RuntimeError as error:
            if compat.is_lost_peer(error):
                watchdog.leave_behind(party)
            raise
    dist.destroy_process_group()
    if asked is not None:
        return interrupt.status_of(asked)
    if membership.rank == 0:
        last = list_checkpoints(run)[-1].name
        interrupt.say(
            f"{run} is trained, its last checkpoint is {last}; next: lsmoe evaluate {shlex.quote(str(run))}"
        )
    return 0
