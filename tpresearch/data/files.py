"""Which local files a corpus is made of, and by what names its documents are known."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

from tpresearch.config.errors import ConfigError

# Which of these are there depends on who built this Python; without them the corpus depends on it less.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}
EMBEDDED: dict[str, object] = {"data": "pystdlib", "data.path": None}


def python_files(with_torch: bool) -> list[tuple[str, Path]]:
    """Source files of this Python's standard library, and of the installed torch: (name, path), by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = _python_files_below(library, library)
    if with_torch:
        spec = importlib.util.find_spec("torch")  # finds without importing
        assert spec, "tpresearch depends on torch"
        torch = Path(str(spec.origin)).parent
        files += _python_files_below(torch, torch.parent)
    if not files:
        raise ConfigError(
            "data.source",
            "pystdlib",
            f"this Python has no source files in {library}",
            "data=text with a path of one's own",
        )
    return files


def _python_files_below(folder: Path, root: Path) -> list[tuple[str, Path]]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths = [Path(where, name) for name in names if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def expand(path: Any) -> list[Path]:
    """The files that `data.path` names (a file, a glob with `**` or not, or a list of them), sorted.

    Raises:
        ConfigError: for one that names nothing, names a folder, cannot be read, or when all are empty.
    """
    legal = "a file, a glob such as 'texts/**/*.txt', or a list of them"
    patterns = path if isinstance(path, list | tuple) else [path]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError("data.path", path, "no file is named", legal, EMBEDDED)
    files: set[Path] = set()
    for pattern in patterns:
        local = os.path.expanduser(pattern)
        if os.path.isdir(local):
            inside: dict[str, object] = {"data.path": f"'{pattern.rstrip('/')}/**/*'"}
            raise ConfigError("data.path", pattern, "is a folder", legal, inside)
        if os.path.exists(local):
            files.add(Path(local))
            continue
        matches = [Path(match) for match in glob.glob(local, recursive=True) if os.path.isfile(match)]
        if not matches:
            why = "matches no file" if glob.has_magic(local) else "there is no such file"
            raise ConfigError("data.path", pattern, f"{why} (seen from {os.getcwd()})", legal, EMBEDDED)
        files.update(matches)
    for file in files:
        if not os.access(file, os.R_OK):
            raise ConfigError(
                "data.path", file, "may not be read", f"a file readable by this user, {os.getuid()}"
            )
    if not any(file.stat().st_size for file in files):
        many = "is empty" if len(files) == 1 else f"all {len(files)} files are empty"
        raise ConfigError("data.path", path, many, "files with text in them", EMBEDDED)
    return sorted(files)


def named(files: list[Path]) -> list[tuple[str, Path]]:
    """Each file by its path below the folder that holds them all: moving that folder renames nothing."""
    absolute = [Path(os.path.abspath(file)) for file in files]
    root = os.path.commonpath([file.parent for file in absolute])
    return [(file.relative_to(root).as_posix(), file) for file in absolute]


def looks_like_hub_id(path: str) -> bool:
    """Whether a path that is not there could be `name` or `owner/name` on the Hugging Face hub."""
    name = r"[A-Za-z0-9][\w.-]*"
    return bool(re.fullmatch(rf"{name}(/{name})?", path)) and not path.endswith(
        (".json", ".jsonl", ".parquet")
    )
