"""What is kept on disk, so that a run that was stopped or killed goes on as if nothing had happened?

    RUN_DIR/checkpoints/step_00010/    weights and optimizer, by torch's distributed checkpoints: each process
                                       writes its shard where the policy is sharded, and any number of
                                       processes may read them again
                        progress.json  counters, config and evaluations so far
                        digests.json   SHA-256 of every other file

Each is written under another name and renamed when it is whole. There is no generator and no scheduler to
keep: every random draw and the learning rate are functions of the seed and the counters.
"""

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from config import differences


# ---- the directory of a run -----------------------------------------------------------------------------

def check_run_dir(config: SimpleNamespace) -> None:
    """Raise ValueError where `run_dir` holds results that a run with this config would not go on from."""
    run_dir, found = Path(config.run_dir), newest_first(config.run_dir)
    rows = read_rows(run_dir)
    free = next(name for i in range(2, 10**6) if not Path(name := f"{config.run_dir}-{i}").exists())
    another = f"name another, for instance run_dir={free}"
    if config.resume not in ("auto", "never"):
        if not (Path(config.resume) / "progress.json").exists():
            raise ValueError(f"resume: {config.resume} is not auto, never or a checkpoint's directory")
        found = [Path(config.resume)]
    if rows and config.resume != "auto":
        raise ValueError(f"run_dir: {run_dir} holds an earlier run; {another}")
    if rows and not found and rows[-1]["step"] > config.save_every:
        raise ValueError(f"run_dir: {run_dir} holds an earlier run, without a checkpoint to go on from; {another}")
    earlier = next((progress for path in found if (progress := read_progress(path))), None)
    if not earlier:  # nothing was saved yet, or all is damaged, of which `find_checkpoint` will speak
        return
    step, last = earlier["counters"]["step"], config.total_training_steps
    if step > last or (step == last and config.resume == "auto" and (run_dir / "model").exists()):
        raise ValueError(f"run_dir: {run_dir} is finished, with {step} steps; raise total_training_steps={last} to "
                         f"train on, or {another}")
    if changed := differences(earlier["config"], config):
        raise ValueError(f"{found[0].parent.parent} is a run with another config ({', '.join(changed)}): undo that, or "
                         f"{another}")


def read_rows(run_dir: Path) -> list[dict]:
    """The whole rows of metrics.jsonl: the last may be half written."""
    file = Path(run_dir) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def lock_run_dir(accelerator: Accelerator, run_dir: str) -> FileLock:
    """Hold `run_dir` as long as the process lives; ValueError where another run does.

    Also finds out whether all machines see the same directory; where they do not, each keeps checkpoints of its own.
    """
    lock, error = FileLock(Path(run_dir) / ".lock"), ""
    if accelerator.is_local_main_process:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            error = f"run_dir: another run is writing into {run_dir}; wait for it, stop it, or name another"
    (error, mark), = broadcast_object_list([(error, uuid.uuid4().hex)])
    if error:
        raise ValueError(error)
    if accelerator.is_main_process:
        (Path(run_dir) / ".shared").write_text(mark)
    accelerator.wait_for_everyone()
    file = Path(run_dir) / ".shared"
    shared = all(gather_object([file.exists() and file.read_text() == mark]))
    if not shared and is_sharded(accelerator):
        raise ValueError(f"run_dir: {run_dir} is not the same directory on all machines, as a sharded run needs it")
    accelerator.project_configuration.save_on_each_node = not shared
    return lock


def trim_run(run_dir: Path, origin: Path, step: int) -> None:
    """Leave in `run_dir` what a run up to `step` had written; its metrics are read from `origin`."""
    if rows := read_rows(origin):
        write_whole(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    for file in (run_dir / "rollouts").glob("step_*.jsonl"):
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()


def write_whole(file: Path, text: str) -> None:
    """Write a file so that, whenever the process dies, it is there as it was or as it is to be."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def rename_whole(aside: Path, name: Path) -> None:
    """Give a directory that is whole its name; an older one of that name goes."""
    shutil.rmtree(name, ignore_errors=True)
    aside.rename(name)


# ---- checkpoints ----------------------------------------------------------------------------------------

def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds but a part of the policy: by FSDP2, or DeepSpeed's ZeRO."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def newest_first(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run that have their names, and were therefore whole once."""
    return sorted((Path(run_dir) / "checkpoints").glob("step_*"), reverse=True)


def read_progress(path: Path) -> dict:
    """A checkpoint's counters, config and evaluations; nothing where they are not what was written."""
    try:
        digests = json.loads((path / "digests.json").read_text(encoding="utf-8"))
        whole = digests["progress.json"] == _digest(path / "progress.json")
        return json.loads((path / "progress.json").read_text(encoding="utf-8")) if whole else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@contextmanager
def saving(accelerator: Accelerator, path: Path) -> Iterator[None]:
    """A barrier: what fails inside on one process is an OSError on every process."""
    error = ""
    try:
        yield
    except (Exception, CheckpointException) as failure:  # a full disk has many names
        error = (f"cannot save {path}, on whose disk {shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free: "
                 f"{str(failure).strip().splitlines()[-1]}")
    if errors := [error for error in gather_object([error]) if error]:
        raise OSError(errors[0])


def save_checkpoint(accelerator: Accelerator, policy, optimizer, run_dir: str, progress: dict, keep: int) -> None:
    """Write `checkpoints/step_*`, whole or not at all, and remove all but the `keep` newest. Raises OSError."""
    path = Path(run_dir) / "checkpoints" / f"step_{progress['counters']['step']:05d}"
    aside, writes = path.with_name(f".{path.name}.partial"), _writes(accelerator)
    with saving(accelerator, path):
        if writes:
            path.parent.mkdir(exist_ok=True)
            for half in path.parent.glob(".step_*.partial"):
                shutil.rmtree(half)
            aside.mkdir()
            write_whole(aside / "progress.json", json.dumps(progress))
    with saving(accelerator, path):
        _save_state(accelerator, policy, optimizer, aside)
    digests = {}
    with saving(accelerator, path):
        digests = {str(file.relative_to(aside)): _digest(file) for file in
                   _share(accelerator, sorted(file for file in aside.rglob("*") if file.is_file()))}
    for part in gather_object([digests]) if not _own_disks(accelerator) else []:
        digests |= part
    with saving(accelerator, path):
        if writes:
            write_whole(aside / "digests.json", json.dumps(digests))
            rename_whole(aside, path)
            for old in newest_first(run_dir)[keep:]:
                shutil.rmtree(old)


def find_checkpoint(accelerator: Accelerator, run_dir: str, resume: str) -> Path | None:
    """The newest whole checkpoint, or the one that `resume` names; None: start from nothing.

    Raises ValueError where there are checkpoints, but none is whole.
    """
    if resume == "never":
        return None
    named = [] if resume == "auto" else [resume]
    seen = set().union(*gather_object([[str(path) for path in named or newest_first(run_dir)]]))
    for path in map(Path, sorted(seen, reverse=True)):
        if not (problem := what_is_wrong(accelerator, path)):
            return path
        accelerator.print(f"warning: {path} is damaged ({problem}), and passed over")
    if seen:
        raise ValueError(f"no checkpoint is whole of {', '.join(sorted(seen))}; start anew in another run_dir")
    return None


def what_is_wrong(accelerator: Accelerator, path: Path) -> str:
    """Why a checkpoint cannot be used, in the same words on all processes; "" where it can."""
    problem = ""
    try:
        digests = json.loads((path / "digests.json").read_text(encoding="utf-8"))
        wrong = [name for name in _share(accelerator, sorted(digests)) if _digest(path / name) != digests[name]]
        problem = f"{wrong[0]} is not what was written" if wrong else ""
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"digests.json: {error}"
    return next((problem for problem in gather_object([problem]) if problem), "")


def load_checkpoint(accelerator: Accelerator, policy, optimizer, path: Path) -> None:
    """Weights and optimizer as they were saved."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        policy.load_checkpoint(str(path))
        return
    weights, moments = get_state_dict(policy, optimizer)
    state = {"policy": weights, "optimizer": moments}
    with warnings.catch_warnings(action="ignore"):  # that torch.distributed is not needed
        dcp.load(state, checkpoint_id=path, no_dist=not is_sharded(accelerator))
    set_state_dict(policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"])


def _save_state(accelerator: Accelerator, policy, optimizer, path: Path) -> None:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        policy.save_checkpoint(str(path))
        return
    weights, moments = get_state_dict(policy, optimizer)
    if is_sharded(accelerator) or _writes(accelerator):
        with warnings.catch_warnings(action="ignore"):
            dcp.save({"policy": weights, "optimizer": moments}, checkpoint_id=path, no_dist=not is_sharded(accelerator))


def _own_disks(accelerator: Accelerator) -> bool:
    return accelerator.project_configuration.save_on_each_node


def _writes(accelerator: Accelerator) -> bool:
    return accelerator.is_local_main_process if _own_disks(accelerator) else accelerator.is_main_process


def _share(accelerator: Accelerator, files: list) -> list:
    """This process's part of some work on all files that it sees."""
    return files if _own_disks(accelerator) else files[accelerator.process_index::accelerator.num_processes]


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
