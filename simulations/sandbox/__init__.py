"""A federation on this machine: a server and real client processes over gRPC, ended and cleaned up as one."""
