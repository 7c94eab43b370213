"""Pure: bytes ↔ types, shared by gateway, worker and client."""
