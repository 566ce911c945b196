"""The contract between server and clients.

It is typed configuration, typed messages, and their conversion to Flower's.
"""
