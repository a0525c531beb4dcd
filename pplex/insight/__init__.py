"""What happened in a run: statistics, transcripts and scores."""
