"""A workspace: where the catalog, the objects and the scratch of one collection of films are.

By default all of it lies in the workspace's folder. A `workspace.yaml` in it names a catalog and a store that several
hosts share:

    catalog: postgresql+psycopg://moviedreamer@db.example/moviedreamer
    objects: s3://films-bucket/moviedreamer
"""

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from stages.errors import UsageError
from storage.catalog import Catalog
from storage.objects import ObjectStore

FILE = "workspace.yaml"


class WorkspaceConfig(BaseModel):
    """What `workspace.yaml` may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    catalog: str | None = Field(None, description="SQLAlchemy URL without a password; none is SQLite in the folder")
    objects: str | None = Field(None, description="a folder, or s3://BUCKET/PREFIX; none is `objects` in the folder")

    @field_validator("catalog")
    @classmethod
    def _refuse_password(cls, url: str | None) -> str | None:
        try:
            password = sa.make_url(url).password if url else None
        except sa.exc.ArgumentError:
            return url  # the catalog says what is wrong with it
        if password:
            raise ValueError("the URL holds a password: put it into ~/.pgpass or PGPASSWORD instead")
        return url


@dataclass
class Workspace:
    """An open workspace.

    Attributes:
        folder: Where it is.
        catalog: What exists.
        store: The bytes.
    """

    folder: Path
    catalog: Catalog
    store: ObjectStore

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder is a workspace."""
        return (folder / FILE).is_file() or (folder / "catalog.sqlite").is_file()

    @staticmethod
    def open(folder: Path) -> "Workspace":
        """Open a workspace, making it where it is absent.

        Raises:
            UsageError: Its `workspace.yaml` cannot be used.
            StorageError: The catalog or the store cannot be opened.
        """
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        config = read_config(folder / FILE)
        catalog = Catalog(config.catalog or f"sqlite:///{folder / 'catalog.sqlite'}")
        objects = config.objects or "objects"
        return Workspace(
            folder, catalog, ObjectStore(objects if "://" in objects else str(folder / objects), folder / "cache")
        )

    @property
    def scratch(self) -> Path:
        """Folder of checkpoints and half-made files, safe to delete when nothing runs."""
        return self.folder / "scratch"


def read_config(path: Path) -> WorkspaceConfig:
    """What a `workspace.yaml` says; nothing where there is none.

    Raises:
        UsageError: It cannot be used.
    """
    if not path.is_file():
        return WorkspaceConfig()
    try:
        return WorkspaceConfig.model_validate(yaml.safe_load(path.read_text()) or {})
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'file'}: {p['msg']}" for p in error.errors())
        raise UsageError(f"{path}: {problems}; expected `catalog: URL` and `objects: URI`, or no such file") from None
