"""Networks: tensors in, tensors out. `base` defines what they have in common."""
