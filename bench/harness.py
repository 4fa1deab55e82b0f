"""What several benchmarks need: a run that is set up, and `train_dapo.train` without its files."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import train_dapo  # noqa: E402
from infra.checkpoint import Progress  # noqa: E402
from infra.config import load_config  # noqa: E402
from infra.data import Data  # noqa: E402
from infra.setup import TrainState, setup, sync_weights  # noqa: E402


def make_state(*overrides: str) -> tuple[TrainState, Data]:
    """A run of config.yaml with these overrides, its engine with the policy's weights."""
    state, data = setup(load_config("config.yaml", overrides))
    sync_weights(state)
    return state, data


def train(state: TrainState, data: Data, progress: Progress | None = None,
          after_step: Callable[[dict], bool] = lambda metrics: False) -> list[dict]:
    """The metrics of each step of `train_dapo.train`, which logs and saves nothing.

    `after_step` gets a step's metrics, and returns whether to stop.
    """
    rows = []
    with mock.patch.multiple(train_dapo, save_results=lambda *_: after_step(rows[-1]),
                             log_step=lambda state, metrics, *_: rows.append(metrics)):
        train_dapo.train(state, data, progress or Progress())
    return rows
