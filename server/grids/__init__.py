"""Ways of messages to clients: this process, gRPC, Flower's own grid."""
