"""When who was refused for now is told to come again."""

import pytest

from tether.errors import MemoryFullError, QueueFullError, ServiceUnavailableError, TooManyTriesError
from tether.gateway.retry_after import retry_after


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (QueueFullError("900 requests wait", 7), 7),
        (QueueFullError("32 requests wait"), 1),
        (TooManyTriesError("come again", 12.2), 13),
        (MemoryFullError("all are in use"), 5),
        (ServiceUnavailableError("it is being restarted"), 1),
    ],
)
def test_an_error_says_when_where_it_knows(error, seconds):
    assert retry_after(error) == seconds
