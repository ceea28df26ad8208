"""The training loop: from the newest whole checkpoint to the last step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lsmoe_ds import interrupt
from lsmoe_ds.checkpoint import saving as checkpoints
from lsmoe_ds.checkpoint.resharding import load_weights
from lsmoe_ds.checkpoint.run_folder import (
    CHRF,
    FROZEN,
    STOPPING,
    best_first,
    list_checkpoints,
    newest_whole,
)
from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.assignment import affinity
from lsmoe_ds.data.batches import Batch
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.prefetching import Prefetched
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.validation import validation_batches
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import SharedError
from lsmoe_ds.launch.watchdog import beat
from lsmoe_ds.methods.context import Route
from lsmoe_ds.methods.taught import Taught
from lsmoe_ds.notices import counted, listed
from lsmoe_ds.parallel import compat, deepspeed_engine
from lsmoe_ds.parallel.collectives import on_main
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.ema import update_ema
from lsmoe_ds.training.engine import NonFinite, build_engine, train_step, validate
from lsmoe_ds.training.monitor import Monitor
from lsmoe_ds.training.profiling import Profiler, Traced
from lsmoe_ds.training.start_from import added_methods, starting_weights
from lsmoe_ds.training.stopping import Stopping
from lsmoe_ds.training.teacher import load_teacher
from lsmoe_ds.training.throughput import Throughput, peak_of
from lsmoe_ds.training.translating import dev_chrf


def train(recipe: Recipe, run: Path, topology: Topology, traced: Traced | None = None) -> int | None:
    """Train in an open run folder, on every rank of ``topology``.

    Resumes from the newest whole checkpoint, of any layout; without one, starts with the weights of
    ``training.start_from`` or with random ones. Profiles the ``traced`` steps.

    Resuming in the same layout is bit-exact after a kill at any point (on GPUs with
    ``training.deterministic``). Returns None after the last step. When asked to stop (see
    :mod:`lsmoe_ds.interrupt`), saves a checkpoint and returns the signal.
    """
    training, data = recipe.training, recipe.data
    prepared = PreparedData.of(recipe)
    languages, vocabulary = recipe.languages, prepared.vocabulary
    form = form_of(data, languages, vocabulary)
    groups, at_home = affinity(recipe, languages, topology.tensor, topology.expert, topology.data)
    stream = BatchStream(
        prepared,
        languages,
        vocabulary,
        data.batch,
        data.temperature,
        training.seed,
        rank=topology.data_rank,
        world=topology.data,
        groups=groups,
        at_home=at_home,
        form=form,
        directions=recipe.trained,
    )
    compat.seed_tensor_parallel_random(training.seed + 1009 * topology.data_rank, topology.tensor_rank)
    beat("building the model")
    engine = build_engine(recipe, vocabulary.size, topology)
    routes: tuple[Route, ...] = engine.module.objective.routes
    if isinstance(objective := engine.module.objective, Taught):
        beat("loading the teacher")
        objective.teacher = load_teacher(recipe, vocabulary.size, topology, run)
    beat("looking for the newest whole checkpoint")
    found, complaints = on_main(lambda: newest_whole(run))
    done, window, frozen = 0, None, None
    stopping = Stopping(training.early_stopping)
    added: list[str] = []
    learned: list[str | None] = []

    def dev(limit: int | None, directions: Sequence[Direction], doing: str) -> Iterator[Batch]:
        batches = validation_batches(
            prepared,
            languages,
            vocabulary,
            data.batch,
            directions,
            limit=limit,
            rank=topology.data_rank,
            world=topology.data,
            form=form,
        )
        for batch in batches:
            beat(doing)
            yield batch

    if found is not None:
        beat(f"loading {found}")
        state = checkpoints.load(engine, found, topology)
        stream.load_state_dict(state["position"]["stream"])
        done, window, frozen = state["step"], state["position"]["window"], state.get(FROZEN)
        if (stored := state["position"].get(STOPPING)) is not None:
            stopping.load_state_dict(stored)
    elif training.start_from is not None:
        base = find_model(training.start_from)
        load_weights(engine, starting_weights(recipe, base, vocabulary.size), topology)
        added = added_methods(recipe, base)
        learned = [
            method.begin(engine.module, lambda limit: dev(limit, languages.directions, "reading the dev set"))
            for method in engine.module.methods
            if method.name in added
        ]
    last_step = done >= training.steps or stopping.ended
    throughput = Throughput(recipe, topology.world, peak_of(recipe, topology)) if topology.is_main else None
    with (
        Monitor(
            run,
            training.steps,
            training.log_every,
            topology.is_main,
            topology.world,
            throughput,
            training.log_to,
        ) as monitor,
        checkpoints.Saver(
            run, topology, training.keep, training.keep_best, frozen, training.stops_by_chrf
        ) as saver,
        Prefetched(stream) as steps,
        Profiler(traced, run, topology, monitor.say) as profiler,
    ):
        on_main(lambda: monitor.start(done, window))  # if it fails, all ranks end
        if not topology.is_main:
            monitor.start(done, window)
        for complaint in complaints:
            monitor.say(f"damaged checkpoint: {complaint}")
        if found is not None:
            change = checkpoints.describe_change(engine, found, topology)
            monitor.say(f"resuming from {found}" + (f", {change}" if change else ""))
            if done >= training.steps:
                beyond = (
                    f"of {training.steps:,}"
                    if done == training.steps
                    else f"beyond training.steps, which is {training.steps:,}"
                )
                monitor.say(f"{run} is at step {done:,} {beyond}: nothing is left to train")
            elif stopping.ended:
                monitor.say(
                    f"{run} has ended at step {done:,}, nothing is left to train: {stopping.describe()}"
                )
        elif training.start_from is not None:
            beside = f", which is given {listed(added)}" if added else ""
            monitor.say(f"starting from {training.start_from}{beside}")
            for text in filter(None, learned):
                monitor.say(text)
        if training.validate_every and not last_step:
            monitor.say(_describe_validation(recipe, prepared))
        profiler.announce(done, done if last_step else training.steps)
        asked = interrupt.agreed(topology)
        if asked and not last_step:
            monitor.say(
                f"{interrupt.name_of(asked)} before step {done + 1}: nothing new to save; the same command "
                "resumes"
            )
        skipped = 0  # how many of the latest steps in a row were skipped
        for number in range(done + 1, done + 1 if asked or last_step else training.steps + 1):
            beat(f"in step {number}")
            profiler.before_step(number)
            step = next(steps)
            try:
                result = train_step(engine, step, number, recipe, topology)
            except NonFinite as error:
                directions = ", ".join(str(languages.directions[i]) for i in step.directions)
                raise SharedError(
                    f"step {number}: {error}; the directions in the batch: {directions}; {_last(saver)}"
                ) from None
            if training.ema is not None:
                update_ema(engine, training.ema.decay, number)
            monitor.after_step(number, step, result)
            skipped = skipped + 1 if result.skipped else 0
            if skipped:
                scale = f"the loss scale is now {deepspeed_engine.loss_scale(engine):g}"
                monitor.say(f"step {number} is skipped: its gradients overflow float16; {scale}")
                if skipped > training.max_skipped:
                    raise SharedError(
                        f"step {number}: gradients overflow float16 in {counted(skipped, 'step')} in a row, "
                        f"and training.max_skipped is {training.max_skipped}; {scale}: train in bf16 or "
                        "float32, or with a lower training.learning_rate, or, while the scale is still high, "
                        f"allow more; {_last(saver)}"
                    )
            asked = interrupt.agreed(topology)
            begun = time.perf_counter()
            profiler.after_step(number)
            last_step = number == training.steps
            losses: dict[str, float] = {}
            if training.validate_every and (number % training.validate_every == 0 or last_step):
                for route in routes:
                    batches = dev(training.validate_pairs, recipe.trained, f"validating after step {number}")
                    losses["dev_loss" if route == "specific" else f"dev_loss_{route}"] = validate(
                        engine, batches, topology, route
                    )
                if training.validate_translations is not None:
                    doing = f"translating after step {number}"
                    batches = dev(training.validate_translations, recipe.trained, doing)
                    losses[CHRF] = dev_chrf(engine, batches, form.given, vocabulary, topology)
                monitor.record_dev_loss(number, losses)
                stopping.after_validation(number, losses)
                last_step = last_step or stopping.ended
            if number % training.checkpoint_every == 0 or last_step or asked:
                position = {
                    "stream": steps.state_dict(),
                    "window": monitor.state_dict(),
                    STOPPING: stopping.state_dict(),
                }
                beat(f"saving step {number}")
                saving = time.perf_counter()
                saver.save(engine, number, position, losses)
                monitor.record_save(number, time.perf_counter() - saving)
            monitor.pause(time.perf_counter() - begun)
            if last_step and number < training.steps:
                saver.finish()
                monitor.say(
                    f"stopped after step {number:,}: {stopping.describe()}{_find_best(run, stopping)}"
                )
                break
            if asked:
                beat(f"finishing the checkpoint of step {number}")
                saver.finish()
                monitor.say(
                    f"{interrupt.name_of(asked)}: saved after step {number}; the same command resumes"
                )
                break
    engine.destroy()
    return None if last_step else asked


def _last(saver: checkpoints.Saver) -> str:
    """Finish saving, and return a sentence that names the last checkpoint. Every rank must call this."""
    saver.finish()
    last = list_checkpoints(saver.run)
    return f"the last good checkpoint is {last[-1]}" if last else "no checkpoint was saved yet"


def _find_best(run: Path, stopping: Stopping) -> str:
    """Return a sentence that names the checkpoint with the best validation, if there are any.

    With ``min_delta`` it may be later than the last improvement that counted.
    """
    if stopping.best is None:
        return ""
    by_chrf = stopping.settings is not None and stopping.settings.metric == "chrf"
    for value, best in best_first(list_checkpoints(run), by_chrf)[:1]:
        if value >= stopping.best if by_chrf else value <= stopping.best:
            return f"; the best weights are in {best}"
    return (
        f"; no checkpoint has the weights of step {stopping.step:,}: training.keep_best keeps the best that "
        "training.checkpoint_every saves"
    )


def _describe_validation(recipe: Recipe, prepared: PreparedData) -> str:
    """Describe how much text a validation reads."""
    training, bitexts = recipe.training, prepared.manifest["bitexts"]
    counts = [bitexts[direction.bitext]["dev"]["pairs"] for direction in recipe.trained]
    pairs = sum(min(count, training.validate_pairs or count) for count in counts)
    translates = recipe.model.task == "translate"
    read = counted(pairs, "dev pair" if translates else "dev sequence")
    among = counted(sum(map(bool, counts)), "direction" if translates else "language")
    return f"every {counted(training.validate_every, 'step')} it validates on {read} in {among}"
