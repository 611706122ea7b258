"""The paper's protocol: lists of mixtures, scores and their report."""
