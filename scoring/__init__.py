"""``reward-score``: scores data files in one job, with the model in this process, on a Ray cluster, or by a service."""
