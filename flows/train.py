"""A snapshot in, a trained model out: autoencoder, tokens, ID-preserving renderer, autoregressive model."""

from flows.pipeline import Pipeline
from stages import tokenize, train_autoencoder, train_autoregressive, train_renderer

TRAIN_STAGES = (train_autoencoder.SPEC, tokenize.SPEC, train_renderer.SPEC, train_autoregressive.SPEC)


def train_models(pipeline: Pipeline, snapshot: str) -> None:
    """Train every model on a snapshot's shards, which the walk holds."""
    shards = pipeline.all("shards")
    for spec in TRAIN_STAGES:
        inputs = {"shards": shards} | {
            kind: [artifact] for kind in spec.inputs if (artifact := pipeline.get(kind, snapshot))
        }
        if all(inputs.get(kind) for kind in spec.inputs):
            pipeline.step(spec, [pipeline.work(spec, snapshot, {kind: inputs[kind] for kind in spec.inputs})])


def adopt_snapshot(pipeline: Pipeline, snapshot: str) -> bool:
    """Bring a snapshot's shards, and what was trained on it, into the walk; returns whether it exists."""
    catalog = pipeline.workspace.catalog
    ids = catalog.snapshot(snapshot)
    if not ids:
        return False
    for artifact in filter(None, map(catalog.artifact, ids)):
        pipeline.adopt(artifact)
    return True
