"""What a run leaves: checkpoints and figures in a folder that is its own, lines of progress, TensorBoard events."""
