"""Versions and drafts as zarr stores."""
