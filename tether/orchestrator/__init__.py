"""The control plane: who is there, what they hold, who should hold what."""
