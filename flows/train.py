"""A snapshot in, a trained model out: features, autoencoder, tokens, ID-preserving renderer, autoregressive model."""

from flows.pipeline import Pipeline
from stages import features, tokenize, train_autoencoder, train_autoregressive, train_renderer
from storage.artifacts import Artifact

TRAIN_STAGES = (train_autoencoder.SPEC, tokenize.SPEC, train_renderer.SPEC, train_autoregressive.SPEC)


def train_models(pipeline: Pipeline, snapshot: str) -> None:
    """Train every model on a snapshot's shards, which the walk holds."""
    shards, seen = pipeline.all("shards"), look_at_shards(pipeline)
    for spec in TRAIN_STAGES:
        inputs = {"shards": shards, "features": seen} | {
            kind: [artifact] for kind in spec.inputs if (artifact := pipeline.get(kind, snapshot))
        }
        if all(inputs.get(kind) for kind in spec.inputs):
            pipeline.step(spec, [pipeline.work(spec, snapshot, {kind: inputs[kind] for kind in spec.inputs})])


def look_at_shards(pipeline: Pipeline) -> list[Artifact]:
    """What the frozen models make of the shards that the walk holds; empty where that of one is still to be made."""
    shards = pipeline.all("shards")
    pipeline.step(features.SPEC, [pipeline.work(features.SPEC, a.subject, {"shards": [a]}) for a in shards])
    seen = [made for shard in shards if (made := pipeline.get(features.SPEC.output, shard.subject))]
    return seen if len(seen) == len(shards) else []


def adopt_snapshot(pipeline: Pipeline, snapshot: str) -> bool:
    """Bring a snapshot's shards, and what was trained on it, into the walk; returns whether it exists."""
    catalog = pipeline.workspace.catalog
    ids = catalog.snapshot(snapshot)
    if not ids:
        return False
    for artifact in filter(None, map(catalog.artifact, ids)):
        pipeline.adopt(artifact)
    return True
