"""The directory of a run: its lock, resuming, and checkpoints.

    RUN_DIR/checkpoints/step_00010/    weights and optimizer, by torch's distributed checkpoints:
                                       each rank writes its shard if the policy is sharded, and any
                                       number of ranks can read them
                        progress.json  counters, config, evaluations so far, digests of the code
                        digests.json   SHA-256 of every other file
    RUN_DIR/branch.json                the checkpoint of another run that this one branches off, and
                                       the keys of the config and files of code that differ

All machines see the same directory. A checkpoint is written under a temporary name, flushed to
disk, and renamed. No generator and no scheduler is saved: every random draw and the learning rate
are functions of the seed and counters.
"""

import hashlib
import json
import os
import shutil
import sys
import textwrap
import traceback
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)

from data_types import Evaluation, Progress, Prompt, TrainState
from infra.config import config_diff, escape_control, flatten, load_config, tell_launcher
from infra.distributed import (is_sharded, iter_full_weights, map_over_ranks, raise_on_all_ranks,
                               warn)
from infra.lora import full_adapters, save_adapter
from infra.memory import out_of_memory
from infra.metrics import best_validation
from infra.provenance import changed_code, code_digests, digest_file, write_code
from infra.rollout_files import read_metrics
from infra.safe_load import SafePlanner, SafeReader
from infra.trackers import start_tracker

# ---- the directory of a run ----------------------------------------------------------------------

def check_run_dir(config: SimpleNamespace) -> None:
    """Raise ValueError if `run_dir` holds results that a run with this config would not resume."""
    run_dir, checkpoints = Path(config.run_dir), list_checkpoints(config.run_dir)
    if (path := run_dir / "metrics.jsonl").is_symlink():
        raise ValueError(f"run_dir: {path} is a link, to where the run would write: put the file "
                         "itself there")
    if (path := run_dir / "checkpoints").exists() and not path.is_dir():
        raise ValueError(f"run_dir: {path} is no directory: move it elsewhere")
    rows, (named, recorded) = metrics_so_far(run_dir), branch_origins(config)
    unused = unused_run_dir(config)
    hint = f"name another, for instance {unused}"
    origin, needed = named or recorded, not checkpoints or named not in (None, recorded)
    if origin and needed and not (origin / "progress.json").exists():
        found = [*list_checkpoints(origin), *list_checkpoints(origin.parent.parent)]
        raise ValueError(f"resume: {origin} is not a checkpoint's directory, auto or never; "
                         f"{f'{found[0]} is one' if found else f'or {hint}'}")
    if (rows or checkpoints) and (config.resume == "never" or (named and named != recorded)):
        raise ValueError(f"run_dir: {run_dir} holds an earlier run; {hint}")
    sources = checkpoints or [path for path in (named or recorded,) if path]
    metadata = next(filter(None, map(read_metadata, sources)), None)
    step = metadata["counters"]["step"] if metadata else 0
    if rows and not checkpoints and (rows[-1]["step"] > step + config.save_every
                                     or (run_dir / "model").exists()):
        raise ValueError(f"run_dir: {run_dir} holds an earlier run, without a checkpoint to resume "
                         f"from; {hint}")
    earlier = {}  # a new directory: a run that branches off may change any key
    if checkpoints and metadata:
        earlier = metadata["config"]
    elif rows and (run_dir / "config.yaml").exists():
        earlier = flatten(load_config(run_dir / "config.yaml"))
    if earlier and (changed := config_diff(earlier, config)):
        may_branch = checkpoints and "model.lora_" not in str(changed)
        branch = f"; or branch off: resume={checkpoints[0]} {unused}" if may_branch else ""
        raise ValueError(f"{(checkpoints or [run_dir])[0]} has another config "
                         f"({', '.join(changed)}): undo that; {hint}{branch}")
    if step >= config.total_training_steps:
        raise ValueError(f"{sources[0]} is finished, with {step} steps; raise total_training_steps="
                         f"{config.total_training_steps} to train on, or {hint}")
    files = changed_code((metadata or {}).get("code", {}), config) if checkpoints else []
    if files and not config.resume_with_other_code:
        raise ValueError(f"{checkpoints[0]} is of other code ({', '.join(files)} differ from "
                         f"{run_dir}/code/): undo that; {hint}; branch off: resume="
                         f"{checkpoints[0]} {unused}; or resume with resume_with_other_code=true")


def unused_run_dir(config: SimpleNamespace) -> str:
    """The option that names a directory which does not exist."""
    return next(f"run_dir={name}" for i in range(2, 10**6)
                if not Path(name := f"{config.run_dir}-{i}").exists())


def branch_origins(config: SimpleNamespace) -> tuple[Path | None, Path | None]:
    """The checkpoint that `resume` names, and the one that this run has branched off before."""
    file, recorded = Path(config.run_dir, "branch.json"), None
    if config.resume != "never" and file.exists():
        recorded = Path(json.loads(file.read_text(encoding="utf-8"))["checkpoint"])
    return (None if config.resume in ("auto", "never") else Path(config.resume).resolve()), recorded


def metrics_so_far(run_dir: Path, log: Callable[[str], None] = lambda line: None) -> list[dict]:
    """The rows of metrics.jsonl; none if there is no such file."""
    return read_metrics(run_dir, log) if (run_dir / "metrics.jsonl").exists() else []


def lock_run_dir(accelerator: Accelerator, config: SimpleNamespace) -> FileLock:
    """Lock the run's directory for the life of the process. Raises OSError if another run has it,
    or if this machine sees another directory than the main process."""
    run_dir, mark = Path(config.run_dir), broadcast_object_list([uuid.uuid4().hex])[0]
    lock = FileLock(run_dir / ".lock")
    with raise_on_all_ranks("run_dir"):
        if accelerator.is_main_process:
            run_dir.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
                (run_dir / ".lock").write_text(mark)
            except Timeout:
                raise OSError(f"another run is writing into {run_dir}; wait for it, stop it, or "
                              "name another") from None
    with raise_on_all_ranks("run_dir"):
        if not (run_dir / ".lock").exists() or (run_dir / ".lock").read_text() != mark:
            raise OSError(f"{run_dir} is not the same directory on all machines: name one on a "
                          "file system that they share")
        check_run_dir(config)  # again, now that no other run writes there
    return lock


def resume(state: TrainState, prompts: list[Prompt]) -> tuple[Progress, Path | None]:
    """Load the newest intact checkpoint of the run, or the one that it branches off.

    Returns the progress that training continues from, and the checkpoint; None if there is none.
    Raises OSError or ValueError.
    """
    config, accelerator = state.config, state.accelerator
    identity = {"config": flatten(config), "data": hash_prompts(prompts),
                "code": code_digests(config)}
    progress = Progress(identity=identity)
    if any(other != identity for other in gather_object([identity])):
        raise OSError("the processes have different configs or code, or read different "
                      "data.train_file")
    path = find_checkpoint(accelerator, config)
    if path is None:
        return progress, None
    metadata = read_metadata(path)
    changed = ", ".join(branch_changes(metadata, config)) or "the same config"
    if is_branch(config, path):
        accelerator.print(f"branching off {path}: {changed}")
        if "model.lora_" in changed:
            raise OSError(f"resume: {path} has other adapters ({changed}): undo that, or train "
                          "the model that its run exported: model.path")
    elif metadata["data"] != identity["data"]:
        raise OSError(f"{path} is of a run on other prompts: what data.train_file holds has "
                      f"changed; undo that, or branch off: resume={path} {unused_run_dir(config)}")
    load_checkpoint(accelerator, state.policy, state.optimizer.optimizer, path)
    if accelerator.scaler and "scaler" in metadata:  # not if it branches off a run without one
        accelerator.scaler.load_state_dict(metadata["scaler"])
    for group in state.optimizer.param_groups:
        group["weight_decay"] = config.actor.weight_decay  # a branch may have another
    progress.counters |= metadata["counters"]
    if same_evaluation_settings(metadata["config"], identity["config"]):
        for title, by_set in metadata["evaluations"].items():
            progress.evaluations[title] = {name: Evaluation(**fields)
                                           for name, fields in by_set.items()}
    code = ", ".join(changed_code(metadata.get("code", {}), config))
    accelerator.print(f"resuming from {path}" + (f" with other code: {code}" if code else ""))
    return progress, path


def is_branch(config: SimpleNamespace, checkpoint: Path) -> bool:
    """Whether the checkpoint is of another run."""
    return checkpoint.resolve().parent.parent != Path(config.run_dir).resolve()


def branch_changes(metadata: dict, config: SimpleNamespace) -> list[str]:
    """The keys in which a branch differs from what it branches off, but those that it must name."""
    return [change for change in config_diff(metadata["config"], config, every_key=True)
            if not change.startswith(("run_dir: ", "resume: "))]


def same_evaluation_settings(earlier: dict, now: dict) -> bool:
    """Whether evaluations by these two flat configs can stand side by side."""
    return all(earlier.get(key) == value for key, value in now.items()
               if key.startswith(("val.", "data.", "reward."))
               and key not in ("val.every", "data.train_file", "reward.timeout"))


def hash_prompts(prompts: list[Prompt]) -> str:
    """A digest of all prompts and answers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        text = f"{prompt.text}\0{prompt.answer}\0"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def prepare_run_dir(accelerator: Accelerator, config: SimpleNamespace, progress: Progress,
                    checkpoint: Path | None) -> None:
    """Remove from the run's directory what was written after the step that `progress` has reached,
    write config.yaml and the version of the code, start the tracker. A branch gets the metrics of
    the other run so far."""
    run_dir, origin, branch, step = Path(config.run_dir), Path(config.run_dir), {}, -1
    if checkpoint:
        step = progress.counters["step"]
        if is_branch(config, checkpoint):
            origin = checkpoint.parent.parent
            branch = {"checkpoint": str(checkpoint.resolve()), "step": step,
                      "changed": branch_changes(metadata := read_metadata(checkpoint), config),
                      "code": changed_code(metadata.get("code", {}), config)}
    code, so_far = "", metrics_so_far(origin)  # all ranks decide by it: health, the best policy
    progress.history = [row for row in so_far if row["step"] <= step]
    with raise_on_all_ranks("run_dir"):
        if accelerator.is_main_process:
            for path in list_checkpoints(run_dir):
                if _step(path) > step:
                    shutil.rmtree(path)
            if branch:
                write_atomic(run_dir / "branch.json", json.dumps(branch, indent=1))
            elif step < 0:
                (run_dir / "branch.json").unlink(missing_ok=True)
            rows = {row["step"]: json.dumps(row) + "\n"
                    for row in metrics_so_far(origin, accelerator.print) if row["step"] <= step}
            if missing := sorted(set(range(1, step + 1)) - rows.keys()):
                warn(accelerator, f"{origin}/metrics.jsonl lacks {len(missing)} of the steps up to "
                     f"{step} (the first is {missing[0]}): curves will have gaps")
            if rows or (run_dir / "metrics.jsonl").exists():
                write_atomic(run_dir / "metrics.jsonl", "".join(rows.values()))
            (run_dir / "rollouts").mkdir(exist_ok=True)
            for file in [*run_dir.glob("rollouts/*.jsonl"), *run_dir.glob("code/*.patch")]:
                if file.stem.startswith(("step_", "dropped_", "from_step_")) and _step(file) > step:
                    file.unlink()
            resolved = json.loads(json.dumps(config, default=vars))
            write_atomic(run_dir / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
            code = write_code(config, max(step, 0) + 1, progress.identity["data"])
    accelerator.print(f"code: {code}")
    start_tracker(accelerator, config, code, resumed=bool(checkpoint) and not branch)


# ---- what a run saves ----------------------------------------------------------------------------

def save_model(state: TrainState, name: str) -> None:
    """Write policy and tokenizer to `run_dir/name`, a transformers directory; with LoRA, the merged
    model, and the adapter beside it (`adapter/`, `adapter_step_*/`, ...). Raises OSError."""
    run_dir, policy = Path(state.config.run_dir), state.accelerator.unwrap_model(state.policy)
    exact = [f".{name}." for name in policy._keep_in_fp32_modules_strict or ()]
    weights = {}
    for key, weight in iter_full_weights(policy):
        keep = not weight.is_floating_point() or any(name in f".{key}." for name in exact)
        if state.accelerator.is_main_process:
            weights[key] = weight.to("cpu", weight.dtype if keep else state.save_dtype)
    adapters = full_adapters(policy)
    with raise_on_all_ranks(f"cannot save {run_dir / name}"):
        if state.accelerator.is_main_process:
            tmp_path = run_dir / f".{name}.partial"
            shutil.rmtree(tmp_path, ignore_errors=True)
            policy.save_pretrained(tmp_path, state_dict=weights)
            model_config = deepcopy(policy.config)
            model_config.dtype = state.save_dtype  # save_pretrained wrote the policy's
            model_config.save_pretrained(tmp_path)
            state.tokenizer.save_pretrained(tmp_path)
            replace_dir(tmp_path, run_dir / name)
            if adapters:
                save_adapter(policy, adapters, tmp_path)
                replace_dir(tmp_path, run_dir / name.replace("model", "adapter"))


def end_after_failure(state: TrainState, failure: BaseException) -> NoReturn:
    """Save the policy if it was trained, and end the run: with one line if `failure` is a
    SystemExit of `one_line_errors`, which has a cause, or a lost connection; else, a bug or an
    error of a library, with its traceback.

    If one of several ranks has an error that the others do not know of, it ends here and now: they
    wait for it, and nothing can be saved together. The launcher stops them.
    """
    accelerator, cause = state.accelerator, failure.__cause__
    one_line = isinstance(failure, SystemExit) and cause is not None
    lost = isinstance(failure, RuntimeError) and (
        isinstance(failure, torch.distributed.DistError) or "gloo" in str(failure))
    message = f"error: {escape_control(cause)}" if one_line else f"error: {failure!r}"
    if lost:
        reason = textwrap.shorten(str(failure), 200)
        message = f"error: another rank has ended, or cannot be reached ({reason})"
    saved = "".join(f". {path} is intact: the same command resumes from it"
                    for path in list_checkpoints(state.config.run_dir)[:1])
    alone = not one_line or isinstance(cause.__cause__, torch.OutOfMemoryError)
    if alone and accelerator.num_processes > 1:
        if not one_line and not lost:
            traceback.print_exception(failure)
        message = f"{message} (rank {accelerator.process_index}){saved}"
        print(message, file=sys.stderr, flush=True)
        tell_launcher(message)
        os._exit(1)
    if state.optimizer.state:
        try:
            with out_of_memory("sync"):
                save_model(state, "last_good_model")
            message += f". The policy as it was is in {state.config.run_dir}/last_good_model"
        except Exception as error:  # a GPU that has failed fails here too
            message += f". The policy is lost: {error}"
    with suppress(Exception):  # it may be what has failed
        state.engine.close()
    if not one_line:
        traceback.print_exception(failure)
    raise SystemExit(tell_launcher(message + saved)) from None


def save_results(state: TrainState, progress: Progress, checkpoint: bool) -> None:
    """After a step: save the model, the best one and a checkpoint, each if it is due; a
    `checkpoint` anyway if it is asked for. Raises OSError."""
    config, step = state.config, progress.counters["step"]
    last = step == config.total_training_steps
    if config.save_model_every and step % config.save_model_every == 0:
        save_model(state, f"model_step_{step:05d}")
    validated = any(name.startswith("val/") for name in progress.history[-1])
    if config.save_best_model and validated and best_validation(progress.history)[0] == step:
        save_model(state, "model_best")
    if last:  # before the last checkpoint, which says that the run is finished
        save_model(state, "model")
    if checkpoint or (config.save_every and (last or step % config.save_every == 0)):
        save_checkpoint(state, progress)


def save_checkpoint(state: TrainState, progress: Progress) -> None:
    """Write `checkpoints/step_*`, whole or not at all; remove all but the newest
    `keep_checkpoints`. Raises OSError."""
    accelerator, run_dir = state.accelerator, Path(state.config.run_dir)
    path = run_dir / "checkpoints" / f"step_{progress.counters['step']:05d}"
    tmp_path, is_main = path.with_name(f".{path.name}.partial"), accelerator.is_main_process
    free = shutil.disk_usage(run_dir).free / 1e6
    doing = f"cannot save {path}, on whose disk {free:.0f} MB were free"
    metadata = progress.identity | {"counters": progress.counters,
                                    "evaluations": progress.evaluations}
    if accelerator.scaler:
        metadata["scaler"] = accelerator.scaler.state_dict()
    try:
        with raise_on_all_ranks(doing):
            if is_main:
                path.parent.mkdir(exist_ok=True)
                for half in path.parent.glob(".step_*.partial"):
                    shutil.rmtree(half)
                tmp_path.mkdir()
                write_atomic(tmp_path / "progress.json", json.dumps(metadata, default=vars))
        with raise_on_all_ranks(doing):
            if is_main or is_sharded(accelerator):
                optimizer = state.optimizer.optimizer
                with warnings.catch_warnings(action="ignore"):
                    dcp.save(_state_dict(state.policy, optimizer, bool(optimizer.state)),
                             checkpoint_id=tmp_path, no_dist=not is_sharded(accelerator))
        names = sorted(file.name for file in tmp_path.iterdir()) if is_main else []
        names = broadcast_object_list([names])[0]
        with raise_on_all_ranks(doing):
            digests = hash_files(accelerator, tmp_path, names)
        with raise_on_all_ranks(doing):
            if is_main:
                write_atomic(tmp_path / "digests.json", json.dumps(digests))
                replace_dir(tmp_path, path)
                for old in list_checkpoints(run_dir)[state.config.keep_checkpoints:]:
                    shutil.rmtree(old)
    except OSError:
        if is_main:
            shutil.rmtree(tmp_path, ignore_errors=True)  # frees the disk
        raise


# ---- reading checkpoints -------------------------------------------------------------------------

def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    found = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted((path for path in found if path.is_dir() and path.name[5:].isdigit()), key=_step,
                  reverse=True)


def read_metadata(path: Path) -> dict:
    """A checkpoint's counters, config and evaluations; {} if they are not what was written."""
    try:
        digests = json.loads((path / "digests.json").read_text(encoding="utf-8"))
        intact = digests["progress.json"] == digest_file(path / "progress.json")
        found = json.loads((path / "progress.json").read_text("utf-8"))
        kinds = {"config": dict, "counters": dict, "evaluations": dict, "data": str}
        for by_set in found["evaluations"].values():
            [Evaluation(**fields) for fields in by_set.values()]
        found = {key: kind() for key, kind in kinds.items()} | found
        return found if intact and found["counters"]["step"] >= 0 and all(
            isinstance(found[key], kind) for key, kind in kinds.items()) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def find_checkpoint(accelerator: Accelerator, config: SimpleNamespace) -> Path | None:
    """The newest intact checkpoint of the run, else the one that it branches off; None if there is
    none. Raises OSError if there are checkpoints and none is intact."""
    named, recorded = branch_origins(config)
    origin = [path for path in (named or recorded,) if path]
    paths = broadcast_object_list([list_checkpoints(config.run_dir) or origin])[0]
    for path in paths:
        problem = find_corruption(accelerator, path)
        if not problem:
            return path
        warn(accelerator, f"{path} is damaged: {problem}")
    if paths:
        raise OSError(f"no checkpoint is intact of {', '.join(map(str, paths))}; start in another "
                      "run_dir")
    return None


def find_corruption(accelerator: Accelerator, path: Path) -> str:
    """Why a checkpoint cannot be used, the same on all ranks; "" if it can."""
    try:
        with raise_on_all_ranks("digests.json"):
            digests = dict(json.loads((path / "digests.json").read_text(encoding="utf-8")))
        found = hash_files(accelerator, path, sorted(digests))
    except (OSError, ValueError) as error:
        return str(error)
    changed = [name for name in found if found[name] != digests[name]]
    if not changed and not read_metadata(path):
        changed = ["progress.json"]
    return ", ".join(f"not what was written: {name}" for name in changed)


def hash_files(accelerator: Accelerator, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of each file of the folder; the ranks share the work.
    Raises ValueError or OSError on all ranks if one cannot be read."""
    def hash_share(share: Sequence[str]) -> list[str]:
        return [digest_file(folder / name) for name in share]
    return dict(zip(names, map_over_ranks(accelerator, hash_share, names, "hash"), strict=True))


def load_checkpoint(accelerator: Accelerator, policy, optimizer, path: Path) -> None:
    """Load weights and optimizer as they were saved. Raises OSError."""
    with (raise_on_all_ranks(f"cannot load {path}"),
          warnings.catch_warnings(action="ignore")):  # of one process without a process group
        trained = read_metadata(path)["counters"]["optimizer_steps"] > 0
        state_dict = _state_dict(policy, optimizer, trained)
        reader = SafeReader(path)
        reader.read_metadata()  # dcp would say three times what is wrong with it
        dcp.load(state_dict, storage_reader=reader, planner=SafePlanner(),
                 no_dist=not is_sharded(accelerator))
        set_model_state_dict(policy, state_dict["policy"], options=StateDictOptions(strict=False))
        if trained:
            set_optimizer_state_dict(policy, optimizer, state_dict["optimizer"])


def _state_dict(policy, optimizer, trained: bool) -> dict:
    """What a checkpoint holds: nothing that is frozen. To read the state of an untrained optimizer,
    torch would step it."""
    weights = getattr(policy, "module", policy).named_parameters(remove_duplicate=False)
    frozen = {name for name, weight in weights if not weight.requires_grad}
    state_dict = {"policy": {name: value for name, value in get_model_state_dict(policy).items()
                             if name not in frozen}}
    if trained:
        state_dict["optimizer"] = get_optimizer_state_dict(policy, optimizer)
    return state_dict


def _step(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else 0


def write_atomic(file: Path, text: str) -> None:
    """Write a file: whenever the process or the machine dies, it has its old content or the new."""
    tmp_path = file.with_name(f".{file.name}.partial")
    tmp_path.write_text(text, encoding="utf-8")
    _flush(tmp_path)
    tmp_path.replace(file)


def replace_dir(tmp_path: Path, path: Path) -> None:
    """Move a complete directory to `path`; an older one there is removed."""
    for file in tmp_path.iterdir():
        if file.suffix == ".safetensors":
            file.chmod(0o644)  # safetensors makes weights readable by their owner only
        _flush(file)
    _flush(tmp_path)
    shutil.rmtree(path, ignore_errors=True)
    tmp_path.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files a directory has."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
