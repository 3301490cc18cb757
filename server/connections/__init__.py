"""The server's end of the transport: a listener, a stream for each client, and the grid over them."""
