"""Requests to slow, broken or absent servers: fakes here, real ones in test_vllm_server.py."""

import json
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra.config import load_config
from infra.vllm_server import Servers, complete, healthy_servers, run_async


@pytest.fixture
def fake_server():
    """`fake_server(answers)`: the URL of a server; `answers(path, body)` is its (status, JSON)."""
    running = []

    def start(answers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                status, answer = answers(self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
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


def answer(path, body, reason="stop", tokens=1, seconds=0.0):
    """A server with weights of version 1 answers so; the response is the prompt `tokens` times."""
    if path != "/v1/completions":
        return 200, {"weight_version": "1", "success": True}
    time.sleep(seconds)
    ids, logprobs = body["prompt"] * tokens, [-1.0] * tokens
    return 200, {"choices": [{"index": 0, "finish_reason": reason, "token_ids": ids,
                              "logprobs": {"token_logprobs": logprobs}}]}


def fail(path, body):
    return (500, {"error": "out of luck"}) if path == "/v1/completions" else answer(path, body)


def make_servers(*urls, timeout=0, warnings=None, weights_dir=None):
    warn = print if warnings is None else warnings.append
    return Servers(list(urls), timeout, weights_dir, warn, version="1")


def check(servers, at_least=1):
    return run_async(healthy_servers, servers, at_least)


def generate(count, servers, concurrency=4):
    """The first tokens of the responses to the prompts [0], [1], ..."""
    bodies = [{"prompt": [i], "max_tokens": 5} for i in range(count)]
    return [rows[0][0][0] for rows in run_async(complete, servers, bodies, concurrency)]


def test_if_no_server_answers_the_error_says_which_for_how_long_and_what_to_do():
    url, warnings = unused_url(), []
    with pytest.raises(ConnectionError, match=f"^{url} does not answer .*rollout.server_timeout=0"
                       " s: restart it, then run the same command again$"):
        check(make_servers(url, warnings=warnings))
    assert len(warnings) == 1 and url in warnings[0]


def test_a_server_that_is_gone_is_reported_once_and_the_others_do_its_work(fake_server):
    warnings, gone = [], unused_url()
    servers = make_servers(gone, fake_server(answer), warnings=warnings)
    for _ in range(2):
        assert generate(9, servers) == list(range(9))
    assert len(warnings) == 1 and gone in warnings[0]
    with pytest.raises(ConnectionError, match=gone):
        check(servers, at_least=2)  # as a run starts: a URL may be misspelt


def test_a_request_that_fails_goes_to_another_server(fake_server):
    servers = make_servers(fake_server(fail), fake_server(answer), timeout=5)
    assert generate(2, servers, concurrency=1) == [0, 1]


def test_an_aborted_response_is_requested_again(fake_server):
    """As vLLM answers when it is told to end, or when another client aborts its requests."""
    warnings = []
    aborts = fake_server(partial(answer, reason="abort"))
    servers = make_servers(aborts, fake_server(answer), timeout=5, warnings=warnings)
    assert generate(2, servers, concurrency=1) == [0, 1]
    assert warnings == [f"warning: {aborts} aborted a response (abort)"]


def test_a_response_cut_before_the_limit_is_an_error(fake_server):
    generate(1, make_servers(fake_server(partial(answer, reason="length", tokens=5))))
    message = "cut a response after 4 tokens, not 5: its --max-model-len"
    with pytest.raises(ValueError, match=message):
        generate(1, make_servers(fake_server(partial(answer, reason="length", tokens=4))))


def test_an_answer_without_token_ids_is_an_error(fake_server):
    def other(path, body):
        return 200, {"weight_version": "1", "choices": [{"index": 0, "finish_reason": "stop"}]}
    with pytest.raises(ValueError, match="returns no token ids"):
        generate(1, make_servers(fake_server(other)))


def test_the_responses_of_a_group_come_in_their_order(fake_server):
    def reversed_choices(path, body):
        status, reply = answer(path, body)
        if path == "/v1/completions":
            choice = reply["choices"][0]
            reply["choices"] = [{**choice, "index": i, "token_ids": [i]} for i in (2, 0, 1)]
        return status, reply
    servers = make_servers(fake_server(reversed_choices))
    bodies = [{"prompt": [7], "max_tokens": 5}]
    (rows,) = run_async(complete, servers, bodies, 1)
    assert [ids.tolist() for ids, _, _ in rows] == [[0], [1], [2]]


def test_a_server_that_another_run_sends_weights_to_is_an_error(fake_server):
    version = ["1"]

    def shared(path, body):
        status, reply = answer(path, body)
        if path == "/v1/completions":
            version[0] = "another's"
        return status, {**reply, "weight_version": version[0]}
    with pytest.raises(ValueError, match="has other weights .another's.: .*serves another run"):
        generate(1, make_servers(fake_server(shared)))


@pytest.mark.slow
def test_a_request_that_all_servers_fail_ends_with_their_message(fake_server):
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="/v1/completions: 500, .*out of luck"):
        generate(3, make_servers(fake_server(fail), timeout=2))
    assert 2 <= time.monotonic() - start < 10


def test_the_least_loaded_server_gets_the_next_request(fake_server):
    count = {"slow": 0, "quick": 0}

    def counting(name, seconds, path, body):
        count[name] += path == "/v1/completions"
        return answer(path, body, seconds=seconds)
    slow = fake_server(partial(counting, "slow", 0.5))
    quick = fake_server(partial(counting, "quick", 0.02))
    generate(20, make_servers(slow, quick), concurrency=2)
    assert count["slow"] <= 4 and sum(count.values()) == 20


def test_a_server_without_weight_requests_is_an_error_with_a_hint(fake_server):
    with pytest.raises(ValueError, match="/weight_info: 404, .*VLLM_SERVER_DEV_MODE=1"):
        check(make_servers(fake_server(lambda path, body: (404, {}))))


def test_a_server_with_other_weights_reads_them_once(fake_server):
    requests, version = [], ["default"]

    def restarted(path, body):
        requests.append((path, body))
        if path == "/update_weight_version":
            version[0] = body["new_version"]
        return 200, {"weight_version": version[0], "success": True}
    servers = make_servers(fake_server(restarted), weights_dir=Path("/somewhere"))
    assert check(servers) == check(servers) == servers.urls
    reload = {"method": "reload_weights", "kwargs": {"weights_path": "/somewhere"}}
    assert requests == [("/weight_info", None), ("/collective_rpc", reload),
                        ("/reset_prefix_cache", {}),
                        ("/update_weight_version", {"new_version": "1"}), ("/weight_info", None)]


def test_a_server_that_cannot_read_the_weights_is_an_error_that_says_where_they_are(fake_server):
    def unable(path, body):
        return (500, {"error": "no such file"}) if path == "/collective_rpc" else answer(path, body)
    servers = make_servers(fake_server(unable), weights_dir=Path("/somewhere"))
    servers.version = "2"
    with pytest.raises(ValueError, match="no such file.*does the server see /somewhere"):
        check(servers)


def test_a_restarted_server_ends_a_run_with_nccl(fake_server):
    servers = make_servers(fake_server(answer))
    servers.version = "2"
    message = "has other weights .1.: it was restarted, .* run the same command again"
    with pytest.raises(ValueError, match=message):
        check(servers)


def test_a_run_without_its_servers_ends_with_one_line(start):
    url = unused_url()
    message = f"^error: rollout.server_urls: {url} does not answer .*restart it"
    with pytest.raises(SystemExit, match=message):
        start("rollout.mode=server", f"rollout.server_urls={url}", "rollout.server_timeout=0")


@pytest.mark.parametrize(("overrides", "message"), [
    (["rollout.server_urls="], "wants http://host:port of each server"),
    (["rollout.server_urls=localhost:8000"], "wants http://host:port of each server"),
    (["rollout.server_urls=http://a:1/"], "wants http://host:port of each server"),
    (["rollout.server_urls=http://a:1", "rollout.tensor_parallel_size=2"],
     "--tensor-parallel-size")])
def test_server_settings_that_contradict_each_other_are_an_error(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("config.yaml", ["rollout.mode=server", *overrides])
