"""Films in, a snapshot of training shards out. Read top to bottom, this is the list of stages."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

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
FILM_STAGE_NAMES = tuple(spec.name for spec in FILM_STAGES)
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


def pack_shards(pipeline: Pipeline) -> str | None:
    """Deal all ingested films of the workspace to shards and name the snapshot; returns its name.

    A workspace holds many films, of which few changed: artifacts are loaded only for the shards that need packing.

    Args:
        pipeline: The walk, after `ingest_films`.
    """
    catalog, spec = pipeline.workspace.catalog, shards.SPEC
    splits = {row["film_id"]: row["split"] for row in catalog.films()}
    members: dict[int, dict[str, dict[str, tuple[str, str]]]] = {}
    for film_id, parts in _find_whole_films(pipeline, sorted(splits)):
        members.setdefault(shard_of(film_id, pipeline.profile.shards.count), {})[film_id] = parts
    works, current = [], catalog.current_digests(spec.output)
    for index, films in sorted(members.items()):
        heldout = tuple(f for f in films if (splits[f] or "").lower() in HELDOUT_SPLITS)
        empty = pipeline.work(spec, shard_name(index), {}, heldout_films=heldout)
        digests = {kind: [parts[kind][1] for parts in films.values()] for kind in spec.inputs}
        found = catalog.find(spec.output, empty.subject, replace(empty.recipe, inputs=digests).fingerprint)
        if found is not None:
            pipeline.keep(found, current.get(empty.subject))
            continue
        loaded = catalog.artifacts_by_id(part[0] for parts in films.values() for part in parts.values())
        inputs = {kind: [loaded[parts[kind][0]] for parts in films.values()] for kind in spec.inputs}
        works.append(replace(empty, inputs=inputs))
    pipeline.step(spec, works)
    made = [a for index in sorted(members) if (a := pipeline.get(spec.output, shard_name(index)))]
    if len(made) < len(members) or not made:
        return None
    return _name_snapshot(pipeline, [a.id for a in made], digest_json([a.digest for a in made]))


def _find_whole_films(pipeline: Pipeline, film_ids: list[str]) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Films with everything that a shard holds, made in this walk or earlier: kind to artifact id and digest."""
    catalog, kinds = pipeline.workspace.catalog, shards.SPEC.inputs
    earlier = {kind: catalog.current_digests(kind) for kind in kinds}
    unsettled = {todo.subject for todo in pipeline.todo} | pipeline.failed.keys()
    for film_id in film_ids:
        now = {kind: (a.id, a.digest) for kind in kinds if (a := pipeline.get(kind, film_id))}
        if film_id not in unsettled:
            now = {kind: earlier[kind][film_id] for kind in kinds if film_id in earlier[kind]} | now
        if len(now) == len(kinds):
            yield film_id, now


def shard_name(index: int) -> str:
    """The subject of a shard."""
    return f"shard-{index:05d}"


def _name_snapshot(pipeline: Pipeline, artifact_ids: list[str], digest: str) -> str:
    name = f"snapshot-{digest[:12]}"
    catalog = pipeline.workspace.catalog
    if pipeline.runner is not None:
        if catalog.snapshot(name) is None:
            catalog.save_snapshot(name, artifact_ids)
        if catalog.get_ref(NEWEST_SNAPSHOT) != name:
            catalog.set_ref(NEWEST_SNAPSHOT, name)
    return name
