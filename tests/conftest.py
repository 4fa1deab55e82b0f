"""What several test files need: the repository on the path, the embedded model, and a way to start a run."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

TINY = ["data.train_batch_size=4", "data.gen_batch_size=6", "rollout.n=4", "actor.ppo_mini_batch_size=8",
        "total_training_steps=2", "val.max_prompts=6", "val.n=2"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in config.yaml are relative to the repository; Accelerate keeps its state between runs."""
    monkeypatch.chdir(ROOT)
    yield
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
    """`start("key=value", ...)` trains as the command line would, with a tiny batch; returns the run's directory."""
    import train_dapo

    def start(*overrides: str, config: str = "config.yaml") -> Path:
        run_dir = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["train_dapo.py", "--config", config, f"run_dir={run_dir}", *TINY, *overrides])
        train_dapo.main()
        return run_dir
    return start


@pytest.fixture
def make_run(tmp_path):
    """`make_run("key=value", ...)`: a `Run` and its prompts, set up but not started."""
    import train_dapo
    from infra.config import load_config

    def make_run(*overrides: str, double: bool = False):
        config = load_config("config.yaml", [f"run_dir={tmp_path / 'run'}", *TINY, *overrides])
        run, data = train_dapo.setup(config)
        if double:
            run.policy.to(torch.float64)
        return run, data.train
    return make_run
