"""One lab on the swarm: connections to peers, coming back after a sleep."""
