"""One recording or one live stream: the run, its outputs, stats and words."""
