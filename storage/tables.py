"""The catalog's tables, the same on SQLite and on Postgres."""

import sqlalchemy as sa

metadata = sa.MetaData()

film = sa.Table(
    "film",
    metadata,
    sa.Column("film_id", sa.String, primary_key=True),
    sa.Column("uri", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("modified_ns", sa.BigInteger, nullable=False),
    sa.Column("title", sa.String),
    sa.Column("year", sa.Integer),
    sa.Column("split", sa.String),
    sa.Column("created_at", sa.String, nullable=False),
)
artifact = sa.Table(
    "artifact",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("recipe", sa.JSON, nullable=False),
    sa.Column("files", sa.JSON, nullable=False),
    sa.Column("counts", sa.JSON, nullable=False),
    sa.Column("summary", sa.JSON, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("run_id", sa.String),
    sa.Column("created_at", sa.String, nullable=False),
    # Holds all that a plan over many films reads, so that it never touches the recipes.
    sa.Index("artifact_outline", "kind", "subject", "fingerprint", "digest"),
)
edge = sa.Table(
    "edge",
    metadata,
    sa.Column("artifact_id", sa.String, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("input_id", sa.String, nullable=False),
)
unit = sa.Table(
    "unit",
    metadata,
    sa.Column("stage", sa.String, primary_key=True),
    sa.Column("subject", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, primary_key=True),
    sa.Column("unit_index", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("result", sa.JSON, nullable=False),
    sa.Column("updated_at", sa.String, nullable=False),
)
snapshot = sa.Table(
    "snapshot",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("artifact_ids", sa.JSON, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
)
ref = sa.Table(
    "ref",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("target", sa.String, nullable=False),
    sa.Column("updated_at", sa.String, nullable=False),
)
run = sa.Table(
    "run",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("command", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("summary", sa.JSON, nullable=False),
    sa.Column("started_at", sa.String, nullable=False),
    sa.Column("ended_at", sa.String),
    sa.Column("beat_at", sa.String),
    sa.Column("progress", sa.JSON),
)
