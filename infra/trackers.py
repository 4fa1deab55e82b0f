"""Trackers by Accelerate (`log_with`). One that fails never ends a run: metrics.jsonl has all."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator

from infra.config import flatten
from infra.distributed import warn


@contextmanager
def no_tracker_ends_the_run(accelerator: Accelerator) -> Iterator[None]:
    """If the tracker raises in the block: a warning, and no more calls of it."""
    try:
        yield
    except Exception as error:  # each tracker has its own
        accelerator.trackers.clear()
        reason = " ".join(str(error).split())[:300]
        warn(accelerator, f"log_with: the tracker failed ({type(error).__name__}: {reason}); the "
             "run continues without it, and metrics.jsonl has everything")


def start_tracker(accelerator: Accelerator, config: SimpleNamespace, code: str,
                  resumed: bool) -> None:
    """Start the tracker; a run that is `resumed` continues its record, whose id run_dir keeps."""
    run_dir = Path(config.run_dir)
    file = run_dir / "tracker_id"
    known = file.read_text() if resumed and file.exists() else None
    options = {"wandb": {"name": run_dir.name, "dir": run_dir, "id": known, "resume": "allow"},
               "mlflow": {"run_name": run_dir.name, "run_id": known}}
    with no_tracker_ends_the_run(accelerator):
        # mlflow refuses to change what a record says of its config.
        settings = None if known else flatten(config) | {"code": code}
        accelerator.init_trackers(config.log_project, settings, options)
        for tracker in accelerator.trackers if accelerator.is_main_process else ():
            if tracker.name in options:
                record = tracker.tracker
                file.write_text(record.id if tracker.name == "wandb" else record.info.run_id)


def log_to_tracker(accelerator: Accelerator, metrics: dict[str, float], step: int) -> None:
    """Give the metrics of a step to the tracker, by names that it takes: avg_at_4 for mlflow."""
    with no_tracker_ends_the_run(accelerator):
        for tracker in accelerator.trackers:
            if tracker.name == "mlflow":
                metrics = {re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_")): value
                           for name, value in metrics.items()}
            tracker.log(metrics, step=step)


def end_tracker(accelerator: Accelerator) -> None:
    """Let the tracker send what it still has."""
    with no_tracker_ends_the_run(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.trackers.clear()
