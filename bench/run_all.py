"""Measure again what RESULTS.md says, and write it there.

    python bench/run_all.py [--only waste scaling] [--list]

RESULTS.md is the list: below each command stands, between two comments, what it printed and where.
This runs the commands one after the other (never two at once: they would slow each other), and puts
in what they print now; all else on that page stays. A command that fails leaves its section as it
is. Exits 1 where one failed, or missed its goal."""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "bench" / "RESULTS.md"
SECTION = re.compile(r"```bash\n([^\n]+)\n```\n\n<!-- printed -->.*?<!-- end -->", re.DOTALL)


def circumstances() -> str:
    """What a figure depends on besides the code: commit, date, machine, versions."""
    import torch
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.strip()
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        name = re.search(r"model name\s*: (.*)", info)
        processor = name.group(1) if name else platform.processor()
        machine = f"{os.cpu_count()} cores, {processor}, no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers",
                                                                "accelerate"))
    python = platform.python_version()
    return f"Commit {commit}, {date.today()}; {machine}; Python {python}, {packages}."


def measure(command: str) -> tuple[str, bool]:
    """What a command prints, from its first table on, if it has one; and whether it reached its
    goal. Raises OSError if it failed."""
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [sys.executable, *words[len(settings) + 1:]]  # its `python` is this one
    result = subprocess.run(words, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE,
                            text=True, check=False)
    table = ("\n" + result.stdout).find("\n|")
    printed = result.stdout[max(table, 0):]
    if "goal" not in printed.strip().rpartition("\n")[2]:
        raise OSError(f"{command}: exit code {result.returncode} without a line about its goal")
    return printed.strip(), result.returncode == 0


def main() -> None:
    """Run, and rewrite the page after each command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the commands to run")
    parser.add_argument("--list", action="store_true", help="say which there are")
    args = parser.parse_args()
    commands = [command for command in SECTION.findall(PAGE.read_text(encoding="utf-8"))
                if any(part in command for part in args.only)]
    if args.list or not commands:
        sys.exit("\n".join(commands) or f"error: no command has {' or '.join(args.only)} in it: "
                 "see --list")
    outcomes, where = [], circumstances()
    for command in tqdm(commands, desc="benchmarks"):
        try:
            printed, reached = measure(command)
        except OSError as error:
            outcomes.append((False, f"FAILED {error}"))
            continue
        table, _, goal = printed.rpartition("\n")
        goal += "." if "no goal" in goal else f": {'reached' if reached else '**missed**'}."
        outcomes.append((reached, f"{command}\n    {goal}"))
        section = (f"```bash\n{command}\n```\n\n"
                   f"<!-- printed -->\n{table.strip()}\n\n{goal}\n\n{where}\n<!-- end -->")
        page = PAGE.read_text(encoding="utf-8")
        (before,) = (match[0] for match in SECTION.finditer(page) if match[1] == command)
        PAGE.write_text(page.replace(before, section), encoding="utf-8")
    print("\n".join(text for _, text in outcomes))
    sys.exit(not all(reached for reached, _ in outcomes))


if __name__ == "__main__":
    main()
