"""Stage 6: the folder on disk: model files, manifest, golden batch, hashes, signature."""
