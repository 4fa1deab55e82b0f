"""How the project is built: imports run one way, and files stay short enough to be read."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.house
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


def test_infra_imports_of_the_algorithm_only_types_equations_and_rewards():
    for path in ROOT.glob("infra/*.py"):
        top = {name for name in project_imports(path) if not name.startswith("infra")}
        assert top <= {"data_types", "losses", "reward"}, path.name


def test_losses_imports_nothing_of_the_project_but_types():
    assert project_imports(ROOT / "losses.py") == {"data_types"}
    assert project_imports(ROOT / "data_types.py") == set()


def test_processes_of_reward_functions_start_without_torch():
    code = "import sys, infra.reward_pool; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_state_is_always_typed():
    untyped = [name for name, node in functions() for argument in node.args.args
               if argument.arg == "state" and ast.unparse(argument.annotation or ast.Constant(0))
               != "TrainState"]
    assert untyped == []


@pytest.mark.parametrize("paths, limit", [
    (ALGORITHM[:1], 280), (ALGORITHM, 1250), (PRODUCT, 6560)],
    ids=["train_dapo.py", "the five files and their types", "all product code"])
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


def test_functions_have_at_most_sixty_lines_and_the_training_loop_forty_six():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert lengths["train_dapo.py:train"] <= 46
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_each_line_of_algorithm_1_stands_beside_what_does_it():
    """The statement that each number in the loop's comments belongs to contains the call."""
    source = (ROOT / "train_dapo.py").read_text()
    (train,) = [node for name, node in functions() if name == "train_dapo.py:train"]
    statements = [node for node in ast.walk(train) if isinstance(node, ast.stmt)]
    expected = {"1": "for step in", "2": "draw_prompts(", "3": "sync_weights(", "4": "generate(",
                "5": "score_responses(", "6": "keep_group(", "7": "while len(buffer) <",
                "8": "while len(buffer) <", "9": "compute_advantages(", "10": "for mini_batch in",
                "11": "update_policy("}
    found = {}
    for number, line in enumerate(source.splitlines(), 1):
        tags = re.search(r"# ([\d, ]+)(:|$)", line) if train.lineno < number <= train.end_lineno \
            else None
        for tag in tags[1].split(", ") if tags else ():
            assert tag not in found, tag
            (innermost, *_) = sorted((node for node in statements
                                      if node.lineno <= number <= node.end_lineno),
                                     key=lambda node: node.end_lineno - node.lineno)
            found[tag] = ast.get_source_segment(source, innermost)
    assert found.keys() == expected.keys()
    for tag, text in expected.items():
        assert text in found[tag], f"line {tag} of Algorithm 1 stands beside {found[tag]}"


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
        train_dapo.setup(load_config("config.yaml", []), train_dapo.transformers_engine,
                         training=False)
        print(gc.get_threshold() == usual)
        print(*sys.modules)"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    assert printed[0] == "0 False" and printed[-2] == "True"
    slow = {"datasets", "pyarrow", "pandas", "peft", "matplotlib", "math_verify", "scipy",
            "sklearn", "vllm", "transformers.trainer"}
    assert "torch" in printed[-1].split() and not slow & set(printed[-1].split())
