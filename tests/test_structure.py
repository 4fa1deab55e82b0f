"""How the project is built: imports run one way, and files stay short enough to be read."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALGORITHM = [ROOT / f"{name}.py" for name in
             ("train_dapo", "data_types", "sampling", "rollout", "reward", "losses")]
SCRIPTS = [ROOT / "evaluate.py", ROOT / "plot.py"]
PRODUCT = [*ALGORITHM, *SCRIPTS, *sorted(ROOT.glob("infra/*.py")), *sorted(ROOT.glob("toy/*.py"))]
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PRODUCT}


def project_imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & NAMES.keys()


def count_lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_nothing_imports_train_dapo():
    """But the tests and the measurements of it."""
    assert [path.name for path in PRODUCT if "train_dapo" in project_imports(path)] == []


def test_imports_have_no_cycle():
    imports = {name: project_imports(path) for name, path in NAMES.items()}
    assert "infra.setup" in imports["train_dapo"]
    for name, direct in imports.items():
        reached, unseen = set(), set(direct)
        while unseen:
            reached |= unseen
            unseen = set().union(*(imports[other] for other in unseen)) - reached
        assert name not in reached, f"{name} imports itself, through some of {sorted(reached)}"


def test_a_name_is_defined_once():
    """A reader who searches for a function finds one."""
    names = Counter()
    for path in PRODUCT:
        names.update(node.name for node in ast.parse(path.read_text()).body
                     if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == ["main"]


def test_losses_imports_nothing_of_the_project():
    assert project_imports(ROOT / "losses.py") == set()


def test_reward_imports_no_torch():
    code = "import sys, reward; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("paths, limit", [
    (ALGORITHM[:1], 320), (ALGORITHM, 1200), (PRODUCT, 5440)],
    ids=["train_dapo.py", "the five files", "all product code"])
def test_the_code_stays_short(paths, limit):
    assert count_lines(*paths) <= limit


def test_no_line_has_more_than_a_hundred_columns():
    long = []
    for path in [*PRODUCT, ROOT / "config.yaml"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 100:
                long.append(f"{path.relative_to(ROOT)}:{number}")
    assert long == []


def functions() -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found.append((f"{path.name}:{node.name}", node))
    return found


def test_no_function_but_the_training_loop_is_longer_than_sixty_lines():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert lengths.pop("train_dapo.py:train") <= 90
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_the_training_loop_names_every_line_of_algorithm_1():
    source = (ROOT / "train_dapo.py").read_text()
    (loop,) = [node for name, node in functions() if name == "train_dapo.py:train"]
    numbers = set()
    for comment in re.findall(r"# ([\d, ]+):", ast.get_source_segment(source, loop)):
        numbers |= set(comment.split(", "))
    assert numbers == {str(number) for number in range(1, 12)}


def test_the_limit_on_spinning_threads_is_set_before_torch_is_loaded():
    """OpenMP reads it when it is loaded; the user's own setting stays."""
    code = ("import os, sys, infra; assert 'torch' not in sys.modules; "
            "print(os.environ.get('GOMP_SPINCOUNT'))")
    clean = {key: value for key, value in os.environ.items()
             if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for extra, expected in (({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                            ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")):
        printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | extra,
                                 capture_output=True, text=True, check=True).stdout
        assert printed.strip() == expected
    for script in ("train_dapo.py", "evaluate.py"):
        imports = [line for line in (ROOT / script).read_text().splitlines()
                   if re.match(r"(import|from) (infra|torch|accelerate|transformers)", line)]
        assert "infra" in imports[0].split()[1]


def test_a_start_imports_nothing_that_may_not_be_needed_and_does_not_look_for_garbage_meanwhile():
    """Once all is imported, Python's garbage collector works as usual."""
    code = """if True:
        import gc, sys
        usual = gc.get_threshold()
        import train_dapo
        from infra.config import load_config
        print(gc.get_stats()[2]["collections"], gc.get_threshold() == usual)
        train_dapo.setup(load_config("config.yaml", []), training=False)
        print(gc.get_threshold() == usual)
        print(*sys.modules)"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    assert printed[0] == "0 False" and printed[-2] == "True"
    slow = {"datasets", "pyarrow", "pandas", "peft", "matplotlib", "math_verify", "scipy",
            "sklearn", "vllm", "transformers.trainer"}
    assert "torch" in printed[-1].split() and not slow & set(printed[-1].split())
