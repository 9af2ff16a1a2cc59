"""The model in pure torch: no data, files, tracking or cluster."""
