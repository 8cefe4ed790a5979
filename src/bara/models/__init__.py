"""Base models: sentence encoders, GGUF files, checkpoints of transformers."""
