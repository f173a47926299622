"""What a run leaves: checkpoints and figures in a folder that is its own, lines on the screen, boards."""
