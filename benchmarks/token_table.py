"""Memory of a table of tokens that is mapped, against the same files read into memory, and the time of a window.

    python benchmarks/token_table.py --json

Each is opened in a process of its own; where it is mapped, windows are then drawn as in training. The peer is pyarrow,
which reads the same files whole. Memory is what the process holds by itself (anonymous pages): pages of mapped files
belong to the system, which takes them back when it needs them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.script import Character, FrameScript
from models.token_table import ROWS, SENTENCES, TokenTable, write_token_table

WIDTHS = {"tokens_per_frame": 2, "token_dim": 1024, "text_width": 768, "face_width": 512}
SENTENCES_A_FRAME = 15
FILM_FRAMES = 5_000
WINDOW = 128


def make_batches(keyframes: int) -> Iterator[list[dict]]:
    """Films of made keyframes, all of whose sentences differ."""
    rng = np.random.default_rng(0)
    people = [Character(identity=f"Person {i}", character_index=i, description=["a", "b", "c"]) for i in range(2)]
    script = FrameScript(characters=people, plot=["s"] * (SENTENCES_A_FRAME - 6)).model_dump_json()
    for start in range(0, keyframes, FILM_FRAMES):
        rows = []
        for index in range(min(FILM_FRAMES, keyframes - start)):
            tokens = rng.standard_normal((2, WIDTHS["token_dim"]), np.float32)
            words = rng.standard_normal((SENTENCES_A_FRAME, WIDTHS["text_width"]), np.float32)
            rows.append({
                "film_id": f"film {start:09d}", "frame_index": index, "time_s": float(index), "shot_index": 0,
                "split": "train", "tokens": tokens, "mirrored_tokens": tokens, "script": script,
                "mirrored_script": script,
                "sentence_embeddings": words, "mirrored_sentence_embeddings": words, "face_character": [0, 1],
                "face_embeddings": rng.standard_normal((2, WIDTHS["face_width"]), np.float32),
            })  # fmt: skip
        yield rows


def own_bytes() -> int:
    """Anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def look(folder: Path, way: str, windows: int) -> dict[str, float]:
    """Open the table one way, and draw windows from it where it is mapped."""
    before, started = own_bytes(), time.perf_counter()
    if way == "read":
        kept = [pa.ipc.open_file(pa.OSFile(str(folder / name))).read_all() for name in (ROWS, SENTENCES)]
        return {"bytes": own_bytes() - before, "open_s": time.perf_counter() - started, "rows": len(kept[0])}
    table = TokenTable(folder)
    opened_s = time.perf_counter() - started
    rng = np.random.default_rng(1)
    started = time.perf_counter()
    for _ in range(windows):
        start = int(rng.integers(len(table) - WINDOW))
        for row in range(start, start + WINDOW):
            table.frame(row, rng)
    seconds = time.perf_counter() - started
    return {"bytes": own_bytes() - before, "open_s": opened_s, "rows": len(table), "window_s": seconds / windows}


def measure(keyframes: int, windows: int) -> dict[str, float]:
    """Both ways, and the ratio of their memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_token_table(make_batches(keyframes), folder, WIDTHS)
        size = sum(path.stat().st_size for path in folder.iterdir())
        found = {}
        for way in ("map", "read"):
            command = [sys.executable, __file__, "--look", way, "--folder", name, "--windows", str(windows)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way] = json.loads(done.stdout)
    return {
        "keyframes": keyframes,
        "file_bytes_a_keyframe": size / keyframes,
        "mapped_bytes_a_keyframe": found["map"]["bytes"] / keyframes,
        "read_bytes_a_keyframe": found["read"]["bytes"] / keyframes,
        "memory_ratio": found["map"]["bytes"] / found["read"]["bytes"],
        "open_s": found["map"]["open_s"],
        "window_ms": 1000 * found["map"]["window_s"],
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keyframes", type=int, default=20_000)
    parser.add_argument("--windows", type=int, default=20, help="windows of 128 keyframes that are drawn")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--look", choices=("map", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.look:
        print(json.dumps(look(call.folder, call.look, call.windows)))
        return
    result = measure(call.keyframes, call.windows)
    print(json.dumps(result) if call.json else "\n".join(f"{name}: {value:.4g}" for name, value in result.items()))


if __name__ == "__main__":
    main()
