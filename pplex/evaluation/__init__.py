"""Look at answers and judge them: reports, scores, checks."""
