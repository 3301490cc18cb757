"""What server and clients share to speak over gRPC: messages, frames, identities."""
