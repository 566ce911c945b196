"""How messages reach clients: in this process, over gRPC or through Flower."""
