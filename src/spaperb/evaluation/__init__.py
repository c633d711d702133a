"""How predictions are judged: scores, network-free baselines, contexts left out. For any model."""
