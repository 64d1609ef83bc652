"""A short form of `python -m tests.faults.kills`, on two short clips."""

from models import weights
from tests.faults.kills import measure


def test_killed_ingestions_resume_to_the_same_artifacts():
    films = [str(weights.folder("demo_films") / name) for name in ("carphone_pristine.mp4", "bikes.mp4")]
    result = measure(films, kills=2, seed=22, settings=["keyframes.every_n_frames=60"])
    assert result["kills"]["command"] == result["kills"]["raylet"] == 1
    for found in result["rounds"]:
        assert found["identical"], result
        assert (found["problems"], found["exit_codes"]) == ([], [0, 0])
