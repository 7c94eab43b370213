"""The real hyperdht inside this process: one node of the DHT under one key."""
