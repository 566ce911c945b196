"""FedKNOW (ICDE 2023): signature knowledge, restored and integrated gradients."""
