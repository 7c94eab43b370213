"""The HTTP door of a lab."""
