"""The language model: tokens of one frame to tokens of the next."""
