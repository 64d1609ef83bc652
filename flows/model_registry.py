"""Trained models by name, and which of them is in use.

A model is the four artifacts that generation needs, trained on one snapshot. `champion` is the model that generation
takes; `previous` is the one before it, so that a promotion can be taken back.
"""

import json
from dataclasses import dataclass
from typing import Any

from flows.pipeline import Pipeline
from flows.train import TRAIN_STAGES, adopt_snapshot, look_at_shards
from flows.workspace import Workspace
from stages import score, tokenize
from stages.errors import MissingInputError, UsageError
from storage.artifacts import Artifact, digest_json

KINDS = tuple(spec.output for spec in TRAIN_STAGES)
CHAMPION, PREVIOUS = "model/champion", "model/previous"
PREFIX = "model-"


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        name: `model-<12 hex digits>`.
        snapshot: What it was trained on.
        parts: Kind to artifact.
        created_at: When it was registered, UTC.
    """

    name: str
    snapshot: str
    parts: dict[str, Artifact]
    created_at: str = ""


def register_model(pipeline: Pipeline, snapshot: str) -> Model | None:
    """Name what a walk trained on a snapshot; None where it is not complete."""
    parts = {kind: found for kind in KINDS if (found := pipeline.get(kind, snapshot))}
    if len(parts) < len(KINDS):
        return None
    ids = [parts[kind].id for kind in KINDS]
    name = f"{PREFIX}{digest_json(ids)[:12]}"
    if pipeline.runner is not None:
        pipeline.workspace.catalog.save_snapshot(name, ids)
    return Model(name, snapshot, parts)


def get_model(workspace: Workspace, name: str) -> Model:
    """A registered model.

    Raises:
        UsageError: There is none of that name, or a part of it was removed.
    """
    for row in workspace.catalog.snapshots():
        if row["name"] == name and name.startswith(PREFIX):
            found = [artifact for i in row["artifact_ids"] if (artifact := workspace.catalog.artifact(i))]
            if len(found) < len(KINDS):
                raise UsageError(f"parts of model {name} were removed: train again")
            return Model(name, found[0].subject, {a.kind: a for a in found}, row["created_at"])
    raise UsageError(f"no model '{name}': `moviedreamer models list` names them")


def champion(workspace: Workspace) -> Model | None:
    """The model in use, or None before the first promotion."""
    name = workspace.catalog.get_ref(CHAMPION)
    return get_model(workspace, name) if name else None


def adopt_model(pipeline: Pipeline, model: Model) -> str:
    """Bring a model and its snapshot into the walk as they are; returns the snapshot's name."""
    adopt_snapshot(pipeline, model.snapshot)
    for artifact in model.parts.values():
        pipeline.adopt(artifact)
    return model.snapshot


def promote(workspace: Workspace, name: str) -> None:
    """Put a model in use, and remember the one that was.

    Raises:
        UsageError: There is no such model, or it is in use already.
    """
    model, current = get_model(workspace, name), workspace.catalog.get_ref(CHAMPION)
    if model.name == current:
        raise UsageError(f"{name} is the champion already")
    workspace.catalog.set_refs({CHAMPION: model.name} | ({PREVIOUS: current} if current else {}))


def roll_back(workspace: Workspace) -> str:
    """Put the model before the champion in use again; called twice, it changes back. Returns its name.

    Raises:
        MissingInputError: There is none.
    """
    current, previous = (workspace.catalog.get_ref(name) for name in (CHAMPION, PREVIOUS))
    if not current or not previous:
        raise MissingInputError("there is no model before the champion to roll back to")
    get_model(workspace, previous)
    workspace.catalog.set_refs({CHAMPION: previous, PREVIOUS: current})
    return previous


def list_models(workspace: Workspace) -> list[dict[str, Any]]:
    """Every model, oldest first: `name, role, snapshot, created_at, score, scored_on`."""
    catalog = workspace.catalog
    roles = {catalog.get_ref(CHAMPION): "champion", catalog.get_ref(PREVIOUS): "previous"}
    rows = []
    for row in catalog.snapshots():
        if not row["name"].startswith(PREFIX):
            continue
        snapshot = (catalog.subjects_of(row["artifact_ids"], KINDS[0]) or [None])[0]
        found = catalog.refs(f"current/{score.SPEC.output}/{score_subject('', row['name'])}")
        newest = max(filter(None, map(catalog.artifact, found.values())), key=lambda a: a.created_at, default=None)
        rows.append(
            {
                "name": row["name"],
                "role": roles.get(row["name"], ""),
                "snapshot": snapshot,
                "created_at": row["created_at"],
                "score": newest.summary["mean_reciprocal_rank"] if newest else None,
                "scored_on": newest.subject.rpartition(" on ")[2] if newest else None,
            }
        )
    return rows


def score_model(pipeline: Pipeline, model: Model, snapshot: str) -> dict[str, Any] | None:
    """Rank a snapshot's held-out keyframes with a model; None in a plan that finds it still to be done.

    A model that was trained on another snapshot reads this one's keyframes through its own autoencoder.
    """
    tokens: Artifact | None = model.parts[tokenize.SPEC.output]
    if model.snapshot != snapshot:
        subject = score_subject(snapshot, model.name)
        seen = look_at_shards(pipeline)
        if not seen:
            return None
        inputs = {"shards": pipeline.all("shards"), "features": seen, "autoencoder": [model.parts["autoencoder"]]}
        pipeline.step(tokenize.SPEC, [pipeline.work(tokenize.SPEC, subject, inputs)])
        tokens = pipeline.get(tokenize.SPEC.output, subject)
    if tokens is None:
        return None
    subject = score_subject(snapshot, model.name)
    inputs = {"tokens": [tokens], "autoregressive": [model.parts["autoregressive"]]}
    pipeline.step(score.SPEC, [pipeline.work(score.SPEC, subject, inputs)])
    made = pipeline.get(score.SPEC.output, subject)
    return json.loads(pipeline.workspace.store.path(made.file("score.json")).read_text()) if made else None


def score_subject(snapshot: str, model: str) -> str:
    """What a score is about."""
    return f"{model} on {snapshot}"


def choose_champion(pipeline: Pipeline, candidate: Model, snapshot: str) -> dict[str, Any] | None:
    """Promote a candidate where it is better: by more than `retrain.margin` in mean reciprocal rank, on the held-out
    keyframes of the new snapshot. The first model of a workspace is promoted without a contest.

    Returns:
        `candidate`, `champion` (before), both `scores`, `promoted` and the `rule`; None in a plan that finds work.
    """
    workspace, margin = pipeline.workspace, pipeline.profile.retrain.margin
    current = champion(workspace)
    rule = f"the candidate's mean reciprocal rank exceeds the champion's by more than {margin:g}"
    decision: dict[str, Any] = {
        "candidate": candidate.name,
        "champion": current.name if current else None,
        "scores": {},
        "rule": rule if current else "there was no champion",
        "promoted": current is None,
    }
    if current is not None and current.name != candidate.name:
        scores = {model.name: score_model(pipeline, model, snapshot) for model in (candidate, current)}
        if None in scores.values():
            return None
        found = {name: values["mean_reciprocal_rank"] for name, values in scores.items() if values}
        decision["scores"] = found
        decision["promoted"] = found[candidate.name] > found[current.name] + margin
    if decision["promoted"] and pipeline.runner is not None:
        promote(workspace, candidate.name)
    return decision
