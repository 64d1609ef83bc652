"""A catalog and an object store of each kind: a folder with SQLite, and Postgres with a bucket."""

import pytest

from storage.catalog import Catalog
from storage.objects import ObjectStore


@pytest.fixture
def catalog(backend):
    opened = Catalog(backend[0])
    yield opened
    opened.close()


@pytest.fixture
def store(backend, tmp_path):
    return ObjectStore(backend[1], tmp_path / "cache")
