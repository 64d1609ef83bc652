"""Workspaces for tests: one whose catalog only says that films were ingested, and pipelines that really compute."""

from pathlib import Path

from flows.commands import Request, walk
from flows.ingest import FILM_STAGES, pack_shards
from flows.pipeline import Pipeline, compute, open_executor
from flows.profile import ExplainedProfile, Profile
from flows.workspace import Workspace
from storage.artifacts import Artifact, Recipe, artifact_id, content_digest, digest_json
from storage.objects import StoredFile

PROFILE = ExplainedProfile("embedded").profile


def profile_with(*settings: str) -> Profile:
    return ExplainedProfile("embedded", settings).profile


def note_film(workspace: Workspace, film_id: str, path: Path | None = None, **facts) -> str:
    """Put a film into the catalog; returns the digest of its bytes."""
    uri = path or workspace.folder / f"{film_id} (gone)"
    size, modified = (path.stat().st_size, path.stat().st_mtime_ns) if path else (1, 0)
    about = {"title": None, "year": None, "split": None} | facts
    digest = digest_json(film_id)
    row = {"film_id": film_id, "uri": str(uri), "digest": digest, "bytes": size, "modified_ns": modified}
    workspace.catalog.save_film(row | about)
    return digest


def ingest(workspace: Workspace, *film_ids: str, profile: Profile = PROFILE, seconds: float = 2.0) -> None:
    """Commit every artifact of films, each with the recipe that an ingestion gives it, and then the shards."""
    ingest_films(workspace, film_ids, profile, seconds)
    pack(workspace, profile)


def ingest_films(workspace, film_ids, profile, seconds=2.0, table=None) -> None:
    """Commit every artifact of films; `table(spec, film_id)` gives the stored part file of each."""
    for film_id in film_ids:
        digests = {FILM_STAGES[0].inputs[0]: note_film(workspace, film_id)}
        made: dict[str, str] = {}
        for spec in FILM_STAGES:
            work = Pipeline(workspace, profile).work(spec, film_id, {})
            inputs = {kind: [digests[kind]] for kind in spec.inputs}
            recipe = Recipe(spec.name, spec.version, work.config.recipe(), work.weights, inputs)
            stored = table(spec, film_id) if table else None
            inputs = [made[k] for k in spec.inputs if k in made]
            artifact = commit(workspace, spec.output, film_id, recipe, inputs, seconds, stored)
            digests[spec.output], made[spec.output] = artifact.digest, artifact.id


def pack(workspace: Workspace, profile: Profile = PROFILE) -> None:
    """Commit the shards of the films in the catalog."""
    pipeline = Pipeline(workspace, profile)
    taken = []

    def keep(spec, works, states=()):
        taken.extend(works)

    pipeline.step = keep
    pack_shards(pipeline)
    for work in taken:
        inputs = [a.id for found in work.inputs.values() for a in found]
        films = {"films": len(work.inputs["keyframes"])}
        commit(workspace, "shards", work.subject, work.recipe, inputs, summary=films)


def commit(workspace, kind, subject, recipe, inputs, seconds=2.0, stored=None, summary=None) -> Artifact:
    files = (stored or StoredFile("part-00000.parquet", digest_json([subject, recipe.fingerprint]), 1000, 2),)
    made = artifact_id(kind, subject, recipe.fingerprint)
    return workspace.catalog.commit(
        Artifact(
            made, kind, subject, recipe.fingerprint, content_digest(files), {**recipe.__dict__}, files, tuple(inputs),
            {"ok": 2}, summary or {}, seconds,
        )
    )  # fmt: skip


def fail(workspace: Workspace, film_id: str, error: str, profile: Profile = PROFILE) -> None:
    """Record that the first stage of a film failed for good."""
    spec = FILM_STAGES[0]
    digest = note_film(workspace, film_id)
    work = Pipeline(workspace, profile).work(spec, film_id, {}, ({"film_id": film_id}, digest))
    facts = {"error": error, "retryable": False, "version": 1, "inputs": {}, "source": {"film_id": film_id}}
    workspace.catalog.save_unit((spec.name, film_id, work.recipe.fingerprint, 0), "failed", 1, facts)


def computing_pipeline(workspace: Workspace, profile: Profile) -> Pipeline:
    """A pipeline that computes in this process, without Prefect."""
    executor = open_executor(workspace, profile)
    run_id = workspace.catalog.start_run("test")

    def runner(spec, works):
        return compute(workspace, executor, run_id, works, lambda done, total, message: None)

    return Pipeline(workspace, profile, runner, run_id)


def ingest_in_process(workspace: Workspace, profile: Profile, films: list[Path]) -> Pipeline:
    pipeline = computing_pipeline(workspace, profile)
    walk(pipeline, Request("ingest", tuple(map(str, films))))
    return pipeline
