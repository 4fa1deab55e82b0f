"""Requests to slow, broken or absent servers: fakes here, real ones in test_vllm_server.py."""

import gc
import json
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import infra.vllm_server
from data_types import SamplingParams
from infra.config import load_config
from infra.setup import make_engine, sync_weights
from infra.vllm_server import Servers, check_servers, generate_on_servers, run_async, send_by_disk

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fake_server():
    """`fake_server(answers)`: the URL of a server; `answers(path, body)` is its (status, JSON), or
    None: it closes the connection. It hangs as long as `answers` does, at most until the end. With
    a `key`, it refuses requests for /v1/ without it, as vLLM does."""
    running = []

    def start(answers, key=""):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                answer = answers(self.path, body)
                known = self.headers.get("Authorization") == f"Bearer {key}" or not key
                if self.path.startswith("/v1/") and not known:
                    answer = 401, {"error": "Unauthorized"}
                if answer is None:
                    self.close_connection = True
                    return
                content = json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            do_POST = do_GET

            def log_message(self, *_):
                pass
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"
    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def unused_url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def answer(path, body, reason="stop", tokens=1):
    """A server with weights of version 1 answers so; a response is the prompt `tokens` times."""
    if path == "/get_world_size":
        return 200, {"world_size": 1}
    if path != "/v1/completions":
        return 200, {"weight_version": "1", "success": True}
    ids, logprobs = body["prompt"] * tokens, [-1.0] * tokens
    return 200, {"choices": [{"index": i, "finish_reason": reason, "token_ids": ids,
                              "logprobs": {"token_logprobs": logprobs}} for i in range(body["n"])]}


def closes(path, body):
    """The process is gone."""


def fails(path, body):
    return 500, {"error": "out of luck"}


def hangs(path, body):
    time.sleep(60)


def only(request, does, path, body):
    """As usual, but to requests for `request`, `does`."""
    return does(path, body) if path == request else answer(path, body)


def make_servers(*urls, timeout=5, version="1", key=""):
    return Servers(list(urls), timeout, version, key)


@pytest.fixture
def generate(tokenizer):
    """`generate(count, servers)`: the token ids of a response to each of the prompts [0], [1], ..."""
    def generate(count, servers, max_num_seqs=4, n=1):
        prompts, seeds = [[i] for i in range(count)], [(i,) for i in range(count)]
        groups = generate_on_servers(servers, tokenizer, [0], max_num_seqs, prompts, seeds,
                                     SamplingParams(n, max_tokens=5))
        return [response.token_ids.tolist() for group in groups for response in group]
    return generate


# ---- a key ---------------------------------------------------------------------------------------

def test_servers_get_their_key_from_the_environment_and_it_is_written_nowhere(fake_server, generate,
                                                                              make_state, capsys,
                                                                              monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    url = fake_server(answer, key="sesame")
    state, _ = make_state("rollout.mode=server", f"rollout.server_urls={url}")
    (servers, *_) = state.engine.generate.args
    servers.version = "1"
    assert generate(3, servers) == [[0], [1], [2]]
    assert state.config.rollout.server_api_key == "VLLM_API_KEY"
    assert "sesame" not in f"{servers}{state.config}" + capsys.readouterr().out


@pytest.mark.parametrize("name, value", [("VLLM_API_KEY", None), ("VLLM_API_KEY", "wrong"),
                                         ("OTHER", "wrong"), ("sesame", None)])
def test_a_run_without_the_servers_key_ends_at_its_start_and_says_where_to_put_it(
        name, value, fake_server, make_state, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if value:
        monkeypatch.setenv(name, value)
    url = fake_server(answer, key="sesame")
    with pytest.raises(SystemExit) as error:
        make_state("rollout.mode=server", f"rollout.server_urls={url}",
                   f"rollout.server_api_key={name}")
    message = str(error.value)
    if name == "sesame":  # the key itself, where its variable's name belongs
        assert message == "error: rollout.server_api_key: no environment variable has this name"
    else:
        assert f"{url}/v1/models: 401, " in message and message.endswith(
            "put its --api-key into the environment variable that rollout.server_api_key names")
        assert "wrong" not in message


# ---- the types of weights ------------------------------------------------------------------------

def test_a_buffer_keeps_its_type_on_the_way_to_servers(fake_server, make_state, tmp_path):
    """Such as a router's corrections, which choose experts, and are float32 in vLLM too."""
    url = fake_server(answer)
    state, _ = make_state("mixed_precision=bf16")
    state.policy.register_buffer("correction", torch.tensor([1.001]))
    state.config.rollout.mode, state.config.rollout.server_urls = "server", url
    engine = make_engine(state.config, state.accelerator, state.policy, state.tokenizer, None)
    with pytest.raises(OSError, match="has other weights"):  # the fake one's version never changes
        sync_weights(replace(state, engine=engine))
    sent = load_file(tmp_path / "run/server_weights/model.safetensors")
    assert sent.pop("correction").item() == torch.tensor(1.001).item()
    assert len(sent) > 10 and {weight.dtype for weight in sent.values()} == {torch.bfloat16}


@pytest.mark.parametrize("gpus, way", [(0, "disk"), (1, "disk"), (2, "nccl")])
def test_weights_go_from_gpu_to_gpu_only_if_there_is_one_for_the_servers(gpus, way, fake_server,
                                                                         make_state, monkeypatch):
    """nccl refuses a trainer and a server on one GPU."""
    senders = []
    state, _ = make_state()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(infra.vllm_server, "find_spec", lambda name: name)
    monkeypatch.setattr(infra.vllm_server, "nccl_sender", lambda *_: senders.append("nccl"))
    state.config.rollout.mode, state.config.rollout.server_urls = "server", fake_server(answer)
    make_engine(state.config, state.accelerator, state.policy, state.tokenizer, None)
    assert senders == ["nccl"] * (way == "nccl")


def test_the_documented_servers_are_on_a_gpu_that_the_trainer_leaves_to_them():
    page = (ROOT / "docs/VLLM.md").read_text()
    one, two = re.findall(r"^(.*)vllm serve (.*)\naccelerate launch (.*)$", page, re.MULTILINE)
    assert "nccl" not in one[1] and "--gpu-memory-utilization 0.4" in one[1]
    assert "CUDA_VISIBLE_DEVICES=1 " in two[0] and '"backend": "nccl"' in two[1]
    assert one[2] == two[2] and "weight_transfer" not in one[2]


# ---- checks --------------------------------------------------------------------------------------

def test_a_server_that_does_not_answer_is_an_error_that_says_which_and_what_to_do(fake_server):
    url = unused_url()
    with pytest.raises(OSError, match=f"^{url}/weight_info: does not answer .*: repair or restart "
                       "it, then run the same command again$"):
        run_async(check_servers, make_servers(fake_server(answer), url))


def test_a_server_with_other_weights_is_an_error(fake_server):
    """It was restarted, or another run sends it weights."""
    url = fake_server(answer)
    run_async(check_servers, make_servers(url, version=""))
    run_async(check_servers, make_servers(url, version="1"))
    message = f"^{url} has other weights .1.: it was restarted, .* run the same command again"
    with pytest.raises(OSError, match=message):
        run_async(check_servers, make_servers(url, version="2"))


def test_a_server_without_weight_requests_is_an_error_with_a_hint(fake_server):
    with pytest.raises(OSError, match="/weight_info: 404, .*VLLM_SERVER_DEV_MODE=1"):
        run_async(check_servers, make_servers(fake_server(lambda path, body: (404, {}))))


# ---- generation ----------------------------------------------------------------------------------

def test_servers_take_turns(generate, fake_server):
    prompts = [[], [], []]

    def remember(mine, path, body):
        if path == "/v1/completions":
            mine.append(body["prompt"][0])
        return answer(path, body)
    servers = make_servers(*(fake_server(partial(remember, mine)) for mine in prompts))
    assert generate(8, servers) == [[i] for i in range(8)]
    assert [sorted(mine) for mine in prompts] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_as_many_requests_are_in_progress_as_allowed(generate, fake_server):
    running, most, lock = [0], [0], threading.Lock()

    def count(path, body):
        if path == "/v1/completions":
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.1)
            with lock:
                running[0] -= 1
        return answer(path, body)
    assert len(generate(8, make_servers(fake_server(count)), max_num_seqs=7, n=2)) == 16
    assert most == [3]


@pytest.mark.parametrize(("does", "message"), [
    (closes, "does not answer .*: repair or restart it, then run the same command again"),
    (fails, "500, .*out of luck.*: repair or restart it, then run the same command again"),
    (partial(answer, reason="abort"), "aborted a response .abort.: run the same command again")],
    ids=["dies", "fails", "aborts"])
def test_a_request_that_fails_is_an_error_at_once(generate, fake_server, does, message):
    """No other server takes it over, and other requests are not waited for."""
    failing = fake_server(partial(only, "/v1/completions", does))
    hanging = fake_server(partial(only, "/v1/completions", hangs))
    start = time.monotonic()
    with pytest.raises(OSError, match=f"^{failing}.*{message}$"):
        generate(2, make_servers(hanging, failing))
    assert time.monotonic() - start < 3


def test_a_server_that_hangs_while_it_generates_is_an_error_within_the_limit(
        generate, fake_server, monkeypatch, caplog):
    monkeypatch.setattr(infra.vllm_server, "CHECK_SECONDS", 0.2)
    url, start = fake_server(hangs), time.monotonic()
    with pytest.raises(OSError, match=f"^{url}/weight_info: does not answer .for 1 s.: repair"):
        generate(8, make_servers(fake_server(answer), url, fake_server(hangs), timeout=1))
    assert 1 <= time.monotonic() - start < 3
    gc.collect()
    assert caplog.text == ""  # of the other requests


def test_a_response_may_take_longer_than_a_check(generate, fake_server, monkeypatch):
    monkeypatch.setattr(infra.vllm_server, "CHECK_SECONDS", 0.2)

    def slow(path, body):
        time.sleep(2)
        return answer(path, body)
    url = fake_server(partial(only, "/v1/completions", slow))
    assert generate(2, make_servers(url, timeout=1)) == [[0], [1]]


def test_a_server_that_another_run_sends_weights_to_is_an_error(generate, fake_server):
    version = ["1"]

    def shared(path, body):
        if path == "/v1/completions":
            version[0] = "another's"
            return answer(path, body)
        return 200, {"weight_version": version[0]}
    with pytest.raises(OSError, match="has other weights .another's.: .*serves another run"):
        generate(1, make_servers(fake_server(shared)))


def test_a_response_cut_before_the_limit_is_an_error(generate, fake_server):
    generate(1, make_servers(fake_server(partial(answer, reason="length", tokens=5))))
    message = "cut a response after 4 tokens, not 5: its --max-model-len"
    with pytest.raises(OSError, match=message):
        generate(1, make_servers(fake_server(partial(answer, reason="length", tokens=4))))


def test_an_answer_without_token_ids_is_an_error(generate, fake_server):
    def other(path, body):
        return 200, {"weight_version": "1", "choices": [{"index": 0, "finish_reason": "stop"}]}
    with pytest.raises(OSError, match="returns no token ids"):
        generate(1, make_servers(fake_server(other)))


def test_the_responses_of_a_group_come_in_their_order(generate, fake_server):
    def reversed_choices(path, body):
        status, reply = answer(path, body)
        if path == "/v1/completions":
            choice = reply["choices"][0]
            reply["choices"] = [{**choice, "index": i, "token_ids": [i]} for i in (2, 0, 1)]
        return status, reply
    servers = make_servers(fake_server(reversed_choices))
    assert generate(1, servers, n=3) == [[0], [1], [2]]


# ---- weights -------------------------------------------------------------------------------------

def test_a_server_reads_the_weights_forgets_its_cache_then_gets_their_version(
        fake_server, tmp_path):
    requests = []

    def remember(path, body):
        requests.append((path, body))
        return answer(path, body)
    weight = torch.arange(3.0)
    send_by_disk(make_servers(fake_server(remember)), tmp_path / "new", [("name", weight)])
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "new")}}
    assert requests == [("/collective_rpc", reload), ("/reset_prefix_cache", {}),
                        ("/update_weight_version", {"new_version": "1"})]
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "model.safetensors" and torch.equal(load_file(file)["name"], weight)


STAND_IN = """
# In place of vLLM's engine: like NCCL, its main thread waits for ever for a lost server.
import sys, threading
from types import SimpleNamespace as Module
import torch
from infra.vllm_server import Servers, nccl_sender

class Engine:
    @classmethod
    def trainer_init(cls, group, client, source):
        self = cls()
        self.client, self.source = client, source
        self.send("init_weight_transfer_engine", {})
        return self

    def send_weights(self):
        self.client.start_weight_update()
        self.send("update_weights", {"names": list(self.source)})
        self.client.finish_weight_update()

    def send(self, name, info):
        answered = threading.Event()
        def request():
            getattr(self.client, name)(info)
            answered.set()
        threading.Thread(target=request).start()
        answered.wait()

transfer = "vllm.distributed.weight_transfer"
nccl_engine = Module(NCCLTrainerInitInfo=lambda *_, rank: None,
                     NCCLTrainerWeightTransferEngine=Engine)
sys.modules[transfer] = Module(nccl_engine=nccl_engine)
sys.modules[transfer + ".base"] = Module(ParamMeta=tuple, WeightSource=object)
sys.modules["vllm.utils.network_utils"] = Module(get_ip=str, get_open_port=int)
torch.accelerator.synchronize = lambda: None
send = nccl_sender(Servers(sys.argv[1:], timeout=2), {"name": ((1,), torch.float32)})
send(["weights"])
print("sent")
"""


def send_by_nccl(*urls):
    """The output of a process that sends weights with a stand-in for NCCL, and its exit status."""
    process = subprocess.run([sys.executable, "-c", STAND_IN, *urls], text=True, timeout=60,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return process.stdout, process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(("does", "message"), [
    (closes, "does not answer .*"), (hangs, "does not answer .for 2 s.: .*"),
    (fails, "500, .*out of luck.*")], ids=["dies", "hangs", "fails"])
@pytest.mark.parametrize("request_path", ["/init_weight_transfer_engine", "/update_weights"])
def test_a_server_that_fails_in_mid_transfer_ends_a_trainer_that_waits_in_nccl(
        fake_server, does, message, request_path):
    urls = fake_server(answer), fake_server(partial(only, request_path, does))
    output, status = send_by_nccl(*urls)
    assert re.fullmatch(f"error: cannot send the weights by nccl: {urls[1]}{request_path}: "
                        f"{message}run the same command again .*\n", output), output
    assert status == 1


@pytest.mark.slow
def test_all_servers_that_answer_get_the_weights_by_nccl(fake_server):
    requests = [[], []]

    def remember(mine, path, body):
        mine.append((path, body))
        return answer(path, body)
    urls = [fake_server(partial(remember, mine)) for mine in requests]
    assert send_by_nccl(*urls) == ("sent\n", 0)
    for mine, rank in zip(requests, (1, 2), strict=True):
        assert mine == [
            ("/get_world_size", None), ("/shutdown_weight_transfer_engine", {}),
            ("/init_weight_transfer_engine", {"init_info": {"rank_offset": rank}}),
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"names": ["weights"]}}),
            ("/finish_weight_update", {"weight_version": ""}), ("/reset_prefix_cache", {})]


# ---- runs ----------------------------------------------------------------------------------------

def start_run(start, *urls):
    start("rollout.mode=server", f"rollout.server_urls={','.join(urls)}",
          "rollout.server_timeout=1")


def test_a_run_starts_only_if_all_servers_answer(start, fake_server):
    url = unused_url()
    with pytest.raises(SystemExit, match=f"^error: rollout.server_urls: {url}/weight_info: does "
                       "not answer .*restart it"):
        start_run(start, fake_server(answer), url)


def test_weights_that_a_server_cannot_read_end_a_run_with_their_place(
        start, fake_server, tmp_path):
    url = fake_server(partial(only, "/collective_rpc", fails))
    with pytest.raises(SystemExit, match="^error: cannot send the weights through "
                       f"{tmp_path}/run/server_weights, which all servers must see: "
                       f"{url}/collective_rpc: 500, .*out of luck"):
        start_run(start, url)


def test_a_server_that_dies_while_it_generates_ends_a_run_with_one_line(
        start, fake_server, capfd):
    version = ["before"]

    def dies(path, body):
        version[0] = (body or {}).get("new_version", version[0])
        return None if path == "/v1/completions" else (200, {"weight_version": version[0]})
    url = fake_server(dies)
    with pytest.raises(SystemExit, match=f"^error: .*{url}/v1/completions: does not answer .*: "
                       "repair or restart it, then run the same command again$") as error:
        start_run(start, url)
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("overrides", "message"), [
    (["rollout.server_urls="], "wants http://host:port of each server"),
    (["rollout.server_urls=localhost:8000"], "wants http://host:port of each server"),
    (["rollout.server_urls=http://a:1/"], "wants http://host:port of each server"),
    (["rollout.server_urls=http://a:1", "rollout.tensor_parallel_size=2"],
     "--tensor-parallel-size")])
def test_server_settings_that_contradict_each_other_are_an_error(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("config.yaml", ["rollout.mode=server", *overrides])
