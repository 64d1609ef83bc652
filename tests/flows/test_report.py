import base64
import io
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flows.report import (
    GENERATED_SHOWN,
    KEYFRAMES_SHOWN,
    MOVIE_LIMIT_BYTES,
    TEMPLATES,
    ArtifactRow,
    Box,
    Character,
    Film,
    GeneratedKeyframe,
    Keyframe,
    Reconstruction,
    ReportData,
    ScriptedKeyframe,
    build_report,
    choose_ticks,
    encode_picture,
    format_clock,
    format_number,
    format_size,
    plot_history,
    render_page,
    smooth,
    spread,
)
from flows.report_tables import lay_out_tables

SCRIPT = {
    "characters": [{"identity": "Person 1", "description": ["A man & a dog stand on the left."]}],
    "scene_elements": ["It is a wide shot."],
    "plot": ["The man moves to the right."],
}
VOID = {"meta", "img", "rect", "line", "polyline", "br", "input", "link"}


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects what a test asks about."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_jpeg(width: int = 64, height: int = 36, seed: int = 0) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG", quality=90)
    return data.getvalue()


def make_data(**changes) -> ReportData:
    keyframe = Keyframe(make_jpeg(), 30, 1.25, 2, [Box(4, 5, 30, 35, "0.91")], [Box(10, 8, 20, 18)])
    parts = {
        "title": "A test",
        "films": [
            Film(
                "bikes",
                "/films/bikes.mp4",
                125.0,
                [keyframe],
                1,
                {"people": {"no_person": 3}},
                None,
                sentences=40,
                untraced=3,
            )
        ],
        "characters": [Character("bikes", "Person 1", 7, [make_jpeg(150, 150)])],
        "scripts": [ScriptedKeyframe("bikes", 30, make_jpeg(), SCRIPT)],
        "reconstructions": [Reconstruction(make_jpeg(), make_jpeg(seed=1), "bikes frame 30")],
        "histories": {"train_autoencoder": [{"phase": "warm-up", "step": i, "loss": 1 / (i + 1)} for i in range(50)]},
        "generated": [GeneratedKeyframe(3, 1, make_jpeg(), SCRIPT)],
        "movie": b"not really a movie",
        "movie_name": "out/movie.mp4",
        "evaluation": [
            {
                "name": "LT",
                "value": 0.75,
                "unit": "share of frames",
                "definition": "Long-term consistency.",
                "computed_with": "3 of 4",
                "better": "higher",
            },
            {
                "name": "FID",
                "value": None,
                "unit": "",
                "definition": "Frechet distance.",
                "computed_with": "not available in this profile",
                "better": "lower",
            },
        ],
        "artifacts": [ArtifactRow("keyframes", 1, "bikes", "0123456789abcdef" * 4, 250, 1_234_567, 3.5)],
        "facts": {"profile": "embedded"},
    }
    return ReportData(**{**parts, **changes})


def test_sentences_of_scripts_that_no_caption_bears_out_are_counted():
    assert "40 sentences in its scripts, 3 of them in no caption" in render_page(make_data())


def test_page_is_balanced_and_loads_nothing_from_outside():
    page = render_page(make_data())
    outline = Outline(page)
    for tag, attributes in outline.tags:
        for name in ("src", "href", "poster", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), f"<{tag} {name}> reaches outside"
    assert "@import" not in page and "url(" not in page and not outline.all("script")


def test_every_link_of_the_contents_leads_to_a_section():
    outline = Outline(render_page(make_data()))
    targets = [link["href"].removeprefix("#") for link in outline.all("a")]
    assert len(targets) >= 9 and targets == [section["id"] for section in outline.all("section")]


def test_everything_given_is_on_the_page():
    outline = Outline(render_page(make_data()))
    for text in (
        "bikes",
        "/films/bikes.mp4",
        "2:05",
        "no_person",
        "Person 1",
        "A man & a dog",
        "It is a wide shot.",
        "The man moves to the right.",
        "warm-up",
        "out/movie.mp4",
        "0.75",
        "share of frames",
        "3 of 4",
        "Long-term consistency.",
        "not available in this profile",
        "0123456789ab",
        "1.2 MB",
        "embedded",
    ):
        assert text in outline.text, f"{text!r} is missing"
    assert len(outline.all("img")) == 6 and len(outline.all("video")) == 1
    assert all(image["alt"] for image in outline.all("img"))


def test_boxes_are_drawn_in_the_stored_keyframes_pixels():
    outline = Outline(render_page(make_data()))
    assert [(r["class"], r["x"], r["y"], r["width"], r["height"]) for r in outline.all("rect")] == [
        ("person", "4", "5", "26", "30"),
        ("face", "10", "8", "10", "10"),
    ]
    assert any(svg.get("viewbox") == "0 0 64 36" for svg in outline.all("svg"))


def test_the_papers_tables_stand_below_the_numbers():
    scored = [{"name": "CLIP score", "value": 21.125}, {"name": "FID", "value": None}]
    outline = Outline(render_page(make_data(tables=lay_out_tables({"this workspace (heist)": scored}))))
    for text in ("Table 1 of the paper: story generation", "StreamingT2V", "19.97", "this workspace (heist)", "21.12"):
        assert text in outline.text, f"{text!r} is missing"
    assert "Table 1 of the paper" not in Outline(render_page(make_data())).text


def test_names_from_outside_are_escaped():
    evil = "<script>alert('x')</script>\" onload=\"alert(1)"
    keyframe = Keyframe(make_jpeg(), 0, 0.0, 0, [Box(0, 0, 9, 9, evil)])
    script = {"characters": [{"identity": evil, "description": [evil]}]}
    texts = ("name", "unit", "definition", "computed_with", "better")
    page = render_page(
        make_data(
            title=evil,
            films=[Film(evil, evil, None, [keyframe], 1, {evil: {evil: 1}}, evil)],
            characters=[Character(evil, evil, 1, [make_jpeg()])],
            scripts=[ScriptedKeyframe(evil, 0, make_jpeg(), script)],
            histories={evil: [{"phase": evil, "step": 1, "loss": 1.0}]},
            movie_name=evil,
            evaluation=[dict.fromkeys(texts, evil) | {"value": 1.0}],
            tables=lay_out_tables({evil: []}),
            artifacts=[ArtifactRow(evil, 1, evil, evil, None, 1, None)],
            facts={evil: evil},
        )
    )
    outline = Outline(page)
    assert not outline.all("script") and not any("onload" in attributes for _, attributes in outline.tags)
    assert evil in outline.text


def test_an_empty_run_says_so_in_every_section():
    outline = Outline(render_page(ReportData()))
    empty = [p for p in outline.all("p") if p.get("class") == "empty"]
    assert len(empty) == len(outline.all("section")) == 10
    assert not outline.all("video") and not outline.all("img")


def test_a_movie_too_large_for_the_page_is_named_instead():
    outline = Outline(render_page(make_data(movie=bytes(MOVIE_LIMIT_BYTES + 1))))
    assert not outline.all("video") and "too much for this page" in outline.text and "out/movie.mp4" in outline.text


def test_movie_bytes_come_back_from_the_page():
    (video,) = Outline(render_page(make_data(movie=bytes(range(256))))).all("video")
    assert base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,")) == bytes(range(256))


def test_a_large_run_stays_small_and_says_what_is_left_out(tmp_path):
    noise = [make_jpeg(448, 252, seed) for seed in range(4)]
    sheet = [Keyframe(noise[i % 4], i, i / 10, 0) for i in range(100)]
    data = make_data(
        films=[Film(f"film {i}", "uri", 10.0, sheet, 100) for i in range(30)],
        characters=[Character("film", f"Person {i}", 1, noise * 5) for i in range(200)],
        scripts=[ScriptedKeyframe("film", i, noise[i % 4], SCRIPT) for i in range(50)],
        reconstructions=[Reconstruction(noise[0], noise[1])] * 50,
        generated=[GeneratedKeyframe(i, 0, noise[i % 4], SCRIPT) for i in range(90)],
        movie=bytes(MOVIE_LIMIT_BYTES),
    )
    path = build_report(data, tmp_path / "report.html")
    assert path.stat().st_size < 25_000_000, "noise compresses worse than any film"
    text = Outline(path.read_text()).text
    assert f"{KEYFRAMES_SHOWN} of 100 keyframes of this film are shown" in text
    assert f"{GENERATED_SHOWN} of 90 generated keyframes are shown" in text


def test_a_broken_picture_does_not_break_the_page():
    film = Film("bikes", "uri", None, [Keyframe(b"no picture", 0, 0.0, 0), Keyframe(make_jpeg()[:200], 1, 0.1, 0)], 2)
    outline = Outline(render_page(make_data(films=[film], characters=[Character("bikes", "Person 1", 1, [b""])])))
    assert outline.text.count("cannot be decoded") == 2


def test_the_file_is_written_whole_or_not_at_all(tmp_path):
    path = build_report(make_data(), tmp_path / "report.html")
    before = path.read_bytes()
    with pytest.raises(KeyError):
        build_report(make_data(histories={"stage": [{"phase": "a", "loss": 1.0}]}), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        build_report(make_data(), tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "report.html"]
    with pytest.raises(OSError, match="nowhere"):
        build_report(make_data(), tmp_path / "nowhere" / "report.html")


def test_same_data_gives_the_same_page():
    assert render_page(make_data()) == render_page(make_data())


def test_pictures_are_shrunk_and_keep_their_shape():
    picture = encode_picture(make_jpeg(800, 200))
    assert (picture.width_px, picture.height_px) == (360, 90)
    assert (picture.source_width_px, picture.source_height_px) == (800, 200)
    data = base64.b64decode(picture.uri.removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (360, 90)
    assert encode_picture(make_jpeg(20, 20)).width_px == 20, "small pictures are not enlarged"


def test_history_is_drawn_a_panel_a_phase_inside_the_drawing():
    history = [{"phase": phase, "step": i, "loss": 5 / (i + 1) - 1} for phase in ("one", "two") for i in range(600)]
    history += [{"phase": "two", "step": 600, "loss": float("nan")}, {"phase": "three", "step": 1, "loss": None}]
    one, two = plot_history(history)
    assert (one.phase, one.left_out, two.phase, two.left_out) == ("one", 0, "two", 1)
    for points in (one.raw, one.smooth):
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        assert len(pairs) == 400 and pairs == sorted(pairs)
        assert all(48 <= x <= 350 and 10 <= y <= 164 for x, y in pairs)
    assert one.last == pytest.approx(-1, abs=0.01) and one.steps == 599


@pytest.mark.parametrize("losses", [[1.0], [2.0, 2.0], [0.0, 0.0, 0.0], [1e9, -1e9], [1.0, float("inf")]])
def test_odd_histories_are_drawn(losses):
    (panel,) = plot_history([{"phase": "p", "step": i, "loss": loss} for i, loss in enumerate(losses)])
    assert panel.raw and "nan" not in panel.raw + panel.smooth


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_smoothing_stays_within_the_values(values):
    means = smooth(values)
    assert len(means) == len(values)
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert min(values) - slack <= min(means) and max(means) <= max(values) + slack


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_span_the_range(low, width):
    ticks = choose_ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    slack = (ticks[1] - ticks[0]) * 1e-6
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack


@given(st.integers(0, 60), st.integers(2, 20))
def test_spread_keeps_both_ends_and_the_order(count, limit):
    kept = spread(list(range(count)), limit)
    assert len(kept) == min(count, limit) and kept == sorted(set(kept))
    assert not count or (kept[0], kept[-1]) == (0, count - 1)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (format_number(0.73125), "0.7312"),
        (format_number(-1234567.0), "-1,235,000"),
        (format_number(0.000012), "1.20e-05"),
        (format_number(0), "0"),
        (format_number(None), "-"),
        (format_number(12.0), "12"),
        (format_clock(1.25), "1.25 s"),
        (format_clock(125), "2:05"),
        (format_clock(3725), "1:02:05"),
        (format_clock(None), "-"),
        (format_size(0), "0 B"),
        (format_size(999), "999 B"),
        (format_size(1_500), "1.5 kB"),
        (format_size(2 * 10**13), "20.0 TB"),
    ],
)
def test_numbers_are_written_for_people(found, wanted):
    assert found == wanted


def test_importing_the_report_loads_no_heavy_package():
    heavy = ("torch", "cv2", "PIL", "jinja2", "numpy", "prefect", "av")
    code = f"import sys, flows.report; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_template_is_ascii_and_runs_no_code():
    assert "<script" not in (TEMPLATES / "report.html").read_text("ascii")
