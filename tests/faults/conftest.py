"""Hosts of their own, for tests that need several."""

import pytest

from tests.faults.hosts import NoHostsError, connected_hosts


@pytest.fixture
def hosts():
    """A head and two workers, each in a network namespace; where the machine lets us make none, the test is skipped."""
    try:
        with connected_hosts() as connected:
            yield connected
    except NoHostsError as error:
        pytest.skip(str(error))
