"""The client's end of the transport: one stream to its server, and the desk with its work."""
