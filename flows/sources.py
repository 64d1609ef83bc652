"""Where films come from: files, folders, URLs and catalogues, turned into a list of films with ids and digests."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from stages.errors import CatalogueError, FilmError, UsageError
from storage.catalog import Catalog
from storage.errors import StorageError
from storage.objects import digest_file, download, list_bucket

FILM_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".m2ts", ".mts",
    ".mpg", ".mpeg", ".wmv", ".ogv", ".3gp",
}  # fmt: skip
BUCKET_SCHEMES = {"s3", "s3a", "gs", "az", "abfs", "abfss"}
CATALOGUE_SUFFIXES = {".csv", ".parquet"}
MISSING_VALUES = ("", None)


@dataclass(frozen=True)
class Source:
    """A film as the user names it.

    Attributes:
        film_id: Its identity in the catalog: a file's name, or what a catalogue says.
        uri: A local path or a URL that fsspec opens.
        title, year, split: What a catalogue says; split `test` or `val` keeps the film out of training.
    """

    film_id: str
    uri: str
    title: str | None = None
    year: int | None = None
    split: str | None = None


@dataclass(frozen=True)
class Film:
    """A film that can be worked on: where workers find it (a local path, or an object of a bucket), and the digest of
    its bytes."""

    film_id: str
    uri: str
    digest: str
    split: str | None = None


def expand(names: Iterable[str]) -> list[Source]:
    """Turn what the user typed into films, in order.

    Raises:
        UsageError: A name leads to nothing, or two films share an id.
        CatalogueError: A catalogue cannot be used.
    """
    sources: dict[str, Source] = {}
    for name in names:
        for source in _expand_one(name):
            known = sources.setdefault(source.film_id, source)
            if known.uri != source.uri:
                raise UsageError(
                    f"film id '{source.film_id}' stands for {known.uri} and for {source.uri}: "
                    "give them ids of their own in a catalogue (CSV with columns film_id,uri)"
                )
    if not sources:
        raise UsageError("no films: name files, folders, URLs or a catalogue (CSV or Parquet with film_id, uri)")
    return list(sources.values())


def _expand_one(name: str) -> Iterator[Source]:
    if is_bucket(name) and name.endswith("/"):
        found = sorted(entry for entry, _ in list_bucket(name) if Path(entry).suffix.lower() in FILM_SUFFIXES)
        if not found:
            raise UsageError(f"{name} holds no film: expected objects such as {', '.join(sorted(FILM_SUFFIXES)[:5])}")
        yield from (Source(entry, name + entry) for entry in found)
        return
    if _is_url(name):
        yield Source(Path(unquote(urlparse(name).path)).name or name, name)
        return
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in FILM_SUFFIXES and p.is_file())
        if not found:
            raise UsageError(
                f"folder {path} holds no film: expected files such as {', '.join(sorted(FILM_SUFFIXES)[:5])}"
            )
        for film in found:
            yield Source(film.relative_to(path).as_posix(), str(film.absolute()))
    elif not path.is_file():
        raise UsageError(f"no such film: {name!r}; expected a file, a folder, a URL, or a CSV or Parquet catalogue")
    elif path.suffix.lower() in CATALOGUE_SUFFIXES:
        yield from read_catalogue(path)
    else:
        yield Source(path.name, str(path.absolute()))


def is_bucket(name: str) -> bool:
    """Whether a name is an object, or a prefix, of a bucket."""
    return urlparse(name).scheme in BUCKET_SCHEMES


def _is_url(name: str) -> bool:
    return "://" in name and len(urlparse(name).scheme) > 1


def read_catalogue(path: Path) -> list[Source]:
    """Films of a CSV or Parquet catalogue; relative URIs are relative to its folder.

    Raises:
        CatalogueError: A column is missing, an id blank or repeated, a year no number; the row is named.
    """
    rows = _read_rows(path)
    seen: dict[str, int] = {}
    sources = []
    for number, row in enumerate(rows, 2):
        film_id, uri = str(row["film_id"] or "").strip(), str(row["uri"] or "").strip()
        if not film_id or not uri:
            raise CatalogueError(f"{path} row {number}: {'film_id' if not film_id else 'uri'} is blank: fill it in")
        if film_id in seen:
            raise CatalogueError(f"{path} row {number}: film_id '{film_id}' stands in row {seen[film_id]} already")
        seen[film_id] = number
        year = row.get("year")
        if year not in MISSING_VALUES and not str(year).strip().removesuffix(".0").isdigit():
            raise CatalogueError(f"{path} row {number}: year {year!r} is not a number: correct it or leave it blank")
        if not _is_url(uri) and not Path(uri).is_absolute():
            uri = str((path.parent / uri).absolute())
        optional = {name: str(row[name]) for name in ("title", "split") if row.get(name) not in MISSING_VALUES}
        number_of_year = None if year in MISSING_VALUES else int(float(str(year)))
        sources.append(Source(film_id, uri, year=number_of_year, **optional))
    if not sources:
        raise CatalogueError(f"{path} lists no film: expected rows with film_id, uri")
    return sources


def listed_films(chosen: str) -> dict[str, Source] | None:
    """Films of a catalogue by id, or None where `chosen` names no catalogue.

    Raises:
        CatalogueError: The catalogue cannot be used.
    """
    path = Path(chosen).expanduser()
    if path.suffix.lower() not in CATALOGUE_SUFFIXES or not path.is_file():
        return None
    return {source.film_id: source for source in read_catalogue(path)}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            columns, rows = pq.read_schema(path).names, pq.read_table(path).to_pylist()
        else:
            with path.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream)
                columns, rows = list(reader.fieldnames or []), list(reader)
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        raise CatalogueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None
    missing = [name for name in ("film_id", "uri") if name not in columns]
    if missing:
        raise CatalogueError(
            f"{path} has no column {' or '.join(missing)}: it has {', '.join(columns) or 'none'}; "
            "expected film_id, uri and optionally title, year, split"
        )
    return rows


def resolve(source: Source, catalog: Catalog, cache: Path) -> Film:
    """Find a film's bytes, digest them (once: an unchanged file is known by size and time), and note it in the catalog.

    Raises:
        FilmError: The file is not there, cannot be fetched, or its id stands for another film already.
    """
    path = _fetch(source.uri, cache) if _is_url(source.uri) else Path(source.uri)
    if not path.is_file():
        raise FilmError(f"{source.uri} does not exist: correct the path and run again")
    facts = path.stat()
    known = catalog.film(source.film_id)
    same = known and (known["uri"], known["bytes"], known["modified_ns"]) == (
        source.uri, facts.st_size, facts.st_mtime_ns,
    )  # fmt: skip
    digest = known["digest"] if known and same else digest_file(path)
    if known and known["uri"] != source.uri and known["digest"] != digest and _exists(known["uri"]):
        raise FilmError(
            f"film id '{source.film_id}' stands for {known['uri']} already, and {source.uri} is another film: "
            "give it an id of its own in a catalogue (CSV with columns film_id,uri)"
        )
    about = {"title": source.title, "year": source.year, "split": source.split}
    if not same or any(known[name] != value for name, value in about.items() if value is not None):
        identity = {"film_id": source.film_id, "uri": source.uri, "digest": digest}
        catalog.save_film(identity | {"bytes": facts.st_size, "modified_ns": facts.st_mtime_ns} | about)
    uri = source.uri if is_bucket(source.uri) else str(path)
    return Film(source.film_id, uri, digest, source.split or (known or {}).get("split"))


def _exists(uri: str) -> bool:
    return _is_url(uri) or Path(uri).is_file()


def _fetch(url: str, cache: Path) -> Path:
    """A local copy of a remote film, fetched once."""
    if is_bucket(url):
        try:
            return download(url, cache)
        except StorageError as error:
            raise FilmError(str(error)) from error
    import fsspec

    try:
        return Path(fsspec.open_local(f"filecache::{url}", filecache={"cache_storage": str(cache)}))
    except Exception as error:  # fsspec's back ends share no base class
        raise FilmError(f"cannot fetch {_without_secrets(url)}: {type(error).__name__}: {error}") from error


def _without_secrets(url: str) -> str:
    parsed = urlparse(url)
    host = parsed.netloc.rpartition("@")[2]
    return parsed._replace(netloc=host, query="", fragment="").geturl()
