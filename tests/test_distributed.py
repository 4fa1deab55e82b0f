"""One process or two: the same groups, the same losses, the same policy. Real processes, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def launch(run_dir, processes, *overrides):
    how = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else ["--num_processes", "1"]
    port = str(20_000 + os.getpid() % 20_000)  # several test sessions may share a machine
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", port, "train_dapo.py", "--config",
         "config.yaml", f"run_dir={run_dir}", *TINY, *overrides],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    samples = [path.read_text() for path in sorted((run_dir / "rollouts").iterdir())]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s/"))} for row in rows], samples, \
        load_file(run_dir / "model/model.safetensors")


def test_two_processes_do_what_one_does(tmp_path):
    overrides = ["actor.loss_agg_mode=seq-mean-token-mean", "algorithm.use_kl_in_reward=true", "actor.use_kl_loss=true",
                 "filter_groups.metric=seq_final_reward", "actor.ppo_epochs=2", "actor.max_tokens_per_micro_batch=300"]
    one, two = (launch(tmp_path / str(processes), processes, "save_rollouts=99", *overrides) for processes in (1, 2))
    for a, b in zip(one[0], two[0], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert len(one[1]) == 2 and one[1][0] == two[1][0]  # the first step's responses, to the letter and in order
    assert all(torch.allclose(one[2][name], two[2][name], atol=1e-4) for name in one[2])
