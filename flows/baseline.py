"""A story in, another system's movie out, animated and scored as one's own; no trained model is needed."""

from pathlib import Path

from flows.generate import register_references, score_pictures, subject_of
from flows.pipeline import Pipeline
from stages import animate, baseline, evaluate
from stages.errors import UsageError

PAINTING_STAGES = (baseline.SPEC, animate.SPEC)
BASELINE_STAGES = (*PAINTING_STAGES, evaluate.SPEC)


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
        StoryError: The first picture is not there, or is none.
    """
    method = pipeline.profile.baseline.method
    if method is None:
        raise UsageError("baseline.method is null: name a system, as in `moviedreamer baseline frame_by_frame`")
    if first is not None and method != "svd_chain":
        raise UsageError(f"--first {first}: only svd_chain starts from a picture, and {method} does not; leave it out")
    subject = subject_of(method, story)
    if first is not None and first.is_file():
        baseline.require_picture(first)
    register_references(pipeline, subject, (first,) if first else ())
    for spec in PAINTING_STAGES:
        found = {kind: pipeline.get(kind, story if kind == "story" else subject) for kind in spec.inputs}
        inputs = {kind: [artifact] for kind, artifact in found.items() if artifact}
        if not inputs:
            continue  # what it works on failed, or waits
        given = {}
        kept = pipeline.get("references", subject)
        if spec is baseline.SPEC and kept:
            inputs["references"] = [kept]
            given = {"first_picture": "given"}  # SDXL's weights are then not asked for
        pipeline.step(spec, [pipeline.work(spec, subject, inputs, **given)])
    if pipeline.get("pictures", subject):
        score_pictures(pipeline, story, subject)
    return subject
