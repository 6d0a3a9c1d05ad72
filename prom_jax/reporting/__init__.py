"""From evaluations on disk to the paper's tables."""
