"""The folder on disk: model files, manifest, golden batch, hashes, signature."""
