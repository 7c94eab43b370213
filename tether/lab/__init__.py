"""Labs: started, found, asked. `lab.py` has `Lab`, `up` and `connect`."""
