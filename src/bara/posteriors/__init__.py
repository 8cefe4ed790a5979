"""The posterior families: one file each, with its configuration, posterior and registration."""
