"""Blobs and manifests with peers, each verified as it arrives."""
