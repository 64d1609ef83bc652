"""Why an artifact is the way it is, and what tells two of them apart."""

from typing import Any

from flows.workspace import Workspace
from stages.errors import UsageError
from storage.artifacts import Artifact, Recipe
from storage.plan import explain_change


def get_artifact(workspace: Workspace, artifact_id: str) -> Artifact:
    """The artifact of that id.

    Raises:
        UsageError: There is none.
    """
    artifact = workspace.catalog.artifact(artifact_id)
    if artifact is None:
        raise UsageError(f"no artifact '{artifact_id}' in {workspace.folder}: `moviedreamer artifacts list` names them")
    return artifact


def explain_artifact(workspace: Workspace, artifact_id: str) -> list[dict[str, Any]]:
    """An artifact and all that it was made from, down to the films; each once, nearest first.

    Returns:
        Rows with `depth` (0 for the artifact itself), `id`, `kind`, `subject`, `stage`, `stage_version`, `config`,
        `weights`, `run`, `created_at`, `seconds`, `inputs` (ids), and `source` for what was made from a film.
    """
    catalog, rows, seen = workspace.catalog, [], set()
    queue = [(0, get_artifact(workspace, artifact_id))]
    while queue:
        depth, artifact = queue.pop(0)
        if artifact.id in seen:
            continue
        seen.add(artifact.id)
        recipe = artifact.recipe
        row = {
            "depth": depth, "id": artifact.id, "kind": artifact.kind, "subject": artifact.subject,
            "stage": recipe["stage"], "stage_version": recipe["version"], "config": recipe["config"],
            "weights": recipe["weights"], "run": catalog.run_of(artifact.id), "created_at": artifact.created_at,
            "seconds": round(artifact.seconds, 3), "inputs": list(artifact.inputs), "source": None,
        }  # fmt: skip
        if not artifact.inputs and (film := catalog.film(artifact.subject)):
            row["source"] = {"uri": film["uri"], "digest": film["digest"], "bytes": film["bytes"]}
        rows.append(row)
        queue += [(depth + 1, found) for i in artifact.inputs if (found := catalog.artifact(i))]
    return rows


def compare_artifacts(workspace: Workspace, first_id: str, second_id: str) -> dict[str, Any]:
    """What differs between two artifacts in recipe and in content."""
    first, second = get_artifact(workspace, first_id), get_artifact(workspace, second_id)
    before, after = ({f.name: f for f in artifact.files} for artifact in (first, second))
    both = before.keys() & after.keys()
    return {
        "same_recipe": first.fingerprint == second.fingerprint,
        "same_content": first.digest == second.digest,
        "recipe": explain_change(first.recipe, Recipe(**second.recipe)),
        "rows": [first.rows, second.rows],
        "files_removed": sorted(before.keys() - after.keys()),
        "files_added": sorted(after.keys() - before.keys()),
        "files_changed": sorted(name for name in both if before[name].digest != after[name].digest),
        "counts": [first.counts, second.counts],
    }
