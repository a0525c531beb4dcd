"""Building blocks shared by the codec and the language model."""
