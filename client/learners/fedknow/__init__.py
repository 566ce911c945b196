"""FedKNOW (ICDE 2023): a file for each part of the method."""
