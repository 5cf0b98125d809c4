"""From a planned model to an artifact, its trial before training, and the choice of runtime and engine."""
