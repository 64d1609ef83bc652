"""A story in, another system's movie out, animated and scored as one's own; no trained model is needed."""

from pathlib import Path

from flows.generate import register_references
from flows.pipeline import Pipeline
from stages import animate, baseline, evaluate
from stages.errors import UsageError
from storage.artifacts import Artifact

BASELINE_STAGES = (baseline.SPEC, animate.SPEC, evaluate.SPEC)


def baseline_subject(story: str, method: str) -> str:
    """What the artifacts of a baseline are called; no story's own name has a dot in it."""
    return f"{story}.{method}"


def make_baseline(pipeline: Pipeline, story: str, first: Path | None = None) -> str:
    """Let the system of the profile's `baseline.method` paint a story; animate its pictures and score them.

    Args:
        pipeline: The walk, which holds the story, and shards where there are some to compare with.
        story: Its subject.
        first: The picture that an SVD chain starts from; None has SDXL make it.

    Returns:
        The subject of what was made.

    Raises:
        UsageError: No system is chosen, or a first picture is given to one that takes none.
    """
    method = pipeline.profile.baseline.method
    if method is None:
        raise UsageError("baseline.method is null: name a system, as in `moviedreamer baseline frame_by_frame`")
    if first is not None and method != "svd_chain":
        raise UsageError(f"--first {first}: only svd_chain starts from a picture, and {method} does not; leave it out")
    subject = baseline_subject(story, method)
    register_references(pipeline, subject, (first,) if first else ())
    for spec in BASELINE_STAGES:
        inputs = {kind: _inputs(pipeline, kind, subject, story) for kind in spec.inputs}
        if not inputs[spec.inputs[0]]:
            continue  # what it works on failed, or waits
        given = {}
        if spec is baseline.SPEC and first:
            inputs["references"] = _inputs(pipeline, "references", subject, story)
            given = {"first_picture": "given"}  # its weights are then not asked for
        inputs = {kind: artifacts for kind, artifacts in inputs.items() if artifacts}
        pipeline.step(spec, [pipeline.work(spec, subject, inputs, **given)])
    return subject


def _inputs(pipeline: Pipeline, kind: str, subject: str, story: str) -> list[Artifact]:
    """What a stage reads of a kind: the baseline's own, or what else tells of the story; no trained model's numbers."""
    if kind == "shards":
        return pipeline.all("shards")
    told = pipeline.get("story", story)
    found = told if kind == "story" else pipeline.get(kind, subject)
    if kind == "dream":  # whose faces the story's characters have
        dreamed = pipeline.workspace.catalog.current("dream", story)
        found = dreamed if dreamed and told and told.id in dreamed.inputs else None
    return [found] if found else []
