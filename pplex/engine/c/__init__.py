"""The engine of plain CPUs: language model and codec as compiled C."""
