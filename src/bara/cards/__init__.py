"""The README.md beside an adapter, and the files it stands with."""
