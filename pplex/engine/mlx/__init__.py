"""The engine of MLX's own operations: Macs, and wherever no other is there."""
