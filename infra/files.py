"""Writing files so that, whenever the process dies, they are whole."""

import shutil
from pathlib import Path


def write_atomic(file: Path, text: str) -> None:
    """Write a file: whenever the process dies, it has its old content or the new one."""
    tmp_path = file.with_name(f".{file.name}.partial")
    tmp_path.write_text(text, encoding="utf-8")
    tmp_path.replace(file)


def replace_dir(tmp_path: Path, path: Path) -> None:
    """Move a complete directory to `path`; an older one there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    tmp_path.rename(path)
