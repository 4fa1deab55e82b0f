"""Which code made a run: RUN_DIR/code/from_step_00001.patch, one for each launch, has the commit,
digests of reward files and training data, and the diff to the commit, which `git apply` takes as it
is. Copies of the reward files, which git may not know, stand beside it."""

import ast
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

from infra.config import split_list

ROOT = Path(__file__).parent.parent
LONGEST_DIFF = 2**20  # characters; a longer one is left out
# whatever a user's git is told to show
DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "-U3",
        "--src-prefix=a/", "--dst-prefix=b/")


def code_digests(config: SimpleNamespace) -> dict[str, str]:
    """SHA-256 of each file of code that a run depends on: ours at the top and in infra/, and those
    of its reward functions."""
    files = {path.relative_to(ROOT).as_posix(): path
             for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("infra/*.py")])}
    files |= {name: Path(name) for name in reward_files(config)}
    return {name: digest_file(path) for name, path in files.items() if path.exists()}


def reward_files(config: SimpleNamespace) -> list[str]:
    """The files that `reward.name` names, and those beside them that they import."""
    found = [name.rpartition(":")[0] for name in split_list(config.reward.name) if ":" in name]
    for file in map(Path, found):  # and those that it adds meanwhile
        try:
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
        except (OSError, SyntaxError, ValueError):  # it will not load
            continue
        names = [alias.name for node in nodes if isinstance(node, ast.Import)
                 for alias in node.names]
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                names += [node.module or "", *(f"{node.module or ''}.{alias.name}".strip(".")
                                               for alias in node.names)]
        for name in names:
            module = file.parent / name.replace(".", "/")
            found += [path for path in (f"{module}.py", f"{module}/__init__.py")
                      if path not in found and Path(path).is_file()]
    return found


def changed_code(earlier: dict[str, str], config: SimpleNamespace) -> list[str]:
    """The files of which a run had others `earlier`, by their digests; none if it kept none."""
    now = code_digests(config) if earlier else {}
    return [name for name in sorted(earlier.keys() | now.keys())
            if earlier.get(name) != now.get(name)]


def code_version(config: SimpleNamespace) -> tuple[str, str]:
    """The commit of this code, and its diff to that, with the files that git does not know beside
    ours and the reward functions; "no repository" and "" without git."""
    folders = {ROOT.resolve(), ROOT.resolve() / "infra",
               *(Path(name).resolve().parent for name in reward_files(config))}
    try:
        commit = _git("rev-parse", "HEAD").strip()
        diff = _git(*DIFF, "HEAD", "--", ".")
        for name in _git("ls-files", "--others", "--exclude-standard", "--", "*.py").splitlines():
            if (ROOT / name).resolve().parent in folders:  # not a virtual environment
                diff += _git(*DIFF, "--no-index", "--", "/dev/null", name, codes=(0, 1))
    except (OSError, subprocess.SubprocessError):
        return "no repository", ""
    return commit, diff


def write_code(config: SimpleNamespace, step: int, data: str = "") -> str:
    """Write the file of a launch that begins with this step, with the digest of its `data`; returns
    `describe_code` of it."""
    folder, (commit, diff) = Path(config.run_dir, "code"), code_version(config)
    if len(diff) > LONGEST_DIFF:
        names = "\n".join(re.findall("^diff --git .*", diff, re.MULTILINE))
        diff = f"the diff is left out: it has {len(diff)} characters\n{names}\n"
    digests = {name: digest_file(Path(name)) for name in reward_files(config)}
    head = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    head += f"{data}  the prompts and answers of {config.data.train_file}\n" * bool(data)
    folder.mkdir(exist_ok=True)
    for name, digest in digests.items():
        shutil.copyfile(name, folder / f"{digest[:12]}_{Path(name).name}")
    (folder / f"from_step_{step:05d}.patch").write_text(
        f"commit {commit}\n{head}\n{diff}", "utf-8", "surrogateescape")
    return describe_code(config.run_dir, step)


def describe_code(run_dir: str | Path, step: int) -> str:
    """The commit of the launch that made a step, which files differ from it, and what the run
    branches off; "" if unknown."""
    files = {int(file.stem.rpartition("_")[2]): file
             for file in Path(run_dir, "code").glob("from_step_*[0-9].patch")}
    if not (starts := [start for start in files if start <= step]):
        return ""
    text = files[max(starts)].read_text("utf-8", "replace")
    changed = re.findall(r"^diff --git a/(.*) b/", text, re.MULTILINE)
    parts = [f"with changes in {', '.join(changed)}" * bool(changed), describe_branch(run_dir)]
    return ", ".join(filter(None, [text.partition("\n")[0], *parts]))


def describe_branch(run_dir: str | Path) -> str:
    """Which run and step this run branches off; "" if it does not."""
    file = Path(run_dir, "branch.json")
    if not file.exists():
        return ""
    branch = json.loads(file.read_text("utf-8"))
    return f"branch of {Path(branch['checkpoint']).parent.parent.name} after step {branch['step']}"


def digest_file(path: Path) -> str:
    """Its SHA-256."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _git(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    command = ["git", "-c", "safe.directory=*", *arguments]  # in containers, another user's
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30)
    if result.returncode not in codes:
        raise subprocess.SubprocessError(result.stderr)
    return result.stdout.decode("utf-8", "surrogateescape")
