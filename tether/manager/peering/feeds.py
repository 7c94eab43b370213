"""Feeds of labs, this one's and others': catalogs as public, signed histories."""

from tether.manager.peering.feed_reading import News
from tether.manager.peering.followed_feed import FollowedFeed, Following
from tether.manager.peering.own_feed import OwnFeed

__all__ = ["FollowedFeed", "Following", "News", "OwnFeed"]
