"""The contract between server and clients: typed configuration, typed messages, and their
conversion to Flower's."""
