"""What several benchmarks need: a run that is set up, and `train_dapo.train` without its files."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import train_dapo  # noqa: E402
from torch import Tensor  # noqa: E402
from data_types import Data, Progress, Sample, TrainState  # noqa: E402
from infra.config import load_config  # noqa: E402
from infra.logprobs import compute_logprobs  # noqa: E402
from infra.setup import setup, sync_weights  # noqa: E402
from rollout import transformers_engine  # noqa: E402


def make_state(*overrides: str, config: str = "config.yaml") -> tuple[TrainState, Data]:
    """A run of this config with these overrides, its engine with the policy's weights."""
    state, data = setup(load_config(config, overrides), transformers_engine)
    sync_weights(state)
    return state, data


def logprobs_of(state: TrainState, samples: Sequence[Sample]) -> list[Tensor]:
    """The log-probs (T,) of each sample under the policy, in order; they need no keys."""
    keyed = [replace(sample, key=(0, i)) for i, sample in enumerate(samples)]
    found = compute_logprobs(state, state.policy, [keyed])
    return [found[sample.key] for sample in keyed]


def train(state: TrainState, data: Data, progress: Progress | None = None,
          after_step: Callable[[dict], bool] = lambda metrics: False) -> list[dict]:
    """The metrics of each step of `train_dapo.train`, which logs and saves nothing.

    `after_step` gets a step's metrics, and returns whether to stop.
    """
    rows = []

    def write_step(state, record, buffer, metrics):
        rows.append(metrics)
        if after_step(metrics):
            state.accelerator.set_trigger()  # as a signal does

    with mock.patch.multiple(train_dapo, write_step=write_step, save_results=mock.DEFAULT):
        train_dapo.train(state, data, progress or Progress())
    return rows
