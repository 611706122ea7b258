"""Model families. One file a family; `base` is what the pipeline knows of any of them."""
