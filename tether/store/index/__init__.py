"""The catalog and its tables, in SQLite."""
