"""Peers that can't reach each other meet at a node that both reach."""
