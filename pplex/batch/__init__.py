"""Many recordings in a folder that tells what was done."""
