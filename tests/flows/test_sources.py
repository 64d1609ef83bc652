import functools
import http.server
import os
import threading
import time
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.sources import Source, expand, read_catalogue, resolve
from flows.watch import find_new_films
from flows.workspace import Workspace
from stages.errors import CatalogueError, FilmError, UsageError
from storage.catalog import Catalog


@pytest.fixture
def catalog(tmp_path):
    opened = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    yield opened
    opened.close()


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "my 'films'"
    (folder / "sub").mkdir(parents=True)
    for name in ("a b.mp4", "-dash.mkv", "sub/a b.mp4", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_folder_gives_films_with_ids_by_path(films):
    assert [s.film_id for s in expand([str(films)])] == ["-dash.mkv", "a b.mp4", "sub/a b.mp4"]


def test_file_with_odd_name(films, monkeypatch):
    monkeypatch.chdir(films)
    assert expand(["-dash.mkv"]) == [Source("-dash.mkv", str(films / "-dash.mkv"))]


def test_same_film_twice_is_one(films):
    path = str(films / "a b.mp4")
    assert len(expand([path, path])) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [(["nowhere.mp4"], "no such film: 'nowhere.mp4'"), ([], "no films"), (["EMPTY"], "holds no film")],
)
def test_wrong_calls(tmp_path, names, message):
    (tmp_path / "EMPTY").mkdir()
    names = [str(tmp_path / n) if n == "EMPTY" else n for n in names]
    with pytest.raises(UsageError, match=message):
        expand(names)


def test_two_films_with_one_id(films):
    with pytest.raises(UsageError, match="give them ids of their own in a catalogue"):
        expand([str(films / "a b.mp4"), str(films / "sub" / "a b.mp4")])


def test_catalogue_in_both_formats(films):
    table = films / "films.csv"
    table.write_text('film_id,uri,title,year,split\n-x,a b.mp4,A "b",1999,train\ny,https://host/y.mp4,,,\n')
    rows = read_catalogue(table)
    assert rows[0] == Source("-x", str(films / "a b.mp4"), 'A "b"', 1999, "train")
    assert rows[1] == Source("y", "https://host/y.mp4")
    columns = {"film_id": ["-x"], "uri": ["a b.mp4"], "year": [1999.0]}
    pq.write_table(pa.table(columns), films / "films.parquet")
    assert expand([str(films / "films.parquet")]) == [Source("-x", str(films / "a b.mp4"), None, 1999)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,uri\n1,x\n", "no column film_id: it has id, uri"),
        ("", "it has none"),
        ("film_id,uri\n,x\n", "row 2: film_id is blank"),
        ("film_id,uri\na,\n", "row 2: uri is blank"),
        ("film_id,uri\na,x\na,y\n", "row 3: film_id 'a' stands in row 2"),
        ("film_id,uri,year\na,x,soon\n", "year 'soon' is not a number"),
        ("film_id,uri\n", "lists no film"),
    ],
)
def test_catalogue_errors_name_the_place(tmp_path, text, message):
    path = tmp_path / "films.csv"
    path.write_text(text)
    with pytest.raises(CatalogueError, match=message):
        read_catalogue(path)


def test_unreadable_catalogue(tmp_path):
    path = tmp_path / "films.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(CatalogueError, match="cannot be read as parquet"):
        read_catalogue(path)


def test_resolve_digests_once_and_sees_changes(films, catalog, tmp_path):
    source = expand([str(films / "a b.mp4")])[0]
    first = resolve(source, catalog, tmp_path / "cache")
    assert resolve(source, catalog, tmp_path / "cache") == first
    (films / "a b.mp4").write_bytes(b"another film")
    os.utime(films / "a b.mp4", ns=(1, 1))
    assert resolve(source, catalog, tmp_path / "cache").digest != first.digest


def test_an_id_keeps_its_film(films, catalog, tmp_path):
    resolve(Source("x", str(films / "a b.mp4")), catalog, tmp_path)
    with pytest.raises(FilmError, match="stands for .* already"):
        resolve(Source("x", str(films / "-dash.mkv")), catalog, tmp_path)


def test_missing_film_of_a_catalogue(catalog, tmp_path):
    with pytest.raises(FilmError, match="does not exist"):
        resolve(Source("x", str(tmp_path / "gone.mp4")), catalog, tmp_path)


def test_film_from_a_url(films, catalog, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(films)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        (source,) = expand([f"{url}/a%20b.mp4"])
        film = resolve(source, catalog, tmp_path / "cache")
        assert (film.film_id, Path(film.uri).read_bytes()) == ("a b.mp4", b"a b.mp4")
        with pytest.raises(FilmError, match="cannot fetch http"):
            resolve(Source("gone", f"{url}/gone.mp4"), catalog, tmp_path / "cache")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def put(bucket, name, content):
    bucket.put_object(Bucket="films", Key=f"{PREFIX}/{name}", Body=content)


PREFIX = "incoming films"


def test_films_of_a_bucket(s3, catalog, tmp_path):
    bucket = boto3.client("s3")
    for name in ("a b.mp4", "sub/c.mkv", "notes.txt"):
        put(bucket, name, name.encode())
    place = f"s3://films/{PREFIX}/"
    sources = expand([place])
    assert [(s.film_id, s.uri) for s in sources] == [("a b.mp4", f"{place}a b.mp4"), ("sub/c.mkv", f"{place}sub/c.mkv")]
    film = resolve(sources[0], catalog, tmp_path / "cache")
    assert film.uri == sources[0].uri, "workers fetch it themselves"
    again = resolve(sources[0], catalog, tmp_path / "cache")
    assert again == film
    put(bucket, "a b.mp4", b"another film")
    assert resolve(sources[0], catalog, tmp_path / "cache").digest != film.digest
    with pytest.raises(FilmError, match=r"gone.mp4 does not exist: correct the URL"):
        resolve(Source("gone", f"{place}gone.mp4"), catalog, tmp_path / "cache")
    with pytest.raises(UsageError, match="holds no film"):
        expand(["s3://films/nothing here/"])


def test_what_appeared_in_a_place(s3, tmp_path, films):
    workspace = Workspace.open(tmp_path / "w")
    old = time.time() - 1000
    for path in films.rglob("*.m*"):
        os.utime(path, (old, old))
    assert find_new_films(workspace, str(films), settle_s=60) == ["-dash.mkv", "a b.mp4", "sub/a b.mp4"]
    (source,) = expand([str(films / "-dash.mkv")])
    resolve(source, workspace.catalog, tmp_path)
    (films / "still being copied.mp4").write_bytes(b"half")
    assert find_new_films(workspace, str(films), settle_s=60) == ["a b.mp4", "sub/a b.mp4"]
    boto3.client("s3").put_object(Bucket="films", Key="watched/x.mp4", Body=b"x")
    assert find_new_films(workspace, "s3://films/watched/", settle_s=60) == ["x.mp4"]
    run_id = workspace.catalog.start_run("ingest")
    assert find_new_films(workspace, str(films), settle_s=60) == [], "an ingestion is at work on them"
    workspace.catalog.end_run(run_id, "done", {})
    with pytest.raises(UsageError, match="no folder .* to watch"):
        find_new_films(workspace, str(films / "nowhere"), settle_s=60)
    (tmp_path / "empty").mkdir()
    assert find_new_films(workspace, str(tmp_path / "empty"), settle_s=60) == []
    workspace.catalog.close()
