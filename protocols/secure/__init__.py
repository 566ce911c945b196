"""Secure aggregation: a server learns the sum of updates alone.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal and Seth, "Practical Secure
Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4, against a server that
follows the protocol and wants to know more. A round has four waves:

1. ``train.secure_keys``: each client makes two X25519 key pairs and sends the public halves;
2. ``train.secure_shares``: each deals shares of two secrets to all, sealed for each receiver;
3. ``train``: each sends its update plus a mask of its own and one for each other client;
4. ``train.secure_unmask``: each gives its shares of the own masks of those who answered, and of
   the keys of those who did not.

A method that solves in closed form sends sums over samples too. They take the same four waves when
a task ends (``train.end_task``), all clients' at once: of two sums whose clients differ by one, the
difference would be that client's.

The primitives are those of the package ``cryptography``.
"""
