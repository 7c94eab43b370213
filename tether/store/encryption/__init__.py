"""Encrypted versions: keys, sealing on the way in, opening on the way out."""
