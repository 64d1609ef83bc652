"""Shared set-up. A server or cluster that the user's shell points at is never touched by a test."""

import os

import pytest

from tests.servers import run_postgres, run_s3

for name in ("PREFECT_API_URL", "PREFECT_API_KEY", "RAY_ADDRESS"):
    os.environ.pop(name, None)
for name in [name for name in os.environ if name.startswith(("AWS_", "PG"))]:
    os.environ.pop(name)
os.environ["DO_NOT_TRACK"] = "1"


@pytest.fixture(scope="session")
def postgres():
    """A Postgres server for the whole session."""
    with run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3():
    """An S3 server for the whole session; this process and those it starts find it by their environment."""
    with run_s3() as variables:
        os.environ.update(variables)
        yield variables


@pytest.fixture(params=["local", "remote"])
def backend(request, tmp_path):
    """Where a workspace keeps its catalog and its objects: `(catalog URL, objects URI)`."""
    if request.param == "local":
        return f"sqlite:///{tmp_path / 'a workspace' / 'catalog.sqlite'}", str(tmp_path / "o b-jects")
    place = request.getfixturevalue("postgres").new_database()
    request.getfixturevalue("s3")
    return f"postgresql+psycopg:{place}", f"s3://films/{place.rpartition('/')[2]}/a prefix"


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that their operations wait for each other's threads most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
