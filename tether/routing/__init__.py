"""Pure: which worker gets a request. Shared by the gateway, which picks, and the orchestrator, which makes the table."""
