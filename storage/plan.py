"""What is fresh, missing, failed or stale, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.artifacts import Artifact, Recipe
from storage.catalog import Catalog

State = Literal["fresh", "missing", "failed", "stale"]


@dataclass(frozen=True)
class Decision:
    """What should happen to one subject at one stage.

    Attributes:
        state: `fresh`: there is an artifact of exactly this recipe. `failed`: this recipe failed for good before.
            `stale`: an artifact of another recipe exists. `missing`: there is none.
        reason: Why, in words; empty when fresh.
        artifact: The fresh artifact.
    """

    state: State
    reason: str = ""
    artifact: Artifact | None = None


def decide(catalog: Catalog, kind: str, subject: str, recipe: Recipe) -> Decision:
    """Compare a recipe with what the catalog holds for a subject."""
    fingerprint = recipe.fingerprint
    if found := catalog.find(kind, subject, fingerprint):
        return Decision("fresh", "", found)
    failed = [u for u in catalog.units(recipe.stage, subject, fingerprint).values() if u["state"] == "failed"]
    if failed and not failed[0]["result"].get("retryable"):
        return Decision("failed", failed[0]["result"]["error"])
    previous = catalog.current(kind, subject)
    if previous is None:
        return Decision("missing", "never computed")
    return Decision("stale", explain_change(previous.recipe, recipe))


def explain_change(before: Mapping[str, Any], now: Recipe) -> str:
    """Say what differs between the recipe of an artifact and the recipe now, for example `config.x 6 -> 8`."""
    reasons = []
    if before["version"] != now.version:
        reasons.append(f"stage version {before['version']} -> {now.version}")
    for name in sorted({*before["config"], *now.config}):
        old, new = before["config"].get(name), now.config.get(name)
        if old != new:
            reasons.append(f"config.{name} {old} -> {new}")
    for name in sorted({*before["weights"], *now.weights}):
        if before["weights"].get(name) != now.weights.get(name):
            reasons.append(f"weights {name} changed")
    for role in sorted({*before["inputs"], *now.inputs}):
        if list(before["inputs"].get(role, [])) != list(now.inputs.get(role, [])):
            reasons.append(f"input {role} changed")
    return f"{now.stage}: " + (", ".join(reasons) or "unchanged")
