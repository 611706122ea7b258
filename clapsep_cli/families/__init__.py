"""Model families: how each one's networks are made, asked and joined to recordings."""
