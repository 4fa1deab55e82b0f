"""How do vLLM servers write responses? By requests to servers that somebody else started, and that may fail.

New weights reach a server by vLLM's weight transfer, from GPU to GPU (`nccl`), or from a directory that it sees under
the same name (`disk`). Servers keep the version of their weights, so that one that was started anew is found out
before it writes: it gets the weights again (`disk`), or ends the run (`nccl`).
"""

import asyncio
import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from infra.checkpoint import replace_dir, raise_on_all_ranks
from rollout import Engine, Response, make_responses, request_seed


@dataclass
class Servers:
    """`urls`; `timeout`, seconds to wait while none answers; `version` of the weights that they should have, "" for
    any; `mend(client, url)`, for one that has another; `warn(message)`; `silent`, those that did not answer last."""
    urls: list[str]
    timeout: float
    mend: Callable[[httpx2.AsyncClient, str], Awaitable]
    warn: Callable[[str], None]
    version: str = ""
    silent: set[str] = field(default_factory=set)


def server_engine(config: SimpleNamespace, accelerator: Accelerator, tokenizer, stop_ids: list[int],
                  shapes: dict[str, tuple[int, ...]]) -> Engine:
    """Running servers, as an `Engine`. `shapes`: those of the policy's weights, by name. Raises OSError, ValueError."""
    rollout, folder = config.rollout, Path(config.run_dir).resolve() / "server_weights"
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else getattr(torch, config.model.dtype)
    nccl = rollout.weight_transfer == "nccl" or (
        rollout.weight_transfer == "auto" and accelerator.device.type == "cuda" and find_spec("vllm") is not None)
    urls = rollout.server_urls.split(",")
    first = accelerator.process_index % len(urls)  # each process begins with another
    servers = Servers(urls[first:] + urls[:first], rollout.server_timeout, refuse if nccl else partial(load, folder),
                      tqdm.write if accelerator.is_main_process else lambda message: None)
    run, syncs = broadcast_object_list([str(time.time_ns())])[0], 0

    def wait_for_servers(at_least: int) -> None:
        with raise_on_all_ranks(accelerator, "rollout.server_urls"):
            if accelerator.is_main_process:
                asyncio.run(with_client(healthy_servers, servers, at_least))

    def sync(weights: Iterable[tuple[str, Tensor]]) -> None:
        nonlocal syncs
        if nccl:  # one that is missing would have the others wait for ever
            wait_for_servers(at_least=len(urls))
        syncs += 1
        servers.version = f"{run}-{syncs}"
        weights = ((name, weight.to(dtype)) for name, weight in weights)
        with raise_on_all_ranks(accelerator, f"cannot hand on the weights by {'nccl' if nccl else folder}"):
            try:
                send(weights)
            finally:
                deque(weights, maxlen=0)  # the other processes gather all of them, whatever happens here
        wait_for_servers(at_least=1)
    wait_for_servers(at_least=len(urls))
    with raise_on_all_ranks(accelerator, "rollout.weight_transfer"):
        send = nccl_sender(servers, accelerator, shapes, dtype) if nccl else partial(save, folder, accelerator)

    def close() -> None:
        for path in (folder, aside(folder)):
            shutil.rmtree(path, ignore_errors=True)
    return Engine(partial(write_responses, servers, tokenizer, stop_ids, rollout.max_num_seqs), sync,
                  rest=lambda: None, close=close, apart=True)


# ---- requests -------------------------------------------------------------------------------------------

KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [  # a machine that is gone does not say so
    (socket.IPPROTO_TCP, getattr(socket, name), seconds) for name, seconds in
    (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)) if hasattr(socket, name)]


async def with_client(function: Callable, *arguments):
    """`function(client, *arguments)`."""
    transport = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None), trust_env=False,
                                          socket_options=KEEPALIVE)
    async with httpx2.AsyncClient(timeout=httpx2.Timeout(None, connect=10), transport=transport) as client:
        return await function(client, *arguments)


async def ask(client: httpx2.AsyncClient, url: str, path: str, body: dict | None = None) -> dict:
    """A server's answer to a GET, or to a POST where there is a body. Raises ConnectionError where it cannot answer,
    ValueError where it does not want to."""
    try:  # a POST takes as long as it takes; but what only asks is answered at once
        answer = await (client.get(url + path, timeout=30) if body is None else client.post(url + path, json=body))
    except httpx2.TransportError as error:
        raise ConnectionError(f"{url} does not answer ({str(error) or type(error).__name__})") from error
    if answer.is_success:
        return answer.json() if answer.content else {}
    said = f"{url}{path}: {answer.status_code}, {' '.join(answer.text.split())[:300]}"
    if answer.status_code == 404:
        raise ValueError(f"{said}: is it vLLM, and was it started with VLLM_SERVER_DEV_MODE=1?")
    raise ConnectionError(said) if answer.is_server_error else ValueError(said)


def request_all(servers: Servers, path: str, bodies: list[dict | None]) -> list[dict]:
    """Every server's answer, to a body each; all at the same time."""
    async def asked(client: httpx2.AsyncClient) -> list[dict]:
        return await asyncio.gather(*(ask(client, url, path, body)
                                      for url, body in zip(servers.urls, bodies, strict=True)))
    return asyncio.run(with_client(asked))


async def healthy_servers(client: httpx2.AsyncClient, servers: Servers, at_least: int = 1) -> list[str]:
    """The servers that answer, all of them with the right weights. Waits for `at_least` so many.

    Raises ConnectionError where `servers.timeout` is over before, and ValueError.
    """
    async def look(url: str) -> None:
        version = (await ask(client, url, "/weight_info"))["weight_version"]
        if servers.version not in ("", version):
            await servers.mend(client, url)
            if not (await ask(client, url, "/reset_prefix_cache", {}))["success"]:
                raise ConnectionError(f"{url} did not empty its prefix cache")
            await ask(client, url, "/update_weight_version", {"new_version": servers.version})

    start = time.monotonic()
    while True:
        results = dict(zip(servers.urls, await asyncio.gather(*map(look, servers.urls), return_exceptions=True),
                           strict=True))
        silent = {url: error for url, error in results.items() if isinstance(error, ConnectionError)}
        for url, error in results.items():
            if error and url not in silent:
                raise error
            if error and url not in servers.silent:
                servers.warn(f"warning: {error}")
        servers.silent = set(silent)
        if len(servers.urls) - len(silent) >= at_least:
            return [url for url in servers.urls if url not in silent]
        if time.monotonic() - start > servers.timeout:
            raise ConnectionError(f"{next(iter(silent.values()))}, for rollout.server_timeout={servers.timeout} s; "
                                  "start it again, and then this run")
        await asyncio.sleep(1)


# ---- weights --------------------------------------------------------------------------------------------

def save(folder: Path, accelerator: Accelerator, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write the weights where servers are to read them. Tied ones under each of their names, as vLLM wants them."""
    whole = {}
    for name, weight in weights:
        if accelerator.is_main_process:
            whole[name] = weight.to("cpu", copy=True)
    if accelerator.is_main_process:
        aside(folder).mkdir(parents=True, exist_ok=True)
        save_file(whole, aside(folder) / "model.safetensors", metadata={"format": "pt"})
        replace_dir(aside(folder), folder)


def aside(folder: Path) -> Path:
    """Where it is written until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


async def load(folder: Path, client: httpx2.AsyncClient, url: str) -> None:
    """Have a server read them. One that fails in that does not live on."""
    try:
        await ask(client, url, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    except ConnectionError as error:
        if error.__cause__:  # it did not answer
            raise
        raise ValueError(f"{error}: does it see {folder}, and is it of the same model?") from error


async def refuse(client: httpx2.AsyncClient, url: str) -> None:
    """With nccl: a new process has no place in the group that weights are sent to. Raises ValueError."""
    raise ValueError(f"{url} was started anew, and cannot join in again: start this run anew too")


def nccl_sender(servers: Servers, accelerator: Accelerator, shapes: dict[str, tuple[int, ...]],
                dtype: torch.dtype) -> Callable[[Iterable], None]:
    """What sends weights to all servers at once, from this process's GPU; vLLM's own machinery, on both sides."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    class Weights(WeightSource):
        """The policy's, as vLLM asks for them: what is to come, and then one after the other."""
        values: Iterable[tuple[str, Tensor]] = ()

        def metadata(self):
            return [ParamMeta(name, dtype, shape) for name, shape in shapes.items()]

        def __iter__(self):
            return iter(self.values)

    def to_all(path: str, body: dict) -> list[dict]:
        return request_all(servers, path, [body] * len(servers.urls))

    def invite(info: dict) -> None:
        try:
            request_all(servers, "/init_weight_transfer_engine", [
                {"init_info": info | {"rank_offset": rank}} for rank in first_ranks[:-1]])
        except (OSError, ValueError) as error:  # which is heard of only when the trainer has waited for minutes
            servers.warn(f"warning: {error} (a server wants --weight-transfer-config '{{\"backend\": \"nccl\"}}')")
            raise

    sizes = [answer["world_size"] for answer in request_all(servers, "/get_world_size", [None] * len(servers.urls))]
    first_ranks = list(accumulate(sizes, initial=1))  # the trainer is rank 0
    client = SimpleNamespace(
        init_weight_transfer_engine=invite,
        start_weight_update=lambda: to_all("/start_weight_update", {}),
        update_weights=lambda info: to_all("/update_weights", {"update_info": info}),
        finish_weight_update=lambda: to_all("/finish_weight_update", {"weight_version": servers.version}))
    if accelerator.is_main_process:
        to_all("/shutdown_weight_transfer_engine", {})  # an earlier run's
    source = Weights()
    group = NCCLTrainerInitInfo(get_ip(), get_open_port(), first_ranks[-1], rank=accelerator.process_index)
    engine = WeightTransferTrainerFactory.trainer_init(group, client=client, source=source)

    def send(weights: Iterable[tuple[str, Tensor]]) -> None:
        source.values = weights
        torch.accelerator.synchronize()  # vLLM reads them on streams of its own
        engine.send_weights()
        if accelerator.is_main_process and not all(answer["success"] for answer in to_all("/reset_prefix_cache", {})):
            raise ConnectionError("a server did not empty its prefix cache")
    return send


# ---- responses ------------------------------------------------------------------------------------------

NO_DEFAULTS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def write_responses(servers: Servers, tokenizer, stop_ids: list[int], max_num_seqs: int, prompts, seeds, n: int,
                    max_tokens: int, temperature: float, top_p: float, progress: str = "") -> list[list[Response]]:
    """`n` responses to each prompt, `max_num_seqs` of them asked for at a time. Raises ConnectionError, ValueError."""
    copies = n if temperature == 0 else 1  # greedy ones are all the same, and vLLM wants to write but one
    settings = {"n": n // copies, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "logprobs": 0,
                "return_token_ids": True, "stop_token_ids": stop_ids, **NO_DEFAULTS}
    bodies = [{"prompt": [int(token) for token in ids], "seed": request_seed(seed), **settings}
              for ids, seed in zip(prompts, seeds, strict=True)]
    with tqdm(desc=progress, total=len(bodies), disable=not progress, leave=False, delay=10) as bar:
        answers = asyncio.run(with_client(complete, servers, bodies, max(1, max_num_seqs // n), bar))
    groups = [[read_choice(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
              for answer in answers]
    responses = iter(make_responses(tokenizer, [row for group in groups for row in group]))
    return [[next(responses) for _ in group] * copies for group in groups]


async def complete(client: httpx2.AsyncClient, servers: Servers, bodies: list[dict], at_a_time: int,
                   bar: tqdm) -> list[dict]:
    """The answer to each body, from whichever server had least to do; and from another where that one fails."""
    live, busy, used, named = await healthy_servers(client, servers), Counter(), set(), set()
    gate, looking = asyncio.Semaphore(at_a_time), asyncio.Lock()

    async def one(body: dict) -> dict:
        failures, lost = Counter(), 0.0
        while True:
            url = min(live, key=lambda url: (failures[url], busy[url]))
            busy[url] += 1
            try:
                answer = await ask(client, url, "/v1/completions", body)
                check_ends(url, answer, body)
                used.add(url)
                return answer
            except ConnectionError as error:
                if lost > servers.timeout:
                    raise
                if not error.__cause__ and url not in named:  # it answers, but not this
                    named.add(url)
                    servers.warn(f"warning: {error}")
                failures[url] += 1
                start = time.monotonic()
                await asyncio.sleep(1)
                async with looking:
                    live[:] = await healthy_servers(client, servers)
                lost += time.monotonic() - start
            finally:
                busy[url] -= 1

    async def in_turn(body: dict) -> dict:
        async with gate:
            answer = await one(body)
        bar.update()
        return answer
    answers = await asyncio.gather(*map(in_turn, bodies))
    for url in used & set(live):
        if (version := (await ask(client, url, "/weight_info"))["weight_version"]) != servers.version:
            raise ValueError(f"{url} was given other weights ({version}) in between: a server serves one run at a time")
    return answers


def check_ends(url: str, answer: dict, body: dict) -> None:
    """Raise ConnectionError where a response was broken off, ValueError where it was cut before `max_tokens`."""
    for choice in answer.get("choices", []):
        if choice.get("token_ids") is None:
            raise ValueError(f"{url} does not return token ids: it is no vLLM, or an old one")
        if choice["finish_reason"] not in ("stop", "length"):
            raise ConnectionError(f"{url} broke a response off ({choice['finish_reason']})")
        if choice["finish_reason"] == "length" and len(choice["token_ids"]) < body["max_tokens"]:
            raise ValueError(f"{url} cut a response after {len(choice['token_ids'])} tokens, not {body['max_tokens']}: "
                             "its --max-model-len, or a default of its own, is too small")


def read_choice(choice: dict) -> tuple[np.ndarray, np.ndarray, bool]:
    """Token ids, their log-probs, and whether it ended by itself, of a response as vLLM's server has it."""
    return (np.array(choice["token_ids"], dtype=np.int32),
            np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32), choice["finish_reason"] == "stop")
