"""What somebody else has made, a checkpoint, a model or data, is read and never executed."""

import io
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from infra.provenance import digest_file
from infra.safe_load import MetadataUnpickler

STEPS = ["save_every=1", "val.file="]


class Evil:
    """Writes a file when it is unpickled."""
    def __init__(self, file) -> None:
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory in which a run of one step is kept, once there is one."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def checkpoint(start, trained, tmp_path):
    """Of another run, after its first step."""
    if not trained.exists():
        start(*STEPS, "total_training_steps=1").rename(trained)
    shutil.copytree(trained, tmp_path / "origin")
    return tmp_path / "origin/checkpoints/step_00001"


def forge(checkpoint, name: str, content: bytes | str) -> None:
    """Write a file of the checkpoint, with its digest."""
    (checkpoint / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    digests = json.loads((checkpoint / "digests.json").read_text())
    digests[name] = digest_file(checkpoint / name)
    (checkpoint / "digests.json").write_text(json.dumps(digests))


def evil_metadata(checkpoint, file) -> None:
    forge(checkpoint, ".metadata", pickle.dumps(Evil(file)))


def evil_inside(checkpoint, file) -> None:
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    found.planner_data["evil"] = Evil(file)
    forge(checkpoint, ".metadata", pickle.dumps(found))


def evil_object(checkpoint, file) -> None:
    """Among the optimizer's settings, where torch pickles what is no tensor."""
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    torch.save(Evil(file), payload := io.BytesIO())
    ((index, place),) = [item for item in found.storage_data.items()
                         if item[0].fqn == "optimizer.param_groups.0.lr"]
    data = (checkpoint / place.relative_path).read_bytes()
    found.storage_data[index] = replace(place, offset=len(data), length=len(payload.getvalue()))
    forge(checkpoint, place.relative_path, data + payload.getvalue())
    forge(checkpoint, ".metadata", pickle.dumps(found))


@pytest.mark.parametrize("named", [True, False], ids=["branch", "resume"])
@pytest.mark.parametrize("make_evil, words", [
    (evil_metadata, ".metadata names io.open, which no checkpoint has: refused"),
    (evil_inside, ".metadata names io.open, which no checkpoint has: refused"),
    (evil_object, "optimizer.param_groups.0.lr is no plain value: refused")])
def test_a_checkpoint_that_would_run_code_is_refused_in_one_line(start, checkpoint, tmp_path,
                                                                 make_evil, words, named):
    make_evil(checkpoint, tmp_path / "executed")
    resume = f"resume={checkpoint}"
    if not named:
        checkpoint.parent.parent.rename(tmp_path / "run")
        resume = "resume=auto"
    with pytest.raises(SystemExit) as error:
        start(*STEPS, "total_training_steps=2", resume)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_names_that_only_look_like_torchs_own_are_refused():
    for module, name in (("torch.distributed.checkpoint.metadata", "os.system"),
                         ("torch.distributed.checkpoint.metadata", "dataclass"),
                         ("torch", "load"), ("torch", "hub"), ("builtins", "eval")):
        with pytest.raises(ValueError, match="refused"):
            MetadataUnpickler(io.BytesIO()).find_class(module, name)
    assert MetadataUnpickler(io.BytesIO()).find_class("torch", "float32") is torch.float32
    assert MetadataUnpickler(io.BytesIO()).find_class(Metadata.__module__, "Metadata") is Metadata


class ByGetattr:
    """Pickled as Python 3.11.2 pickles a member of an enum."""
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_an_enum_is_read_as_any_python_writes_it_and_getattr_gives_nothing_else():
    def load(*arguments):
        return MetadataUnpickler(io.BytesIO(pickle.dumps(ByGetattr(*arguments)))).load()
    for member in _MEM_FORMAT_ENCODING:
        assert load(_MEM_FORMAT_ENCODING, member.name) is member
    for arguments in ((_MEM_FORMAT_ENCODING, "__init__"), (Metadata, "__init__"),
                      (torch.Size, "__class__")):
        with pytest.raises(ValueError, match=".metadata calls getattr, which no checkpoint needs"):
            load(*arguments)


@pytest.mark.parametrize("name, content", [
    ("digests.json", "[1, 2]"), ("digests.json", '{"progress.json": 3}'), ("digests.json", "[" * 10**5),
    ("digests.json", '{"../../../origin/metrics.jsonl": "0"}'), ("digests.json", "null"),
    ("progress.json", "{}"), ("progress.json", "[]"), ("progress.json", "[" * 10**5),
    ("progress.json", {"counters": []}), ("progress.json", {"counters": {"step": "x"}}),
    ("progress.json", {"config": None}), ("progress.json", {"evaluations": {"before": [1]}}),
    ("progress.json", {"evaluations": {"before": {"val": {"no": 1}}}}), (".metadata", b"\x80\x04"),
    (".metadata", b""), (".metadata", pickle.dumps({}))])
def test_a_forged_file_of_a_checkpoint_is_one_line(start, checkpoint, name, content):
    if isinstance(content, dict):
        content = json.dumps(json.loads((checkpoint / name).read_text()) | content)
    if name == "digests.json":
        (checkpoint / name).write_text(content)
    else:
        forge(checkpoint, name, content)
    with pytest.raises(SystemExit) as error:
        start(*STEPS, "total_training_steps=2", f"resume={checkpoint}")
    assert "\n" not in str(error.value) and str(error.value).startswith("error: ")


def test_a_model_whose_weights_are_a_pickle_that_runs_code_is_refused(start, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "toy/base", base)
    (base / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(tmp_path / "executed")}, base / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="error: model.path: cannot load .*base") as error:
        start(f"model.path={base}")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


def test_data_that_are_a_pickle_are_refused(start, tmp_path):
    for name in ("train.pkl", "train.jsonl", "train.parquet"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
        with pytest.raises(SystemExit, match=f"error: .*{name}"):
            start(f"data.train_file={tmp_path / name}")
    assert not (tmp_path / "executed").exists()


def test_a_run_does_not_write_through_a_link(start, tmp_path):
    (tmp_path / "other").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(SystemExit, match="run_dir: .*run/metrics.jsonl is a link, to where"):
        start(*STEPS, "total_training_steps=1")
    assert (tmp_path / "other").read_text() == "precious"


def test_checkpoints_may_lie_on_another_disk(start, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    start(*STEPS, "total_training_steps=1")
    assert (tmp_path / "disk/step_00001/progress.json").exists()
