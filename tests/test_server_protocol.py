"""What becomes of requests when servers are slow, broken or gone. The servers are stand-ins; real ones are in test_vllm_server.py."""

import asyncio
import json
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tqdm import tqdm

from infra.vllm_server import Servers, healthy_servers, complete, load, with_client


@pytest.fixture
def stand_in():
    """`stand_in(answers)`: the address of a server that answers as `answers(path, body)` says, with (status, JSON)."""
    running = []

    def start(answers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length", 0))
                status, answer = answers(self.path, json.loads(self.rfile.read(length)) if length else None)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            do_POST = do_GET

            def log_message(self, *_):
                pass
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"
    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def well(path, body, seconds=0.0):
    if path == "/v1/completions":
        time.sleep(seconds)
    return 200, {"weight_version": "1", "success": True, "echo": body}


def broken(path, body):
    return (500, {"error": "out of luck"}) if path == "/v1/completions" else well(path, body)


def ended(reason, tokens, path, body):
    if path == "/v1/completions":
        return 200, {"choices": [{"finish_reason": reason, "token_ids": [1] * tokens}], "echo": body}
    return well(path, body)


def servers(*urls, timeout=0, warnings=None, mend=None):
    return Servers(list(urls), timeout, mend, (warnings if warnings is not None else []).append, version="1")


def nobody():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def ask_for(count, where, at_a_time=4):
    with tqdm(total=count, disable=True) as bar:
        return asyncio.run(with_client(complete, where, [{"number": i, "max_tokens": 5} for i in range(count)], at_a_time, bar))


def test_when_none_answers_the_error_says_who_for_how_long_and_what_to_do():
    gone, warnings = nobody(), []
    with pytest.raises(ConnectionError, match=f"^{gone} does not answer .*rollout.server_timeout=0 s; start it again, and then this run$"):
        asyncio.run(with_client(healthy_servers, servers(gone, warnings=warnings)))
    assert len(warnings) == 1 and gone in warnings[0]


def test_one_that_is_gone_is_named_once_and_the_others_do_its_work(stand_in):
    warnings = []
    where = servers(gone := nobody(), stand_in(well), warnings=warnings)
    for _ in range(2):
        assert [answer["echo"]["number"] for answer in ask_for(9, where)] == list(range(9))
    assert len(warnings) == 1 and gone in warnings[0]
    with pytest.raises(ConnectionError, match=gone):  # at the start all have to be there: the address may be misspelt
        asyncio.run(with_client(healthy_servers, where, 2))


def test_what_one_fails_at_goes_to_another(stand_in):
    good = stand_in(well)
    answers = ask_for(3, servers(stand_in(broken), good, timeout=5), at_a_time=1)
    assert [answer["echo"]["number"] for answer in answers] == [0, 1, 2]


def test_a_response_that_a_server_broke_off_is_asked_for_again(stand_in):
    """As vLLM answers when it is told to end, or another aborts its requests."""
    warnings = []
    answers = ask_for(2, servers(stand_in(partial(ended, "abort", 2)), stand_in(partial(ended, "stop", 2)), timeout=5, warnings=warnings), at_a_time=1)
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["stop", "stop"]
    assert len(warnings) == 1 and "broke a response off" in warnings[0]


def test_a_response_cut_before_the_limit_is_an_error(stand_in):
    ask_for(1, servers(stand_in(partial(ended, "length", 5))))
    with pytest.raises(ValueError, match="cut a response after 4 tokens, not 5: its --max-model-len"):
        ask_for(1, servers(stand_in(partial(ended, "length", 4))))
    with pytest.raises(ValueError, match="does not return token ids"):
        ask_for(1, servers(stand_in(lambda path, body: (200, {"weight_version": "1", "choices": [{"finish_reason": "stop"}]}))))


def test_a_server_that_another_run_gives_weights_to_is_an_error(stand_in):
    version = ["1"]

    def shared(path, body):
        if path == "/v1/completions":
            version[0] = "another's"
        return 200, {"weight_version": version[0], "success": True}
    with pytest.raises(ValueError, match="was given other weights .* one run at a time"):
        ask_for(1, servers(stand_in(shared)))


def test_what_all_fail_at_ends_with_what_they_said(stand_in):
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="/v1/completions: 500, .*out of luck"):
        ask_for(3, servers(stand_in(broken), timeout=2))
    assert 2 <= time.monotonic() - start < 10


def test_who_has_least_to_do_gets_the_next(stand_in):
    count = {"slow": 0, "quick": 0}

    def counting(name, seconds, path, body):
        count[name] += path == "/v1/completions"
        return well(path, body, seconds)
    ask_for(20, servers(stand_in(partial(counting, "slow", 0.5)), stand_in(partial(counting, "quick", 0.02))), at_a_time=2)
    assert count["slow"] <= 4 and sum(count.values()) == 20


def test_a_server_without_weight_requests_is_refused_with_a_hint(stand_in):
    with pytest.raises(ValueError, match="/weight_info: 404, .*VLLM_SERVER_DEV_MODE=1"):
        asyncio.run(with_client(healthy_servers, servers(stand_in(lambda path, body: (404, {})))))


def test_a_server_with_other_weights_gets_them_and_a_failure_says_where_they_are(stand_in):
    asked, version = [], ["default"]

    def other(path, body):
        asked.append(path)
        if path == "/update_weight_version":
            version[0] = body["new_version"]
        return 200, {"weight_version": version[0], "success": True}
    where = servers(stand_in(other), mend=partial(load, Path("/somewhere")))
    assert asyncio.run(with_client(healthy_servers, where)) == where.urls
    asyncio.run(with_client(healthy_servers, where))  # now it has them
    assert asked == ["/weight_info", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/weight_info"]
    unable = stand_in(lambda path, body: (500, {"error": "no such file"}) if path == "/collective_rpc" else well(path, body))
    where = servers(unable, mend=partial(load, Path("/somewhere")))
    where.version = "2"
    with pytest.raises(ValueError, match="no such file.*does it see /somewhere"):
        asyncio.run(with_client(healthy_servers, where))


def test_a_run_without_its_servers_ends_with_one_line(start):
    with pytest.raises(SystemExit, match=r"^error: rollout.server_urls: http://127.0.0.1:\d+ does not answer .*start it again"):
        start("rollout.mode=server", f"rollout.server_urls={nobody()}", "rollout.server_timeout=0")


@pytest.mark.parametrize(("overrides", "message"), [
    (["rollout.server_urls="], "wants http://host:port of each server"),
    (["rollout.server_urls=localhost:8000"], "wants http://host:port of each server"),
    (["rollout.server_urls=http://a:1/"], "wants http://host:port of each server"),
    (["rollout.server_urls=http://a:1", "rollout.tensor_parallel_size=2"], "--tensor-parallel-size")])
def test_settings_that_cannot_be_meant_are_refused(overrides, message):
    from infra.config import load_config
    with pytest.raises(ValueError, match=message):
        load_config("config.yaml", ["rollout.mode=server", *overrides])
