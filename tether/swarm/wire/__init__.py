"""What all that speaks with peers stands on: npm's encodings and channels, links, pieces, bandwidth, local streams."""
