"""Models as files: downloaded, converted, checked, loaded."""
