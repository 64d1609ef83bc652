"""Fills the report from a workspace: reads the current artifacts, and only as much of them as the page shows."""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.commands import all_evaluations, read_evaluation
from flows.generate import NEWEST_STORY
from flows.ingest import NEWEST_SNAPSHOT
from flows.report import (
    CHARACTERS_SHOWN,
    FACES_SHOWN,
    FILMS_SHOWN,
    KEYFRAMES_SHOWN,
    RECONSTRUCTIONS_SHOWN,
    SCRIPTS_SHOWN,
    ArtifactRow,
    Box,
    Character,
    Film,
    GeneratedKeyframe,
    Keyframe,
    Reconstruction,
    ReportData,
    ScriptedKeyframe,
    build_report,
)
from flows.report_tables import lay_out_tables
from flows.workspace import Workspace
from storage.artifacts import Artifact, read_rows

Row = dict[str, Any]
MODELS = ("autoencoder", "renderer", "autoregressive")


def write_report(workspace: Workspace, out: Path) -> Path:
    """Gather what the workspace holds and write the page.

    Raises:
        OSError: The page cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    return build_report(gather(workspace), out)


def gather(workspace: Workspace) -> ReportData:
    """Everything that the page shows."""
    catalog = workspace.catalog
    views = [FilmView(workspace, row) for row in catalog.films()]
    shown = [view for view in views if view.artifact("keyframes")][:FILMS_SHOWN]
    failures = {row["subject"]: row["result"]["error"] for row in catalog.failures()}
    films = [view.film() for view in shown]
    films += [
        Film(v.film_id, v.uri, error=failures[v.film_id]) for v in views if v not in shown and v.film_id in failures
    ]
    models = {kind: _newest(workspace, kind, NEWEST_SNAPSHOT) for kind in MODELS}
    pictures, movie, evaluation = (_newest(workspace, k, NEWEST_STORY) for k in ("pictures", "movie", "evaluation"))
    movie_path = workspace.store.path(movie.file("movie.mp4")) if movie else None
    return ReportData(
        title="moviedreamer: films in, a movie out",
        films=films,
        characters=[c for view in shown for c in view.characters()][:CHARACTERS_SHOWN],
        scripts=[s for view in shown for s in view.scripts(-(-SCRIPTS_SHOWN // len(shown)))],
        reconstructions=_reconstructions(workspace, models["autoencoder"]),
        histories={
            f"train_{kind}": json.loads(workspace.store.path(model.file("history.json")).read_text())
            for kind, model in models.items()
            if model
        },
        generated=_generated(workspace, pictures),
        movie=movie_path.read_bytes() if movie_path else None,
        movie_name=str(movie_path or ""),
        evaluation=read_evaluation(workspace, evaluation) if evaluation else (),
        tables=lay_out_tables(scored) if (scored := all_evaluations(workspace)) else (),
        artifacts=[_artifact_row(artifact) for artifact in catalog.artifacts()],
        facts=_facts(workspace),
    )


class FilmView:
    """One film's current artifacts, read as far as the page shows them."""

    def __init__(self, workspace: Workspace, row: Row) -> None:
        self._workspace, self.film_id, self.uri = workspace, row["film_id"], row["uri"]

    def artifact(self, kind: str) -> Artifact | None:
        """The film's current artifact of a kind."""
        return self._workspace.catalog.current(kind, self.film_id)

    def _rows(self, kind: str) -> Iterator[Row]:
        artifact = self.artifact(kind)
        return read_rows(self._workspace.store, artifact.tables) if artifact else iter(())

    def _by_frame(self, kind: str) -> dict[int, list[Row]]:
        rows: dict[int, list[Row]] = defaultdict(list)
        for row in self._rows(kind):
            rows[row["frame_index"]].append(row)
        return rows

    def film(self) -> Film:
        """Contact sheet and counts."""
        keyframes = list(self._rows("keyframes"))
        people, faces = self._by_frame("people"), self._by_frame("faces")
        names = {(r["frame_index"], r["face_index"]): r["character_index"] for r in self._rows("identities")}
        sheet = [
            Keyframe(
                row["jpeg"],
                row["frame_index"],
                row["time_s"],
                row["shot_index"],
                [_box(p, f"{p['source']} {p['score']:.2f}") for p in people[row["frame_index"]]],
                [_box(f, _name(names.get((f["frame_index"], f["face_index"])))) for f in faces[row["frame_index"]]],
            )
            for row in _spread(keyframes, KEYFRAMES_SHOWN)
        ]
        kinds = ("keyframes", "people", "faces", "identities", "captions", "scripts")
        rejects = {
            kind: {reason: n for reason, n in artifact.counts.items() if reason != "ok"}
            for kind in kinds
            if (artifact := self.artifact(kind)) and any(reason != "ok" for reason in artifact.counts)
        }
        duration_s = keyframes[-1]["time_s"] if keyframes else None
        scripts = list(self._rows("scripts"))
        sentences, untraced = sum(len(r["captions"]) for r in scripts), sum(r["untraced"] for r in scripts)
        told = {"sentences": sentences, "untraced": untraced}
        return Film(self.film_id, self.uri, duration_s, sheet, len(keyframes), rejects, **told)

    def characters(self) -> list[Character]:
        """The film's characters, by screen time."""
        faces = {(r["frame_index"], r["face_index"]): r["jpeg"] for r in self._rows("faces")}
        members: dict[int, list[Row]] = defaultdict(list)
        for row in self._rows("identities"):
            if row["character_index"] is not None:
                members[row["character_index"]].append(row)
        found = []
        for index, rows in sorted(members.items()):
            best = sorted(rows, key=lambda r: (not r["representative"], r["distance"]))[:FACES_SHOWN]
            pictures = [faces[r["frame_index"], r["face_index"]] for r in best]
            frames = len({r["frame_index"] for r in rows})
            found.append(Character(self.film_id, _name(index), frames, pictures))
        return found

    def scripts(self, count: int) -> list[ScriptedKeyframe]:
        """Some keyframes beside their scripts."""
        chosen = {r["frame_index"]: json.loads(r["script"]) for r in _spread(list(self._rows("scripts")), count)}
        return [
            ScriptedKeyframe(self.film_id, r["frame_index"], r["jpeg"], chosen[r["frame_index"]])
            for r in self._rows("keyframes")
            if r["frame_index"] in chosen
        ]


def _box(row: Row, label: str) -> Box:
    return Box(row["x0"], row["y0"], row["x1"], row["y1"], label)


def _name(character_index: int | None) -> str:
    return "unclustered" if character_index is None else f"Person {character_index + 1}"


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly spread."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def _newest(workspace: Workspace, kind: str, ref: str) -> Artifact | None:
    subject = workspace.catalog.get_ref(ref)
    return workspace.catalog.current(kind, subject) if subject else None


def _reconstructions(workspace: Workspace, model: Artifact | None) -> list[Reconstruction]:
    if model is None:
        return []
    rows = _spread(list(read_rows(workspace.store, [model.file("samples.parquet")])), RECONSTRUCTIONS_SHOWN)
    return [
        Reconstruction(r["original"], r["reconstruction"], f"{r['film_id']} frame {r['frame_index']}") for r in rows
    ]


def _generated(workspace: Workspace, pictures: Artifact | None) -> list[GeneratedKeyframe]:
    if pictures is None:
        return []
    rows = read_rows(workspace.store, [pictures.file("pictures.parquet")])
    return [GeneratedKeyframe(r["frame_index"], r["shot_index"], r["jpeg"], json.loads(r["script"])) for r in rows]


def _artifact_row(artifact: Artifact) -> ArtifactRow:
    stage, number = artifact.recipe["stage"], artifact.recipe["version"]
    size = sum(f.bytes for f in artifact.files)
    rows = artifact.rows if artifact.tables else None
    return ArtifactRow(stage, number, artifact.subject, artifact.digest[:12], rows, size, artifact.seconds)


def _facts(workspace: Workspace) -> dict[str, str]:
    packages = ("moviedreamer", "torch", "diffusers", "transformers", "prefect", "ray")
    return {
        "workspace": str(workspace.folder),
        "snapshot": workspace.catalog.get_ref(NEWEST_SNAPSHOT) or "none",
        "story": workspace.catalog.get_ref(NEWEST_STORY) or "none",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    } | {name: version(name) for name in packages}
