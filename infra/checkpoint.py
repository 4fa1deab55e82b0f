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
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)

from infra.config import config_diff, flatten, load_config

# ---- the directory of a run -----------------------------------------------------------------------------

def check_run_dir(config: SimpleNamespace) -> None:
    """Raise ValueError where `run_dir` holds results that a run with this config would not go on from."""
    run_dir, resume = Path(config.run_dir), config.resume
    rows, found, file = read_rows(run_dir), list_checkpoints(run_dir), run_dir / "config.yaml"
    unused = next(name for i in range(2, 10**6) if not Path(name := f"{config.run_dir}-{i}").exists())
    remedy = f"name another, for instance run_dir={unused}"
    begun = load_config(file) if file.exists() and (rows or found) else None
    named = resume not in ("auto", "never")
    if named and not (Path(resume) / "progress.json").exists():
        raise ValueError(f"resume: {resume} is not auto, never or a checkpoint's directory")
    if (rows or found) and (resume == "never" or (named and begun and begun.resume != resume)):
        raise ValueError(f"run_dir: {run_dir} holds an earlier run; {remedy}")
    origin = [Path(resume)] if named else []
    earlier = next((progress for path in found or origin if (progress := read_metadata(path))), None)
    step = earlier["counters"]["step"] if earlier else 0
    if rows and not found and (rows[-1]["step"] > step + config.save_every or (run_dir / "model").exists()):
        raise ValueError(f"run_dir: {run_dir} holds an earlier run, without a checkpoint to go on from; {remedy}")
    if step >= config.total_training_steps:
        raise ValueError(f"{(found or origin)[0]} is finished, with {step} steps; raise total_training_steps="
                         f"{config.total_training_steps} to train on, or {remedy}")
    before = earlier["config"] if earlier else flatten(begun) if begun else {}
    if before and (changed := config_diff(before, config)):
        raise ValueError(f"{(found or origin or [run_dir])[0]} is of a run with another config ({', '.join(changed)}): "
                         f"undo that, or {remedy}")


def read_rows(run_dir: Path) -> list[dict]:
    """The whole rows of metrics.jsonl: the last may be half written."""
    file, rows = Path(run_dir) / "metrics.jsonl", []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{file}:{number}: not valid JSON: delete this line") from None
    return rows


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator, doing: str) -> Iterator[None]:
    """A barrier: what fails inside on one process is a one-line OSError on all of them, so that none waits in vain."""
    error = ""
    try:
        yield
    except (Exception, CheckpointException) as failure:  # a full disk has many names
        error = f"{doing}: {(str(failure).strip() or repr(failure)).splitlines()[-1]}"
    if errors := [error for error in gather_object([error]) if error]:
        raise OSError(errors[0])


def lock_run_dir(accelerator: Accelerator, config: SimpleNamespace) -> FileLock:
    """Hold the run's directory as long as the process lives; OSError where another run does.

    Also finds out whether all machines see the same directory; where they do not, each keeps checkpoints of its own
    (`save_on_each_node`).
    """
    run_dir, mark = Path(config.run_dir), broadcast_object_list([uuid.uuid4().hex])[0]
    lock = FileLock(run_dir / ".lock")
    with raise_on_all_ranks(accelerator, "run_dir"):
        if accelerator.is_local_main_process:
            run_dir.mkdir(parents=True, exist_ok=True)
    with raise_on_all_ranks(accelerator, "run_dir"):
        if accelerator.is_main_process:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise OSError(f"another run is writing into {run_dir}; wait for it, stop it, or name another") from None
            (run_dir / ".shared").write_text(mark)
        check_run_dir(config)  # again, now that nobody else writes there
    file = run_dir / ".shared"
    own_disks = not all(gather_object([file.exists() and file.read_text() == mark]))
    if own_disks and is_sharded(accelerator):
        raise OSError(f"run_dir: {run_dir} is not the same directory on all machines, as a sharded run needs it")
    accelerator.project_configuration.save_on_each_node = own_disks
    return lock


def truncate_run(accelerator: Accelerator, run_dir: Path, origin: Path, step: int) -> None:
    """Leave in `run_dir` what a run up to `step` had written; its metrics are read from `origin`."""
    with raise_on_all_ranks(accelerator, "run_dir"):
        if _writes(accelerator):
            for path in list_checkpoints(run_dir):
                if _step(path) > step:
                    shutil.rmtree(path)
        if accelerator.is_main_process:
            rows = [json.dumps(row) + "\n" for row in read_rows(origin) if row["step"] <= step]
            if rows or (run_dir / "metrics.jsonl").exists():
                write_atomic(run_dir / "metrics.jsonl", "".join(rows))
            for file in (run_dir / "rollouts").glob("step_*.jsonl"):
                if _step(file) > step:
                    file.unlink()


def write_atomic(file: Path, text: str) -> None:
    """Write a file so that, whenever the process dies, it is there as it was or as it is to be."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def replace_dir(aside: Path, name: Path) -> None:
    """Give a directory that is whole its name; an older one of that name goes."""
    shutil.rmtree(name, ignore_errors=True)
    aside.rename(name)


# ---- checkpoints ----------------------------------------------------------------------------------------

def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds but a part of the policy: by FSDP2, or DeepSpeed's ZeRO-3."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run that have their names, and were therefore whole once."""
    return sorted((Path(run_dir) / "checkpoints").glob("step_*"), key=_step, reverse=True)


def read_metadata(path: Path) -> dict:
    """A checkpoint's counters, config and evaluations; nothing where they are not what was written."""
    try:
        digests = json.loads((path / "digests.json").read_text(encoding="utf-8"))
        whole = digests["progress.json"] == _digest(path / "progress.json")
        return json.loads((path / "progress.json").read_text(encoding="utf-8")) if whole else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def save_checkpoint(accelerator: Accelerator, policy, optimizer, run_dir: str, progress: dict, keep: int) -> None:
    """Write `checkpoints/step_*`, whole or not at all, and remove all but the `keep` newest. Raises OSError."""
    path = Path(run_dir) / "checkpoints" / f"step_{progress['counters']['step']:05d}"
    aside, writes = path.with_name(f".{path.name}.partial"), _writes(accelerator)
    doing = f"cannot save {path}, on whose disk {shutil.disk_usage(run_dir).free / 1e6:.0f} MB were free"
    try:
        with raise_on_all_ranks(accelerator, doing):
            if writes:
                path.parent.mkdir(exist_ok=True)
                for half in path.parent.glob(".step_*.partial"):
                    shutil.rmtree(half)
                aside.mkdir()
                write_atomic(aside / "progress.json", json.dumps(progress))
        with raise_on_all_ranks(accelerator, doing):
            _save_state(accelerator, policy, optimizer, aside)
        with raise_on_all_ranks(accelerator, doing):
            digests = _digests(accelerator, aside)
        with raise_on_all_ranks(accelerator, doing):
            if writes:
                write_atomic(aside / "digests.json", json.dumps(digests))
                replace_dir(aside, path)
                for old in list_checkpoints(run_dir)[keep:]:
                    shutil.rmtree(old)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # others may want the room
        raise


def find_checkpoint(accelerator: Accelerator, run_dir: str, resume: str) -> Path | None:
    """The run's newest whole checkpoint, or else the one that `resume` names; None: start from nothing.

    Raises OSError where there are checkpoints, but none is whole.
    """
    named = [] if resume in ("auto", "never") else [resume]
    seen = set().union(*gather_object([[str(path) for path in list_checkpoints(run_dir) or named]]))
    for path in sorted(map(Path, seen), key=_step, reverse=True):
        if not (problem := find_corruption(accelerator, path)):
            return path
        accelerator.print(f"warning: {path} is damaged: {problem}")
    if seen:
        raise OSError(f"no checkpoint is whole of {', '.join(sorted(seen))}; start anew in another run_dir")
    return None


def find_corruption(accelerator: Accelerator, path: Path) -> str:
    """Why a checkpoint cannot be used, in the same words on all processes; "" where it can."""
    problem = ""
    try:
        digests = json.loads((path / "digests.json").read_text(encoding="utf-8"))
        wrong = [name for name in _my_part(accelerator, sorted(digests)) if _digest(path / name) != digests[name]]
        problem = f"{wrong[0]} is not what was written" if wrong else ""
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except OSError as error:
        problem = str(error)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"digests.json: {error}"
    return next((problem for problem in gather_object([problem]) if problem), "")


def load_checkpoint(accelerator: Accelerator, policy, optimizer, path: Path) -> None:
    """Weights and optimizer as they were saved. Raises OSError."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed != (path / "latest").exists():
        raise OSError(f"{path} is of a run {'without' if deepspeed else 'with'} DeepSpeed: launch it in the same way")
    with raise_on_all_ranks(accelerator, f"cannot load {path}"), warnings.catch_warnings(action="ignore"):  # no process group
        if deepspeed:
            policy.load_checkpoint(str(path))
            return
        trained = read_metadata(path)["counters"]["optimizer_steps"] > 0
        state = _state(policy, optimizer, trained)
        dcp.load(state, checkpoint_id=path, no_dist=not is_sharded(accelerator))
        set_model_state_dict(policy, state["policy"])
        if trained:
            set_optimizer_state_dict(policy, optimizer, state["optimizer"])


def _save_state(accelerator: Accelerator, policy, optimizer, path: Path) -> None:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        policy.save_checkpoint(str(path))
    elif is_sharded(accelerator) or _writes(accelerator):
        with warnings.catch_warnings(action="ignore"):
            dcp.save(_state(policy, optimizer, bool(optimizer.state)), checkpoint_id=path,
                     no_dist=not is_sharded(accelerator))


def _state(policy, optimizer, trained: bool) -> dict:
    """What is saved. An optimizer that has taken no step is left alone: torch would take one to see its state."""
    state = {"policy": get_model_state_dict(policy)}
    return state | {"optimizer": get_optimizer_state_dict(policy, optimizer)} if trained else state


def _own_disks(accelerator: Accelerator) -> bool:
    return accelerator.project_configuration.save_on_each_node


def _writes(accelerator: Accelerator) -> bool:
    return accelerator.is_local_main_process if _own_disks(accelerator) else accelerator.is_main_process


def _my_part(accelerator: Accelerator, files: list) -> list:
    """This process's part of some work on all files of a disk."""
    return files if _own_disks(accelerator) else files[accelerator.process_index::accelerator.num_processes]


def _digests(accelerator: Accelerator, path: Path) -> dict[str, str]:
    """SHA-256 of each file, by its name under `path`; the processes share the work."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    if _own_disks(accelerator):
        return {name: _digest(path / name) for name in names}
    names = broadcast_object_list([names])[0]  # a network's file system may not show the same to all
    parts = gather_object([{name: _digest(path / name) for name in _my_part(accelerator, names)}])
    return {name: digest for part in parts for name, digest in part.items()}


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0
