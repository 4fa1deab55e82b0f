"""vLLM servers outside the trainer, which may fail and restart: an `Engine` over HTTP.

After each update the servers get the new weights: from GPU to GPU by vLLM's weight transfer
(`nccl`), or from a directory that they see under the same path (`disk`). Each set of weights has a
version. A server that restarts has lost it, so before it generates it reads the weights again
(`disk`), or ends the run (`nccl`).
"""

import asyncio
import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
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

from infra.distributed import raise_on_all_ranks
from rollout import Engine, Response, SamplingParams, make_responses, request_seed


@dataclass
class Servers:
    """The servers of a run, as this process sees them."""
    urls: list[str]
    timeout: float                 # seconds to wait while too few of them answer
    weights_dir: Path | None       # where they read weights; None: weights arrive by nccl
    warn: Callable[[str], None]
    version: str = ""              # of the weights that they must have; "" accepts any
    unreachable: set[str] = field(default_factory=set)  # URLs that failed the last check


def server_engine(config: SimpleNamespace, accelerator: Accelerator, tokenizer, stop_ids: list[int],
                  shapes: dict[str, tuple[int, ...]]) -> Engine:
    """An `Engine` backed by the servers at `rollout.server_urls`, all of which must answer now.

    `shapes` are those of the policy's weights, by name. Raises OSError if a server or the weight
    transfer fails, ValueError if a server rejects a request.
    """
    rollout = config.rollout
    dtype = getattr(torch, "bfloat16" if config.mixed_precision == "bf16" else config.model.dtype)
    can_nccl = accelerator.device.type == "cuda" and find_spec("vllm") is not None
    nccl = rollout.weight_transfer == "nccl" or (rollout.weight_transfer == "auto" and can_nccl)
    weights_dir = Path(config.run_dir).resolve() / "server_weights"
    urls = rollout.server_urls.split(",")
    first = accelerator.process_index % len(urls)  # each process prefers another server
    servers = Servers(urls[first:] + urls[:first], rollout.server_timeout,
                      weights_dir=None if nccl else weights_dir,
                      warn=tqdm.write if accelerator.is_main_process else lambda message: None)

    def wait_for_servers(at_least: int) -> None:
        with raise_on_all_ranks(accelerator, "rollout.server_urls"):
            if accelerator.is_main_process:
                asyncio.run(with_client(healthy_servers, servers, at_least))

    def sync(weights: Iterable[tuple[str, Tensor]]) -> None:
        if nccl:  # all servers must take part in a transfer
            wait_for_servers(at_least=len(urls))
        servers.version = broadcast_object_list([str(time.time_ns())])[0]
        weights = ((name, weight.to(dtype)) for name, weight in weights)
        doing = f"cannot send the weights by {'nccl' if nccl else weights_dir}"
        with raise_on_all_ranks(accelerator, doing):
            try:
                if accelerator.is_main_process:
                    send(weights)
            finally:
                deque(weights, maxlen=0)  # all ranks gather each weight, even if nothing is sent
        wait_for_servers(at_least=1)

    wait_for_servers(at_least=len(urls))
    send = partial(save_weights, weights_dir)
    with raise_on_all_ranks(accelerator, "rollout.weight_transfer"):
        if nccl and accelerator.is_main_process:
            send = nccl_sender(servers, shapes, dtype)
    generate = partial(generate_on_servers, servers, tokenizer, stop_ids, rollout.max_num_seqs)
    return Engine(generate, sync, sleep=lambda: None, has_own_weights=True,
                  close=partial(shutil.rmtree, weights_dir, ignore_errors=True))


SOCKET_OPTIONS = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]  # notice a machine that disappeared
for _name, _seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
    if hasattr(socket, _name):  # they differ between operating systems
        SOCKET_OPTIONS.append((socket.IPPROTO_TCP, getattr(socket, _name), _seconds))


class ServerError(ConnectionError):
    """A server answers, but failed to do what it was asked for."""


async def with_client(function: Callable, *args):
    """The result of `function(client, *args)`."""
    transport = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None),
                                          trust_env=False, socket_options=SOCKET_OPTIONS)
    async with httpx2.AsyncClient(transport=transport) as client:
        return await function(client, *args)


async def request(client: httpx2.AsyncClient, url: str, path: str,
                  body: dict | None = None) -> dict:
    """A server's answer to a POST of `body`, or to a GET if there is none.

    Raises ConnectionError if it does not answer, ServerError if it fails, ValueError if it refuses.
    """
    method, seconds = ("GET", 30) if body is None else ("POST", None)  # a POST may take hours
    timeout = httpx2.Timeout(seconds, connect=10)
    try:
        answer = await client.request(method, url + path, json=body, timeout=timeout)
    except httpx2.TransportError as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"{url} does not answer ({reason})") from error
    if answer.is_success:
        return answer.json() if answer.content else {}
    message = f"{url}{path}: {answer.status_code}, {' '.join(answer.text.split())[:300]}"
    if answer.is_server_error:
        raise ServerError(message)
    if answer.status_code == 404:
        message += ": is it vLLM, and was it started with VLLM_SERVER_DEV_MODE=1?"
    raise ValueError(message)


def request_all(servers: Servers, path: str, bodies: Sequence[dict | None]) -> list[dict]:
    """Each server's answer to its body, requested at the same time. Raises like `request`."""
    async def gather(client: httpx2.AsyncClient) -> list[dict]:
        pairs = zip(servers.urls, bodies, strict=True)
        return await asyncio.gather(*(request(client, url, path, body) for url, body in pairs))
    return asyncio.run(with_client(gather))


async def healthy_servers(client: httpx2.AsyncClient, servers: Servers,
                          at_least: int = 1) -> list[str]:
    """URLs of the servers that answer and have the right weights; waits for `at_least` of them.

    Raises ConnectionError after `servers.timeout` seconds, ValueError if a server cannot be used.
    """
    start = time.monotonic()
    while True:
        checks = [check_weights(client, servers, url) for url in servers.urls]
        results = await asyncio.gather(*checks, return_exceptions=True)
        errors = {url: error for url, error in zip(servers.urls, results, strict=True) if error}
        for url, error in errors.items():
            if not isinstance(error, ConnectionError):
                raise error
            if url not in servers.unreachable:
                servers.warn(f"warning: {error}")
        servers.unreachable = set(errors)
        if len(servers.urls) - len(errors) >= at_least:
            return [url for url in servers.urls if url not in errors]
        if time.monotonic() - start > servers.timeout:
            error = next(iter(errors.values()))
            raise ConnectionError(f"{error}, for rollout.server_timeout={servers.timeout} s: "
                                  "restart it, then run the same command again")
        await asyncio.sleep(1)


async def check_weights(client: httpx2.AsyncClient, servers: Servers, url: str) -> None:
    """Make a server read the current weights if it has others. Raises like `request`."""
    version = (await request(client, url, "/weight_info"))["weight_version"]
    if servers.version in ("", version):
        return
    if not servers.weights_dir:
        raise ValueError(f"{url} was restarted, and cannot rejoin a run with "
                         "rollout.weight_transfer=nccl: run the same command again")
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(servers.weights_dir)}}
    try:
        await request(client, url, "/collective_rpc", reload)
    except ServerError as error:  # vLLM does not survive a failed reload: no use in another try
        raise ValueError(f"{error}: does the server see {servers.weights_dir}, and does it run the "
                         "same model?") from error
    if not (await request(client, url, "/reset_prefix_cache", {}))["success"]:
        raise ServerError(f"{url} did not empty its prefix cache")
    await request(client, url, "/update_weight_version", {"new_version": servers.version})


def save_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace `folder/model.safetensors` by the weights. Raises OSError.

    A tied weight is written under each of its names, as vLLM expects.
    """
    copies = {name: weight.to("cpu", copy=True) for name, weight in weights}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(copies, folder / "model.partial", metadata={"format": "pt"})
    (folder / "model.partial").replace(folder / "model.safetensors")  # atomic


def nccl_sender(servers: Servers, shapes: dict[str, tuple[int, ...]],
                dtype: torch.dtype) -> Callable[[Iterable], None]:
    """A function that sends weights from this GPU to all servers, by vLLM's weight transfer."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    class Weights(WeightSource):
        """The policy's weights: vLLM asks for all names, types and shapes, then for the values."""
        values: Iterable[tuple[str, Tensor]] = ()

        def metadata(self):
            return [ParamMeta(name, dtype, shape) for name, shape in shapes.items()]

        def __iter__(self):
            return iter(self.values)

    def post(path: str, body: dict) -> list[dict]:
        return request_all(servers, path, [body] * len(servers.urls))

    def init_servers(info: dict) -> None:
        bodies = [{"init_info": info | {"rank_offset": rank}} for rank in first_ranks[:-1]]
        try:
            request_all(servers, "/init_weight_transfer_engine", bodies)
        except (OSError, ValueError) as error:  # said now, since vLLM waits for minutes to raise it
            servers.warn(f"warning: {error} (a server needs --weight-transfer-config "
                         "'{\"backend\": \"nccl\"}')")
            raise

    sizes = request_all(servers, "/get_world_size", [None] * len(servers.urls))
    first_ranks = list(accumulate((size["world_size"] for size in sizes), initial=1))  # 0: trainer
    client = SimpleNamespace(
        init_weight_transfer_engine=init_servers,
        start_weight_update=lambda: post("/start_weight_update", {}),
        update_weights=lambda info: post("/update_weights", {"update_info": info}),
        finish_weight_update=lambda: post("/finish_weight_update",
                                          {"weight_version": servers.version}))
    post("/shutdown_weight_transfer_engine", {})  # that of an earlier run
    source = Weights()
    group = NCCLTrainerInitInfo(get_ip(), get_open_port(), first_ranks[-1], rank=0)
    engine = WeightTransferTrainerFactory.trainer_init(group, client=client, source=source)

    def send(weights: Iterable[tuple[str, Tensor]]) -> None:
        source.values = weights
        torch.accelerator.synchronize()  # vLLM reads the weights on its own CUDA streams
        engine.send_weights()
        if not all(answer["success"] for answer in post("/reset_prefix_cache", {})):
            raise ConnectionError("a server did not empty its prefix cache")
    return send


# Without these a server takes its defaults from the model's generation config.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
           "frequency_penalty": 0.0}


def generate_on_servers(servers: Servers, tokenizer, stop_ids: list[int], max_num_seqs: int,
                        prompts: Sequence[list[int]], seeds: Sequence[tuple[int, ...]],
                        params: SamplingParams, progress: str = "") -> list[list[Response]]:
    """`params.n` responses to each prompt, `max_num_seqs` of them requested at a time.

    Raises ConnectionError if no server answers, ValueError if one rejects a request.
    """
    copies = params.n if params.temperature == 0 else 1  # greedy: vLLM only allows one sample
    samples = params.n // copies
    shared = {**params._asdict(), **NEUTRAL, "n": samples, "logprobs": 0, "return_token_ids": True,
              "stop_token_ids": stop_ids}
    bodies = [{"prompt": [int(token) for token in ids], "seed": request_seed(seed), **shared}
              for ids, seed in zip(prompts, seeds, strict=True)]
    concurrency = max(1, max_num_seqs // params.n)
    with tqdm(desc=progress, total=len(bodies), disable=not progress, leave=False, delay=10) as bar:
        rows = asyncio.run(with_client(complete, servers, bodies, concurrency, bar))
    flat = make_responses(tokenizer, [row for group in rows for row in group])
    return [flat[i:i + samples] * copies for i in range(0, len(flat), samples)]


async def complete(client: httpx2.AsyncClient, servers: Servers, bodies: list[dict],
                   concurrency: int, bar: tqdm) -> list[list[tuple[np.ndarray, np.ndarray, bool]]]:
    """For each body the rows of `read_choices`, with `concurrency` requests in progress.

    A request goes to the least loaded server, and if that fails to another. Raises ConnectionError
    if all fail for `servers.timeout` seconds, ValueError if one refuses or got other weights.
    """
    healthy, load = await healthy_servers(client, servers), Counter()  # URLs; requests by URL
    used, warned = set(), set()
    semaphore, checking = asyncio.Semaphore(concurrency), asyncio.Lock()

    async def complete_one(body: dict) -> list:
        failures = Counter()  # by URL
        while True:
            url = min(healthy, key=lambda url: (failures[url], load[url]))
            load[url] += 1
            try:
                answer = await request(client, url, "/v1/completions", body)
                rows = read_choices(url, answer, body["max_tokens"])
                used.add(url)
                return rows
            except ConnectionError as error:
                if failures.total() > servers.timeout:  # a failure takes at least a second
                    raise
                if isinstance(error, ServerError) and url not in warned:
                    warned.add(url)
                    servers.warn(f"warning: {error}")
                failures[url] += 1
                await asyncio.sleep(1)
                async with checking:
                    healthy[:] = await healthy_servers(client, servers)
            finally:
                load[url] -= 1

    async def in_turn(body: dict) -> list:
        async with semaphore:
            rows = await complete_one(body)
        bar.update()
        return rows

    results = await asyncio.gather(*map(in_turn, bodies))
    for url in used.intersection(healthy):
        version = (await request(client, url, "/weight_info"))["weight_version"]
        if version != servers.version:
            raise ValueError(f"{url} got other weights ({version}) while it generated: a server "
                             "serves one run at a time")
    return results


def read_choices(url: str, answer: dict,
                 max_tokens: int) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """For each response: token ids (T,) int32, log-probs (T,) float32, whether it ends in an EOS.

    Raises ServerError if a response was aborted, ValueError if it was cut before `max_tokens`.
    """
    rows = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        ids, reason = choice.get("token_ids"), choice["finish_reason"]
        if ids is None:
            raise ValueError(f"{url} returns no token ids: use the vLLM of requirements-vllm.txt")
        if reason not in ("stop", "length"):
            raise ServerError(f"{url} aborted a response ({reason})")
        if reason == "length" and len(ids) < max_tokens:
            raise ValueError(f"{url} cut a response after {len(ids)} tokens, not {max_tokens}: its "
                             "--max-model-len, or a default of its own, is too small")
        logprobs = np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32)
        rows.append((np.array(ids, dtype=np.int32), logprobs, reason == "stop"))
    return rows
