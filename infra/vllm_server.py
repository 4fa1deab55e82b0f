"""vLLM servers outside the trainer: an `Engine` over HTTP.

A run needs all of its servers. If one is lost, fails or has other weights, the run ends with one
line, and the same command resumes it. After each update the servers get the new weights: from GPU
to GPU by vLLM's weight transfer (`nccl`), or from a directory that they too see (`disk`).
"""

import asyncio
import os
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from httpx2 import AsyncClient, AsyncHTTPTransport, Limits, TimeoutException, TransportError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data_types import Engine, Response, SamplingParams
from infra.config import escape_control
from infra.distributed import raise_on_all_ranks
from infra.vllm_engine import group_responses, request_params, what_ended

CHECK_SECONDS = 5          # between two checks of the servers while they generate
GENERATE_SECONDS = 86_400  # a response may wait for hours in a server's queue
# A packet a minute, since routers drop connections that are silent while a server generates.
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (
    socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE, 60)]
# Without these a server takes its defaults from the model's generation config.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
           "frequency_penalty": 0.0}


@dataclass
class Servers:
    """The servers of a run, as this process sees them."""
    urls: list[str]
    timeout: int       # seconds that one may take to answer a check, or to take new weights
    version: str = ""  # of the weights that they must have; "" accepts any
    key: str = field(default="", repr=False)  # their --api-key, if they have one


def server_engine(config: SimpleNamespace, accelerator: Accelerator, tokenizer, stop_ids: list[int],
                  metas: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Engine:
    """An `Engine` backed by the servers at `rollout.server_urls`, all of which must answer now.

    `metas`: each weight's shape, and the type that it is sent in. Raises OSError if one fails.
    """
    rollout = config.rollout
    can_nccl = torch.cuda.device_count() > 1 and find_spec("vllm") is not None
    nccl = rollout.weight_transfer == "nccl" or (rollout.weight_transfer == "auto" and can_nccl)
    weights_dir = Path(config.run_dir).resolve() / "server_weights"
    way = "by nccl" if nccl else f"through {weights_dir}, which all servers must see"
    servers = Servers(rollout.server_urls.split(","), rollout.server_timeout,
                      key=os.environ.get(rollout.server_api_key, ""))
    if not servers.key and rollout.server_api_key != "VLLM_API_KEY":  # not repeated: a key, perhaps
        raise OSError("rollout.server_api_key: no environment variable has this name")

    def sync(weights: Iterable[tuple[str, Tensor]]) -> None:
        servers.version = broadcast_object_list([str(time.time_ns())])[0]
        weights = ((name, weight.to(metas[name][1])) for name, weight in weights)
        with raise_on_all_ranks(f"cannot send the weights {way}"):
            try:
                if accelerator.is_main_process:
                    send(weights)
                    run_async(check_servers, servers)
            finally:
                deque(weights, maxlen=0)  # all ranks gather each weight, even if nothing is sent

    send = partial(send_by_disk, servers, weights_dir)
    with raise_on_all_ranks("rollout.server_urls"):
        if accelerator.is_main_process:
            run_async(check_servers, servers)
            run_async(request_all, servers, "/v1/models", [None] * len(servers.urls))  # the key
            if nccl:
                send = nccl_sender(servers, metas)
    generate = partial(generate_on_servers, servers, tokenizer, stop_ids, rollout.max_num_seqs)
    return Engine(generate, sync, sleep=lambda: None, has_own_weights=True,
                  close=partial(shutil.rmtree, weights_dir, ignore_errors=True))


# ---- requests: all raise OSError -----------------------------------------------------------------

def run_async(function: Callable, servers: Servers, *args):
    """The result of `await function(client, servers, *args)`."""
    async def with_client():
        transport = AsyncHTTPTransport(limits=Limits(), socket_options=KEEPALIVE)
        headers = {"Authorization": f"Bearer {servers.key}"} if servers.key else {}
        async with AsyncClient(transport=transport, headers=headers) as client:
            return await function(client, servers, *args)
    return asyncio.run(with_client())


async def request(client: AsyncClient, url: str, path: str, body: dict | None,
                  seconds: int) -> dict:
    """A server's answer to a POST of `body`, or to a GET if there is none."""
    hint = "repair or restart it, then run the same command again"
    method = "GET" if body is None else "POST"
    try:
        response = await client.request(method, url + path, json=body, timeout=seconds)
    except TransportError as error:
        reason = f"for {seconds} s" if isinstance(error, TimeoutException) else repr(error)
        raise OSError(f"{url}{path}: does not answer ({reason}): {hint}") from error
    answer = response.json() if response.is_success and response.content else {}
    if response.is_success and answer.get("success", True):
        return answer
    if response.status_code == 404:
        hint = "is it vLLM, and was it started with VLLM_SERVER_DEV_MODE=1?"
    if response.status_code == 401:
        hint = "put its --api-key into the environment variable that rollout.server_api_key names"
    text = " ".join(response.text.split())[:300]
    raise OSError(f"{url}{path}: {response.status_code}, {text}: {hint}")


async def request_all(client: AsyncClient, servers: Servers, path: str,
                      bodies: Sequence[dict | None]) -> list[dict]:
    """Each server's answer to its body, requested at the same time."""
    pairs = zip(servers.urls, bodies, strict=True)
    return await asyncio.gather(*(request(client, url, path, body, servers.timeout)
                                  for url, body in pairs))


async def check_servers(client: AsyncClient, servers: Servers) -> None:
    """Returns if all servers answer and have the right weights. Their engines answer, between two
    steps, so that one that hangs is noticed too."""
    answers = await request_all(client, servers, "/weight_info", [None] * len(servers.urls))
    for url, answer in zip(servers.urls, answers, strict=True):
        version = answer["weight_version"]
        if servers.version not in ("", version):
            raise OSError(f"{url} has other weights ({version}): it was restarted, or serves "
                          "another run too; run the same command again")


def post(servers: Servers, path: str, **body) -> None:
    """Send the same request to all servers."""
    run_async(request_all, servers, path, [body] * len(servers.urls))


# ---- weights -------------------------------------------------------------------------------------

def send_by_disk(servers: Servers, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write `folder/model.safetensors`, and make all servers read it. Raises OSError.

    A tied weight is written under each of its names, as vLLM expects.
    """
    copies = {name: weight.to("cpu", copy=True) for name, weight in weights}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(copies, folder / "model.partial", metadata={"format": "pt"})
    (folder / "model.partial").replace(folder / "model.safetensors")  # servers may map the old one
    post(servers, "/collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
    post(servers, "/reset_prefix_cache")  # its entries are of the old weights
    post(servers, "/update_weight_version", new_version=servers.version)


def nccl_sender(servers: Servers, metas: dict[str, tuple]) -> Callable[[Iterable], None]:
    """A function that sends weights from this GPU to all servers, by vLLM's weight transfer.

    Raises OSError, as does the function; a failure in the middle of a transfer ends the process.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.utils.network_utils import get_ip, get_open_port

    class Weights(WeightSource):
        """vLLM asks for all names, types and shapes, then for the values."""
        values: Iterable[tuple[str, Tensor]] | None = ()  # None: nothing is being sent

        def metadata(self):
            return [ParamMeta(name, dtype, shape) for name, (shape, dtype) in metas.items()]

        def __iter__(self):
            return iter(self.values)

    def transfer(path: str, bodies: list[dict]) -> None:
        """Send requests, in a thread of vLLM's, while the main thread waits in NCCL for the
        servers. Nothing can interrupt it: if a request fails, the process ends."""
        try:
            run_async(request_all, servers, path, bodies)
        except Exception as error:
            if source.values is None:
                raise  # the main thread has failed too, and says why
            tqdm.write(f"error: cannot send the weights by nccl: {escape_control(error)} "
                       "(docs/VLLM.md has the command that starts one)", file=sys.stderr)
            os._exit(1)

    sizes = run_async(request_all, servers, "/get_world_size", [None] * len(servers.urls))
    first_ranks = list(accumulate((size["world_size"] for size in sizes), initial=1))  # 0: trainer
    post(servers, "/shutdown_weight_transfer_engine")  # that of an earlier run
    client = SimpleNamespace(
        init_weight_transfer_engine=lambda info: transfer(
            "/init_weight_transfer_engine",
            [{"init_info": info | {"rank_offset": rank}} for rank in first_ranks[:-1]]),
        start_weight_update=partial(post, servers, "/start_weight_update"),
        update_weights=lambda info: transfer(
            "/update_weights", [{"update_info": info}] * len(servers.urls)),
        finish_weight_update=lambda: post(
            servers, "/finish_weight_update", weight_version=servers.version))
    source = Weights()
    group = nccl_engine.NCCLTrainerInitInfo(get_ip(), get_open_port(), first_ranks[-1], rank=0)
    engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
        group, client=client, source=source)

    def send(weights: Iterable[tuple[str, Tensor]]) -> None:
        source.values = weights
        torch.accelerator.synchronize()  # vLLM reads the weights on its own CUDA streams
        try:
            engine.send_weights()
        finally:
            source.values = None
        post(servers, "/reset_prefix_cache")
    return send


# ---- generation ----------------------------------------------------------------------------------

def generate_on_servers(servers: Servers, tokenizer, stop_ids: list[int], max_num_seqs: int,
                        prompts: Sequence[list[int]], seeds: Sequence[tuple[int, ...]],
                        params: SamplingParams, progress: str = "") -> list[list[Response]]:
    """`params.n` responses to each prompt, `max_num_seqs` requested at a time; the servers take
    turns. Raises OSError, also if a server fails a check meanwhile or afterwards."""
    semaphore = asyncio.Semaphore(max(1, max_num_seqs // params.n))

    async def complete(client: AsyncClient, url: str, ids: list[int], options: dict) -> list[tuple]:
        body = {"prompt": ids, **options, **NEUTRAL, "return_token_ids": True}
        async with semaphore:
            answer = await request(client, url, "/v1/completions", body, GENERATE_SECONDS)
        bar.update()
        return read_choices(url, answer, params.max_tokens)

    async def complete_all(client: AsyncClient, servers: Servers) -> list[list[tuple]]:
        work = asyncio.gather(*map(partial(complete, client), cycle(servers.urls), prompts,
                                   request_params(params, seeds, stop_ids)))
        try:
            while True:
                finished, _ = await asyncio.wait([work], timeout=CHECK_SECONDS)
                rows = work.result() if finished else []  # raises at once what a request has raised
                await check_servers(client, servers)
                if finished:
                    return rows
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)  # or asyncio prints those left

    with tqdm(desc=progress, total=len(prompts), disable=not progress, leave=False,
              delay=10) as bar:
        rows = [row for group in run_async(complete_all, servers) for row in group]
    return group_responses(tokenizer, rows, params)


def read_choices(url: str, answer: dict,
                 max_tokens: int) -> list[tuple[np.ndarray, np.ndarray | None, bool | str]]:
    """For each response: token ids (T,) int32, log-probs (T,) float32 or None, what ended it.

    Raises OSError if a response was aborted, or cut before `max_tokens`.
    """
    rows = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        ids, reason = choice.get("token_ids"), choice["finish_reason"]
        if ids is None:
            raise OSError(f"{url} returns no token ids: use the vLLM of requirements-vllm.txt")
        if reason not in ("stop", "length"):
            raise OSError(f"{url} aborted a response ({reason}): run the same command again")
        if reason == "length" and len(ids) < max_tokens:
            raise OSError(f"{url} cut a response after {len(ids)} tokens, not {max_tokens}: its "
                          "--max-model-len, or a default of its own, is too small")
        logprobs = choice["logprobs"] and np.array(choice["logprobs"]["token_logprobs"], np.float32)
        rows.append((np.array(ids, dtype=np.int32), logprobs,
                     what_ended(reason, choice.get("stop_reason"))))
    return rows
