"""Faults at random moments; each must end the run, or let it go on, within two minutes, and the
same command must then resume it to the uninterrupted run's results.

    python bench/faults.py [--faults 100] [--kinds one ddp fsdp2 server] [--seed 0] [--jobs 2]
        [--server-python PYTHON_WITH_VLLM] [key.sub=value ...]

Launches: one process; two by DDP; two with a sharded policy (FSDP2, on a CPU by torchrun); one with
a vLLM server, if there is a Python that has vLLM. Faults: kill -9 of a rank or of the launcher, a
rank or a server that is stopped for good, or for three seconds, SIGTERM, SIGHUP, SIGUSR1, Ctrl-C, a
server that is killed; besides, after a kill, a damaged checkpoint or a half row of metrics. They
come at the start, in a step, and while a checkpoint is saved. A run gets faults until it finishes;
then metrics, rollout files and weights are compared, and no process may be left.

Prints a table in Markdown; exits with 1 if one fault had another outcome.
"""

import argparse
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from urllib.request import urlopen

import psutil
from tqdm import tqdm

from kill_resume import half_written, rows, run_differences

ROOT = Path(__file__).parent.parent
SMALL = ["data.train_batch_size=4", "data.gen_batch_size=8", "rollout.n=4", "val.file=",
         "actor.ppo_mini_batch_size=8", "total_training_steps=8", "save_every=1",
         "watchdog_seconds=8", "rollout.max_num_seqs=64", "rollout.server_timeout=8"]
LIMIT = 120  # seconds
SHARES = {"one": 0.4, "ddp": 0.25, "fsdp2": 0.2, "server": 0.15}  # of the faults
ENDS = {"kill -9 of a rank": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP,
        "SIGUSR1": signal.SIGUSR1, "Ctrl-C": signal.SIGINT, "damaged checkpoint": signal.SIGKILL,
        "half a row of metrics": signal.SIGKILL}
STOPS = ["stopped for 3 s"]
SEVERAL = ["stopped for good", "kill -9 of the launcher"]
OF_SERVER = ["server killed", "server stopped for good"]
FAULTS = {"one": [*ENDS, *STOPS], "ddp": [*ENDS, *STOPS, *SEVERAL],
          "fsdp2": [*ENDS, *STOPS, *SEVERAL], "server": [*ENDS, *STOPS, *OF_SERVER]}


def run_sharded_rank(arguments: list[str]) -> None:
    """A rank of FSDP2 on a CPU: Accelerate's own code, which it offers on GPUs only."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import infra.setup
    from worker import sharded_accelerator
    infra.setup.Accelerator = sharded_accelerator
    sys.argv = ["train_dapo.py", *arguments]
    runpy.run_path(str(ROOT / "train_dapo.py"), run_name="__main__")


class Server:
    """A vLLM server of the embedded task's model."""
    def __init__(self, python: str, port: int) -> None:
        self.command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", "toy/base",
                        "--port", str(port), "--no-enable-chunked-prefill", "--dtype", "float32",
                        "--logprobs-mode", "processed_logprobs", "--max-model-len", "160"]
        self.url, self.process = f"http://127.0.0.1:{port}", None

    def start(self) -> None:
        """Start it, unless it runs; wait until it answers."""
        if self.process and self.process.poll() is None:
            return
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                       "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                       "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=environment,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True)
        for _ in range(600):
            try:
                return urlopen(f"{self.url}/health", timeout=2).close()
            except OSError:
                time.sleep(0.5)
        raise SystemExit(f"the server does not start: {' '.join(self.command)}")

    def kill(self) -> None:
        """End it and all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def command(kind: str, run_dir: Path, overrides: list[str], server: Server | None) -> list[str]:
    """The command line of a launch."""
    arguments = ["--config", "config.yaml", f"run_dir={run_dir}", *SMALL, *overrides]
    if kind == "ddp":
        port = 20_000 + hash(run_dir) % 20_000
        return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                "--num_processes", "2", "--main_process_port", str(port), "train_dapo.py",
                *arguments]
    if kind == "fsdp2":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2", str(Path(__file__)), "--as-rank", *arguments]
    if kind == "server":
        arguments += ["rollout.mode=server", f"rollout.server_urls={server.url}"]
    return [sys.executable, "train_dapo.py", *arguments]


def processes(run_dir: Path, ranks_only: bool = False) -> list[psutil.Process]:
    """The processes that work for a run: its ranks, and the launcher."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if (f"run_dir={run_dir}" in line and process.info["status"] != psutil.STATUS_ZOMBIE
                and not (ranks_only and {"accelerate.commands.launch", "torch.distributed.run"}
                         & set(line))):
            found.append(process)
    return found


def wait_until(condition, seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def wait_for_moment(moment: str, launch: subprocess.Popen, run_dir: Path,
                    rng: random.Random) -> None:
    """Return when it is time, or the run has ended."""
    done, ended = len(rows(run_dir)), lambda: launch.poll() is not None
    if moment == "at the start":
        wait_until(ended, rng.uniform(0, 8))
    elif moment == "in a step":
        wait_until(lambda: ended() or len(rows(run_dir)) > done, 100)
        time.sleep(rng.uniform(0, 0.3))
    else:
        wait_until(lambda: ended() or half_written(run_dir), 100)
        time.sleep(rng.uniform(0, 0.02))


def inflict(fault: str, launch: subprocess.Popen, run_dir: Path, server: Server | None,
            rng: random.Random) -> str:
    """Inflict a fault; "" if the run then ended, or went on, in time, or else what happened."""
    ranks, done = processes(run_dir, ranks_only=True), len(rows(run_dir))
    rank = rng.choice(ranks)
    goes_on = lambda: launch.poll() is not None or len(rows(run_dir)) > done  # noqa: E731
    if fault in STOPS:
        rank.send_signal(signal.SIGSTOP)
        time.sleep(3)
        rank.send_signal(signal.SIGCONT)
        return "" if wait_until(goes_on, LIMIT) else "did not go on"
    if fault == "kill -9 of the launcher":
        launch.kill()
        launch.wait()
        if not wait_until(lambda: not processes(run_dir) or len(rows(run_dir)) > done, LIMIT):
            return "the ranks neither ended nor went on"
        for left in processes(run_dir):
            left.kill()
        return ""
    if fault == "server killed":
        server.kill()
    elif fault == "server stopped for good":
        os.killpg(server.process.pid, signal.SIGSTOP)
    elif fault == "stopped for good":
        rank.send_signal(signal.SIGSTOP)
    else:  # a scheduler signals all processes
        for process in ranks if fault.startswith(("SIG", "Ctrl")) else [rank]:
            process.send_signal(ENDS[fault])
    if not wait_until(lambda: launch.poll() is not None, LIMIT):
        return f"did not end within {LIMIT} s"
    return "" if wait_until(lambda: not processes(run_dir), 10) else "left processes behind"


def end_all(run_dir: Path, server: Server | None) -> None:
    """Kill what is left of a run, and the server."""
    for process in processes(run_dir):
        process.kill()
    if server:
        server.kill()


def damage(fault: str, run_dir: Path, rng: random.Random) -> None:
    """What a fault leaves on the disk besides."""
    newest = sorted(run_dir.glob("checkpoints/step_*"))[1:][-1:]  # with an older one
    if fault == "damaged checkpoint" and newest:
        file = rng.choice(sorted(newest[0].iterdir()))
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 0xFF
        file.write_bytes(content)
    if fault == "half a row of metrics" and (file := run_dir / "metrics.jsonl").exists():
        row = file.read_text().splitlines()[-1]  # as if the next one were being written
        file.write_text(file.read_text() + row[:rng.randrange(1, len(row))])


def differences(kind: str, straight: Path, broken: Path) -> list[str]:
    """What is not the uninterrupted run's. A server batches requests as they arrive, which changes
    the last bits: there, steps and prompts must be equal, and accuracies nearly."""
    if kind != "server":
        return run_differences(straight, broken)
    pairs = zip(rows(straight), rows(broken), strict=False)
    same = len(rows(straight)) == len(rows(broken)) and all(
        a["prompts_drawn"] == b["prompts_drawn"] and a["step"] == b["step"]
        and abs(a["acc/before_filter"] - b["acc/before_filter"]) < 0.1 for a, b in pairs)
    return [] if same and (broken / "model").exists() else ["metrics.jsonl"]


def run_kind(kind: str, number: int, folder: Path, args: argparse.Namespace,
             bar: tqdm) -> tuple[Counter, list[str], float]:
    """Inflict so many faults on launches of a kind. Returns how many of each, what went wrong, and
    the longest that one took."""
    rng, hit, wrong, slowest = random.Random(f"{args.seed} {kind}"), Counter(), [], 0.0
    problem = ""
    server = Server(args.server_python, 8700) if kind == "server" else None
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    faults = (fault for _ in count() for fault in rng.sample(FAULTS[kind], len(FAULTS[kind])))
    moments = (moment for _ in count() for moment in (
        "in a step", "while saving", "in a step", "at the start"))

    def start(run_dir: Path) -> subprocess.Popen:
        if server:
            server.start()
        with open(run_dir.with_suffix(".log"), "a") as log:
            return subprocess.Popen(command(kind, run_dir, args.overrides, server), cwd=ROOT,
                                    stdout=log, stderr=log, env=environment)

    straight = folder / f"{kind}_straight"
    if start(straight).wait():
        raise SystemExit(straight.with_suffix(".log").read_text()[-2000:])
    for episode in count():
        broken, last = folder / f"{kind}_{episode}", rows(straight)[-1]["step"]
        while not (broken / "model").exists() or rows(broken)[-1]["step"] < last:
            launch, fault = start(broken), ""
            if hit.total() < number:
                wait_for_moment(next(moments), launch, broken, rng)
                if processes(broken, ranks_only=True):
                    fault, before = next(faults), time.monotonic()
                    problem = inflict(fault, launch, broken, server, rng)
                    wrong += [f"{kind}, {fault}: {problem}"] * bool(problem)
                    slowest = max(slowest, time.monotonic() - before)
                    hit[fault] += 1
                    bar.update()
                if problem or fault in OF_SERVER:
                    end_all(broken, server)
            if launch.wait() and not fault:
                text = broken.with_suffix(".log").read_text()
                wrong.append(f"{kind}: a launch without a fault failed: {text[-1000:]}")
                return hit, wrong, slowest
            damage(fault, broken, rng)
        found = differences(kind, straight, broken)
        wrong += [f"{kind}, run {episode}: differs: {', '.join(found)}"] * bool(found)
        if hit.total() >= number:
            break
        shutil.rmtree(broken)
    if server:
        server.kill()
    return hit, wrong, slowest


def main() -> None:
    """Run, print the table and whether all went well."""
    if sys.argv[1:2] == ["--as-rank"]:
        return run_sharded_rank(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=SHARES, default=[*SHARES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--server-python", default="", help="a Python that has vLLM")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()
    kinds = [kind for kind in args.kinds if kind != "server" or args.server_python]
    total = sum(SHARES[kind] for kind in kinds)
    numbers = {kind: max(1, round(args.faults * SHARES[kind] / total)) for kind in kinds}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool, \
            tqdm(desc="faults", total=sum(numbers.values())) as bar:
        results = dict(zip(kinds, pool.map(
            lambda kind: run_kind(kind, numbers[kind], Path(folder), args, bar), kinds),
            strict=True))
    print("| launch | faults | of which | the longest, seconds |\n|---|---|---|---|")
    for kind, (hit, _, slowest) in results.items():
        kinds_of = ", ".join(f"{number} {name}" for name, number in sorted(hit.items()))
        print(f"| {kind} | {hit.total()} | {kinds_of} | {slowest:.0f} |")
    wrong = [problem for _, problems, _ in results.values() for problem in problems]
    print("".join(f"\n{problem}" for problem in wrong))
    faults = sum(hit.total() for hit, _, _ in results.values())
    print(f"{faults} faults, {len(wrong)} ended otherwise, or resumed to other results (goal: "
          f"{sum(numbers.values())} and 0)")
    sys.exit(bool(wrong) or faults < sum(numbers.values()))


if __name__ == "__main__":
    main()
