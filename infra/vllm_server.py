"""vLLM servers outside the trainer, which may fail and restart: an `Engine` over HTTP.

After each update the servers get the new weights: from GPU to GPU by vLLM's weight transfer
(`nccl`), or from a directory that they see under the same path (`disk`). Each set of weights has a
version. A restarted server lacks it: it reads the weights again (`disk`) or ends the run (`nccl`).
"""

import asyncio
import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from httpx2 import AsyncClient, AsyncHTTPTransport, Limits, Timeout, TransportError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data_types import Engine, Response, SamplingParams
from infra.config import compute_dtype
from infra.distributed import raise_on_all_ranks
from infra.vllm_engine import group_responses, request_params


@dataclass
class Servers:
    """The servers of a run, as this process sees them."""
    urls: list[str]
    timeout: float                 # seconds to wait while too few of them answer
    weights_dir: Path | None       # where they read weights; None: weights arrive by nccl
    warn: Callable[[str], None]
    version: str = ""              # of the weights that they must have; "" accepts any

    def __post_init__(self):
        self.warn = cache(self.warn)  # each message once


def server_engine(config: SimpleNamespace, accelerator: Accelerator, tokenizer, stop_ids: list[int],
                  shapes: dict[str, tuple[int, ...]]) -> Engine:
    """An `Engine` backed by the servers at `rollout.server_urls`, all of which must answer now.

    `shapes` are those of the policy's weights, by name. Raises OSError if a server or the weight
    transfer fails, ValueError if a server rejects a request.
    """
    rollout = config.rollout
    dtype = getattr(torch, compute_dtype(config))
    can_nccl = accelerator.device.type == "cuda" and find_spec("vllm") is not None
    nccl = rollout.weight_transfer == "nccl" or (rollout.weight_transfer == "auto" and can_nccl)
    weights_dir = Path(config.run_dir).resolve() / "server_weights"
    urls = rollout.server_urls.split(",")
    first = accelerator.process_index % len(urls)  # each process prefers another server
    servers = Servers(urls[first:] + urls[:first], rollout.server_timeout,
                      weights_dir=None if nccl else weights_dir,
                      warn=tqdm.write if accelerator.is_main_process else lambda message: None)

    def wait_for_servers(at_least: int) -> None:
        with raise_on_all_ranks("rollout.server_urls"):
            if accelerator.is_main_process:
                run_async(healthy_servers, servers, at_least)

    def sync(weights: Iterable[tuple[str, Tensor]]) -> None:
        if nccl:  # all servers must take part in a transfer
            wait_for_servers(at_least=len(urls))
        servers.version = broadcast_object_list([str(time.time_ns())])[0]
        weights = ((name, weight.to(dtype)) for name, weight in weights)
        doing = f"cannot send the weights by {'nccl' if nccl else weights_dir}"
        with raise_on_all_ranks(doing):
            try:
                if accelerator.is_main_process:
                    send(weights)
            finally:
                deque(weights, maxlen=0)  # all ranks gather each weight, even if nothing is sent
        wait_for_servers(at_least=1)

    wait_for_servers(at_least=len(urls))
    send = partial(save_weights, weights_dir)
    with raise_on_all_ranks("rollout.weight_transfer"):
        if nccl and accelerator.is_main_process:
            send = nccl_sender(servers, shapes, dtype)
    generate = partial(generate_on_servers, servers, tokenizer, stop_ids, rollout.max_num_seqs)
    return Engine(generate, sync, sleep=lambda: None, has_own_weights=True,
                  close=partial(shutil.rmtree, weights_dir, ignore_errors=True))


# Notices within minutes that a server's machine disappeared during a request.
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # the seconds; macOS has another name
    KEEPALIVE += [(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
                  (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)]


class ServerError(ConnectionError):
    """A server answers, but failed to do what it was asked for."""


def run_async(function: Callable, *args):
    """The result of `await function(client, *args)`."""
    async def with_client():
        transport = AsyncHTTPTransport(limits=Limits(), socket_options=KEEPALIVE)
        async with AsyncClient(transport=transport) as client:
            return await function(client, *args)
    return asyncio.run(with_client())


async def request(client: AsyncClient, url: str, path: str, body: dict | None = None) -> dict:
    """A server's answer to a POST of `body`, or to a GET if there is none.

    Raises ConnectionError if it does not answer, ServerError if it fails, ValueError if it refuses.
    """
    method, seconds = ("GET", 30) if body is None else ("POST", None)  # a POST may take hours
    try:
        response = await client.request(method, url + path, json=body,
                                        timeout=Timeout(seconds, connect=10))
    except TransportError as error:
        raise ConnectionError(f"{url} does not answer ({error!r})") from error
    answer = response.json() if response.is_success and response.content else {}
    if response.is_success and answer.get("success", True):
        return answer
    message = f"{url}{path}: {response.status_code}, {' '.join(response.text.split())[:300]}"
    if response.status_code == 404:
        message += ": is it vLLM, and was it started with VLLM_SERVER_DEV_MODE=1?"
    raise (ValueError if response.is_client_error else ServerError)(message)


async def request_all(client: AsyncClient, servers: Servers, path: str,
                      bodies: Sequence[dict | None]) -> list[dict]:
    """Each server's answer to its body, requested at the same time. Raises like `request`."""
    pairs = zip(servers.urls, bodies, strict=True)
    return await asyncio.gather(*(request(client, url, path, body) for url, body in pairs))


async def healthy_servers(client: AsyncClient, servers: Servers, at_least: int = 1) -> list[str]:
    """URLs of the servers that answer and have the right weights; waits for `at_least` of them.

    Raises ConnectionError after `servers.timeout` seconds, ValueError if a server cannot be used.
    """
    start = time.monotonic()
    while True:
        checks = [check_weights(client, servers, url) for url in servers.urls]
        results = dict(zip(servers.urls, await asyncio.gather(*checks), strict=True))
        healthy = [url for url, error in results.items() if not error]
        if len(healthy) >= at_least:
            return healthy
        if time.monotonic() - start > servers.timeout:
            error = next(filter(None, results.values()))
            raise ConnectionError(f"{error}, for rollout.server_timeout={servers.timeout} s: "
                                  "restart it, then run the same command again")
        await asyncio.sleep(1)


async def check_weights(client: AsyncClient, servers: Servers, url: str) -> Exception | None:
    """Make a server read the current weights if it has others. Returns why it does not answer.

    Raises ValueError if the server cannot be used.
    """
    try:
        version = (await request(client, url, "/weight_info"))["weight_version"]
        if servers.version in ("", version):
            return None
        if not servers.weights_dir:
            raise ValueError(f"{url} has other weights ({version}): it was restarted, or serves "
                             "another run too; run the same command again")
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(servers.weights_dir)}}
        try:
            await request(client, url, "/collective_rpc", reload)
        except ServerError as error:  # vLLM does not survive a failed reload
            raise ValueError(f"{error}: does the server see {servers.weights_dir}, and does it run "
                             "the same model?") from error
        await request(client, url, "/reset_prefix_cache", {})
        await request(client, url, "/update_weight_version", {"new_version": servers.version})
        servers.warn.cache_clear()  # it is back: warn of its next failure again
    except ConnectionError as error:
        servers.warn(f"warning: {error}")
        return error


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
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.utils.network_utils import get_ip, get_open_port

    class Weights(WeightSource):
        """The policy's weights: vLLM asks for all names, types and shapes, then for the values."""
        values: Iterable[tuple[str, Tensor]] = ()

        def metadata(self):
            return [ParamMeta(name, dtype, shape) for name, shape in shapes.items()]

        def __iter__(self):
            return iter(self.values)

    def post(path: str, **body) -> None:
        run_async(request_all, servers, path, [body] * len(servers.urls))

    def init_servers(info: dict) -> None:
        bodies = [{"init_info": info | {"rank_offset": rank}} for rank in first_ranks[:-1]]
        try:
            run_async(request_all, servers, "/init_weight_transfer_engine", bodies)
        except (OSError, ValueError) as error:  # vLLM raises it only after minutes
            servers.warn(f"warning: {error} (a server needs --weight-transfer-config "
                         "'{\"backend\": \"nccl\"}')")
            raise

    sizes = run_async(request_all, servers, "/get_world_size", [None] * len(servers.urls))
    first_ranks = list(accumulate((size["world_size"] for size in sizes), initial=1))  # 0: trainer
    client = SimpleNamespace(
        init_weight_transfer_engine=init_servers,
        start_weight_update=lambda: post("/start_weight_update"),
        update_weights=lambda info: post("/update_weights", update_info=info),
        finish_weight_update=lambda: post("/finish_weight_update", weight_version=servers.version))
    post("/shutdown_weight_transfer_engine")  # that of an earlier run
    source = Weights()
    group = nccl_engine.NCCLTrainerInitInfo(get_ip(), get_open_port(), first_ranks[-1], rank=0)
    engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
        group, client=client, source=source)

    def send(weights: Iterable[tuple[str, Tensor]]) -> None:
        source.values = weights
        torch.accelerator.synchronize()  # vLLM reads the weights on its own CUDA streams
        engine.send_weights()
        post("/reset_prefix_cache")
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
    requests = request_params(params, seeds, stop_ids)
    bodies = [{"prompt": ids, **request, **NEUTRAL, "return_token_ids": True}
              for ids, request in zip(prompts, requests, strict=True)]
    concurrency = max(1, max_num_seqs // params.n)
    rows = run_async(complete, servers, bodies, concurrency, progress)
    return group_responses(tokenizer, [row for group in rows for row in group], params)


async def complete(client: AsyncClient, servers: Servers, bodies: list[dict], concurrency: int,
                   progress: str = "") -> list[list[tuple]]:
    """For each body the rows of `read_choices`, with `concurrency` requests in progress.

    A request goes to the least loaded server, and if that fails to another. Raises ConnectionError
    if all fail for `servers.timeout` seconds, ValueError if one refuses or got other weights.
    """
    healthy, load = await healthy_servers(client, servers), Counter()  # URLs; requests by URL
    semaphore, checking = asyncio.Semaphore(concurrency), asyncio.Lock()

    async def complete_one(body: dict) -> list[tuple]:
        failures = Counter()  # by URL
        async with semaphore:
            while True:
                url = min(healthy, key=lambda url: (failures[url], load[url]))
                load[url] += 1
                try:
                    answer = await request(client, url, "/v1/completions", body)
                    rows = read_choices(url, answer, body["max_tokens"])
                    bar.update()
                    return rows
                except ConnectionError as error:
                    if isinstance(error, ServerError):  # the next check warns of others
                        servers.warn(f"warning: {error}")
                    if failures.total() > servers.timeout:  # a failure takes at least a second
                        raise
                    failures[url] += 1
                finally:
                    load[url] -= 1
                await asyncio.sleep(1)
                async with checking:
                    healthy[:] = await healthy_servers(client, servers)

    with tqdm(desc=progress, total=len(bodies), disable=not progress, leave=False, delay=10) as bar:
        results = await asyncio.gather(*map(complete_one, bodies))
    used = replace(servers, urls=[url for url in healthy if url in load], weights_dir=None)
    await healthy_servers(client, used, at_least=0)  # raises if one has got other weights
    return results


def read_choices(url: str, answer: dict,
                 max_tokens: int) -> list[tuple[np.ndarray, np.ndarray | None, bool]]:
    """For each response: token ids (T,) int32, log-probs (T,) float32 or None, whether it stopped.

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
        logprobs = choice["logprobs"] and np.array(choice["logprobs"]["token_logprobs"], np.float32)
        rows.append((np.array(ids, dtype=np.int32), logprobs, reason == "stop"))
    return rows
