"""Weights that come from a hub at a pinned revision, or out of a folder on a host without network.

What is kept is safetensors and text. Where upstream publishes a pickle, it is converted once, in a process of its own
and with the loading of code turned off. Beside the files lies a manifest with the SHA-256 of each.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


class FetchError(Exception):
    """Weights cannot be fetched; the message says what to do."""


@dataclass(frozen=True)
class HubWeight:
    """One set of weights of the paper's size.

    Attributes:
        purpose: What it does here.
        repo: Repository on the hub; None where there is none, and the files are brought by hand.
        revision: Commit of the repository; None without one.
        files: Patterns of the files that are kept, beside the texts of its folder.
        licence: As stated by its makers.
        size_mb: Of what is kept, about, in megabytes.
        origin: Where to get what is brought by hand.
        converts: Whether its pickle is made safetensors by `models.convert_weights`.
    """

    purpose: str
    repo: str | None
    revision: str | None
    files: tuple[str, ...]
    licence: str
    size_mb: float
    origin: str = ""
    converts: bool = False

    @property
    def carrier(self) -> str:
        """Where it comes from, for a person."""
        return f"{self.repo}@{(self.revision or '')[:8]}" if self.repo else self.origin

    def identity(self, root: Path) -> str:
        """A digest over what it is: the commit, or for what came out of a folder the digests of its files."""
        manifest = _read_manifest(root)
        told = f"{self.repo}@{self.revision}" if self.repo else "absent"
        if manifest and not manifest["from_hub"]:
            told = json.dumps(manifest["files"], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def missing(self, root: Path) -> list[Path]:
        """Files that are not there, and patterns that no file matches, as of what an older table asked for.

        Without a manifest, the manifest itself.
        """
        manifest = _read_manifest(root)
        if not manifest:
            return [root / MANIFEST]
        absent = [name for name in manifest["files"] if not (root / name).is_file()]
        unmatched = [
            pattern
            for pattern in self._kept_patterns()
            if not any(_matches(name, pattern) for name in manifest["files"])
        ]
        return [root / name for name in (*absent, *unmatched)]

    def _kept_patterns(self) -> tuple[str, ...]:
        """Of the files as they are kept: a pickle that is converted has another ending."""
        if not self.converts:
            return self.files
        return (f"{Path(self.files[0]).stem}.safetensors", *self.files[1:])

    def fetch(self, name: str, root: Path, source: Path | None, report: Callable[[str], None], alone: bool) -> None:
        """Bring the files into `root`, whole or not at all.

        Args:
            name: The weights' name.
            root: Where they go.
            source: A folder to take them from: theirs, or one that holds it under `name` or the repository's name.
            report: Told what is being done.
            alone: Whether no other weights are asked for: only then may `source` itself hold their files, because
                those of several models have the same names.

        Raises:
            FetchError: They cannot be had.
        """
        root = root.resolve()
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{name}-") as scratch:
            folder = self._bring(name, source, Path(scratch), report, alone)
            made = Path(scratch) / "made"
            self._keep(name, folder, made)
            files = {path.relative_to(made).as_posix(): _digest(path) for path in sorted(made.rglob("*"))
                       if path.is_file()}  # fmt: skip
            manifest = {"from_hub": source is None, "files": files}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(root, ignore_errors=True)
            made.replace(root)

    def _bring(self, name: str, source: Path | None, scratch: Path, report: Callable[[str], None], alone: bool) -> Path:
        if source is not None:
            tried = [source / name, source / (self.repo or name).rpartition("/")[2], *([source] if alone else [])]
            found = next((path for path in tried if self._select(path)), None)
            if found is None:
                raise FetchError(f"{source} holds no {name}: expected {', '.join(self.files)} in {tried[0]}")
            return found
        if self.repo is None:
            raise FetchError(f"{name} is on no hub: {self.origin}; then `moviedreamer weights pull {name} --from DIR`")
        report(f"{name}: fetching {self.carrier} ({self.size_mb:.0f} MB, {self.licence})")
        from huggingface_hub import snapshot_download

        try:
            patterns = [*self.files, *TEXTS]
            snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns, local_dir=scratch / "hub")
        except Exception as error:  # the hub's own errors, the network's, the disk's
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FetchError(
                f"cannot fetch {self.repo} at {self.revision}: {first}; accept its licence on the hub and log in with "
                f"`hf auth login`, or bring the files and use `moviedreamer weights pull {name} --from DIR`"
            ) from error
        return scratch / "hub"

    def _select(self, folder: Path) -> list[Path]:
        """The files of a folder that are kept; none where a pattern is not matched."""
        if not folder.is_dir():
            return []
        wanted = [sorted(path for path in folder.glob(pattern) if path.is_file()) for pattern in self.files]
        if self.converts and not wanted[0]:  # converted before, by another host
            wanted[0] = sorted(folder.glob(self._kept_patterns()[0]))
        if not all(wanted):
            return []
        chosen = [path for some in wanted for path in some]
        texts: list[Path] = []
        if self.repo:  # tokenizers and settings, only where the weights' own files lie
            places = sorted({path.parent for path in chosen})
            texts = [path for place in places for text in TEXTS for path in sorted(place.glob(text))]
        kept = dict.fromkeys(path.relative_to(folder) for path in (*chosen, *texts))
        return [name for name in kept if name.name != MANIFEST and not name.name.startswith(".")]

    def _keep(self, name: str, folder: Path, made: Path) -> None:
        for chosen in self._select(folder):
            target = made / chosen
            target.parent.mkdir(parents=True, exist_ok=True)
            if chosen.suffix not in PICKLES:
                shutil.copyfile(folder / chosen, target)
            elif self.converts:
                _convert(name, folder / chosen, target.with_suffix(".safetensors"))
            else:
                raise FetchError(f"{folder / chosen} is a pickle, which may hold code: bring safetensors of {name}")


def _convert(name: str, source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "models.convert_weights", name, str(source), str(target)]
    place = {"cwd": Path(__file__).resolve().parents[1], "env": os.environ | {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}}
    done = subprocess.run(command, capture_output=True, text=True, **place)
    if done.returncode:
        raise FetchError(f"cannot convert {source}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")


def _read_manifest(root: Path) -> dict[str, Any]:
    """`from_hub`, and `files`: name to SHA-256; empty where there is none."""
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if {"from_hub", "files"} <= found.keys() else {}


def _matches(name: str, pattern: str) -> bool:
    """As `Path.glob` does: a star stays within its folder."""
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
