"""A ticket set -> a trained ViT: only the kept patches, with their own position embeddings, reach the model."""
