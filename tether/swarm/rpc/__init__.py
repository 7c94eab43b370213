"""Calls with peers, on the wire of @hyperswarm/rpc."""
