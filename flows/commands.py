"""What each command does, as a walk over a pipeline: the same walk plans and computes."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.baseline import make_baseline
from flows.generate import (
    NEWEST_STORY,
    OF,
    make_movies,
    register_pictures,
    register_references,
    register_stories,
    register_story,
    retell_films,
    score_pictures,
    subject_of,
)
from flows.ingest import NEWEST_SNAPSHOT, ingest_films, pack_shards
from flows.model_registry import adopt_model, champion, choose_champion, get_model, register_model
from flows.pipeline import Pipeline
from flows.snapshots import find_snapshot
from flows.sources import Film, expand, resolve
from flows.train import adopt_snapshot, train_models
from flows.workspace import Workspace
from stages.errors import FilmError, MissingInputError, UsageError
from storage.artifacts import Artifact

HERE = "this workspace"
"""Who made the pictures of a story that was generated here."""


@dataclass(frozen=True)
class Request:
    """What a command was asked for.

    Attributes:
        command: `run`, `ingest`, `train`, `retrain`, `generate`, `evaluate`, `score_pictures` or `baseline`.
        films: Files, folders, URLs or catalogues, for `run` and `ingest`.
        story: A story file, for `baseline` and, if given, `run` and `score_pictures`.
        out: Where the movie goes; of several stories, the folder of their movies.
        references: Pictures whose style and people a generation follows (few-shot).
        snapshot: What to train on, by name; the newest where None.
        model: What to generate with, by name; the champion where None, and where there is none the newest snapshot's.
        pictures: Another system's pictures of the story, for `score_pictures`: a folder or a video.
        name: What that system is called.
        first: The picture that a `baseline` starts from, where its system takes one.
        stories: Story files, for `generate`.
    """

    command: str
    films: tuple[str, ...] = ()
    story: Path | None = None
    out: Path | None = None
    references: tuple[Path, ...] = ()
    snapshot: str | None = None
    model: str | None = None
    pictures: Path | None = None
    name: str | None = None
    first: Path | None = None
    stories: tuple[Path, ...] = ()


@dataclass
class Walked:
    """What came of a walk, for the caller to print."""

    pipeline: Pipeline
    movies: list[Path] = field(default_factory=list)
    decision: dict[str, Any] | None = None

    @property
    def movie(self) -> Path | None:
        """The last of the movies."""
        return self.movies[-1] if self.movies else None

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        pipeline = self.pipeline
        computed, reused = Counter(), Counter()
        for report in pipeline.reports:
            computed[report.stage] += len(report.done)
            reused[report.stage] += report.reused
        return {
            "fresh": pipeline.fresh,
            "computed": dict(computed),
            "reused_items": {stage: count for stage, count in reused.items() if count},
            "failed": [
                {"subject": subject, "stage": stage, "error": error}
                for subject, (stage, error) in sorted(pipeline.failed.items())
            ],
            "movie": str(self.movie) if self.movie else None,
            "movies": [str(movie) for movie in self.movies],
            "decision": self.decision,
        }


def walk(pipeline: Pipeline, request: Request) -> Walked:
    """Take a pipeline through everything that a command asks for.

    Raises:
        UsageError: A film or story named in the request cannot be used at all.
        MissingInputError: An earlier command has to come first.
    """
    walked = Walked(pipeline)
    match request.command:
        case "ingest":
            _walk_films(pipeline, request.films)
        case "train" | "retrain":
            snapshot = _adopt_snapshot(pipeline, request.snapshot)
            train_models(pipeline, snapshot)
            candidate = register_model(pipeline, snapshot)
            if candidate and request.command == "retrain":
                walked.decision = choose_champion(pipeline, candidate, snapshot)
        case "generate" | "evaluate":
            snapshot = _adopt_models(pipeline, request.model)
            stories = register_stories(pipeline, request.stories) if request.stories else [_adopt_story(pipeline)]
            _walk_stories(walked, request, stories, snapshot)
        case "score_pictures":
            newest = pipeline.workspace.catalog.get_ref(NEWEST_SNAPSHOT)
            if newest is not None:
                adopt_snapshot(pipeline, newest)
            story = register_story(pipeline, request.story) if request.story else _adopt_story(pipeline)
            subject = register_pictures(pipeline, story, request.pictures or Path(), request.name or "")
            score_pictures(pipeline, story, subject)
        case "baseline":
            _walk_baseline(walked, request)
        case "run":
            film_ids, packed = _walk_films(pipeline, request.films)
            if packed is not None:
                train_models(pipeline, packed)
                told = register_story(pipeline, request.story) if request.story else retell_films(pipeline, film_ids)
                if told is not None:
                    _walk_stories(walked, request, [told], packed)
    return walked


def _walk_stories(walked: Walked, request: Request, stories: list[str], snapshot: str) -> None:
    pipeline = walked.pipeline
    for story in stories:
        register_references(pipeline, story, request.references)
    make_movies(pipeline, stories, snapshot)
    for story in stories:
        out = request.out / f"{story}.mp4" if request.out and len(request.stories) > 1 else request.out
        _deliver(walked, story, out)


def _walk_baseline(walked: Walked, request: Request) -> None:
    pipeline = walked.pipeline
    if snapshot := pipeline.workspace.catalog.get_ref(NEWEST_SNAPSHOT):
        adopt_snapshot(pipeline, snapshot)  # the films that pictures are compared with
    if request.story is None:
        raise UsageError("a baseline needs a story: name one with --story STORY.json")
    subject = make_baseline(pipeline, register_story(pipeline, request.story), request.first)
    _deliver(walked, subject, request.out)


def _adopt_models(pipeline: Pipeline, name: str | None) -> str:
    """Bring the model of a name into the walk, or the champion; before there is one, train on the newest snapshot."""
    model = get_model(pipeline.workspace, name) if name else champion(pipeline.workspace)
    if model is not None:
        return adopt_model(pipeline, model)
    snapshot = _adopt_snapshot(pipeline, None)
    train_models(pipeline, snapshot)
    return snapshot


def _walk_films(pipeline: Pipeline, names: tuple[str, ...]) -> tuple[list[str], str | None]:
    workspace = pipeline.workspace
    films: list[Film] = []
    for source in expand(names):
        try:
            films.append(resolve(source, workspace.catalog, workspace.folder / "cache"))
        except FilmError as error:
            pipeline.failed[source.film_id] = ("source", str(error))
    ingest_films(pipeline, films)
    return [film.film_id for film in films], pack_shards(pipeline)


def _adopt_snapshot(pipeline: Pipeline, name: str | None) -> str:
    if name is not None:
        snapshot: str | None = find_snapshot(pipeline.workspace, name)
    else:
        snapshot = pipeline.workspace.catalog.get_ref(NEWEST_SNAPSHOT)
    if snapshot is None or not adopt_snapshot(pipeline, snapshot):
        raise MissingInputError(
            f"workspace {pipeline.workspace.folder} holds no films yet: run `moviedreamer ingest FILM...` first"
        )
    return snapshot


def _adopt_story(pipeline: Pipeline) -> str:
    """The story of the newest generation."""
    story = pipeline.workspace.catalog.get_ref(NEWEST_STORY)
    artifact = pipeline.workspace.catalog.current("story", story) if story else None
    if artifact is None:
        raise MissingInputError("nothing was generated yet: run `moviedreamer generate STORY.json` first")
    pipeline.adopt(artifact)
    return artifact.subject


def _deliver(walked: Walked, subject: str, out: Path | None) -> None:
    """Copy a movie to where the user wants it."""
    movie = walked.pipeline.get("movie", subject)
    if movie is None:
        return
    source = walked.pipeline.workspace.store.path(movie.file("movie.mp4"))
    walked.movies.append(out or source)
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.is_file() or out.stat().st_size != source.stat().st_size or out.read_bytes() != source.read_bytes():
        temporary = out.with_name(f".{out.name}.part")
        shutil.copyfile(source, temporary)
        temporary.replace(out)


def evaluation_rows(workspace: Workspace, system: str | None = None, story: str | None = None) -> list[dict[str, Any]]:
    """The numbers of a story's pictures.

    Args:
        workspace: Whose evaluations.
        system: Who made the pictures; None for this workspace's own models.
        story: Its subject; None for the newest that the system told.
    """
    catalog = workspace.catalog
    if system is None:
        subjects = [story or catalog.get_ref(NEWEST_STORY)]
    elif story is not None:
        subjects = [subject_of(system, story)]
    else:
        subjects = [s for s in catalog.current_digests("evaluation") if s.rpartition(OF)[0] == system]
    found = [artifact for s in subjects if s and (artifact := catalog.current("evaluation", s))]
    return read_evaluation(workspace, max(found, key=lambda artifact: artifact.created_at)) if found else []


def all_evaluations(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    """Who made which story's pictures, and the numbers of them."""
    found = {}
    for subject in sorted(workspace.catalog.current_digests("evaluation")):
        artifact = workspace.catalog.current("evaluation", subject)
        if artifact is not None:
            system, _, story = subject.rpartition(OF)
            found[f"{system or HERE} ({story})"] = read_evaluation(workspace, artifact)
    return found


def read_evaluation(workspace: Workspace, artifact: Artifact) -> list[dict[str, Any]]:
    """The numbers in an evaluation."""
    return json.loads(workspace.store.path(artifact.file("evaluation.json")).read_text())
