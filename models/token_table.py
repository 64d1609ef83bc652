"""The table of keyframe tokens: its columns, and its rows as frames of the story model.

Dimensions: token = tokens a frame, dim = width of a token, sentence, text = sentences and width of their embeddings,
face_width = width of a face embedding.

Source: the paper, section 3.3 (face embedding randomisation).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from models.script import FrameScript
from models.sequence import Frame

_NUMBERS = pa.large_list(pa.float32())  # offsets of 32 bits end at a few hundred thousand keyframes
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
        ("sentence_embeddings", _NUMBERS),
        ("mirrored_sentence_embeddings", _NUMBERS),
        ("face_character", pa.list_(pa.int32())),
        ("face_embeddings", _NUMBERS),
    ]
)
"""Lists of numbers are flat; the widths stand in the schema's metadata under the names of `WIDTHS`."""
WIDTHS = ("tokens_per_frame", "token_dim", "text_width", "face_width")


class TokenTableError(ValueError):
    """A table of tokens cannot be used; the message names the file and the remedy."""


class TokenTable:
    """Rows sorted by film and frame; a row is decoded when it is asked for.

    Attributes:
        widths: The sizes named in `WIDTHS`.
        films: Film of each row.

    Raises:
        TokenTableError: The file is not a table of tokens.
    """

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if not set(WIDTHS) <= metadata.keys() or not set(SCHEMA.names) <= set(table.column_names):
            raise TokenTableError(f"{path} is not a table of tokens: make it with the tokenize stage")
        self.widths = {name: int(metadata[name]) for name in WIDTHS}
        self._columns = {name: table[name].combine_chunks() for name in SCHEMA.names}
        self.films: list[str] = self._columns["film_id"].to_pylist()
        self._frame_indexes: list[int] = self._columns["frame_index"].to_pylist()
        self._splits = self._columns["split"].to_pylist()
        self._faces: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for row, characters in enumerate(self._columns["face_character"].to_pylist()):
            for position, character in enumerate(characters):
                self._faces.setdefault((self.films[row], character), []).append((row, position))
        self._runs = {split: self._find_runs(split) for split in ("train", "heldout", "test")}
        self._training_rows: dict[str, list[int]] = {}
        for row in self.split_rows("train"):
            self._training_rows.setdefault(self.films[row], []).append(row)

        self._path = path

    def __reduce__(self) -> tuple[type["TokenTable"], tuple[Path]]:
        return TokenTable, (self._path,)  # another process reads the file itself

    def __len__(self) -> int:
        return len(self.films)

    def key(self, row: int) -> tuple[str, int]:
        """Film and frame index of a row."""
        return self.films[row], self._frame_indexes[row]

    def _find_runs(self, split: str) -> list[list[int]]:
        runs: list[list[int]] = []
        for row, (film, found) in enumerate(zip(self.films, self._splits, strict=True)):
            if found == split:
                follows = runs and runs[-1][-1] == row - 1 and self.films[row - 1] == film
                runs[-1].append(row) if follows else runs.append([row])
        return runs

    def runs(self, split: str) -> list[list[int]]:
        """Rows of consecutive keyframes of one film in split "train", "heldout" or "test", as long as they go."""
        return self._runs[split]

    def windows(self, split: str, frames: int) -> list[list[int]]:
        """Runs cut into windows that do not overlap."""
        return [run[start : start + frames] for run in self.runs(split) for start in range(0, len(run), frames)]

    def split_rows(self, split: str) -> list[int]:
        """All rows of a split."""
        return [row for run in self._runs[split] for row in run]

    def training_rows_of(self, film: str) -> list[int]:
        """Training rows of a film."""
        return self._training_rows.get(film, [])

    def tokens(self, row: int, mirrored: bool = False) -> Float[np.ndarray, "token dim"]:
        """The compressed keyframe, or that of its mirror image."""
        flat = self._numbers("mirrored_tokens" if mirrored else "tokens", row)
        return flat.reshape(self.widths["tokens_per_frame"], self.widths["token_dim"])

    def script(self, row: int, mirrored: bool = False) -> FrameScript:
        """The keyframe's script, or that of its mirror image."""
        return FrameScript.model_validate_json(self._columns["mirrored_script" if mirrored else "script"][row].as_py())

    def sentences(self, row: int, mirrored: bool = False) -> Float[np.ndarray, "sentence text"]:
        """Embeddings of the script's sentences."""
        name = "mirrored_sentence_embeddings" if mirrored else "sentence_embeddings"
        return self._numbers(name, row).reshape(-1, self.widths["text_width"])

    def face(self, row: int, position: int) -> Float[np.ndarray, " face_width"]:
        """One of the keyframe's face embeddings."""
        return self._numbers("face_embeddings", row).reshape(-1, self.widths["face_width"])[position]

    def faces_of(self, film: str, character_index: int) -> list[tuple[int, int]]:
        """Row and position of each face of a film's character."""
        return self._faces.get((film, character_index), [])

    def characters(self) -> list[tuple[str, int]]:
        """Film and index of every identified character with a face."""
        return [(film, character) for film, character in self._faces if character >= 0]

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
        faces = self.faces_of(self.films[row], character)
        others = [face for face in faces if face[0] != row]
        train = [face for face in others if self._splits[face[0]] == "train"]
        own = [face for face in faces if face[0] == row]
        pool = train or (others if self._splits[row] != "train" else []) or own
        return pool[rng.integers(len(pool))] if pool else None

    def _numbers(self, name: str, row: int) -> np.ndarray:
        return self._columns[name][row].values.to_numpy(zero_copy_only=False)


def write_token_table(rows: Sequence[dict], path: Path, widths: dict[str, int]) -> None:
    """Write rows of `SCHEMA`, sorted by film and frame; the same rows give the same bytes.

    Args:
        rows: In any order; arrays may be given flat or not.
        path: The Parquet file.
        widths: The sizes named in `WIDTHS`.
    """
    rows = sorted(rows, key=lambda row: (row["film_id"], row["frame_index"]))
    flat = [{k: v.ravel() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]
    schema = SCHEMA.with_metadata({name: str(widths[name]) for name in WIDTHS})
    pq.write_table(pa.Table.from_pylist(flat, schema), path, compression="zstd")
