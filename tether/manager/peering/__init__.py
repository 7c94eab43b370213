"""A lab among labs: what peers may call, what comes from them, and the door of the user's own notebooks."""
