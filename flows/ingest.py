"""Films in, a snapshot of training shards out. Read top to bottom, this is the list of stages."""

from collections.abc import Collection, Iterable, Sequence

from flows.pipeline import COMPUTABLE, Pipeline
from flows.sources import Film
from stages import captions, faces, identities, keyframes, people, scripts, shards
from stages.shards import shard_of
from stages.spec import StageSpec
from storage.artifacts import digest_json

FILM_STAGES = (
    keyframes.SPEC,
    people.SPEC,
    faces.SPEC,
    identities.SPEC,
    captions.SPEC,
    scripts.SPEC,
)
HELDOUT_SPLITS = {"test", "val", "valid", "validation", "heldout"}
NEWEST_SNAPSHOT = "snapshot/newest"


def ingest_films(
    pipeline: Pipeline,
    films: Iterable[Film],
    stages: Sequence[StageSpec] = FILM_STAGES,
    states: Collection[str] = COMPUTABLE,
) -> None:
    """Take films through every stage that looks at one film alone.

    Args:
        pipeline: The walk.
        films: What to take through it.
        stages: Stages to compute; a stage that is left out has to be fresh, or what follows from it waits.
        states: What to compute: `missing`, `stale` or both.
    """
    films = list(films)
    for spec in FILM_STAGES:
        works = []
        for film in films:
            if spec is keyframes.SPEC:
                row = {"film_id": film.film_id, "uri": film.uri}
                works.append(pipeline.work(spec, film.film_id, {}, (row, film.digest)))
                continue
            found = {kind: pipeline.get(kind, film.film_id) for kind in spec.inputs}
            if all(found.values()):
                works.append(pipeline.work(spec, film.film_id, {kind: [a] for kind, a in found.items() if a}))
        pipeline.step(spec, works, states if spec in stages else ())


def pack_shards(pipeline: Pipeline, splits: dict[str, str | None]) -> str | None:
    """Deal all ingested films of the workspace to shards and name the snapshot; returns its name.

    Args:
        pipeline: The walk, after `ingest_films`.
        splits: Film id to split, for the workspace's films.
    """
    count = pipeline.profile.shards.count
    members: dict[int, list[str]] = {}
    for film_id in sorted(splits):
        if pipeline.get("scripts", film_id) or _adopt(pipeline, film_id):
            members.setdefault(shard_of(film_id, count), []).append(film_id)
    works = []
    for index, film_ids in sorted(members.items()):
        inputs = {kind: [a for f in film_ids if (a := pipeline.get(kind, f))] for kind in shards.SPEC.inputs}
        heldout = tuple(f for f in film_ids if (splits[f] or "").lower() in HELDOUT_SPLITS)
        works.append(pipeline.work(shards.SPEC, shard_name(index), inputs, heldout_films=heldout))
    pipeline.step(shards.SPEC, works)
    made = [a for work in works if (a := pipeline.get("shards", work.subject))]
    if len(made) < len(works) or not made:
        return None
    return _name_snapshot(pipeline, [a.id for a in made], digest_json([a.digest for a in made]))


def shard_name(index: int) -> str:
    """The subject of a shard."""
    return f"shard-{index:05d}"


def _adopt(pipeline: Pipeline, film_id: str) -> bool:
    """Bring a film of an earlier ingestion into this walk, as it was committed then."""
    catalog = pipeline.workspace.catalog
    found = [catalog.current(kind, film_id) for kind in shards.SPEC.inputs]
    artifacts = [artifact for artifact in found if artifact is not None]
    if len(artifacts) < len(shards.SPEC.inputs) or film_id in pipeline.failed:
        return False
    if any(todo.subject == film_id for todo in pipeline.todo):
        return False
    for artifact in artifacts:
        pipeline.adopt(artifact)
    return True


def _name_snapshot(pipeline: Pipeline, artifact_ids: list[str], digest: str) -> str:
    name = f"snapshot-{digest[:12]}"
    catalog = pipeline.workspace.catalog
    if pipeline.runner is not None:
        if catalog.snapshot(name) is None:
            catalog.save_snapshot(name, artifact_ids)
        if catalog.get_ref(NEWEST_SNAPSHOT) != name:
            catalog.set_ref(NEWEST_SNAPSHOT, name)
    return name
