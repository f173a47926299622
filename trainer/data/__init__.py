"""What a student is fed: which views in which order, their tickets, augmentation and mixing, batches made ahead."""
