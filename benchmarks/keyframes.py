"""Every 30th frame of a film as RGB: ours against ffmpeg's own `select` filter, one process each, timed from outside.

    python benchmarks/keyframes.py [FILM] [--repetitions 5] [--json]

Without FILM it makes one: 90 s of 1280 x 544 H.264 (libx264, medium preset, default GOP, B-frames) that pans over the
demo clip `bikes.mp4` under film grain, with the clip's own cuts; it is kept in the temporary folder. ffmpeg runs with
its defaults, so it threads by itself; ours decodes in 2 threads. The last line is one JSON object:

    ratio           times as fast as ffmpeg, medians of wall clock
    identical       both wrote the same frames (SHA-256 of each)
    decoded_frames  what ours decoded; needed_frames: what cannot be left out by any decoder that must not look into
                    macroblocks: wanted frames, and the I and P frames that they may be predicted from. B frames that
                    are references themselves make up the difference
    full_decode_s   ffmpeg decoding every frame and keeping none: what no choice of frames by a filter can beat
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY_N_FRAMES = 30
THREADS = 2
SIZE_PX, FPS, DURATION_S = (1280, 544), 25, 90


def make_film(path: Path) -> None:
    """Write the film described above; the same on every machine with the same encoder."""
    import av
    import numpy as np

    from models import weights

    width, height = SIZE_PX
    margin = (320, 136)
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 3.0, (8, height, width)).astype(np.float32)
    with av.open(str(weights.folder("demo_films") / "bikes.mp4")) as clip:
        enlarged = (width + margin[0], height + margin[1])
        frames = [f.reformat(*enlarged, "yuv420p", interpolation="BICUBIC") for f in clip.decode(video=0)]
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    with av.open(str(partial), "w") as film:
        stream = film.add_stream("libx264", rate=FPS, options={"preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(FPS * DURATION_S):
            lap, position = divmod(index, len(frames))
            left = int(margin[0] / 2 * (1 + 0.9 * np.sin(index / 60 + lap))) // 2 * 2
            top = int(margin[1] / 2 * (1 + 0.9 * np.cos(index / 45 + lap))) // 2 * 2
            frame = _cut_out(frames[position].to_ndarray(), left, top, grain[index % len(grain)], mirror=lap % 2 == 1)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="yuv420p")))
        film.mux(stream.encode())
    partial.replace(path)


def _cut_out(planes, left: int, top: int, grain, mirror: bool):
    """A window of a planar 4:2:0 picture (rows x width array), with grain on its luma."""
    import numpy as np

    width, height = SIZE_PX
    rows, full_width = planes.shape[0] * 2 // 3, planes.shape[1]
    chroma = planes[rows:].reshape(2, rows // 2, full_width // 2)
    luma = planes[top : top + height, left : left + width] + grain
    chroma = chroma[:, top // 2 : (top + height) // 2, left // 2 : (left + width) // 2]
    step = -1 if mirror else 1
    luma = np.clip(luma, 0, 255).astype(np.uint8)[:, ::step]
    return np.concatenate([luma, chroma[:, :, ::step].reshape(height // 2, width)])


def write_frames(film_path: Path, out: Path) -> None:
    """Our side: raw RGB of the wanted frames, as ffmpeg writes it."""
    from models.frames import read_frames
    from models.video import Limits, open_film

    film = open_film(film_path, Limits(max_duration_s=86400.0, max_pixels=8192 * 4320))
    with out.open("wb") as stream:
        for picture in read_frames(film, EVERY_N_FRAMES, threads=THREADS):
            stream.write(picture.rgb)


def time_process(command: list[str]) -> tuple[float, float]:
    """Wall clock and processor seconds of one process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    wall_s, after = time.perf_counter() - start, os.times()
    busy_s = after.children_user + after.children_system - before.children_user - before.children_system
    return wall_s, busy_s


def hash_frames(path: Path, frame_bytes: int) -> list[str]:
    """SHA-256 of each raw frame of a file."""
    hashes = []
    with path.open("rb") as stream:
        while frame := stream.read(frame_bytes):
            hashes.append(hashlib.sha256(frame).hexdigest())
    return hashes


def count_work(film_path: Path) -> dict[str, int]:
    """Frames of the film, frames wanted, frames that ours decodes, frames that nobody can leave out."""
    from models.video import Limits, open_film

    film = open_film(film_path, Limits(max_duration_s=86400.0, max_pixels=8192 * 4320))
    total = len(film.entries)
    counts = {"film_frames": total, "frames": -(-total // EVERY_N_FRAMES)}
    if film.obstacle:
        return counts | {"decoded_frames": total, "needed_frames": total}
    decoded = needed = 0
    for segment in film.plan_segments(EVERY_N_FRAMES):
        for position in range(segment.begin, segment.last + 1):
            if film.is_needed(position, segment):
                decoded += 1
                entry = film.entries[position]
                needed += entry.pts in segment.wanted or not entry.unit.bipredicted
    return counts | {"decoded_frames": decoded, "needed_frames": needed}


def measure(film_path: Path, repetitions: int) -> dict[str, object]:
    """Run both sides in turns and compare what they wrote."""
    import av
    import imageio_ffmpeg

    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", f"file:{film_path}"]
    select = ["-vf", f"select='not(mod(n,{EVERY_N_FRAMES}))'", "-fps_mode", "passthrough"]
    with av.open(str(film_path)) as container:
        codec = container.streams.video[0].codec_context
        frame_bytes = codec.width * codec.height * 3
    times: dict[str, list[tuple[float, float]]] = {"peer": [], "ours": [], "full_decode": []}
    with tempfile.TemporaryDirectory() as folder:
        theirs, mine = Path(folder) / "peer.rgb", Path(folder) / "ours.rgb"
        commands = {
            "peer": [*ffmpeg, *select, "-f", "rawvideo", "-pix_fmt", "rgb24", str(theirs)],
            "ours": [sys.executable, __file__, str(film_path), "--write", str(mine)],
            "full_decode": [*ffmpeg, "-f", "null", "-"],
        }
        for _ in range(repetitions):
            for name, command in commands.items():
                times[name].append(time_process(command))
        identical = hash_frames(theirs, frame_bytes) == hash_frames(mine, frame_bytes)
    wall = {name: statistics.median(w for w, _ in pairs) for name, pairs in times.items()}
    busy = {name: statistics.median(b for _, b in pairs) for name, pairs in times.items()}
    return {
        "ratio": round(wall["peer"] / wall["ours"], 3),
        "peer": f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}, select='not(mod(n,{EVERY_N_FRAMES}))'",
        "identical": identical,
        "processor_ratio": round(busy["peer"] / busy["ours"], 3),
        **{f"{name}_s": round(value, 3) for name, value in wall.items()},
        **{f"{name}_processor_s": round(value, 3) for name, value in busy.items()},
        **count_work(film_path),
        "repetitions": repetitions,
        "threads": THREADS,
        "film": str(film_path),
    }


def main() -> None:
    """Parse, make the film if there is none, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", nargs="?", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if args.write:
        write_frames(args.film, args.write)
        return
    film = args.film.absolute() if args.film else Path(tempfile.gettempdir()) / "moviedreamer-keyframes-1.mp4"
    if not film.exists() and not args.film:
        print(f"making {film}, about a minute", file=sys.stderr)
        make_film(film)
    result = measure(film, args.repetitions)
    if not args.json:
        print(
            f"ours {result['ours_s']} s, ffmpeg {result['peer_s']} s: {result['ratio']} times as fast; "
            f"{result['decoded_frames']} of {result['film_frames']} frames decoded for {result['frames']} wanted, "
            f"{result['needed_frames']} at the least"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
