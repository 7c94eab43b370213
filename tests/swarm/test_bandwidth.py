"""How many bytes a second may go out."""

import pytest

from tether.errors import ConfigError
from tether.swarm.wire.bandwidth import TokenBucket


@pytest.mark.parametrize("rate", [0, 0.0, -5, float("nan")])
def test_a_cap_at_which_nothing_ever_goes_is_refused_and_the_one_before_stays(rate):
    with pytest.raises(ConfigError, match="over 0"):
        TokenBucket(rate)
    bucket = TokenBucket(1000.0, 1000)
    with pytest.raises(ConfigError, match="over 0"):
        bucket.limit(rate)
    assert bucket.nbytes_per_second == 1000.0
    assert bucket.take(2000, 0.0) == 1.0
