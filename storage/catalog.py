"""The catalog: which films, artifacts, units, snapshots, refs and runs exist. One transaction commits a result.

Every public method is one transaction; see `storage.database` for what happens while the database is away.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from storage.artifacts import Artifact
from storage.database import Database, patient, upsert
from storage.errors import CatalogError
from storage.objects import StoredFile
from storage.tables import artifact, edge, film, ref, run, snapshot, unit

DEAD_AFTER = timedelta(minutes=2)
"""A run that has not said for so long that it is alive counts as killed."""


def utc_now() -> str:
    """The current time, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@patient
class Catalog:
    """Opens, and makes where it is absent, the catalog under an SQLAlchemy URL.

    Raises:
        CatalogError: It cannot be opened, or would be a SQLite file on a network file system.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._database = Database(url)

    def close(self) -> None:
        """Give back all connections."""
        self._database.close()

    # Films

    def save_film(self, row: Mapping[str, Any]) -> None:
        """Insert a film or replace its facts (`film_id, uri, digest, bytes, modified_ns, title, year, split`)."""
        with self._database.write() as connection:
            known = connection.execute(
                sa.select(film.c.created_at).where(film.c.film_id == row["film_id"])
            ).scalar_one_or_none()
            upsert(connection, film, {**row, "created_at": known or utc_now()})

    def film(self, film_id: str) -> dict[str, Any] | None:
        """One film's facts, or None."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(film).where(film.c.film_id == film_id)).mappings().one_or_none()
        return dict(row) if row else None

    def films(self) -> list[dict[str, Any]]:
        """All films, by id."""
        names = [column.name for column in film.c]
        with self._database.read() as connection:
            rows = connection.execute(sa.select(film).order_by(film.c.film_id)).all()
        return [dict(zip(names, row, strict=True)) for row in rows]

    # Artifacts

    def commit(self, made: Artifact, run_id: str | None = None) -> Artifact:
        """Commit a result in one transaction: the artifact, its edges, the ref to it; its unit rows go.

        A result that another writer committed under the same id is kept and returned.
        """
        made = Artifact(**(made.__dict__ | {"created_at": utc_now()}))
        values = {
            "files": [f.as_dict() for f in made.files],
            "run_id": run_id,
            **{c.name: getattr(made, c.name) for c in artifact.c if c.name not in ("files", "run_id")},
        }
        with self._database.write() as connection:
            if upsert(connection, artifact, values, replace=False):
                for position, input_id in enumerate(made.inputs):
                    connection.execute(
                        sa.insert(edge).values(artifact_id=made.id, position=position, input_id=input_id)
                    )
            _set_ref(connection, current_ref(made.kind, made.subject), made.id)
            connection.execute(
                sa.delete(unit).where(
                    unit.c.stage == made.recipe["stage"],
                    unit.c.subject == made.subject,
                    unit.c.fingerprint == made.fingerprint,
                )
            )
        return self.artifact(made.id) or made

    def artifact(self, artifact_id: str) -> Artifact | None:
        """The artifact of that id, or None."""
        found = self._select(artifact.c.id == artifact_id)
        return found[0] if found else None

    def find(self, kind: str, subject: str, fingerprint: str) -> Artifact | None:
        """The artifact that a recipe gave for a subject, or None."""
        found = self._select(
            artifact.c.kind == kind, artifact.c.subject == subject, artifact.c.fingerprint == fingerprint
        )
        return found[0] if found else None

    def find_all(self, kind: str, fingerprints: Mapping[str, str]) -> dict[str, Artifact]:
        """Subject to the artifact that a recipe gave, of those subjects for which there is one.

        Args:
            kind: Of the artifacts.
            fingerprints: Subject to the fingerprint of its recipe.
        """
        found = {}
        for some in _chunks(list(fingerprints)):
            wanted = {fingerprints[subject] for subject in some}
            conditions = (artifact.c.kind == kind, artifact.c.subject.in_(some), artifact.c.fingerprint.in_(wanted))
            found |= {a.subject: a for a in self._select(*conditions) if a.fingerprint == fingerprints[a.subject]}
        return found

    def current(self, kind: str, subject: str) -> Artifact | None:
        """The artifact last committed, or last found fresh, for a subject."""
        target = self.get_ref(current_ref(kind, subject))
        return self.artifact(target) if target else None

    def run_of(self, artifact_id: str) -> dict[str, Any] | None:
        """The run that made an artifact: `id, command, state, started_at, ended_at`; None where it is not known."""
        columns = sa.select(run.c.id, run.c.command, run.c.state, run.c.started_at, run.c.ended_at)
        query = columns.join(artifact, artifact.c.run_id == run.c.id).where(artifact.c.id == artifact_id)
        with self._database.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return dict(row) if row else None

    def set_current(self, made: Artifact) -> None:
        """Make a fresh artifact the current one of its subject (after a setting went back to an earlier value)."""
        self.set_ref(current_ref(made.kind, made.subject), made.id)

    def artifacts(self) -> list[Artifact]:
        """All artifacts, oldest first."""
        return self._select()

    def artifacts_by_id(self, ids: Iterable[str]) -> dict[str, Artifact]:
        """Those artifacts of some ids that there are."""
        found = (made for some in _chunks(list(ids)) for made in self._select(artifact.c.id.in_(some)))
        return {made.id: made for made in found}

    def artifacts_of(self, kind: str, subject: str) -> list[Artifact]:
        """Every artifact of a kind about a subject, oldest first."""
        return self._select(artifact.c.kind == kind, artifact.c.subject == subject)

    def outline(self, kind: str) -> Sequence[Any]:
        """Subject, fingerprint and content digest of every artifact of a kind, in no order."""
        columns = sa.select(artifact.c.subject, artifact.c.fingerprint, artifact.c.digest)
        with self._database.read() as connection:
            return connection.execute(columns.where(artifact.c.kind == kind)).all()

    def current_digests(self, kind: str) -> dict[str, tuple[str, str]]:
        """Subject to id and content digest of the current artifact of a kind, of every subject that has one."""
        query = sa.select(artifact.c.subject, artifact.c.id, artifact.c.digest, ref.c.name)
        query = query.join(ref, ref.c.target == artifact.c.id).where(artifact.c.kind == kind)
        with self._database.read() as connection:
            rows = connection.execute(query.where(ref.c.name.startswith(current_ref(kind, ""), autoescape=True)))
            return {subject: (artifact_id, digest) for subject, artifact_id, digest, _ in rows}

    def current_recipes(self, kind: str, subjects: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The recipe of the current artifact of each subject that has one."""
        query = sa.select(artifact.c.subject, artifact.c.recipe).join(ref, ref.c.target == artifact.c.id)
        found: dict[str, dict[str, Any]] = {}
        with self._database.read() as connection:
            for some in _chunks([current_ref(kind, subject) for subject in subjects]):
                found |= {row.subject: row.recipe for row in connection.execute(query.where(ref.c.name.in_(some)))}
        return found

    def costs(self, kind: str, count: int) -> list[tuple[float, int]]:
        """Seconds of work and bytes of the newest artifacts of a kind."""
        query = sa.select(artifact.c.seconds, artifact.c.files).where(artifact.c.kind == kind)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(artifact.c.created_at.desc()).limit(count))
            return [(row.seconds, sum(file["bytes"] for file in row.files)) for row in rows]

    def _select(self, *where: Any) -> list[Artifact]:
        with self._database.read() as connection:
            rows = (
                connection.execute(sa.select(artifact).where(*where).order_by(artifact.c.created_at)).mappings().all()
            )
            ids = [row["id"] for row in rows]
            inputs: dict[str, list[str]] = {key: [] for key in ids}
            wanted = sa.select(edge).order_by(edge.c.artifact_id, edge.c.position)
            for pair in connection.execute(wanted.where(edge.c.artifact_id.in_(ids)) if where else wanted):
                inputs.setdefault(pair.artifact_id, []).append(pair.input_id)
        return [_artifact(dict(row), inputs[row["id"]]) for row in rows]

    def reached(self) -> set[str]:
        """What refs point at and snapshots list."""
        with self._database.read() as connection:
            targets = set(connection.execute(sa.select(ref.c.target)).scalars())
            for ids in connection.execute(sa.select(snapshot.c.artifact_ids)).scalars():
                targets |= set(ids)
        return targets

    def delete_artifacts(self, ids: Iterable[str]) -> None:
        """Forget artifacts and their edges; their objects stay."""
        with self._database.write() as connection:
            _delete_artifacts(connection, list(ids))

    def made_from(self, ids: Iterable[str]) -> list[str]:
        """Ids of the artifacts that have one of some artifacts as an input."""
        found: set[str] = set()
        with self._database.read() as connection:
            for some in _chunks(list(ids)):
                found |= set(
                    connection.execute(sa.select(edge.c.artifact_id).where(edge.c.input_id.in_(some))).scalars()
                )
        return sorted(found)

    def subjects_of(self, ids: Iterable[str], kind: str) -> list[str]:
        """Subjects of those of some artifacts that are of a kind, sorted."""
        found: set[str] = set()
        query = sa.select(artifact.c.subject).where(artifact.c.kind == kind)
        with self._database.read() as connection:
            for some in _chunks(list(ids)):
                found |= set(connection.execute(query.where(artifact.c.id.in_(some))).scalars())
        return sorted(found)

    def forget_film(self, film_id: str) -> None:
        """Take a film out of the catalog's list; its artifacts stay until they are deleted."""
        with self._database.write() as connection:
            connection.execute(sa.delete(film).where(film.c.film_id == film_id))

    def forget_subject(self, subject: str, ids: Iterable[str]) -> None:
        """Forget artifacts of a subject with all refs to them, and what its computations had reached."""
        with self._database.write() as connection:
            names = list(ids)
            for some in _chunks(names):
                connection.execute(sa.delete(ref).where(ref.c.target.in_(some)))
            _delete_artifacts(connection, names)
            connection.execute(sa.delete(unit).where(unit.c.subject == subject))

    def totals(self) -> dict[str, dict[str, float]]:
        """Kind to `count`, `seconds` of work and `bytes` of all its artifacts, by kind."""
        found: dict[str, dict[str, float]] = {}
        columns = sa.select(artifact.c.kind, artifact.c.seconds, artifact.c.files).order_by(artifact.c.kind)
        with self._database.read() as connection:
            for kind, seconds, files in connection.execute(columns):
                total = found.setdefault(kind, {"count": 0, "seconds": 0.0, "bytes": 0})
                total["count"] += 1
                total["seconds"] += seconds
                total["bytes"] += sum(file["bytes"] for file in files)
        return found

    # Units: what a film's computation has reached, until the film is committed

    def save_unit(self, key: tuple[str, str, str, int], state: str, attempts: int, result: Mapping[str, Any]) -> None:
        """Record a unit's state (`done`, `failed`) with its result or error.

        A failure that follows an earlier one adds its attempts and keeps `first_seen`.
        """
        stage, subject, fingerprint, index = key
        where = (
            unit.c.stage == stage,
            unit.c.subject == subject,
            unit.c.fingerprint == fingerprint,
            unit.c.unit_index == index,
        )
        now = utc_now()
        values = {"state": state, "attempts": attempts, "result": dict(result), "updated_at": now}
        names = {"stage": stage, "subject": subject, "fingerprint": fingerprint, "unit_index": index}
        with self._database.write() as connection:
            known = sa.select(unit.c.state, unit.c.attempts, unit.c.result).where(*where)
            before = connection.execute(known.with_for_update()).one_or_none()
            if before is not None and before.state == "done":  # of the same try, whose items turned out to have failed
                values["attempts"] = before.attempts
            elif before is not None:
                values["attempts"] += before.attempts
            if first_seen := before.result.get("first_seen") if before else None:
                values["result"]["first_seen"] = first_seen
            elif state == "failed":
                values["result"]["first_seen"] = now
            upsert(connection, unit, names | values)

    def units(self, stage: str, subject: str, fingerprint: str) -> dict[int, dict[str, Any]]:
        """Unit index to its row, for one computation."""
        query = sa.select(unit).where(
            unit.c.stage == stage, unit.c.subject == subject, unit.c.fingerprint == fingerprint
        )
        with self._database.read() as connection:
            return {row["unit_index"]: dict(row) for row in connection.execute(query).mappings()}

    def unit_keys(self) -> set[str]:
        """Keys of the objects that units have written for computations that have not ended."""
        with self._database.read() as connection:
            results = connection.execute(sa.select(unit.c.result).where(unit.c.state == "done")).scalars()
            return {StoredFile(**file).key for result in results for file in result["files"]}

    def failures(self) -> list[dict[str, Any]]:
        """Every unit that failed, newest first."""
        query = sa.select(unit).where(unit.c.state == "failed").order_by(unit.c.updated_at.desc())
        with self._database.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def forget_failures(self, subjects: Iterable[str]) -> int:
        """Let every failed computation of some subjects be tried again; returns how many there were."""
        count = 0
        with self._database.write() as connection:
            for some in _chunks(list(subjects)):
                forgotten = sa.update(unit).where(unit.c.state == "failed", unit.c.subject.in_(some))
                count += connection.execute(forgotten.values(state="forgotten")).rowcount
        return count

    def artifacts_with_failed_items(self) -> list[Artifact]:
        """Artifacts that lack items because computing them failed, oldest first."""
        return self._select(sa.cast(artifact.c.counts, sa.String).like('%"fail"%'))

    # Snapshots and refs

    def save_snapshot(self, name: str, artifact_ids: Iterable[str]) -> None:
        """Name a list of artifacts; a name keeps its first list for ever.

        Raises:
            CatalogError: The name stands for another list already.
        """
        ids = list(artifact_ids)
        with self._database.write() as connection:
            upsert(connection, snapshot, {"name": name, "artifact_ids": ids, "created_at": utc_now()}, replace=False)
            known = connection.execute(sa.select(snapshot.c.artifact_ids).where(snapshot.c.name == name)).scalar_one()
            if known != ids:
                raise CatalogError(f"snapshot '{name}' exists with {len(known)} other artifacts: choose another name")

    def snapshot(self, name: str) -> list[str] | None:
        """The artifact ids of a snapshot, or None."""
        with self._database.read() as connection:
            return connection.execute(
                sa.select(snapshot.c.artifact_ids).where(snapshot.c.name == name)
            ).scalar_one_or_none()

    def snapshots(self) -> list[dict[str, Any]]:
        """All snapshots, oldest first: `name, artifact_ids, created_at`."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(snapshot).order_by(snapshot.c.created_at, snapshot.c.name)).mappings()
            return [dict(row) for row in rows]

    def set_ref(self, name: str, target: str) -> None:
        """Point a name at an artifact or a snapshot."""
        self.set_refs({name: target})

    def set_refs(self, targets: Mapping[str, str]) -> None:
        """Point several names at once."""
        with self._database.write() as connection:
            for name, target in targets.items():
                _set_ref(connection, name, target)

    def delete_ref(self, name: str) -> None:
        """Forget a name."""
        with self._database.write() as connection:
            connection.execute(sa.delete(ref).where(ref.c.name == name))

    def refs(self, prefix: str) -> dict[str, str]:
        """Name, without the prefix, to what it points at, of every ref whose name begins with a prefix."""
        query = sa.select(ref.c.name, ref.c.target).where(ref.c.name.startswith(prefix, autoescape=True))
        with self._database.read() as connection:
            return {row.name.removeprefix(prefix): row.target for row in connection.execute(query.order_by(ref.c.name))}

    def get_ref(self, name: str) -> str | None:
        """What a name points at, or None."""
        with self._database.read() as connection:
            return connection.execute(sa.select(ref.c.target).where(ref.c.name == name)).scalar_one_or_none()

    # Runs

    def start_run(self, command: str) -> str:
        """Record that a command started; returns the run's id."""
        run_id = f"run-{uuid.uuid4().hex[:12]}"
        now = utc_now()
        values = {"id": run_id, "command": command, "state": "running", "summary": {}, "started_at": now}
        with self._database.write() as connection:
            connection.execute(sa.insert(run).values(**values, beat_at=now))
        return run_id

    def beat(self, run_id: str, progress: Mapping[str, Any] | None) -> None:
        """Record that a run is alive, and how far it is. A run that says nothing for `DEAD_AFTER` counts as killed."""
        values = {"beat_at": utc_now(), "progress": dict(progress) if progress else None}
        with self._database.write() as connection:
            connection.execute(sa.update(run).where(run.c.id == run_id).values(**values))

    def end_run(self, run_id: str, state: str, summary: Mapping[str, Any]) -> None:
        """Record how a command ended (`done`, `failed`, `interrupted`)."""
        values = {"state": state, "summary": json.loads(json.dumps(summary)), "ended_at": utc_now()}
        with self._database.write() as connection:
            connection.execute(sa.update(run).where(run.c.id == run_id).values(**values))

    def active_runs(self) -> list[dict[str, Any]]:
        """Runs that have not ended and whose process is alive, as far as the catalog knows; oldest first."""
        return [row for row in reversed(self.runs()) if row["state"] == "running"]

    def runs(self, count: int | None = None) -> list[dict[str, Any]]:
        """The newest runs, newest first; one that fell silent without having ended has the state `killed`."""
        limit = (datetime.now(UTC) - DEAD_AFTER).isoformat(timespec="milliseconds")
        query = sa.select(run).order_by(run.c.started_at.desc()).limit(count)
        with self._database.read() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        for row in rows:
            if row["state"] == "running" and (row["beat_at"] or row["started_at"]) < limit:
                row["state"] = "killed"
        return rows


def current_ref(kind: str, subject: str) -> str:
    """The name of the ref to a subject's current artifact of a kind."""
    return f"current/{kind}/{subject}"


def _chunks(names: list[str], size: int = 500) -> Iterator[list[str]]:
    """Parts short enough for one SQL statement."""
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _delete_artifacts(connection: sa.Connection, ids: list[str]) -> None:
    for some in _chunks(ids):
        connection.execute(sa.delete(edge).where(edge.c.artifact_id.in_(some)))
        connection.execute(sa.delete(artifact).where(artifact.c.id.in_(some)))


def _set_ref(connection: sa.Connection, name: str, target: str) -> None:
    upsert(connection, ref, {"name": name, "target": target, "updated_at": utc_now()})


def _artifact(row: dict[str, Any], inputs: list[str]) -> Artifact:
    row.pop("run_id")
    files = tuple(StoredFile(**entry) for entry in row.pop("files"))
    return Artifact(files=files, inputs=tuple(inputs), **row)
