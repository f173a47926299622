"""Looking at ticket sets: figures, differences, pictures, and datalth-shards on top."""
