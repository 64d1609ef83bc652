"""A short form of `python -m tests.faults.hosts`."""

from tests.faults.hosts import FILMS, measure

ROWS = 15


def test_every_film_completes_when_a_host_is_cut_off_in_the_middle_of_a_stage(hosts):
    result = measure(hosts, ROWS)
    assert result["failed"] == {}
    assert result["values"] == {film: [2 * index for index in range(ROWS)] for film in FILMS}
    assert result["counts"] == {"ok": len(FILMS) * ROWS}
    assert result["artifacts"] == 2 * len(FILMS)
    assert result["noticed_after_s"], "the lost host held no unit"
    assert result["noticed_after_s"][0] < 30
