"""What is fresh, missing, failed or stale, and why; and what it may cost."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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


class Index:
    """What the catalog holds of some kinds, read at once: for plans over many films.

    Args:
        catalog: Read now; what is committed later is not seen.
        kinds: Kinds of artifacts.

    Attributes:
        digests: Kind to the content digest of each subject and fingerprint.
    """

    def __init__(self, catalog: Catalog, kinds: Iterable[str]) -> None:
        self.digests: dict[str, dict[tuple[str, str], str]] = {}
        self._known: dict[str, set[str]] = {}
        for kind in kinds:
            rows = catalog.outline(kind)
            self.digests[kind] = {(subject, fingerprint): digest for subject, fingerprint, digest in rows}
            self._known[kind] = {row[0] for row in rows}
        self._failures = {
            (row["stage"], row["subject"], row["fingerprint"]): row["result"]["error"]
            for row in catalog.failures()
            if not row["result"].get("retryable")
        }

    def knows(self, kind: str, subject: str) -> bool:
        """Whether any recipe gave an artifact of the kind for a subject."""
        return subject in self._known[kind]

    def failure(self, stage: str, subject: str, fingerprint: str) -> str | None:
        """The error with which this recipe failed for good, or None."""
        return self._failures.get((stage, subject, fingerprint))


@dataclass(frozen=True)
class Estimate:
    """What computing subjects may cost.

    Attributes:
        seconds: Of work; None where nothing of the kind was computed yet.
        seconds_low, seconds_high: A range that should hold 19 times in 20, if the films are like those computed.
        bytes: Of results.
    """

    seconds: float | None
    seconds_low: float | None = None
    seconds_high: float | None = None
    bytes: int | None = None


def estimate_cost(count: int, costs: Sequence[tuple[float, int]]) -> Estimate:
    """Estimate the cost of `count` subjects from the seconds and bytes of earlier ones."""
    if not count:
        return Estimate(0.0, 0.0, 0.0, 0)
    if not costs:
        return Estimate(None)
    mean = statistics.fmean(seconds for seconds, _ in costs)
    size = round(count * statistics.fmean(size for _, size in costs))
    if len(costs) < 2:
        return Estimate(count * mean, None, None, size)
    spread = 2 * statistics.stdev(seconds for seconds, _ in costs)
    # The mean is known from so many films only, and the films to come differ from each other.
    margin = spread * math.hypot(count / math.sqrt(len(costs)), math.sqrt(count))
    return Estimate(count * mean, max(0.0, count * mean - margin), count * mean + margin, size)
