"""One site's work: a round of training, the scoring of a split, and what both leave behind."""
