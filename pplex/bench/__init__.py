"""How fast models answer on a machine, and what runs there."""
