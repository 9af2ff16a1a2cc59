"""The training loop, and the engine that it runs on when no cluster is asked for."""
