"""What the commands do: one recording, a folder."""
