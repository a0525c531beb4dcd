"""Names to local files, published layouts, weights, voices and text pieces."""
