"""The swarm: a lab is reachable from anywhere by its address, and models travel between peers."""
