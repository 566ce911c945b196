"""A real client: its connection to a server, and the journal of its work."""
