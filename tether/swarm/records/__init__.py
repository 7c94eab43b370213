"""What labs say of themselves in the DHT, and whom one remembers."""
