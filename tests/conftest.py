"""What several test files need: the option --slow, the embedded model, a state, a run, groups.

`pytest` runs the fast tests, `pytest --slow` all. Slow ones, marked `@pytest.mark.slow`, train for
long, start servers or several processes, or kill some.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and hasattr(os, "sched_setaffinity"):  # a core for each, so that threads do not compete
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from data_types import Group, Response, Sample, Score  # noqa: E402

TINY = ["data.train_batch_size=4", "data.gen_batch_size=6", "rollout.n=4",
        "actor.ppo_mini_batch_size=8", "total_training_steps=2", "val.max_prompts=6", "val.n=2"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless pytest is given --slow")
    config.addinivalue_line("markers", "house: guards this repository's own sizes, documents and "
                            "forks; `-m \"not house and not dapo\"` is for an edit of yours")
    config.addinivalue_line("markers", "dapo: states DAPO's own numbers, which another loss, "
                            "advantage or filter changes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: pytest --slow runs it"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in config.yaml are relative to the repository; Accelerate keeps its state."""
    monkeypatch.chdir(ROOT)
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    """Between two runs in one test, if their precisions differ."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "toy/base")


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(ROOT / "toy/base").eval()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start("key=value", ...)` trains as the command line would, with a tiny batch; returns the
    directory of the run. `curves`: draw curves.png, which takes longer than most of these runs."""
    import plot
    import train_dapo

    def start(*overrides: str, config: str = "config.yaml", curves: bool = False) -> Path:
        run_dir = tmp_path / "run"
        drawn = plot.plot_runs if curves else lambda *_: None
        monkeypatch.setattr(train_dapo, "plot_runs", drawn)
        monkeypatch.setattr(sys, "argv", ["train_dapo.py", "--config", config,
                                          f"run_dir={run_dir}", *TINY, *overrides])
        train_dapo.main()
        return run_dir
    return start


@pytest.fixture
def make_state(tmp_path):
    """`make_state("key=value", ...)`: a TrainState and its training prompts, before the first step.
    `double`: the policy in float64."""
    from infra.config import load_config
    from infra.setup import setup
    from rollout import transformers_engine

    def make_state(*overrides: str, double: bool = False):
        config = load_config("config.yaml", [f"run_dir={tmp_path / 'run'}", *TINY, *overrides])
        state, data = setup(config, transformers_engine)
        if double:
            state.policy.to(torch.float64)
        return state, data.train
    return make_state


def logprobs_of(state, model, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """`compute_logprobs` of one mini-batch, in the samples' order; they need no keys."""
    from infra.logprobs import compute_logprobs
    keyed = [replace(sample, key=(0, i)) for i, sample in enumerate(samples)]
    found = compute_logprobs(state, model, [keyed])
    return [found[sample.key] for sample in keyed]


def mean_mismatch(state, prompts: list[list[int]], groups: list[list[Response]]) -> float:
    """The mean difference between the trainer's log-probs and those of the sampled responses."""
    flat = [(ids, response) for ids, group in zip(prompts, groups, strict=True)
            for response in group]
    samples = [Sample(ids, response.token_ids, 0.0) for ids, response in flat]
    theirs = np.concatenate([response.logprobs for _, response in flat])
    ours = torch.cat(logprobs_of(state, state.policy, samples)).numpy()
    return np.abs(ours - theirs).mean().item()


class Step(NamedTuple):
    """What `train` handed to `write_step`; `groups` are those trained, or of a skipped step, which
    has no advantages, all generated ones."""
    metrics: dict
    groups: list[Group]
    advantages: list | None


@pytest.fixture
def train_steps(monkeypatch):
    """`train_steps(state, prompts)` runs the training loop, without files and validation; returns
    what each step logs. `counters` are those of a checkpoint to continue from."""
    import train_dapo

    def train_steps(state, prompts, counters: dict | None = None) -> list[Step]:
        steps = []
        monkeypatch.setattr(train_dapo, "write_step", lambda state, record, buffer, metrics:
                            steps.append(Step(metrics, record.groups or record.generated,
                                              record.advantages)))
        monkeypatch.setattr(train_dapo, "save_results", lambda *_, **__: None)
        progress = train_dapo.Progress()  # a fork may have its own
        progress.counters |= counters or {}
        train_dapo.train(state, train_dapo.Data(prompts, {}), progress)
        return steps
    return train_steps


@pytest.fixture
def fake_rollouts(monkeypatch):
    """`fake_rollouts(score)` replaces what costs time, generating: the responses to the prompt at
    position i of the stream get the scores `scores(i)`, numbers (accuracies) or Scores. Returns the
    positions of each generation batch, as they come. Response i has 3 + i tokens. The check of the
    weights before the first step is left out: these responses are not the policy's."""
    import train_dapo
    batches = []
    monkeypatch.setattr(train_dapo, "check_weight_sync", lambda *_: None)

    def fake_rollouts(scores, finish_reason: str = "stop") -> list[list[int]]:
        def generate(state, prompts, params, stream, description):
            batches.append([prompt.position for prompt in prompts])
            return [[make_response(3 + i, finish_reason) for i in range(params.n)] for _ in prompts]

        def score_responses(state, prompts, responses, description):
            return [[make_score(score) for score in scores(prompt.position)] for prompt in prompts]
        monkeypatch.setattr(train_dapo, "generate", generate)
        monkeypatch.setattr(train_dapo, "score_responses", score_responses)
        return batches
    return fake_rollouts


def make_response(length: int = 3, finish_reason: str = "stop") -> Response:
    return Response(np.full(length, 5, np.int32), np.zeros(length, np.float32), "", finish_reason)


def make_score(acc: float | Score) -> Score:
    """A Score of this accuracy, with the paper's score for it."""
    return acc if isinstance(acc, Score) else Score(acc, 2 * acc - 1, str(acc))


def make_group(position: int, prompt, scores: Sequence[float | Score], length: int = 3,
               finish_reason: str = "stop") -> Group:
    """A group of responses of equal length, with rewards that are the scores."""
    scores = [make_score(score) for score in scores]
    rewards = [score.score for score in scores]
    responses = [make_response(length, finish_reason) for _ in scores]
    return Group(replace(prompt, position=position), responses, scores, rewards, rewards)


def read_rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_rollouts(run_dir: Path, step: int) -> list[dict]:
    """The responses of a step's rollout file."""
    file = run_dir / "rollouts" / f"step_{step:05d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]
