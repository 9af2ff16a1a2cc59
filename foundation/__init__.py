"""The foundation trainer: a backbone shared by all subjects, its training, evaluation and tracking."""
