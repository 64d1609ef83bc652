"""The table of keyframe tokens: how it is kept, and its rows as frames of the story model.

A folder of two Arrow files and a JSON file. `tokens.arrow` holds a row a keyframe; `sentences.arrow` holds the sentence
embeddings, each different one of a batch once, and rows name them by number. Both are mapped, not loaded: in memory is
only what is told apart by (film, frame, split, character of each face), about 140 bytes a keyframe, and of the rest the
operating system reads what is asked for. With tokens of 1,024 numbers and 15 sentences a keyframe takes 67 kB on disk.

Dimensions: token = tokens a frame, dim = width of a token, sentence, text = sentences and width of their embeddings,
face_width = width of a face embedding.

Source: the paper, section 3.3 (face embedding randomisation).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from models.script import FrameScript
from models.sequence import Frame

ROWS, SENTENCES, ABOUT = "tokens.arrow", "sentences.arrow", "tokens.json"
WIDTHS = ("tokens_per_frame", "token_dim", "text_width", "face_width")
SPLITS = ("train", "heldout", "test")
_NUMBERS = pa.large_list(pa.float32())
SCHEMA = pa.schema(
    [
        ("film_id", pa.string()),
        ("frame_index", pa.int64()),
        ("time_s", pa.float64()),
        ("shot_index", pa.int32()),
        ("split", pa.string()),
        ("tokens", _NUMBERS),
        ("mirrored_tokens", _NUMBERS),
        ("script", pa.string()),
        ("mirrored_script", pa.string()),
        ("sentences", pa.large_list(pa.int64())),
        ("mirrored_sentences", pa.large_list(pa.int64())),
        ("face_character", pa.large_list(pa.int32())),
        ("face_embeddings", _NUMBERS),
    ]
)
"""Of `tokens.arrow`. Lists of numbers are flat; a character of -1 is nobody known."""
SENTENCE_SCHEMA = pa.schema([("embedding", _NUMBERS)])


class TokenTableError(ValueError):
    """A table of tokens cannot be used; the message names the folder and the remedy."""


class TokenTable:
    """Rows sorted by film and frame; a row is read from disk when it is asked for.

    Args:
        folder: Where `write_token_table` wrote it.

    Attributes:
        widths: The sizes named in `WIDTHS`.
        films: Film of each row.

    Raises:
        TokenTableError: The folder holds no table of tokens.
    """

    def __init__(self, folder: Path) -> None:
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self.widths = {name: int(about[name]) for name in WIDTHS}
            self._rows, self._sentences = _MappedFile(folder / ROWS), _MappedFile(folder / SENTENCES)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokenTableError(f"{folder} holds no table of tokens ({error!r}): make it with tokenize") from None
        self._folder = folder
        names, codes = self._rows.categories("film_id")
        frames = self._rows.values("frame_index")
        self._places = np.lexsort((frames, codes))  # of each row in the file
        self._film_codes, self._frame_indexes = codes[self._places], frames[self._places]
        self.films: list[str] = [names[code] for code in self._film_codes]
        self._film_places = {name: code for code, name in enumerate(names)}
        self._film_starts = np.searchsorted(self._film_codes, np.arange(len(names) + 1))
        splits, split_codes = self._rows.categories("split")
        self._split_codes, self._splits = split_codes[self._places], {name: code for code, name in enumerate(splits)}
        self._face_starts, self._face_characters = self._gather_characters()
        self._runs = {split: self._find_runs(split) for split in SPLITS}

    def __reduce__(self) -> tuple[type["TokenTable"], tuple[Path]]:
        return TokenTable, (self._folder,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self.films)

    def key(self, row: int) -> tuple[str, int]:
        """Film and frame index of a row."""
        return self.films[row], int(self._frame_indexes[row])

    def rows_of(self, film: str) -> range:
        """Rows of a film; none where it has none."""
        code = self._film_places.get(film)
        return range(0) if code is None else range(*self._film_starts[code : code + 2].tolist())

    def runs(self, split: str) -> list[range]:
        """Rows of consecutive keyframes of one film in split "train", "heldout" or "test", as long as they go."""
        return self._runs[split]

    def windows(self, split: str, frames: int) -> list[range]:
        """Runs cut into windows that do not overlap."""
        return [run[start : start + frames] for run in self.runs(split) for start in range(0, len(run), frames)]

    def split_rows(self, split: str) -> list[int]:
        """All rows of a split."""
        return np.flatnonzero(self._is_of(split)).tolist()

    def training_rows_of(self, film: str) -> list[int]:
        """Training rows of a film."""
        rows = self.rows_of(film)
        return (rows.start + np.flatnonzero(self._is_of("train", rows))).tolist()

    def _is_of(self, split: str, rows: range | None = None) -> np.ndarray:
        """Which rows are of a split, bool [row]."""
        codes = self._split_codes if rows is None else self._split_codes[rows.start : rows.stop]
        return codes == self._splits.get(split, -1)

    def tokens(self, row: int, mirrored: bool = False) -> Float[np.ndarray, "token dim"]:
        """The compressed keyframe, or that of its mirror image."""
        flat = self._rows.numbers("mirrored_tokens" if mirrored else "tokens", self._places[row])
        return flat.reshape(self.widths["tokens_per_frame"], self.widths["token_dim"])

    def script(self, row: int, mirrored: bool = False) -> FrameScript:
        """The keyframe's script, or that of its mirror image."""
        text = self._rows.text("mirrored_script" if mirrored else "script", self._places[row])
        return FrameScript.model_validate_json(text)

    def sentences(self, row: int, mirrored: bool = False) -> Float[np.ndarray, "sentence text"]:
        """Embeddings of the script's sentences."""
        numbers = self._rows.numbers("mirrored_sentences" if mirrored else "sentences", self._places[row])
        found = np.empty((len(numbers), self.widths["text_width"]), np.float32)
        for index, number in enumerate(numbers):
            found[index] = self._sentences.numbers("embedding", number)
        return found

    def face(self, row: int, position: int) -> Float[np.ndarray, " face_width"]:
        """One of the keyframe's face embeddings."""
        flat = self._rows.numbers("face_embeddings", self._places[row])
        return flat.reshape(-1, self.widths["face_width"])[position]

    def faces_of(self, film: str, character_index: int) -> list[tuple[int, int]]:
        """Row and position of each face of a film's character."""
        rows, positions = self._find_faces(film, character_index)
        return list(zip(rows.tolist(), positions.tolist(), strict=True))

    def _find_faces(self, film: str, character_index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows_of(film)
        first, last = self._face_starts[rows.start], self._face_starts[rows.stop]
        faces = first + np.flatnonzero(self._face_characters[first:last] == character_index)
        found = np.searchsorted(self._face_starts, faces, side="right") - 1
        return found, faces - self._face_starts[found]

    def own_face(self, row: int, character_index: int) -> int | None:
        """Position of a character's first face among the keyframe's own, or None where it has none."""
        of_row = self._face_characters[self._face_starts[row] : self._face_starts[row + 1]]
        found = np.flatnonzero(of_row == character_index)
        return int(found[0]) if len(found) else None

    def characters(self, film: str) -> list[int]:
        """Index of every identified character of a film that has a face, in order."""
        rows = self.rows_of(film)
        found = np.unique(self._face_characters[self._face_starts[rows.start] : self._face_starts[rows.stop]])
        return found[found >= 0].tolist()

    def frame(self, row: int, rng: np.random.Generator, mirrored: bool = False, script_row: int | None = None) -> Frame:
        """The keyframe as the story model sees it.

        Each identified character brings a face from another frame of the film: a training frame's from training
        frames; a held-out frame's from those too, else from held-out ones. Its own face only where there is no other.

        Args:
            rng: Draws the faces.
            mirrored: Take the mirror image.
            script_row: Take script and faces of this row in place of its own.

        Source: section 3.3 "Face embedding randomization".
        """
        source = row if script_row is None else script_row
        script = self.script(source, mirrored)
        drawn = {p: self._draw_face(source, c.character_index, rng) for p, c in enumerate(script.characters)}
        faces = {position: self.face(*face) for position, face in drawn.items() if face is not None}
        return Frame(script.layout(), self.sentences(source, mirrored), faces, self.tokens(row, mirrored))

    def _draw_face(self, row: int, character: int | None, rng: np.random.Generator) -> tuple[int, int] | None:
        if character is None:
            return None
        rows, positions = self._find_faces(self.films[row], character)
        train = self._splits.get("train", -1)
        others, training = rows != row, (rows != row) & (self._split_codes[rows] == train)
        may_take_others = self._split_codes[row] != train and others.any()
        pool = np.flatnonzero(training if training.any() else others if may_take_others else ~others)
        if not len(pool):
            return None
        drawn = pool[rng.integers(len(pool))]
        return int(rows[drawn]), int(positions[drawn])

    def _gather_characters(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the faces of each row begin among all faces (one entry more than rows), and the character of each."""
        lengths, characters = self._rows.all_numbers("face_character")
        before = (np.cumsum(lengths) - lengths)[self._places]
        lengths = lengths[self._places]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return starts, characters[np.repeat(before - starts[:-1], lengths) + np.arange(starts[-1])]

    def _find_runs(self, split: str) -> list[range]:
        rows = np.asarray(self.split_rows(split), np.int64)
        breaks = (np.diff(rows) != 1) | (np.diff(self._film_codes[rows]) != 0)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(rows)] if len(rows) else []
        return [range(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(edges)]


class _MappedFile:
    """Columns of an Arrow file, read from disk row by row."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._starts = np.cumsum([0, *(len(batch) for batch in self._table.to_batches())])
        self._lists: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {
            name: [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in self._table[name].chunks]
            for name in self._table.column_names
            if pa.types.is_large_list(self._table[name].type)
        }

    def values(self, name: str) -> np.ndarray:
        """All of a column of numbers."""
        return self._table[name].to_numpy()

    def categories(self, name: str) -> tuple[list[str], np.ndarray]:
        """All of a column of texts: the different ones, in order, and which of them each row has."""
        encoded = self._table[name].dictionary_encode().combine_chunks()
        found = encoded.dictionary.to_pylist()
        names = sorted(found)
        ranks = {text: rank for rank, text in enumerate(names)}
        return names, np.asarray([ranks[text] for text in found], np.int32)[encoded.indices.to_numpy()]

    def all_numbers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All of a column of lists: how long each is, and their numbers one after the other."""
        offsets = [np.diff(starts) for starts, _ in self._lists[name]]
        numbers = [values for _, values in self._lists[name]]
        none = np.empty(0, np.int64)
        return np.concatenate([none, *offsets]), np.concatenate(numbers) if numbers else none

    def text(self, name: str, row: int) -> str:
        """One text."""
        return self._table[name][int(row)].as_py()

    def numbers(self, name: str, row: int) -> np.ndarray:
        """One list of numbers: a part of the file, which cannot be written to."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, values = self._lists[name][batch]
        place = row - self._starts[batch]
        return values[offsets[place] : offsets[place + 1]]


def write_token_table(batches: Iterable[Sequence[Mapping[str, Any]]], folder: Path, widths: Mapping[str, int]) -> None:
    """Write a table of tokens; the same rows in the same batches give the same bytes.

    Args:
        batches: Rows in any order, as many as are to be in memory at once: the columns of `SCHEMA`, but with the
            embeddings of sentences in the place of their numbers, `sentence_embeddings` and
            `mirrored_sentence_embeddings` (float32 [sentence, text]). Other arrays may be given flat or not.
        folder: Gets the three files.
        widths: The sizes named in `WIDTHS`. Without `face_width` that of the faces is taken, 1 where there is none.
    """
    face_width, count = widths.get("face_width", 0), 0
    with (
        pa.OSFile(str(folder / ROWS), "wb") as rows_file,
        pa.OSFile(str(folder / SENTENCES), "wb") as sentences_file,
        pa.ipc.new_file(rows_file, SCHEMA) as rows_writer,
        pa.ipc.new_file(sentences_file, SENTENCE_SCHEMA) as sentences_writer,
    ):
        for batch in filter(None, batches):
            embeddings: dict[bytes, int] = {}
            flat = [_flatten(row, embeddings, count) for row in batch]
            rows_writer.write_batch(pa.RecordBatch.from_pylist(flat, SCHEMA))
            if embeddings:
                sentences_writer.write_batch(_pack(list(embeddings), widths["text_width"]))
            count += len(embeddings)
            for row in flat:
                if len(row["face_character"]):
                    face_width = face_width or len(row["face_embeddings"]) // len(row["face_character"])
    about = {name: widths[name] for name in WIDTHS if name != "face_width"} | {"face_width": face_width or 1}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _flatten(row: Mapping[str, Any], embeddings: dict[bytes, int], count: int) -> dict[str, Any]:
    """A row of `SCHEMA`; embeddings that are new are added, with their number in the file."""
    flat = {name: value.ravel() if isinstance(value, np.ndarray) else value for name, value in row.items()}
    for name in ("sentences", "mirrored_sentences"):
        given = name.replace("sentences", "sentence_embeddings")
        del flat[given]
        vectors = [np.asarray(vector, np.float32).tobytes() for vector in row[given]]
        flat[name] = [embeddings.setdefault(vector, count + len(embeddings)) for vector in vectors]
    return flat


def _pack(vectors: Sequence[bytes], width: int) -> pa.RecordBatch:
    values = np.frombuffer(b"".join(vectors), np.float32)
    offsets = np.arange(0, len(values) + 1, width, dtype=np.int64)
    return pa.RecordBatch.from_arrays([pa.LargeListArray.from_arrays(offsets, values)], schema=SENTENCE_SCHEMA)
