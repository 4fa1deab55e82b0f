"""The embedded task with forks/one_step_ahead.patch and without: time, and accuracy.

    python bench/one_step_ahead.py [--seeds 0 1 2] [--rate TOKENS_PER_S] [key.sub=value ...]

The trainer has one core; on another a stand-in for a vLLM server, which speaks its protocol and
samples by this project's decoding, answers once it has written `--rate` tokens a second: by
default as many as a run of the first seed trains, so that writing and training take equally long;
in each step alike only with filter_groups.enable=false, since the filter makes later steps write
up to three times as much.

Prints a table in Markdown, and exits with 1 if a goal is missed.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean

from ladder import ROOT, patched_copy

RATIO = 0.6  # goal: of the seconds in steps without the fork
AHEAD = ["rollout.correction=token"]


# ---- the stand-in for a server, in a process of its own ------------------------------------------

def serve(rate: float) -> None:
    """Answer the trainer's requests; prints the port on which it listens."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from infra.memory import keep_freed_memory
    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained("toy/base").eval()
    requests, version = queue.Queue(), ["none"]

    def answer(path: str, body: dict) -> dict:
        if path == "/v1/completions":
            requests.put((body, future := Future()))
            return future.result()
        if path == "/collective_rpc":
            folder = Path(body["kwargs"]["weights_path"])
            model.load_state_dict(load_file(folder / "model.safetensors"))
        version[0] = body.get("new_version", version[0])
        return {"weight_version": version[0]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length", 0))
            content = json.dumps(answer(self.path, json.loads(self.rfile.read(length) or "{}")))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())
        do_POST = do_GET

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    while True:
        batch, start = [requests.get()], time.perf_counter()
        while True:  # the requests of a generation batch come together
            try:
                batch.append(requests.get(timeout=0.05))
            except queue.Empty:
                break
        choices = complete(model, [body for body, _ in batch])
        tokens = sum(len(choice["token_ids"]) for group in choices for choice in group)
        time.sleep(max(0.0, tokens / rate - (time.perf_counter() - start)))
        for (_, future), group in zip(batch, choices, strict=True):
            future.set_result({"choices": group})


def complete(model, bodies: Sequence[dict]) -> list[list[dict]]:
    """For each request its choices, as vLLM answers."""
    import numpy as np
    import torch

    from data_types import SamplingParams
    from rollout import decode
    params = SamplingParams(*(bodies[0][name] for name in SamplingParams._fields))
    uniforms = [np.random.default_rng([body["seed"], i]).random(params.max_tokens, np.float32)
                for body in bodies for i in range(params.n)]
    rows = decode(model, [body["prompt"] for body in bodies], torch.from_numpy(np.stack(uniforms)),
                  params, torch.tensor(bodies[0]["stop_token_ids"]))
    choices = [{"index": i % params.n, "finish_reason": "stop" if stopped else "length",
                "token_ids": ids.tolist(), "logprobs": {"token_logprobs": logprobs.tolist()}}
               for i, (ids, logprobs, stopped) in enumerate(rows)]
    return [choices[i:i + params.n] for i in range(0, len(choices), params.n)]


# ---- the runs ------------------------------------------------------------------------------------

def run(code: Path, run_dir: Path, rate: float, overrides: list[str]) -> list[dict]:
    """Train by `code` with a server of its own; the rows that it logs."""
    cores = sorted(os.sched_getaffinity(0))

    def start(core: int, command: list[str], **kwargs) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE,
                                preexec_fn=lambda: os.sched_setaffinity(0, {core}), **kwargs)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = start(cores[-1], [__file__, "--serve", "--rate", str(rate)], cwd=ROOT, env=environment)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        options = ["rollout.mode=server", f"rollout.server_urls={url}", f"run_dir={run_dir}"]
        del environment["PYTHONPATH"]
        with open(run_dir.with_suffix(".log"), "w") as log:
            trainer = start(cores[0], [str(code / "train_dapo.py"), "--config",
                                       str(code / "config.yaml"), *options, *overrides],
                            cwd=ROOT, env=environment, stderr=log)
            trainer.communicate()
        if trainer.returncode:
            raise SystemExit(run_dir.with_suffix(".log").read_text()[-2000:])
    finally:
        server.kill()
        server.wait()
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def total(rows: list[dict], *phases: str) -> float:
    """Seconds of all steps in these phases."""
    return sum(row[f"time/{phase}"] for row in rows if row["step"] for phase in phases)


def main() -> None:
    """Run, print the table and whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, help="tokens a second of the server")
    parser.add_argument("--serve", action="store_true", help="be the server")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()
    if args.serve:
        serve(args.rate)
    ratios, accuracies = [], {"without": [], "one step ahead": []}
    with tempfile.TemporaryDirectory() as folder:
        out, rate = Path(folder), args.rate
        if not rate:
            rows = run(ROOT, out / "rate", 1e9, [*args.overrides, f"seed={args.seeds[0]}"])
            tokens = sum(row["tokens_per_s/generate"] * row["time/generate"] for row in rows[1:])
            rate = tokens / total(rows, "logprobs", "update")
        ways = {"without": (ROOT, []),
                "one step ahead": (patched_copy("one_step_ahead", out), AHEAD)}
        print("| | seed | writing, s | training, s | steps, s | accuracy of all steps | avg@4 "
              "after | mismatch_kl |\n" + "|---" * 8 + "|", flush=True)
        for seed in args.seeds:
            seconds = {}
            for name, (code, more) in ways.items():
                run_dir = out / f"{name.replace(' ', '_')}_{seed}"
                rows = run(code, run_dir, rate, [*args.overrides, *more, f"seed={seed}"])
                seconds[name] = total(rows, "step")
                accuracies[name].append(rows[-1]["val/val/avg@4"])
                print(f"| {name} | {seed} | {total(rows, 'generate'):.1f} | "
                      f"{total(rows, 'logprobs', 'update'):.1f} | {seconds[name]:.1f} | "
                      f"{mean(row['acc/before_filter'] for row in rows[1:]):.3f} | "
                      f"{accuracies[name][-1]:.3f} | {rows[-1]['actor/mismatch_kl']:.1e} |",
                      flush=True)
            ratios.append(seconds["one step ahead"] / seconds["without"])
    spread = max(accuracies["without"]) - min(accuracies["without"])
    difference = mean(accuracies["one step ahead"]) - mean(accuracies["without"])
    print(f"\nthe server writes {rate:.0f} tokens/s; seconds in steps, with by without: "
          f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}, on average {mean(ratios):.2f} (goal "
          f"{RATIO}); avg@4 after, with minus without: {difference:+.3f} (goal at least "
          f"-{spread:.3f}, the spread of the seeds)")
    sys.exit(mean(ratios) > RATIO or difference < -spread)


if __name__ == "__main__":
    main()
