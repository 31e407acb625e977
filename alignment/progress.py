"""How a long computation reports: one callback, `log(step, metrics)`, and a trainer callback that calls it.

The library never prints and never knows MLflow; whoever calls passes a `Log`. Metrics are per optimiser step, names are
the field's (loss, grad_norm, rewards/margins, ...). `say` carries sentences such as "step 12/80, loss 1.93, ETA 40 s".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainerCallback

COMPLETE = "complete"  # marker file: every file of this trainer checkpoint was written


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Log:
    """Where a computation's progress goes. `metrics(step, values)` for curves, `say(text)` for people."""

    metrics: Callable[[int, Mapping[str, float]], None] = _nothing
    say: Callable[[str], None] = _nothing


SILENT = Log()


class Progress:
    """Counts towards a known total and says so at most every `every` seconds, with the time left.

    >>> progress = Progress(SILENT, "sampling", total=10)
    >>> progress.advance(5)
    """

    def __init__(self, log: Log, what: str, total: int, every: float = 5.0) -> None:
        self._log, self._what, self._total, self._every = log, what, total, every
        self._start = self._last = time.monotonic()
        self._done = 0

    def advance(self, n: int, detail: str = "") -> None:
        """`n` more units are done."""
        self._done += n
        now = time.monotonic()
        if now - self._last >= self._every or self._done >= self._total:
            self._last = now
            left = (now - self._start) / max(self._done, 1) * (self._total - self._done)
            tail = f", {detail}" if detail else ""
            self._log.say(f"{self._what} {self._done}/{self._total}{tail}, ETA {left:.0f} s")


def trainer_callback(log: Log, what: str) -> TrainerCallback:
    """A Hugging Face callback that reports every logged step to `log` and marks finished checkpoints as complete."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def __init__(self) -> None:
            self.begun = 0.0
            self.first = self.last_said = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun, self.first = time.monotonic(), state.global_step
            if state.global_step:
                log.say(f"{what}: resumed at step {state.global_step}/{state.max_steps}")
            else:
                log.say(f"{what}: {state.max_steps} steps")

        def on_log(self, args, state, control, logs=None, **kwargs):
            values = {k: float(v) for k, v in (logs or {}).items() if _is_number(v) and k not in _TOTALS}
            if not values:
                return
            log.metrics(state.global_step, values)
            done = state.global_step - self.first
            if "loss" in values and done > 0:
                eta = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step)
                log.say(f"{what}: step {state.global_step}/{state.max_steps}, loss {values['loss']:.4f}, ETA {eta:.0f} s")

        def on_save(self, args, state, control, **kwargs):
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    return Report()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest trainer checkpoint that was written to its end, or None. A save that a kill cut short does not count."""
    steps = [int(p.name.removeprefix("checkpoint-")) for p in folder.glob("checkpoint-*") if (p / COMPLETE).exists()]
    return folder / f"checkpoint-{max(steps)}" if steps else None


def quiet() -> None:
    """Silence the libraries' progress bars and notices: a step's log says how far it is, once, in one format."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # what is experimental in TRL is used knowingly, and pinned

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")


_TOTALS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
