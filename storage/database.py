"""Connections to the catalog's database: SQLite in WAL mode in a local workspace, Postgres when several hosts write.

A database that is locked, restarting or out of reach for a while is waited for, with growing pauses; then the error
says so. A transaction that was cut off has left nothing behind and is done again from its start.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import tenacity

from storage.errors import CatalogError
from storage.tables import metadata

PATIENCE_S = 60.0
"""How long a database that does not answer is waited for."""

TABLES_LOCK = 4_203_001
"""Number of the Postgres advisory lock under which tables are made."""

NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "afs", "ceph", "fuse.s3fs", "lustre",
}  # fmt: skip
Method = TypeVar("Method", bound=Callable[..., Any])


class Database:
    """Opens a database under an SQLAlchemy URL, and makes the tables that are absent.

    Raises:
        CatalogError: It cannot be opened, or would be a SQLite file on a network file system.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
            self._local = parsed.get_backend_name() == "sqlite"
            if self._local:
                refuse_network_file(Path(parsed.database or ""))
            options = {"connect_args": {"timeout": PATIENCE_S}} if self._local else {"pool_pre_ping": True}
            self._engine = sa.create_engine(url, **options)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as error:
            raise CatalogError(
                f"cannot use the catalog URL {url.rpartition('@')[2]!r}: {error}; expected sqlite:///PATH, or postgresql+psycopg://"
                "USER@HOST/DATABASE with the extra `moviedreamer[cluster]` installed"
            ) from None
        if self._local:
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        try:
            if self._absent():
                self._make_tables()
        except sa.exc.SQLAlchemyError as error:
            self._engine.dispose()
            raise CatalogError(
                f"cannot open the catalog {parsed.render_as_string()}: {_first_line(error)}; "
                + ("check that the folder can be written and has space" if self._local else "check that it runs, and ")
                + ("" if self._local else "that PGPASSWORD or ~/.pgpass holds the password")
            ) from error

    def _absent(self) -> list[sa.Column | sa.Index]:
        """Columns and indexes that the database lacks: all of a new one, and those that came after it was made."""
        inspector = sa.inspect(self._engine)
        tables = set(inspector.get_table_names())
        absent: list[sa.Column | sa.Index] = []
        for table in metadata.sorted_tables:
            known: set[str | None] = set()
            if table.name in tables:
                known = {c["name"] for c in inspector.get_columns(table.name)}
                known |= {index["name"] for index in inspector.get_indexes(table.name)}
            absent += [part for part in (*table.columns, *table.indexes) if part.name not in known]
        return absent

    def _make_tables(self) -> None:
        """Make what is absent, one process at a time. Columns that came later may all be null."""
        with self.write() as connection:
            if not self._local:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(TABLES_LOCK)))
            absent = self._absent()
            metadata.create_all(connection)
            for part in absent:
                if isinstance(part, sa.Index):
                    part.create(connection, checkfirst=True)
                elif part.name not in {c["name"] for c in sa.inspect(connection).get_columns(part.table.name)}:
                    kind = part.type.compile(self._engine.dialect)
                    connection.execute(sa.text(f"ALTER TABLE {part.table.name} ADD COLUMN {part.name} {kind}"))

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads."""
        with self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that writes; on SQLite it waits for its turn before it reads anything."""
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Give back all connections."""
        self._engine.dispose()


def patient(cls: type) -> type:
    """Make every public method of a class wait for a database that is away for a while.

    Each method is one transaction, so doing it again is safe.
    """
    for name, method in list(vars(cls).items()):
        if callable(method) and not name.startswith("_") and name != "close":
            setattr(cls, name, _patient(method))
    return cls


def _patient(method: Method) -> Method:
    again = tenacity.retry(
        retry=tenacity.retry_if_exception(is_passing),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
        stop=lambda state: state.seconds_since_start >= PATIENCE_S,
        reraise=True,
    )(method)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return again(*args, **kwargs)
        except sa.exc.OperationalError as error:
            raise CatalogError(
                f"the catalog cannot be used: {_first_line(error)}; what was committed is kept: run the same command "
                "again when the database answers and has space"
            ) from error

    return wrapped


def is_passing(error: BaseException) -> bool:
    """Whether the database was locked, restarting or out of reach, which may pass by itself."""
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:  # Postgres: connections, shutdown and start-up, serialization, too many clients
        return state[:2] in ("08", "40", "53") or state.startswith("57P")
    text = str(error.orig)
    out_of_reach = isinstance(error, sa.exc.OperationalError) and "onnect" in text and "password" not in text
    return error.connection_invalidated or "database is locked" in text or out_of_reach


def upsert(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any], replace: bool = True) -> bool:
    """Insert a row; where its key is taken, replace that row or keep it. Returns whether anything was written."""
    dialect = importlib.import_module(f"sqlalchemy.dialects.{connection.dialect.name}")
    insert = dialect.insert(table).values(**row)
    keys = [column.name for column in table.primary_key]
    if replace:
        values = {name: insert.excluded[name] for name in row if name not in keys}
        statement = insert.on_conflict_do_update(index_elements=keys, set_=values)
    else:
        statement = insert.on_conflict_do_nothing(index_elements=keys)
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount > 0


def refuse_network_file(path: Path) -> None:
    """SQLite's locks do not hold on network file systems; two writers there destroy the file.

    Raises:
        CatalogError: The path lies on one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return
    best, kind = "", ""
    target = os.path.realpath(path.parent)
    for line in mounts.read_text().splitlines():
        _, point, file_system = line.split()[:3]
        point = point.replace("\\040", " ")
        if (target == point or target.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, file_system
    if kind in NETWORK_FILE_SYSTEMS:
        raise CatalogError(
            f"the catalog {path} would lie on a {kind} file system, where SQLite's locks do not hold: "
            "put the workspace on a local disk, or use a Postgres catalog"
        )


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says so
    cursor = connection.cursor()
    pragmas = (f"busy_timeout={PATIENCE_S * 1000:.0f}", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON")
    for pragma in pragmas:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error.args[0]).strip().splitlines()[0][:300]
