"""Show the progress of a training: progress bar, ``metrics.jsonl``, curves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lsmoe_ds.data.batches import Step
from lsmoe_ds.folders import explain_errors, write_whole
from lsmoe_ds.notices import LINE_EVERY
from lsmoe_ds.parallel.collectives import Traffic
from lsmoe_ds.training.curves import PLACES, Curves
from lsmoe_ds.training.engine import SIDES, StepResult
from lsmoe_ds.training.throughput import Throughput, Work, describe_rates


class Monitor:
    """Average metrics over ``every`` steps, on all ranks, and show them, on the main rank only.

    ``throughput`` computes the rates that depend on the model and its devices; ``log_to`` names the places of
    :data:`lsmoe_ds.training.curves.PLACES` where curves are drawn.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        every: int,
        main: bool,
        world: int = 1,
        throughput: Throughput | None = None,
        log_to: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.run, self.steps, self.every, self.main, self.world = run, steps, every, main, world
        self.throughput, self.log_to = throughput, log_to
        # Target tokens, skipped steps, and each metric times target tokens.
        self.sums: dict[str, float] = {"weight": 0.0, "skipped": 0.0}
        self.work, self.since = Work(), time.perf_counter()
        self.exchanged = {side: Traffic() for side in SIDES}
        self.away, self.steps_in_window = 0, 0
        self.line = _Line(0, time.perf_counter(), throughput)
        self.progress: Progress | None = None
        self.curves: list[Curves] = []

    def start(self, step: int, window: dict[str, float] | None) -> None:
        """Start, or resume after ``step``, and remove the records of later steps.

        ``window`` is the :meth:`state_dict` of the checkpoint. Raises UserError if a place for curves cannot
        be opened.
        """
        self.sums = {**self.sums, **(window or {})}
        if not self.main:
            return
        metrics = self.run / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            write_whole(metrics, "".join(f"{line}\n" for line in kept))
        self.curves = [PLACES[name](self.run, step) for name in dict.fromkeys(self.log_to)]
        console = Console(stderr=True)
        columns = [
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=self.steps, completed=step)
        self.progress.start()
        self.since = time.perf_counter()
        self.line = _Line(step, self.since, self.throughput)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        for place in self.curves:
            with suppress(OSError):  # :meth:`_draw` has reported it already
                place.close()

    def state_dict(self) -> dict[str, float]:
        """Return the sums since the last record.

        They are part of a checkpoint, so that the averages do not depend on interruptions.
        """
        return dict(self.sums)

    def after_step(self, number: int, step: Step, result: StepResult) -> None:
        self.sums["weight"] += step.target_tokens
        self.sums["skipped"] += result.skipped
        for name, value in result.metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * step.target_tokens
        self.work += step
        self.exchanged = {
            side: Traffic.sum([so_far, result.exchanged[side]]) for side, so_far in self.exchanged.items()
        }
        self.away += step.away
        self.steps_in_window += 1
        if self.progress is not None:
            self.progress.update(self.task, completed=number)
            if self.progress.disable and (text := self.line.after_step(number, self.steps, step, result)):
                print(text, file=sys.stderr, flush=True)
        if number % self.every and number != self.steps:
            return
        seconds = time.perf_counter() - self.since
        rates = self.throughput.rates(self.work, seconds) if self.throughput is not None else {}
        record = {
            "step": number,
            **{name: self.sums[name] / self.sums["weight"] for name in result.metrics},
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": self.work.tokens,
            "tokens_per_second": self.work.tokens / seconds,
            "tokens_per_second_per_rank": self.work.tokens / (seconds * self.world),
            **rates,
            "seconds": seconds,
            # Expert traffic over all ranks: bytes per step and share of the ranks' time. Then the batches per
            # step that a task-affine stream could not assign to the rank of their experts.
            **self._exchange(seconds),
            "away": self.away / self.steps_in_window,
            **({"skipped": int(self.sums["skipped"])} if self.sums["skipped"] else {}),
        }
        self.exchanged = {side: Traffic() for side in SIDES}
        self.away, self.steps_in_window = 0, 0
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.work, self.since = Work(), time.perf_counter()
        self._write(record)
        text = (
            f"loss {record['loss']:.3f} · {record['tokens_per_second']:,.0f} tokens/s{describe_rates(rates)} "
            f"· lr {result.learning_rate:.2e}"
        )
        if self.progress is not None:
            self.progress.update(self.task, description=text)

    def _exchange(self, seconds: float) -> dict[str, float]:
        """Return the all-to-all traffic of all layers and of each side.

        It is bytes per step, and the share of the ranks' time in a window of ``seconds``.
        """
        parts = {
            "": Traffic.sum(self.exchanged.values()),
            **{f"_{side}": traffic for side, traffic in self.exchanged.items()},
        }
        sent = {
            f"exchanged_bytes{end}": traffic.bytes / self.steps_in_window for end, traffic in parts.items()
        }
        return {
            **sent,
            **{
                f"exchange_share{end}": traffic.seconds / (seconds * self.world)
                for end, traffic in parts.items()
            },
        }

    def pause(self, seconds: float) -> None:
        """Exclude time that was not training (a checkpoint, a validation) from the rate."""
        self.since += seconds
        self.line.since += seconds

    def record_dev_loss(self, number: int, losses: dict[str, float]) -> None:
        """Record and print the metrics of a validation, by name, ``dev_loss`` first."""
        self._write({"step": number, **losses})
        found = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in losses.items())
        self.say(f"step {number:,}: {', '.join(found)}")

    def record_save(self, number: int, seconds: float) -> None:
        """Record how long training waited for a checkpoint."""
        self._write({"step": number, "save_seconds": seconds})

    def say(self, text: str) -> None:
        """Print a line for the user, above the progress bar."""
        if self.main:
            console = self.progress.console if self.progress is not None else Console(stderr=True)
            console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _write(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
        path = self.run / "metrics.jsonl"
        with explain_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._draw(record)

    def _draw(self, record: dict[str, Any]) -> None:
        """Add a record to the curves. A write error, such as a full disk, does not end the training."""
        left_out = ("step", "tokens", "seconds")
        values = {name: value for name, value in record.items() if name not in left_out and value is not None}
        for place in list(self.curves):
            try:
                place.write(record["step"], values)
            except OSError as error:
                self.curves.remove(place)
                self.say(f"{place.name}'s curves end at step {record['step']}: {error.strerror or error}")


class _Line:
    """The lines of a log: after the first step, then every :data:`LINE_EVERY` seconds, and after the last."""

    def __init__(self, step: int, now: float, throughput: Throughput | None) -> None:
        self.first, self.begun, self.throughput = step, now, throughput
        self.due = now
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.loss, self.work, self.since = 0.0, Work(), now

    def after_step(self, number: int, steps: int, step: Step, result: StepResult) -> str | None:
        """Return a line if it is time for one, otherwise None.

        It has the mean loss, tokens per second, and the time left, which is estimated from the mean time per
        step so far, including validations and checkpoints.
        """
        self.loss += result.loss * step.target_tokens
        self.work += step
        now = time.perf_counter()
        if now < self.due and number != steps:
            return None
        left = timedelta(seconds=round((now - self.begun) / (number - self.first) * (steps - number)))
        seconds, work = max(now - self.since, 1e-9), self.work
        rates = self.throughput.rates(work, seconds) if self.throughput is not None else {}
        text = (
            f"step {number}/{steps} · loss {self.loss / work.target:.3f} · {work.tokens / seconds:,.0f} "
            f"tokens/s{describe_rates(rates)} · lr {result.learning_rate:.2e} · {left} left"
        )
        self._begin(now)
        self.due = now + LINE_EVERY
        return text


def _step(line: str) -> float:
    """Return the step of a record; infinity for a line cut off by a kill, which belongs to no saved step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
