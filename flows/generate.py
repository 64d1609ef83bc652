"""A story in, a movie out: dream the tokens, render the pictures, animate the movie, evaluate.

Another system's pictures of a story are evaluated the same way.
"""

import io
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.pipeline import Pipeline
from models.script import FrameScript, ScriptError, Story, load_story, parse_story
from stages import animate, dream, evaluate, render
from stages.errors import StoryError, UsageError
from storage.artifacts import Artifact, Recipe, artifact_id, content_digest, read_rows

GENERATE_STAGES = (dream.SPEC, render.SPEC, animate.SPEC, evaluate.SPEC)
NEWEST_STORY = "story/newest"
RETOLD = "retold"
OF = "."
"""Between a system's name and the story's, in the subject of its pictures; no story's subject holds it."""


def story_subject(path: Path) -> str:
    """What the artifacts of a story are called."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "story"


def register_story(pipeline: Pipeline, path: Path) -> str:
    """Keep a story and the face pictures it names as an artifact; returns its subject.

    Raises:
        ScriptError: The story cannot be used.
    """
    story = load_story(path)
    subject = story_subject(path)
    values = story.model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        for character in values["characters"]:
            if character.get("face"):
                picture = path.parent / character["face"]
                character["face"] = f"face-{len(pictures):03d}{picture.suffix}"
                pictures.append(picture)
        return _keep_story(pipeline, subject, values, pictures, Path(folder))


def register_stories(pipeline: Pipeline, paths: Sequence[Path]) -> list[str]:
    """`register_story` for several; one that cannot be used fails by itself, unless it is the only one.

    Raises:
        ScriptError: None of them can be used.
        UsageError: Two of them would have the same subject.
    """
    named: dict[str, Path] = {}
    for path in paths:
        subject = story_subject(path)
        if subject in named:
            raise UsageError(f"{named[subject]} and {path} would both be called {subject!r}: rename one of them")
        named[subject] = path
    errors: dict[str, ScriptError] = {}
    for subject, path in named.items():
        try:
            register_story(pipeline, path)
        except ScriptError as error:
            errors[subject] = error
    if errors and len(errors) == len(named):
        raise next(iter(errors.values()))
    pipeline.failed |= {subject: ("story", str(error)) for subject, error in errors.items()}
    return [subject for subject in named if subject not in errors]


def retell_films(pipeline: Pipeline, film_ids: list[str]) -> str | None:
    """Make up a story from the films' own scripts: a few scenes, each a run of neighbouring keyframes of one shot.

    Returns:
        The story's subject, or None where no film has a script.
    """
    settings = pipeline.profile.generate
    scenes = [scene for film_id in film_ids for scene in _scenes(pipeline, film_id, settings.frames_per_scene)]
    chosen = _spread(scenes, settings.scenes)
    if not chosen:
        return None
    characters: dict[str, dict[str, Any]] = {}
    frames = []
    for shot, (film_id, rows) in enumerate(chosen):
        for row in rows:
            script = json.loads(row["script"])
            for character in script["characters"]:
                name = f"{character['identity']} of {film_id}"
                known = character.get("character_index") is not None
                characters.setdefault(
                    name,
                    {"identity": name, "description": character["description"]}
                    | ({"film": film_id, "character_index": character["character_index"]} if known else {}),
                )
                character["identity"] = name
                character["character_index"] = None
            frames.append(script | {"shot": shot})
    story = {"title": "Retold from the films' own scripts", "characters": list(characters.values()), "frames": frames}
    values = Story.model_validate(story).model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        return _keep_story(pipeline, RETOLD, values, [], Path(folder))


def _scenes(pipeline: Pipeline, film_id: str, frames: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """The first keyframes of each shot of a film, with their scripts."""
    scripts = pipeline.get("scripts", film_id)
    if scripts is None:
        return []
    shots: dict[int, list[dict[str, Any]]] = {}
    for row in read_rows(pipeline.workspace.store, scripts.tables):
        shots.setdefault(row["shot_index"], []).append(row)
    return [
        (film_id, rows[:frames]) for _, rows in sorted(shots.items()) if json.loads(rows[0]["script"])["scene_elements"]
    ]


def _spread(scenes: list[Any], count: int) -> list[Any]:
    """`count` scenes, evenly spread over all."""
    if len(scenes) <= count:
        return scenes
    return [scenes[i * len(scenes) // count] for i in range(count)]


def _keep_story(pipeline: Pipeline, subject: str, values: dict[str, Any], pictures: list[Path], folder: Path) -> str:
    path = folder / "story.json"
    path.write_text(json.dumps(values, indent=1, sort_keys=True))
    named = [("story.json", path), *((f"face-{i:03d}{p.suffix}", p) for i, p in enumerate(pictures))]
    _keep_files(pipeline, "story", subject, named)
    return subject


def register_references(pipeline: Pipeline, subject: str, pictures: Sequence[Path]) -> None:
    """Keep the reference pictures of a few-shot generation as an artifact.

    Raises:
        StoryError: A picture is not there.
    """
    for picture in pictures:
        if not picture.is_file():
            raise StoryError(f"reference picture {picture} does not exist: correct the path")
    if pictures:
        named = [(f"reference-{i:03d}{p.suffix}", p) for i, p in enumerate(pictures)]
        _keep_files(pipeline, "references", subject, named)


def subject_of(system: str, story: str) -> str:
    """What another system's artifacts of a story are called; no story's own name has a dot in it."""
    return f"{system}{OF}{story}"


def register_pictures(pipeline: Pipeline, story: str, place: Path, name: str) -> str:
    """Keep another system's pictures of a story as an artifact; returns its subject.

    Args:
        pipeline: The walk, which holds the story.
        story: The story's subject.
        place: A folder with one picture a frame, or a video.
        name: What the other system is called here.

    Raises:
        UsageError: The name or the pictures cannot be used.
    """
    from models.picture_files import PictureError, read_pictures

    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"the name {name!r} cannot be used: expected letters, digits, _ and -, such as seine")
    kept = pipeline.get("story", story)
    text = pipeline.workspace.store.path(kept.file("story.json")).read_text() if kept else ""
    told = parse_story(text, story)
    subject = subject_of(name, story)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.parquet"
        try:
            _write_pictures(path, told, read_pictures(place, len(told.frames)))
        except PictureError as error:
            raise UsageError(str(error)) from error
        _keep_files(pipeline, "pictures", subject, [(path.name, path)])
    return subject


def _write_pictures(path: Path, story: Story, pictures: Iterable[bytes]) -> None:
    """As the render stage writes them, a few at a time; what another system encoded stays as it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = _picture_rows(story, pictures)
    with pq.ParquetWriter(path, render.PICTURES_SCHEMA) as writer:
        while group := list(itertools.islice(rows, render.ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=render.PICTURES_SCHEMA))


def _picture_rows(story: Story, pictures: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    from PIL import Image

    told = zip(story.frames, story.shot_indices(), pictures, strict=True)
    for index, (frame, shot, picture) in enumerate(told):
        plain = FrameScript(characters=frame.characters, scene_elements=frame.scene_elements, plot=frame.plot)
        with Image.open(io.BytesIO(picture)) as opened:
            size = dict(zip(("width_px", "height_px"), opened.size, strict=True))
        about = {"frame_index": index, "shot_index": shot, "script": plain.model_dump_json(), "jpeg": picture}
        yield about | size


def score_pictures(pipeline: Pipeline, story: str, subject: str) -> None:
    """Evaluate another system's pictures of a story, beside the films and the faces that the story was made with."""
    inputs = {"pictures": [pipeline.get("pictures", subject)], "shards": pipeline.all("shards")}
    dream, kept = pipeline.workspace.catalog.current("dream", story), pipeline.get("story", story)
    if dream and kept and dream.recipe["inputs"].get("story") == [kept.digest]:
        inputs["dream"] = [dream]
    pipeline.step(evaluate.SPEC, [pipeline.work(evaluate.SPEC, subject, {k: v for k, v in inputs.items() if v})])


def _keep_files(pipeline: Pipeline, kind: str, subject: str, named: Sequence[tuple[str, Path]]) -> None:
    """Commit what the user brought: an artifact whose recipe is its own content."""
    catalog = pipeline.workspace.catalog
    files = tuple(pipeline.workspace.store.put(path, name) for name, path in named)
    digest = content_digest(files)
    recipe = Recipe(kind, 1, {}, {}, {kind: [digest]})
    artifact = catalog.find(kind, subject, recipe.fingerprint)
    if artifact is None:
        made = artifact_id(kind, subject, recipe.fingerprint)
        artifact = catalog.commit(
            Artifact(made, kind, subject, recipe.fingerprint, digest, {**recipe.__dict__}, files, inputs=())
        )
    pipeline.adopt(artifact)


def make_movies(pipeline: Pipeline, stories: Sequence[str], snapshot: str) -> None:
    """Dream, render, animate and evaluate stories with the models of a snapshot, all of them stage by stage."""
    catalog = pipeline.workspace.catalog
    for spec in GENERATE_STAGES:
        works = []
        for story in stories:
            inputs = {kind: _inputs(pipeline, kind, story, snapshot) for kind in spec.inputs}
            if all(inputs.values()):
                given = _inputs(pipeline, "references", story, snapshot) if spec is dream.SPEC else []
                works.append(pipeline.work(spec, story, inputs | ({"references": given} if given else {})))
        if works:
            pipeline.step(spec, works)
    if pipeline.runner is not None and stories and catalog.get_ref(NEWEST_STORY) != stories[-1]:
        catalog.set_ref(NEWEST_STORY, stories[-1])


def _inputs(pipeline: Pipeline, kind: str, story: str, snapshot: str) -> list[Artifact]:
    if kind == "shards":
        return pipeline.all("shards")
    found = pipeline.get(kind, story) or pipeline.get(kind, snapshot)
    return [found] if found else []
