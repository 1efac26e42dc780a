"""Video file → frames → token ids → store → clip pairs. Knows nothing of the model."""
