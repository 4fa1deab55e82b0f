"""Rollouts by real vLLM servers: the same responses as in-process, new weights after each step, and what becomes of a run whose servers die."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import pytest
import tcp_weights
from conftest import TINY
from test_vllm import SETTINGS, assert_each_sync_arrives, move, train, write

from rollout import generate
from infra.vllm_server import request_all, refuse
from infra.setup import sync_weights

ROOT = Path(__file__).parent.parent
PORTS = [8131, 8132]
URLS = [f"http://127.0.0.1:{port}" for port in PORTS]
SERVED = ["rollout.mode=server", f"rollout.server_urls={','.join(URLS)}"]
COMMON = [*TINY, "save_rollouts=99", "save_every=1", "val.file="]


def serve(port: int, plugins: Path) -> subprocess.Popen:
    """The README's command, as it says a CPU wants it."""
    (command,) = re.findall(r"^VLLM_SERVER_DEV_MODE=1 vllm serve (.*) --port 8000 (.*?)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": f"{plugins}:{ROOT / 'tests'}"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", command[0], "--port", str(port),
                             *shlex.split(command[1]), "--no-enable-chunked-prefill"], cwd=ROOT, env=environment, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(server: subprocess.Popen) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_until(true, seconds=240):
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.1)


def healthy(url):
    try:
        return httpx2.get(f"{url}/health", timeout=2).is_success
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """What has vLLM load tcp_weights.py."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "tcp_weights-1.dist-info").mkdir()
    (folder / "tcp_weights-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: tcp_weights\nVersion: 1\n")
    (folder / "tcp_weights-1.dist-info/entry_points.txt").write_text("[vllm.general_plugins]\ntcp_weights = tcp_weights:install\n")
    return folder


@pytest.fixture(scope="module")
def servers(plugins):
    running = {url: serve(port, plugins) for url, port in zip(URLS, PORTS, strict=True)}
    wait_until(lambda: all(map(healthy, URLS)))
    yield running
    for server in running.values():
        kill(server)


@pytest.fixture
def served(request, servers, make_run, monkeypatch):
    """A run whose engine is both servers; with `nccl` over TCP, since there is no GPU."""
    transfer = getattr(request, "param", "auto")
    if transfer == "nccl":
        from vllm.distributed.weight_transfer import nccl_engine
        monkeypatch.setattr(nccl_engine, "NCCLTrainerInitInfo", partial(nccl_engine.NCCLTrainerInitInfo, packed=False))  # packing needs CUDA
        tcp_weights.install(monkeypatch.setattr)
    run, tasks = make_run(*SERVED, f"rollout.weight_transfer={transfer}")
    sync_weights(run)
    return run, [prompt.token_ids for prompt in tasks[0][1][:24]]


def ids(groups):
    return [[r.token_ids.tolist() for r in group] for group in groups]


@pytest.mark.parametrize("served", ["disk", "nccl"], indirect=True)
def test_logprobs_agree_after_each_sync(served, tmp_path):
    run, prompts = served
    assert_each_sync_arrives(run, prompts)
    assert (tmp_path / "run/server_weights").exists() == (run.config.rollout.weight_transfer == "disk")
    run.engine.close()
    assert not (tmp_path / "run/server_weights").exists()


@pytest.mark.parametrize(("stop_ids", "max_tokens"), [([0, 5, 6], 96), ([0], 2)])
def test_greedy_responses_are_those_of_transformers(served, tokenizer, stop_ids, max_tokens):
    """Token for token, with their log-probs and reasons to end."""
    run, prompts = served
    run.policy.generation_config.eos_token_id = stop_ids
    run.engine.write.args[2][:] = stop_ids
    settings = {**SETTINGS, "n": 2, "temperature": 0.0, "max_tokens": max_tokens}
    for a, b in zip(generate(run.policy, tokenizer, prompts, [(1,)] * len(prompts), **settings),
                    write(run, prompts, **settings), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.token_ids.tolist() == y.token_ids.tolist() and (x.text, x.finish_reason) == (y.text, y.finish_reason)
            assert np.abs(x.logprobs - y.logprobs).max() < 1e-4


def test_a_server_that_was_started_anew_gets_the_weights_before_it_writes(served):
    run, prompts = served
    move(run, 0)
    sync_weights(run)
    expected = ids(write(run, prompts))
    servers = run.engine.write.args[0]

    def forget():  # what a new process has: the base model, and no version
        weights = {"method": "reload_weights", "kwargs": {"weights_path": str(ROOT / "toy/base")}}
        request_all(servers, "/collective_rpc", [weights] * 2)
        request_all(servers, "/update_weight_version", [{"new_version": "default"}] * 2)
    forget()
    assert ids(write(run, prompts)) == expected
    forget()
    servers.mend = refuse  # as with nccl
    with pytest.raises(ValueError, match="was started anew"):
        write(run, prompts)


def test_what_a_server_does_not_want_to_do_is_an_error_at_once(served):
    run, prompts = served
    with pytest.raises(ValueError, match=r"http://127.0.0.1:813\d/v1/completions: 400, .*max_tokens"):
        write(run, prompts, max_tokens=100_000)


def launch(run_dir, *overrides):
    return subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "train_dapo.py", "--config",
                             "config.yaml", f"run_dir={run_dir}", *COMMON, *SERVED, *overrides], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows(run_dir):
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def same(a, b):
    files = sorted(file.name for file in (a / "rollouts").iterdir())
    return files == sorted(file.name for file in (b / "rollouts").iterdir()) and all(
        (a / "rollouts" / name).read_text() == (b / "rollouts" / name).read_text() for name in files)


def written_by(url):
    counts = re.findall(r'^vllm:request_success_total\{.*finished_reason="stop".*\} (.*)$', httpx2.get(f"{url}/metrics").text, re.MULTILINE)
    return sum(map(float, counts))


def test_runs_survive_their_servers(servers, plugins, tmp_path):
    """Two processes and two servers do what one process does alone. Then one server dies, and the other takes over; then
    the other, and the run ends, to go on from where it was once there are servers again."""
    steps, before = "total_training_steps=12", [written_by(url) for url in URLS]
    train(tmp_path / "alone", *COMMON, steps)
    metrics = train(tmp_path / "served", *COMMON, *SERVED, "total_training_steps=3", processes=2)
    assert [row["step"] for row in metrics] == [1, 2, 3] and all(row["actor/mismatch_abs"] < 1e-4 for row in metrics)
    for step in (1, 2, 3):
        a, b = ((tmp_path / name / f"rollouts/step_0000{step}.jsonl").read_text() for name in ("alone", "served"))
        assert a == b
    assert all(written_by(url) > earlier + 10 for url, earlier in zip(URLS, before, strict=True))

    run_dir = tmp_path / "killed"
    trainer = launch(run_dir, steps, "rollout.server_timeout=3")
    for url, count in zip(URLS, (2, 4), strict=True):
        wait_until(lambda count=count: rows(run_dir) >= count)
        kill(servers[url])
    output, _ = trainer.communicate(timeout=100)
    assert trainer.returncode == 1 and rows(run_dir) < 12
    assert f"warning: {URLS[0]} does not answer" in output and f"warning: {URLS[1]} does not answer" in output
    assert re.search(r"error: .*does not answer \(.*\), for rollout.server_timeout=3 s; start it again, and then this run", output)
    assert "train_dapo.py\", line" not in output  # no traceback of ours
    done = json.loads(next(iter(sorted((run_dir / "checkpoints").iterdir(), reverse=True))).joinpath("progress.json").read_text())
    assert done["counters"]["step"] == rows(run_dir)

    trainer = launch(run_dir, steps)
    wait_until(lambda: (line := trainer.stdout.readline()) and "warning" in line)  # it waits for them
    servers.update({url: serve(port, plugins) for url, port in zip(URLS, PORTS, strict=True)})
    output, _ = trainer.communicate(timeout=300)
    assert trainer.returncode == 0 and "going on from" in output, output[-2000:]
    assert rows(run_dir) == 12 and same(run_dir, tmp_path / "alone")
