"""Precision and recall of the people stage against COCO-style annotations.

    python benchmarks/people.py ANNOTATIONS.json IMAGES_DIR [--json]

Counts persons whose box covers at least 4% of the picture. A detection is right when it overlaps such a person by an
intersection over union of at least 0.5; each person is found at most once. Smaller persons and crowds are ignored: not
missed when not found, and a detection that is one of them (half of the detection inside a crowd) is not wrong.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import weights
from models.person_detector import SIDE_PX, SSDLite
from models.regions import areas, contained, overlaps, suppress
from stages.people import People, PeopleConfig

MIN_COVER = 0.04
MIN_IOU = 0.5


def read_persons(path: Path) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """The pictures of a COCO file, and the person annotations of each picture's id."""
    coco = json.loads(path.read_text())
    (person,) = (category["id"] for category in coco["categories"] if category["name"] == "person")
    persons: dict[int, list[dict[str, Any]]] = {picture["id"]: [] for picture in coco["images"]}
    for annotation in coco["annotations"]:
        if annotation["category_id"] == person:
            persons[annotation["image_id"]].append(annotation)
    return coco["images"], persons


def judge(boxes: np.ndarray, annotations: list[dict[str, Any]], picture_area: float) -> tuple[list[bool | None], int]:
    """Whether each box (highest score first) is right (True), wrong (False) or ignored (None); persons to find."""
    truth = np.array([annotation["bbox"] for annotation in annotations], float).reshape(-1, 4)
    truth[:, 2:] += truth[:, :2]
    crowd = np.array([bool(annotation["iscrowd"]) for annotation in annotations], bool)
    wanted = ~crowd & (areas(truth) >= MIN_COVER * picture_area)
    overlap, inside = overlaps(boxes, truth), contained(boxes, truth)
    free, verdicts = wanted.copy(), []
    for i in range(len(boxes)):
        hits = np.flatnonzero(free & (overlap[i] >= MIN_IOU))
        if len(hits):
            free[hits[overlap[i, hits].argmax()]] = False
            verdicts.append(True)
        else:
            small = (~wanted & ~crowd & (overlap[i] >= MIN_IOU)).any()
            verdicts.append(None if small or (crowd & (inside[i] >= 0.5)).any() else False)
    return verdicts, int(wanted.sum())


class OnePass:
    """The same network over the whole picture once, as its authors use it: boxes at a score, highest first.

    Args:
        min_score: As of the stage.
    """

    def __init__(self, min_score: float) -> None:
        import torch

        network = SSDLite(weights.file("ssdlite_person")).eval()
        self._network = network.to(memory_format=torch.channels_last)
        self._min_score = min_score

    def __call__(self, image: np.ndarray) -> np.ndarray:
        import cv2
        import torch

        pixels = torch.from_numpy(cv2.resize(image, (SIDE_PX, SIDE_PX))).float().div(255)[None].permute(0, 3, 1, 2)
        with torch.inference_mode():
            boxes, scores = (output[0].numpy() for output in self._network(pixels))
        boxes, scores = boxes[scores >= self._min_score], scores[scores >= self._min_score]
        boxes = boxes[suppress(boxes, scores, 0.5)]
        return np.clip(boxes, 0, 1) * np.array([image.shape[1], image.shape[0]] * 2, np.float32)


def read_picture(path: Path) -> np.ndarray:
    """RGB uint8 [height, width, 3]."""
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise SystemExit(f"{path}: cannot be read as a picture")
    return image


def count(find: Callable[[np.ndarray], np.ndarray], annotations: Path, images: Path) -> dict[str, Any]:
    """Run a detector over all pictures and judge what it finds."""
    pictures, persons = read_persons(annotations)
    counts, wanted, seconds = {True: 0, False: 0, None: 0}, 0, 0.0
    for picture in pictures:
        image = read_picture(images / picture["file_name"])
        started = time.perf_counter()
        boxes = find(image)
        seconds += time.perf_counter() - started
        verdicts, present = judge(boxes, persons[picture["id"]], picture["width"] * picture["height"])
        wanted += present
        for verdict in verdicts:
            counts[verdict] += 1
    return {
        "precision": round(counts[True] / max(counts[True] + counts[False], 1), 4),
        "recall": round(counts[True] / max(wanted, 1), 4),
        "pictures": len(pictures),
        "persons": wanted,
        "right": counts[True],
        "wrong": counts[False],
        "ignored": counts[None],
        "ms_per_picture": round(seconds / len(pictures) * 1000, 1),
    }


def measure(annotations: Path, images: Path) -> dict[str, Any]:
    """Measure the stage's detection with its default settings, and the peer's on the same pictures in the same run."""
    config = PeopleConfig()
    stage = People(config)
    peer = count(OnePass(config.min_score), annotations, images)
    ours = count(lambda image: stage.find(image)[0], annotations, images)
    return {
        "ratio": round(peer["ms_per_picture"] / ours["ms_per_picture"], 3),
        "peer": "one pass of the same network over the whole picture, no mirrored or closer look, no faces",
        "same_pictures": ours["pictures"] == peer["pictures"] and ours["persons"] == peer["persons"],
        **ours,
        **{f"peer_{name}": peer[name] for name in ("precision", "recall", "ms_per_picture")},
        "threshold": config.min_score,
        "iou": MIN_IOU,
        "min_cover": MIN_COVER,
    }


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="COCO-style JSON file")
    parser.add_argument("images", type=Path, help="folder of the pictures it names")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    call = parser.parse_args()
    result = measure(call.annotations, call.images)
    if not call.json:
        print(
            f"{result['right']} of {result['persons']} persons found, {result['wrong']} wrong boxes, "
            f"in {result['pictures']} pictures at score {result['threshold']}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
