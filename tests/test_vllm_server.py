"""Rollouts by real vLLM servers: the in-process engine's responses; a run whose server dies."""

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
import pytest

pytest.importorskip("vllm", reason="needs vLLM: pip install -r requirements-vllm-cpu.txt, "
                    "or requirements-vllm.txt")

import tcp_weights
from vllm_fixtures import (
    ALL_LOGPROBS,
    COMMON,
    STEPS,
    assert_each_sync_arrives,
    assert_same,
    generate,
    launch,
    make_model,
    make_state,
    mean_difference,
    read_metrics,
    read_rollouts,
    train_in_two_processes,
)

from data_types import SamplingParams
from infra.vllm_server import generate_on_servers, post
from rollout import transformers_engine

pytest_plugins = ["vllm_fixtures"]

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/VLLM.md").read_text()
PORTS = [8131, 8132]
URLS = [f"http://127.0.0.1:{port}" for port in PORTS]
SERVED = ["rollout.mode=server", f"rollout.server_urls={','.join(URLS)}"]


def serve(port, plugins, path=None, *more):
    """Start a server by the documented command, as the documentation adapts it to a CPU; of another
    model if there is a `path`, with `more` options."""
    pattern = r"^CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve (.*) --port 8000 (.*?)$"
    (model, options), = re.findall(pattern, PAGE, re.MULTILINE)
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
                   "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{plugins}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path or model,
         "--port", str(port), *shlex.split(options), "--no-enable-chunked-prefill", *more],
        cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)


def kill(server):
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_until(condition, seconds=240):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.1)


def healthy(url):
    try:
        return httpx2.get(f"{url}/health", timeout=2).is_success
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A directory on whose account vLLM loads tcp_weights.py."""
    folder = tmp_path_factory.mktemp("plugins")
    package = folder / "tcp_weights-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tcp_weights\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ntcp_weights = tcp_weights:install\n")
    return folder


@pytest.fixture(scope="module")
def servers(plugins):
    running = {url: serve(port, plugins) for url, port in zip(URLS, PORTS, strict=True)}
    wait_until(lambda: all(map(healthy, URLS)))
    yield running
    for server in running.values():
        if server.poll() is None:
            kill(server)


@pytest.fixture
def served(request, servers, tmp_path, monkeypatch):
    """A state whose engine is both servers, and prompts. Without GPUs `nccl` goes over TCP."""
    transfer = getattr(request, "param", "auto")
    if transfer == "nccl":
        from vllm.distributed.weight_transfer import nccl_engine
        unpacked = partial(nccl_engine.NCCLTrainerInitInfo, packed=False)  # packing needs CUDA
        monkeypatch.setattr(nccl_engine, "NCCLTrainerInitInfo", unpacked)
        tcp_weights.install(monkeypatch.setattr)
    return make_state(tmp_path / "run", *SERVED, f"rollout.weight_transfer={transfer}")


@pytest.mark.parametrize("served", ["disk", "nccl"], indirect=True)
def test_logprobs_agree_after_each_sync(served, tmp_path):
    state, prompts = served
    assert_each_sync_arrives(state, prompts)
    folder = tmp_path / "run/server_weights"
    assert folder.exists() == (state.config.rollout.weight_transfer == "disk")
    state.engine.close()
    assert not folder.exists()


@pytest.mark.parametrize(("stop_ids", "max_tokens"), [([0, 5, 6], 96), ([0], 2)])
def test_greedy_responses_are_those_of_transformers(served, tokenizer, stop_ids, max_tokens):
    """Token for token, with their log-probs and finish reasons."""
    state, prompts = served
    servers, seeds = state.engine.generate.args[0], [(1,)] * len(prompts)
    params = SamplingParams(n=2, max_tokens=max_tokens, temperature=0.0)
    state.policy.generation_config.eos_token_id = stop_ids
    reference = transformers_engine(state.policy, tokenizer, state.accelerator.autocast, 64, False)
    found = generate_on_servers(servers, tokenizer, stop_ids, 64, prompts, seeds, params)
    assert_same(reference.generate(prompts, seeds, params), found)


def test_a_restarted_server_is_an_error(served):
    state, prompts = served
    servers = state.engine.generate.args[0]
    post(servers, "/update_weight_version", new_version="default")  # what a new process has
    with pytest.raises(OSError, match="has other weights .default.: it was restarted"):
        generate(state, prompts)


def test_a_request_that_a_server_rejects_is_an_error_at_once(served):
    state, prompts = served
    message = r"http://127.0.0.1:813\d/v1/completions: 400, .*max_tokens"
    with pytest.raises(OSError, match=message):
        generate(state, prompts, max_tokens=100_000)


def test_the_language_part_of_a_vision_language_checkpoint_is_served_as_documented(
        plugins, tokenizer, tmp_path, monkeypatch):
    """With the options for half precision, too."""
    pytest.importorskip("torchvision", reason="vLLM imports it for Qwen3.5")
    make_model("vision", tokenizer, tmp_path / "checkpoint")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code)
    monkeypatch.chdir(ROOT)
    (head,) = re.findall(r"`--hf-overrides '(.*?)'`", PAGE)
    url, path = "http://127.0.0.1:8133", str(tmp_path / "text")
    server = serve(8133, plugins, path, "--dtype", "bfloat16", "--hf-overrides", head,
                   "--no-enable-prefix-caching")
    try:
        wait_until(lambda: server.poll() is not None or healthy(url))
        state, prompts = make_state(tmp_path / "run", "rollout.mode=server", f"model.path={path}",
                                    f"rollout.server_urls={url}", "mixed_precision=bf16")
        assert_each_sync_arrives(state, prompts, mean_difference, 0.03)
        state.engine.close()
    finally:
        kill(server)


def count_steps(run_dir):
    return len(read_metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def count_responses(url):
    """How many responses a server has finished."""
    pattern = r'^vllm:request_success_total\{.*finished_reason="stop".*\} (.*)$'
    return sum(map(float, re.findall(pattern, httpx2.get(f"{url}/metrics").text, re.MULTILINE)))


def test_two_processes_and_two_servers_do_what_one_process_does(servers, alone, tmp_path):
    before = [count_responses(url) for url in URLS]
    metrics = train_in_two_processes(tmp_path / "run", *COMMON, ALL_LOGPROBS, *SERVED,
                                     "total_training_steps=2")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["actor/mismatch_abs"] < 1e-4 for row in metrics)
    for step in (1, 2):
        assert read_rollouts(tmp_path / "run", step) == read_rollouts(alone, step)
    for url, earlier in zip(URLS, before, strict=True):
        assert count_responses(url) > earlier + 10


def test_a_run_whose_server_died_ends_and_the_same_command_resumes_it(
        servers, plugins, alone, tmp_path):
    """Once the server is restarted; all responses are those of an undisturbed run."""
    run_dir, url, other = tmp_path / "run", *URLS
    arguments = [run_dir, *COMMON, *SERVED, f"total_training_steps={STEPS}"]
    trainer = launch(*arguments)
    wait_until(lambda: count_steps(run_dir) >= 2)
    kill(servers[url])
    output, _ = trainer.communicate(timeout=200)
    assert trainer.returncode == 1 and count_steps(run_dir) < STEPS
    (line,) = re.findall(r"error: .*", output)
    assert re.search(rf"{url}/\S+: does not answer \(.*\): repair or restart it, then run the same "
                     "command again", line)
    assert "train_dapo.py\", line" not in output  # no traceback of ours
    newest = max((run_dir / "checkpoints").iterdir())
    progress = json.loads((newest / "progress.json").read_text())
    assert progress["counters"]["step"] == count_steps(run_dir)

    servers[url] = serve(PORTS[0], plugins)
    wait_until(lambda: healthy(url))
    assert healthy(other)
    trainer = launch(*arguments)
    output, _ = trainer.communicate(timeout=300)
    assert trainer.returncode == 0, output[-2000:]
    assert count_steps(run_dir) == STEPS
    for step in range(1, STEPS + 1):
        assert read_rollouts(run_dir, step) == read_rollouts(alone, step)
