"""The same without a Trainer, and the settings that all doors share."""
