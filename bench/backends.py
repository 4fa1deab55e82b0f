"""The embedded task with each way to generate: start-up, and the phases of a step. Needs vLLM.

    python bench/backends.py [--steps 8] [--ways transformers vllm "vllm server"]

Prints a Markdown table. Each runs in a process of its own, one after the other.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
PORT = 8141
WAYS = {"transformers": ["rollout.backend=transformers"], "vllm": ["rollout.backend=vllm"],
        "vllm server": ["rollout.mode=server", f"rollout.server_urls=http://127.0.0.1:{PORT}"]}


def measure(overrides: list[str], steps: int) -> dict[str, float]:
    """Seconds until the engine was ready, and medians of a step's metrics."""
    from harness import make_state, train  # puts the repository on the path

    import infra.setup
    times, make_engine = [], infra.setup.make_engine

    def timed(*arguments):
        start = time.perf_counter()
        engine = make_engine(*arguments)
        times.append(time.perf_counter() - start)
        return engine

    infra.setup.make_engine = timed
    with tempfile.TemporaryDirectory() as folder:
        state, data = make_state(*overrides, "val.file=", f"total_training_steps={steps}",
                                 f"run_dir={folder}/run")
        rows = train(state, data)
        state.engine.close()
    names = ["time/step", "time/generate", "time/sync", "tokens_per_s/generate",
             "actor/mismatch_abs"]
    return {"start": times[0], **{name: statistics.median(row[name] for row in rows)
                                  for name in names}}


def serve() -> tuple[subprocess.Popen, float]:
    """A server, and the seconds that it took to start."""
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "toy/base",
         "--port", str(PORT), "--dtype", "float32", "--logprobs-mode", "processed_logprobs",
         "--no-enable-chunked-prefill"],
        env={**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
             "VLLM_LOGGING_LEVEL": "ERROR",
             "OMP_NUM_THREADS": "1"},  # threads that wait for work take the trainer's cores
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.perf_counter()
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            return server, time.perf_counter() - start
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def main() -> None:
    """Measure each way, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--one", choices=WAYS, help="measure this one, and print JSON")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.one:
        print(json.dumps(measure(WAYS[args.one], args.steps)))
        return
    print("| responses by | start | step | generation | sync | tokens/s | sampler against trainer "
          "(mean log-prob difference) |\n|---|---|---|---|---|---|---|")
    for name in args.ways:
        server, start = serve() if name == "vllm server" else (None, None)
        result = subprocess.run([sys.executable, __file__, "--one", name, "--steps",
                                 str(args.steps)],
                                stdout=subprocess.PIPE, text=True, check=True)
        if server:
            os.killpg(server.pid, signal.SIGTERM)
        row = json.loads(result.stdout.splitlines()[-1])
        print(f"| {name} | {start or row['start']:.1f} | {row['time/step']:.2f} | "
              f"{row['time/generate']:.2f} | {row['time/sync']:.3f} | "
              f"{row['tokens_per_s/generate']:,.0f} | {row['actor/mismatch_abs']:.0e} |",
              flush=True)


if __name__ == "__main__":
    main()
