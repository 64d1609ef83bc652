"""Pairwise F1 of the characters that the faces and identities stages find in a film of known people.

    python benchmarks/identities.py FILM LABELS.json [--every-n-frames 10] [--json]

LABELS.json lists shots `{"start", "end" (exclusive), "identity" or null}`. Over all pairs of sampled frames that show a
known person: a pair is positive when both show the same person, and predicted when the largest faces of both have the
same character. A frame whose face is not found or not clustered is predicted to match nothing, so it costs recall.
Frames of no shot (mixed, in a dissolve) are left out. A face in a shot without a person counts as a person of its own.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.faces import Faces, FacesConfig
from stages.identities import Identities, IdentitiesConfig
from stages.people import People, PeopleConfig
from stages.spec import Ok, Outcome, Row

DLIB_THRESHOLD = 0.5  # what dlib's own face clustering example uses


def read_keyframes(film: Path, every_n_frames: int) -> Iterator[Row]:
    """Decode every frame and keep each n-th as a keyframe row."""
    import av
    import cv2

    with av.open(str(film)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % every_n_frames == 0:
                _, jpeg = cv2.imencode(".jpg", frame.to_ndarray(format="bgr24"), [cv2.IMWRITE_JPEG_QUALITY, 95])
                yield {"film_id": film.stem, "frame_index": index, "jpeg": jpeg.tobytes()}


def rows_of(outcomes: Iterator[Outcome]) -> list[Row]:
    """The rows of all items that worked."""
    return [row for outcome in outcomes if isinstance(outcome, Ok) for row in outcome.rows]


def find_shot(labels: dict[str, Any], frame_index: int) -> dict[str, Any] | None:
    """The labelled shot that holds a frame; None for a mixed frame."""
    return next((shot for shot in labels["shots"] if shot["start"] <= frame_index < shot["end"]), None)


def pair_counts(known: list[str], found: list[int | None]) -> tuple[int, int, int]:
    """Pairs that are predicted and right, predicted, and positive."""
    pairs = list(combinations(range(len(known)), 2))
    predicted = [found[a] is not None and found[a] == found[b] for a, b in pairs]
    positive = [known[a] == known[b] for a, b in pairs]
    return int(np.sum(np.logical_and(predicted, positive))), sum(predicted), sum(positive)


def cluster_with_dlib(faces: list[Row]) -> list[Row]:
    """Rows as of the identities stage, from dlib's own clustering of the same embeddings at its usual threshold."""
    import dlib

    vectors = [dlib.vector(np.asarray(face["identity"], float)) for face in faces]
    labels = dlib.chinese_whispers_clustering(vectors, DLIB_THRESHOLD)
    return [
        {"frame_index": face["frame_index"], "face_index": face["face_index"], "character_index": label}
        for face, label in zip(faces, labels, strict=True)
    ]


def score(clustered: list[Row], keyframes: list[Row], faces: list[Row], labels: dict[str, Any]) -> dict[str, Any]:
    """Compare clustered faces with the labels."""
    character = {(row["frame_index"], row["face_index"]): row["character_index"] for row in clustered}
    known, found, faceless = [], [], 0
    for keyframe in keyframes:
        index = keyframe["frame_index"]
        shot = find_shot(labels, index)
        shown = [face for face in faces if face["frame_index"] == index]
        if shot is None or (shot["identity"] is None and not shown):
            continue
        largest = max(shown, key=lambda face: (face["x1"] - face["x0"]) * (face["y1"] - face["y0"]), default=None)
        known.append(shot["identity"] or f"nobody at {index}")
        found.append(character[index, largest["face_index"]] if largest else None)
        faceless += largest is None
    right, predicted, positive = pair_counts(known, found)
    return {
        "f1": round(2 * right / max(predicted + positive, 1), 4),
        "precision": round(right / max(predicted, 1), 4),
        "recall": round(right / max(positive, 1), 4),
        "compared": len(known),
        "without_face": faceless,
        "unclustered": sum(label is None for label in found) - faceless,
        "persons": len(set(known)),
        "characters": len({label for label in character.values() if label is not None}),
    }


def measure(film: Path, labels: dict[str, Any], every_n_frames: int) -> dict[str, Any]:
    """Find faces with the stages' default settings, then cluster them as the stage does and as dlib does."""
    keyframes = list(read_keyframes(film, every_n_frames))
    people = rows_of(People(PeopleConfig())(keyframes=keyframes))
    faces = rows_of(Faces(FacesConfig())(keyframes=keyframes, people=people))
    stage = Identities(IdentitiesConfig())
    started = time.perf_counter()
    theirs = cluster_with_dlib(faces)
    between = time.perf_counter()
    ours = rows_of(stage(faces=faces))
    peer_s, ours_s = between - started, time.perf_counter() - between
    peer = score(theirs, keyframes, faces, labels)
    return {
        "ratio": round(peer_s / ours_s, 3),
        "peer": f"dlib's chinese_whispers_clustering at {DLIB_THRESHOLD}",
        "same_faces": len(theirs) == len(ours) == len(faces),
        **score(ours, keyframes, faces, labels),
        **{f"peer_{name}": peer[name] for name in ("f1", "precision", "recall", "characters")},
        "every_n_frames": every_n_frames,
        "keyframes": len(keyframes),
        "faces": len(faces),
        "peer_s": round(peer_s, 4),
        "ours_s": round(ours_s, 4),
    }


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path)
    parser.add_argument("labels", type=Path, help="JSON file of shots and who is in them")
    parser.add_argument("--every-n-frames", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    call = parser.parse_args()
    result = measure(call.film, json.loads(call.labels.read_text()), call.every_n_frames)
    if not call.json:
        print(
            f"F1 {result['f1']} over {result['compared']} frames: {result['persons']} persons, "
            f"{result['characters']} characters, {result['unclustered']} faces unclustered"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
