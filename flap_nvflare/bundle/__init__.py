"""The MONAI Bundle: the one training workflow, its configs and what wraps them."""
