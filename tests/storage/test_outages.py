"""A database or a bucket that is away for a while is waited for; one that stays away gives a clear error."""

import http.client
import itertools
import sqlite3
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest

from storage.catalog import Catalog
from storage.errors import CatalogError, StorageError, StoreUnavailableError
from storage.objects import REMOTE, ObjectStore
from tests.servers import run_postgres

FILM = {"film_id": "a", "uri": "a", "digest": "d", "bytes": 1, "modified_ns": 1, "title": None, "year": None}
FILM |= {"split": None}


@pytest.fixture(scope="module")
def own_postgres():
    """A server that these tests may stop."""
    with run_postgres() as server:
        yield server


def test_a_restart_of_postgres_is_waited_for(own_postgres):
    catalog = Catalog(f"postgresql+psycopg:{own_postgres.new_database()}")
    own_postgres.stop()
    back = threading.Timer(1.5, own_postgres.start)
    back.start()
    catalog.save_film(FILM)
    back.join()
    assert catalog.film("a")["uri"] == "a"
    catalog.close()


def test_a_database_that_stays_away_is_named_with_the_remedy(own_postgres, monkeypatch):
    monkeypatch.setattr("storage.database.PATIENCE_S", 0.5)
    url = f"postgresql+psycopg:{own_postgres.new_database()}"
    catalog = Catalog(url)
    own_postgres.stop()
    try:
        with pytest.raises(CatalogError, match="run the same command again when the database answers"):
            catalog.films()
        with pytest.raises(CatalogError, match=r"cannot open the catalog .* check that it runs"):
            Catalog(url)
    finally:
        own_postgres.start()
    assert catalog.films() == []
    catalog.close()


def test_a_locked_file_is_waited_for(tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    other = sqlite3.connect(tmp_path / "catalog.sqlite", check_same_thread=False, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(1, other.rollback)
    release.start()
    catalog.save_film(FILM)
    release.join()
    other.close()
    catalog.close()


@pytest.mark.parametrize("url", ["nonsense", "oracle://host/name", "postgresql+nodriver://host/name"])
def test_a_url_that_means_nothing_is_named(url):
    with pytest.raises(CatalogError, match="cannot use the catalog URL"):
        Catalog(url)


def test_a_catalog_of_an_earlier_version_gets_its_new_columns_and_indexes(tmp_path):
    path = tmp_path / "catalog.sqlite"
    Catalog(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE run DROP COLUMN progress")
        connection.execute("DROP INDEX artifact_outline")
    catalog = Catalog(f"sqlite:///{path}")
    assert catalog.start_run("ingest")
    assert catalog.active_runs()[0]["progress"] is None
    catalog.close()
    assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'artifact_outline'").fetchone()
    connection.close()


@pytest.fixture
def flaky_s3(s3):
    """The S3 server behind a proxy that answers one request in five with an error or not at all."""
    upstream, numbers = urlparse(s3["AWS_ENDPOINT_URL"]).netloc, itertools.count()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            number = next(numbers)
            if number % 10 == 3:
                self.close_connection = True
                return
            if number % 10 == 8:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(upstream)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            connection.close()

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", numbers
    server.shutdown()
    server.server_close()
    thread.join()


def test_requests_that_fail_are_sent_again(flaky_s3, tmp_path, monkeypatch):
    url, numbers = flaky_s3
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    store = ObjectStore("s3://films/flaky", tmp_path / "cache")
    for number in range(20):
        path = tmp_path / "file"
        path.write_text(f"content {number}")
        stored = store.put(path, "a.txt")
        assert store.path(stored).read_text() == f"content {number}"
    assert len(store.keys()) == 20
    assert next(numbers) >= 50, "the proxy was not in between"


def test_a_bucket_that_stays_away_is_named_with_the_remedy(tmp_path, s3, monkeypatch):
    monkeypatch.setitem(REMOTE, "retry_config", {"max_retries": 2, "retry_timeout": timedelta(seconds=1)})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = ObjectStore("s3://films/away", tmp_path / "cache")
    path = tmp_path / "file"
    path.write_text("content")
    with pytest.raises(StoreUnavailableError, match=r"cannot write a.txt.*run the same command again"):
        store.put(path, "a.txt")


def test_a_uri_that_means_nothing_is_named():
    with pytest.raises(StorageError, match="cannot open the object store"):
        ObjectStore("nonsense://bucket/x")
